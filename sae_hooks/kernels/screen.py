"""What is above a threshold, decided in float32 at the speed of bfloat16 products, for GPUs, which make those ten times
as quickly as exact ones.

The product of the matrices rounded to bfloat16 says which pairs may be above: those that are so by the threshold less
the most by which rounding can have changed the product (Cauchy and Schwarz: no assumption about the data). Only those
are computed anew, from the matrices as they are.
"""

import torch
from torch import Tensor

from .segments import dots, starts_of, triton_for
from .tiles import cast, half_product, wants_gradient

SCREEN_ON = ("cuda",)  # kinds of device
SCREEN_FROM = 128  # tokens: fewer are a matter of reading the weights
ROUNDING = 2.0**-8  # most that rounding to bfloat16 changes a number by, as a share of it
SUMMING = 2.0**-23  # ... that adding a term to a sum in float32 does, even where it is cut off, not rounded


def screens(x: Tensor, rows: Tensor) -> bool:
    """Whether the features (rows) of x are to be found so: of many float32 activations, no gradients wanted."""
    if x.device.type not in SCREEN_ON or len(x) < SCREEN_FROM or x.dtype != torch.float32:
        return False
    return not wants_gradient(x, rows)


def screened(x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, features, values) of x @ rows.T + bias > threshold, by token, then by feature: x (tokens, d), bias and
    threshold (features) float32, rows (features, d) of any dtype."""
    low_x, low_rows = x.bfloat16(), cast(rows, torch.bfloat16)
    coarse = half_product(low_x, low_rows)
    lowest = threshold - bias - 2 * SUMMING * (threshold.abs() + bias.abs())  # to add bias were a pass over coarse
    rounding = 0.0 if rows.dtype == torch.bfloat16 else ROUNDING
    error = (x - low_x).norm(dim=1) + (rounding + SUMMING * x.shape[1]) * low_x.norm(dim=1, dtype=torch.float32)
    slack = error * (1 + rounding), rows.norm(dim=1, dtype=torch.float32)
    if (triton := triton_for(coarse)) is not None:
        tokens, features, _ = triton.Above(coarse, lowest, slack=slack).listed()
    else:
        tokens, features = (coarse > lowest - slack[0][:, None] * slack[1]).nonzero(as_tuple=True)
    values = dots(starts_of(tokens, len(x)), tokens.int(), features.int(), x, rows) + bias[features]
    kept = (values > threshold[features]).nonzero().view(-1)  # once: each selection by marks would wait for the GPU
    return tokens.index_select(0, kept), features.index_select(0, kept), values.index_select(0, kept)
