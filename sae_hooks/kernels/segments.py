"""Sums and products over segments: what an SAE does with the few pairs (row, id) that matter.

A segment is what belongs to one row: segment i holds the entries starts[i]:starts[i + 1], starts (n + 1) ascending from
0 to the number of entries. With ids of features, rows are tokens (CSR); with ids of tokens, rows are features. starts
and ids are of one integer type. On CUDA devices that have Triton its kernels do it, else PyTorch's operations; both
sum in float32, or in float64 where all are, in the same order every time.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .tiles import CPU_WIDENED, GPU_WIDENED, cast, slices, wide
from .tracing import wants_gradient

TRITON_ON = ("cuda",)  # kinds of device
FEWEST_COLUMNS = 16  # of rows of half precision that are widened at once
MOST_KEPT = 0.9  # share of entries from which leaving out the others is not worth it


def triton_for(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, of the functions' names below, and `above`: where they run on the tensors' device, and no
    gradient is asked for, which they don't give."""
    return _triton() if tensors[0].device.type in TRITON_ON and not wants_gradient(*tensors) else None


@cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_ops  # Triton takes a third of a second to import

    return triton_ops


def starts_of(ids: Tensor, n: int) -> Tensor:
    """Where the segments of n rows start (n + 1), int32, given the ascending rows `ids` of all entries."""
    if ids.device.type == "cpu":
        starts = torch.zeros(n + 1, dtype=torch.int32, device=ids.device)
        starts[1:] = torch.bincount(ids, minlength=n).cumsum(0)
        return starts
    rows = torch.arange(n + 1, dtype=ids.dtype, device=ids.device)
    return torch.searchsorted(ids, rows, out_int32=True)  # bincount would wait for the GPU


def stable_order(ids: Tensor, n: int) -> Tensor:
    """The order (entries), int64, that sorts ids, all below n, and leaves equal ones as they are."""
    if ids.device.type == "cpu" and n <= 2**16:  # numpy sorts such numbers by their bytes, in a tenth of the time
        return torch.from_numpy(np.argsort(ids.numpy().astype(np.uint16), kind="stable"))
    return torch.sort(ids, stable=True).indices


def longest_first(starts: Tensor) -> tuple[Tensor, Tensor]:
    """(lengths, rows) of the segments, the longest first, lest they be waited for at the end."""
    lengths, rows = torch.sort(starts.diff(), descending=True, stable=True)
    return lengths, rows


def weighted_sums(
    starts: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    to_all: Tensor | None = None,
    to_each: Tensor | None = None,
) -> Tensor:
    """Row i (n, d): the sum of weights[j] * table[ids[j]] over segment i, plus to_all (d) and to_each (n, 1), which are
    of the result's dtype. weights (entries), table (m, d) of any dtype; the result is float32 or float64, as `wide` has
    it."""
    if (triton := triton_for(table, weights)) is not None:
        summed: Tensor = triton.weighted_sums(starts, ids, weights, table, to_all, to_each)
        return summed
    out = _summed(starts, ids, weights, table)
    for added in (to_all, to_each):
        if added is not None:
            out.add_(added)
    return out


