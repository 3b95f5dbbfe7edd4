"""The sums and products of segments.py in Triton kernels, without gradients.

Every number has one program that adds its terms in a fixed order (no atomics), so that runs agree bit for bit.
Where TRITON_INTERPRET=1 is set before Triton is imported, the kernels take tensors on the CPU too: tests need no GPU.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import wide

SUMMED = 512  # columns that a program of `weighted_sums` has; adam_rows' have whole rows
LONG, LONGER = 512, 2  # entries, and times the average number, above which a segment has its own programs ...
ROWS = 128  # ... and segments in which one looks for such
APART, APART_COLUMNS = 128, 128  # sums side by side in such a program, and its columns
HELD, ROW_HELD = 128, 32  # 32-bit registers of a thread for what a program of the one, and of the other, loads at once
PAIRS, PAIR_COLUMNS = 16, 128  # entries of a program of `dots`, and the columns it takes at a time
FUSION = {"enable_fp_fusion": True}  # said, because Triton's default changes and 3.9 warns of it


def weighted_sums(
    starts: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    to_all: Tensor | None = None,
    to_each: Tensor | None = None,
) -> Tensor:
    """Row i (n, d): the sum of weights[j] * table[ids[j]] over segment i, starts[i]:starts[i + 1], plus to_all (d) and
    to_each (n, 1). starts (n + 1), ids (entries) int32 or int64; weights (entries), table (m, d) of any dtype; float32
    or float64, as `wide` has it."""
    n, d = len(starts) - 1, table.shape[1]
    out = torch.empty(n, d, dtype=wide(weights, table), device=table.device)
    if out.numel():
        table = even(table)
        to_all, to_each = (None if t is None else t.contiguous() for t in (to_all, to_each))
        long = max(LONG, LONGER * len(ids) // max(n, LONGER * ROWS))
        args = (starts.contiguous(), ids.contiguous(), weights.contiguous(), table, to_all, to_each, out, n, d,
                table.stride(0), long)
        with on(table):
            sizes = _sizes(d, SUMMED, out.dtype)
            _weighted_sums[(n, cdiv(d, sizes["BLOCK"]))](*args, **sizes, **FUSION)
            if len(ids) > long:
                sizes = sizes_apart(d, APART, out.dtype)
                _long_sums[(cdiv(n, ROWS), cdiv(d, sizes["BLOCK"]))](*args, ROWS=ROWS, **sizes, **FUSION)
    return out


def dots(starts: Tensor, rows: Tensor, ids: Tensor, by_row: Tensor, by_id: Tensor) -> Tensor:
    """by_row[rows[j]] . by_id[ids[j]] of every entry j (entries). rows, ids (entries) int32 or int64; by_row (n, d),
    by_id (m, d) of any dtype; float32 or float64, as `wide` has it. `starts` is not read, nor need rows ascend."""
    count, d = len(ids), by_id.shape[1]
    out = torch.zeros(count, dtype=wide(by_row, by_id), device=by_id.device)
    if count and d:
        by_row, by_id = even(by_row), even(by_id)
        block = min(power_of_2(d), PAIR_COLUMNS)
        with on(by_id):
            _dots[(cdiv(count, PAIRS),)](
                rows.contiguous(), ids.contiguous(), by_row, by_id, out, count, d, by_row.stride(0), by_id.stride(0),
                K=PAIRS, BLOCK=block, num_warps=4, **FUSION)
    return out


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
    """A step of Adam without momentum for the rows of weight with entries, in place: see segments.adam_rows.

    weight, square (m, d), float32 or float64, contiguous; last (m); starts (m + 1), ids and weights (entries), table
    (rows, d) of any dtype. The gradient, summed in weight's dtype, is never written to memory.
    """
    if weight.dtype not in (torch.float32, torch.float64) or square.dtype != weight.dtype:
        raise ValueError(f"weight and square must be both float32 or both float64: {weight.dtype}, {square.dtype}")
    if not (weight.is_contiguous() and square.is_contiguous() and last.is_contiguous()):
        raise ValueError("weight, square and last are changed in place: they must be contiguous")
    d = weight.shape[1]
    if len(ids) == 0 or d == 0:
        return
    lengths, features = order
    programs = min(len(ids), len(features))  # nobody waits for the GPU to tell how many have entries: no more than so
    starts, table = starts.contiguous(), even(table)
    # In a tensor, since Triton's kernels take Python's floats as float32.
    scalars = torch.tensor([rate, eps, 1 - beta2, log2(beta2) if beta2 else -torch.inf, (1 - beta2**step) ** -0.5],
                           dtype=weight.dtype).to(weight.device, non_blocking=True)
    with on(weight):
        _adam_rows[(programs,)](
            weight, square, last, lengths.contiguous(), features.contiguous(), starts, ids.contiguous(),
            weights.contiguous(), table, scalars, step, d, table.stride(0), UNIT=unit,
            **_sizes(d, d, weight.dtype, ROW_HELD), **FUSION)


def even(matrix: Tensor) -> Tensor:
    """The matrix with the numbers of a row next to one another."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def power_of_2(n: int) -> int:
    """The next one from n on. As triton.next_power_of_2 and, below, triton.cdiv, but without what is wrapped around
    those, which a short call feels."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """How many parts of a size n has."""
    return -(-n // size)


def warps(block: int, each: int = 256) -> int:
    """As many as give each thread `each` / 32 columns, whole vectors of 16 bytes."""
    return min(max(block // each, 1), 16)


@cache
def _sizes(d: int, most: int, dtype: torch.dtype, held: int = HELD) -> dict[str, int]:
    """Columns of a program that sums segments, entries that it takes at a time, and warps."""
    block = power_of_2(min(d, most))
    most_warps = warps(block, 512)
    entries = held * 4 // dtype.itemsize * 32 * most_warps // block
    return {"BLOCK": block, "K": min(max(entries, 1), 16), "num_warps": most_warps}


def sizes_apart(d: int, sums: int, dtype: torch.dtype) -> dict[str, int]:
    """The same of a program that has several sums side by side."""
    block = power_of_2(min(d, APART_COLUMNS))
    return {"BLOCK": block, "K": sums * 4 // dtype.itemsize, "num_warps": max(sums // 16, 1)}


@triton.jit
def segment(total, start, stop, ids, weights, table, stride, columns, within, K: tl.constexpr):
    """total plus the weighted sum over entries start:stop of these columns of the table, K entries at a time: while the
    rows of some are on their way, so are the numbers of the next. total (K, BLOCK), in place of (BLOCK): K sums, each
    of every K-th entry, to be added up at the end."""
    first = start + tl.arange(0, K)
    rows = tl.load(ids + first, mask=first < stop, other=0).to(tl.int64)
    factors = tl.load(weights + first, mask=first < stop, other=0.0).to(total.dtype)
    for begin in range(start, stop, K):
        inside = begin + tl.arange(0, K) < stop
        values = tl.load(table + rows[:, None] * stride + columns[None, :], mask=inside[:, None] & within[None, :],
                         other=0.0).to(total.dtype)
        entries = begin + K + tl.arange(0, K)
        rows = tl.load(ids + entries, mask=entries < stop, other=0).to(tl.int64)
        terms = factors[:, None] * values
        if len(total.shape) == 1:
            total += tl.sum(terms, 0)
        else:
            total += terms
        factors = tl.load(weights + entries, mask=entries < stop, other=0.0).to(total.dtype)
    return total


@triton.jit(do_not_specialize=["n", "long"])
def _weighted_sums(
    starts, ids, weights, table, to_all, to_each, out, n, d, stride, long, K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    if stop - start > long:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    total = segment(total, start, stop, ids, weights, table, stride, columns, within, K)
    _store_sum(total, to_all, to_each, out, row, d, columns, within)


@triton.jit(do_not_specialize=["n", "long"])
def _long_sums(
    starts, ids, weights, table, to_all, to_each, out, n, d, stride, long, ROWS: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr
):
    """Of ROWS segments, which lie far from each other, those that are long."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    looked = first + tl.arange(0, ROWS) * step
    starting = tl.load(starts + looked, mask=looked < n, other=0)
    if tl.max(tl.load(starts + looked + 1, mask=looked < n, other=0) - starting, 0) <= long:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    for row in range(first, n, step):
        start, stop = tl.load(starts + row), tl.load(starts + row + 1)
        if stop - start > long:
            total = tl.zeros((K, BLOCK), out.dtype.element_ty)
            total = segment(total, start, stop, ids, weights, table, stride, columns, within, K)
            _store_sum(tl.sum(total, 0), to_all, to_each, out, row, d, columns, within)


