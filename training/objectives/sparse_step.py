"""JumpReLU's forward and backward over the few (token, feature) pairs that matter.

Those are the pairs whose pre-activation exceeds threshold - bandwidth / 2: no other has value or gradient.

The pairs are kept in CSR form: `rows_start` (batch + 1), `features` and `pre` in row order; sorted by
feature for the weights' gradients, so that each row of a gradient is written once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # tokens: the (CHUNK, d_sae) pre-activations stay in the cache's reach


@dataclass(frozen=True)
class Pairs:
    """Pairs (row, feature) in row order with their pre-activation; rows_start (batch + 1) delimits the
    rows.
    """
    rows_start: Tensor
    rows: Tensor
    features: Tensor
    pre: Tensor


def find_pairs(x: Tensor, enc: Tensor, b_enc: Tensor, floor: Tensor) -> Pairs:
    """The pairs with x (batch, d_in) @ enc.T + b_enc > floor, for feature-major enc (d_sae, d_in). The bias
    goes to the floor's side, less some slack for rounding, and the survivors are judged exactly.
    """
    loose = floor - b_enc - 4 * torch.finfo(x.dtype).eps * (floor.abs() + b_enc.abs())
    found = [_find_in_chunk(part, enc, b_enc, floor, loose.numpy()) for part in torch.split(x, CHUNK)]
    rows, features, pre = (torch.cat(parts) for parts in zip(*found, strict=True))
    rows += torch.repeat_interleave(
        torch.arange(len(found), dtype=torch.int32) * CHUNK, torch.tensor([len(r) for r, _, _ in found]))
    return Pairs(_starts(rows, len(x)), rows, features, pre)


def _find_in_chunk(x: Tensor, enc: Tensor, b_enc: Tensor, floor: Tensor,
                   loose: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    product = x @ enc.t()
    # numpy: torch.nonzero on a mask of this size takes several times longer.
    at = torch.from_numpy(np.flatnonzero(product.numpy() > loose))
    rows = torch.div(at, len(enc), rounding_mode="floor")
    features = at - rows * len(enc)
    pre = product.view(-1).take(at) + b_enc[features]
    keep = pre > floor[features]
    return rows[keep].int(), features[keep].int(), pre[keep]


def _starts(sorted_ids: Tensor, n: int) -> Tensor:
    starts = torch.zeros(n + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(sorted_ids, minlength=n).cumsum(0)
    return starts


def weighted_sums(starts: Tensor, ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Row i: sum of weights[j] * table[ids[j]] for j in starts[i]:starts[i + 1]."""
    return F.embedding_bag(ids, table, starts, mode="sum", per_sample_weights=weights,
                           include_last_offset=True)


def dots(pairs: Pairs, grad: Tensor, dec: Tensor) -> Tensor:
    """grad[row] . dec[feature] for every pair."""
    with warnings.catch_warnings():  # PyTorch calls CSR tensors a beta feature, once a process
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        pattern = torch.sparse_csr_tensor(pairs.rows_start, pairs.features, torch.zeros_like(pairs.pre),
                                          size=(len(grad), len(dec)), check_invariants=False)
    out: Tensor = torch.sparse.sampled_addmm(pattern, grad, dec.t(), beta=0.0).values()
    return out


class SparseStep(torch.autograd.Function):
    """(x, W_enc, b_enc, W_dec, b_dec, threshold, bandwidth) -> (reconstruction, l0), scalars. x gets no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
                threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        pairs = find_pairs(x, W_enc.t().contiguous(), b_enc, threshold - bandwidth / 2)
        active = pairs.pre > threshold[pairs.features]
        residual = weighted_sums(pairs.rows_start, pairs.features, pairs.pre * active, W_dec) + b_dec - x
        ctx.save_for_backward(x, W_dec, threshold, residual)
        ctx.pairs, ctx.bandwidth = pairs, bandwidth
        return residual.square().sum() / len(x), active.sum().to(x.dtype) / len(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_l0: Tensor) -> tuple[Tensor | None, ...]:
        x, W_dec, threshold, residual = ctx.saved_tensors
        pairs, bandwidth = ctx.pairs, ctx.bandwidth
        to_x_hat = residual * (2 / len(x) * grad)
        to_acts = dots(pairs, to_x_hat, W_dec)
        at = threshold[pairs.features]
        acts, to_pre = (v * (pairs.pre > at) for v in (pairs.pre, to_acts))
        kernel = (pairs.pre - at).abs() < bandwidth / 2
        to_threshold = -(at * to_acts + grad_l0 / len(x)) / bandwidth * kernel
        order = torch.sort(pairs.features, stable=True).indices
        rows, starts = pairs.rows[order], _starts(pairs.features, len(W_dec))
        dec = weighted_sums(starts, rows, acts[order], to_x_hat)
        enc = weighted_sums(starts, rows, to_pre[order], x)
        return (None, enc.t(), _per_feature(pairs, to_pre, threshold), dec, to_x_hat.sum(0),
                _per_feature(pairs, to_threshold, threshold), None)


def _per_feature(pairs: Pairs, values: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add_(0, pairs.features, values)