def _summed(starts: Tensor, ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """weighted_sums in PyTorch's operations, with nothing added."""
    dtype = wide(weights, table)
    weights = cast(weights, dtype)
    if table.device.type == "cpu" and not wants_gradient(weights, table):
        starts, ids, weights = _without_zeros(starts, ids, weights.detach())
        table = table.detach()  # beside a tensor that wants gradients PyTorch prepares for a backward pass
    if len(ids) == 0:
        return torch.zeros(len(starts) - 1, table.shape[1], dtype=dtype, device=table.device)
    ids, parts = _widened(ids, table, dtype)
    sums = [F.embedding_bag(ids, part, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
            for _, part in parts]
    return sums[0] if len(sums) == 1 else torch.cat(sums, 1)


def _widened(ids: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
    """(ids (entries), (columns, table[:, columns] in dtype)) of a table (m, d): where it has another dtype, of the rows
    alone that are taken, which the new ids number, and of so many columns at a time that they stay in the cache."""
    if table.dtype == dtype:
        return ids, iter([(slice(None), table)])
    used, numbers = torch.unique(ids, return_inverse=True)
    most = max((CPU_WIDENED if table.is_cpu else GPU_WIDENED) // max(len(used), 1), FEWEST_COLUMNS)
    parts = ((c, table[:, c].index_select(0, used).to(dtype)) for c in slices(table.shape[1], most))
    return numbers.to(ids.dtype), parts


def _without_zeros(starts: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same segments without entries of weight 0, where these are many: in training, pairs next to the threshold."""
    kept = weights.numpy() != 0  # numpy lists marks in a tenth of the time that it takes for numbers
    if np.count_nonzero(kept) > MOST_KEPT * len(weights):
        return starts, ids, weights
    at = torch.from_numpy(np.flatnonzero(kept))
    kept_starts = torch.searchsorted(at, starts.long()).to(starts.dtype)
    return kept_starts, ids.index_select(0, at), weights.index_select(0, at)


def dots(starts: Tensor, rows: Tensor, ids: Tensor, by_row: Tensor, by_id: Tensor) -> Tensor:
    """by_row[rows[j]] . by_id[ids[j]] of every entry j, whose rows ascend and are those of `starts`; no id twice in a
    row. by_row (n, d) and by_id (m, d) are of any dtype; the result is float32 or float64, as `wide` has it."""
    if (triton := triton_for(by_id, by_row)) is not None:
        found: Tensor = triton.dots(starts, rows, ids, by_row, by_id)
        return found
    dtype = wide(by_row, by_id)
    by_row = cast(by_row, dtype)
    products = torch.zeros(len(ids), dtype=dtype, device=ids.device)
    ids, parts = _widened(ids, by_id, dtype)
    for c, part in parts:
        with warnings.catch_warnings():  # PyTorch calls CSR tensors a beta feature, and unchecked, each once a process
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
            size = len(by_row), len(part)
            pattern = torch.sparse_csr_tensor(starts, ids, products, size, device=ids.device, check_invariants=False)
        products = torch.sparse.sampled_addmm(pattern, by_row[:, c].contiguous(), part.t()).values()
    return products


def remove_along(grad: Tensor, rows: Tensor) -> None:
    """Take from each row of grad (n, d), in place, its part along the same of rows (n, d), which have norm 1 (Gemma
    Scope 1, 3.2)."""
    grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)


def adam_rows(
    weight: Tensor,
    square: Tensor,
    last: Tensor,
    order: tuple[Tensor, Tensor],
    starts: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    *,
    step: int,
    rate: float,
    beta2: float,
    eps: float,
    unit: bool,
) -> None:
    """A step of Adam without momentum (beta1 = 0), in place, for the rows that have a gradient: the exact one, since a
    row without leaves no trace but the decay of its second moment, which is made up for when it next has one.

    weight, square (m, d): the weights and the second moment of each as it was at step last[row] (m, int32, 0 at first).
    The gradient of row i is the weighted sum over segment i of (starts (m + 1), ids, weights, table); rows without
    entries do not move. order: `longest_first` of starts. step: this one's number, from 1. rate, beta2, eps: Adam's.
    unit: rows are of norm 1; the gradient's part along the row is taken off, and the row brought back to norm 1.
    """
    if (triton := triton_for(weight)) is not None:
        triton.adam_rows(weight, square, last, order, starts, ids, weights, table, step=step, rate=rate, beta2=beta2,
                         eps=eps, unit=unit)
        return
    lengths, features = order
    features = features[lengths > 0]
    grad, w = weighted_sums(starts, ids, weights, table)[features], weight[features]
    if unit:
        remove_along(grad, w)
    decay = torch.pow(torch.tensor(beta2, dtype=w.dtype, device=w.device), step - last[features])[:, None]
    v = square[features] * decay + (1 - beta2) * grad.square()
    w = w - rate * grad / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
    weight[features] = w / w.norm(dim=1, keepdim=True) if unit else w
    square[features] = v
    last[features] = step