@triton.jit
def _store_sum(total, to_all, to_each, out, row, d, columns, within):
    if to_all is not None:
        total += tl.load(to_all + columns, mask=within, other=0.0)
    if to_each is not None:
        total += tl.load(to_each + row)
    tl.store(out + row * d + columns, total, mask=within)


@triton.jit(do_not_specialize=["count"])
def _dots(
    rows, ids, by_row, by_id, out, count, d, row_stride, id_stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = out.dtype.element_ty
    entries = tl.program_id(0).to(tl.int64) * K + tl.arange(0, K)
    inside = entries < count
    left = by_row + tl.load(rows + entries, mask=inside, other=0).to(tl.int64)[:, None] * row_stride
    right = by_id + tl.load(ids + entries, mask=inside, other=0).to(tl.int64)[:, None] * id_stride
    total = tl.zeros((K, BLOCK), DTYPE)
    for begin in range(0, d, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = inside[:, None] & (columns < d)[None, :]
        total += (tl.load(left + columns[None, :], mask=mask, other=0.0).to(DTYPE)
                  * tl.load(right + columns[None, :], mask=mask, other=0.0).to(DTYPE))
    tl.store(out + entries, tl.sum(total, 1), mask=inside)


@triton.jit(do_not_specialize=["step"])
def _adam_rows(
    weight, square, last, lengths, features, starts, ids, weights, table, scalars, step, d, stride,
    UNIT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = weight.dtype.element_ty
    length = tl.load(lengths + tl.program_id(0))
    if length == 0:
        return
    row = tl.load(features + tl.program_id(0))
    start = tl.load(starts + row)
    columns = tl.arange(0, BLOCK)
    within = columns < d
    w = tl.load(weight + row * d + columns, mask=within, other=0.0)
    v = tl.load(square + row * d + columns, mask=within, other=0.0)
    rate, eps, new, log2_beta2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    correction = tl.load(scalars + 4)
    decay = tl.exp2(log2_beta2 * (step - tl.load(last + row)).to(DTYPE))
    grad = tl.zeros((BLOCK,), DTYPE)
    grad = segment(grad, start, start + length, ids, weights, table, stride, columns, within, K)
    if UNIT:
        grad -= tl.sum(grad * w, 0) * w
    v = v * decay + new * grad * grad
    w = tl.where(within, w - rate * grad / (tl.sqrt(v) * correction + eps), 0.0)
    if UNIT:
        w = w / tl.sqrt(tl.sum(w * w, 0))
    tl.store(weight + row * d + columns, w, mask=within)
    tl.store(square + row * d + columns, v, mask=within)
    tl.store(last + row, step)
