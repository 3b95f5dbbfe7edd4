"""What is above a threshold, decided in float32 at the speed of bfloat16 products, for GPUs, which make those ten times
as quickly as exact ones.

The product of the matrices rounded to bfloat16 says which pairs may be above: those that are so by the threshold less
the most by which rounding can have changed the product (Cauchy and Schwarz: no assumption about the data). Only those
are computed anew, from the matrices as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .segments import dots, starts_of, triton_for
from .tiles import cast, half_product
from .tracing import wants_gradient
from .triplets import Triplets

SCREEN_ON = ("cuda",)  # kinds of device
SCREEN_FROM = 128  # tokens: fewer are a matter of reading the weights
ROUNDING = 2.0**-8  # most that rounding to bfloat16 changes a number by, as a share of it
SUMMING = 2.0**-23  # ... that adding a term to a sum in float32 does, even where it is cut off, not rounded


def screens(x: Tensor, rows: Tensor) -> bool:
    """Whether the features (rows) of x are to be found so: of many float32 activations, no gradients wanted."""
    if x.device.type not in SCREEN_ON or len(x) < SCREEN_FROM or x.dtype != torch.float32:
        return False
    return not wants_gradient(x, rows)


class Candidates:
    """All that is above in x @ rows.T + bias > threshold, and the few more that might have been: x (tokens, d), bias
    and threshold (features) float32, rows (features, d) of any dtype. ahead: a GPU is given more to do before one asks.
    """

    def __init__(self, x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, ahead: bool = False) -> None:
        self.x, self.rows, self.bias = x, rows, bias
        low_x, low_rows = x.bfloat16(), cast(rows, torch.bfloat16)
        coarse = half_product(low_x, low_rows)
        lowest = threshold - bias - 2 * SUMMING * (threshold.abs() + bias.abs())  # to add bias were a pass over coarse
        rounding = 0.0 if rows.dtype == torch.bfloat16 else ROUNDING
        error = (x - low_x).norm(dim=1) + (rounding + SUMMING * x.shape[1]) * low_x.norm(dim=1, dtype=torch.float32)
        slack = error * (1 + rounding), rows.norm(dim=1, dtype=torch.float32)
        self._found: Any = None
        if (triton := triton_for(coarse)) is not None:
            self._found = triton.Above(coarse, lowest, slack=slack, ahead=ahead)
        else:
            self._marks = coarse > lowest - slack[0][:, None] * slack[1]

    def total(self) -> int:
        """How many they are."""
        return int(self._marks.count_nonzero() if self._found is None else self._found.total())

    def exact(self) -> Triplets:
        """(tokens, features, values), by token, then by feature."""
        if self._found is None:
            tokens, features = self._marks.nonzero(as_tuple=True)
        else:
            tokens, features, _ = self._found.listed()
        starts = starts_of(tokens, len(self.x))
        values = dots(starts, tokens.int(), features.int(), self.x, self.rows)
        return tokens, features, values + self.bias.index_select(0, features)


def screened(
    x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, ahead: bool = False
) -> Callable[[], Triplets]:
    """What gives the candidates."""
    return Candidates(x, rows, bias, threshold, ahead).exact


def decided(found: Triplets, threshold: Tensor) -> Triplets:
    """Those of the candidates that are above threshold (features)."""
    tokens, features, values = found
    kept = (values > threshold.index_select(0, features)).nonzero().view(-1)  # a selection by marks waits each time
    return tokens.index_select(0, kept), features.index_select(0, kept), values.index_select(0, kept)
