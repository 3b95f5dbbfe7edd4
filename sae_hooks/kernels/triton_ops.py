"""The sums and products of segments.py, and what is above a threshold, in Triton kernels, without gradients.

Every number has one program that adds its terms in a fixed order (no atomics), so that runs agree bit for bit.
Where TRITON_INTERPRET=1 is set before Triton is imported, the kernels take tensors on the CPU too: tests need no GPU.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from contextlib import AbstractContextManager, nullcontext
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import wide

SCANNED = 1024  # pre-activations that a program of `above` looks at
SUMMED = 512  # columns that a program of `weighted_sums` has; adam_rows' have whole rows
HELD = 64  # 32-bit registers of a thread for what it loads at once: enough loads on their way to fill the memory bus
PAIRS, PAIR_COLUMNS = 16, 128  # entries of a program of `dots`, and the columns it takes at a time
FUSION = {"enable_fp_fusion": True}  # said, because Triton's default changes and 3.9 warns of it


def above(
    pre: Tensor, threshold: Tensor, slack: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, values) of the entries of pre (n, f) with pre > threshold (f), by row, then by column: int64,
    int64, pre's dtype. With slack, a pair of vectors (n) and (f), thresholds are less their product, in one rounding.

    nan is above nothing. Waits for the GPU once, to learn how many there are.
    """
    n, f = pre.shape
    pre, threshold = _even(pre), threshold.contiguous()
    by_row, by_column = (None, None) if slack is None else (s.to(pre.dtype).contiguous() for s in slack)
    if n == 0 or f == 0:
        none = torch.zeros(0, dtype=torch.int64, device=pre.device)
        return none, none, pre.new_zeros(0)
    block = min(triton.next_power_of_2(f), SCANNED)
    grid = (n, triton.cdiv(f, block))
    counts = torch.zeros(grid[0] * grid[1] + 1, dtype=torch.int64, device=pre.device)
    with _on(pre):
        args = (pre, threshold, by_row, by_column, f, pre.stride(0))
        _count_above[grid](*args, counts, BLOCK=block, num_warps=_warps(block), **FUSION)
        places = counts.cumsum(0)
        total = int(places[-1])
        rows, columns = (torch.empty(total, dtype=torch.int64, device=pre.device) for _ in range(2))
        values = pre.new_empty(total)
        if total:
            _write_above[grid](*args, places, rows, columns, values, BLOCK=block, num_warps=_warps(block), **FUSION)
    return rows, columns, values


def weighted_sums(starts: Tensor, ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Row i (n, d): the sum of weights[j] * table[ids[j]] over segment i, starts[i]:starts[i + 1]. starts (n + 1), ids
    (entries) int32 or int64; weights (entries), table (m, d) of any dtype; float32 or float64, as `wide` has it."""
    n, d = len(starts) - 1, table.shape[1]
    out = torch.empty(n, d, dtype=wide(weights, table), device=table.device)
    if out.numel():
        table = _even(table)
        sizes = _sizes(d, SUMMED, out.dtype)
        with _on(table):
            _weighted_sums[(n, triton.cdiv(d, sizes["BLOCK"]))](
                starts.contiguous(), ids.contiguous(), weights.contiguous(), table, out, d, table.stride(0), **sizes,
                **FUSION)
    return out


def dots(starts: Tensor, rows: Tensor, ids: Tensor, by_row: Tensor, by_id: Tensor) -> Tensor:
    """by_row[rows[j]] . by_id[ids[j]] of every entry j (entries). rows, ids (entries) int32 or int64; by_row (n, d),
    by_id (m, d) of any dtype; float32 or float64, as `wide` has it. `starts` is not read, nor need rows ascend."""
    count, d = len(ids), by_id.shape[1]
    out = torch.zeros(count, dtype=wide(by_row, by_id), device=by_id.device)
    if count and d:
        by_row, by_id = _even(by_row), _even(by_id)
        block = min(triton.next_power_of_2(d), PAIR_COLUMNS)
        with _on(by_id):
            _dots[(triton.cdiv(count, PAIRS),)](
                rows.contiguous(), ids.contiguous(), by_row, by_id, out, count, d, by_row.stride(0), by_id.stride(0),
                K=PAIRS, BLOCK=block, num_warps=4, **FUSION)
    return out


def adam_rows(
    weight: Tensor,
    square: Tensor,
    last: Tensor,
    features: Tensor,
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
    """A step of Adam without momentum for rows `features` (each once) of weight, in place: see segments.adam_rows.

    weight, square (m, d), float32 or float64, contiguous; last (m); starts (m + 1), ids and weights (entries), table
    (rows, d) of any dtype. The gradient, summed in weight's dtype, is never written to memory.
    """
    if weight.dtype not in (torch.float32, torch.float64) or square.dtype != weight.dtype:
        raise ValueError(f"weight and square must be both float32 or both float64: {weight.dtype}, {square.dtype}")
    if not (weight.is_contiguous() and square.is_contiguous() and last.is_contiguous()):
        raise ValueError("weight, square and last are changed in place: they must be contiguous")
    d = weight.shape[1]
    if len(features) == 0 or d == 0:
        return
    features, starts, table = features.long(), starts.contiguous(), _even(table)
    lengths = starts[features + 1] - starts[features]
    features = features[lengths.argsort(descending=True, stable=True)]  # the longest first, lest they be waited for
    # In a tensor, since Triton's kernels take Python's floats as float32.
    scalars = torch.tensor([rate, eps, 1 - beta2, log2(beta2) if beta2 else -torch.inf, (1 - beta2**step) ** -0.5],
                           dtype=weight.dtype).to(weight.device, non_blocking=True)
    with _on(weight):
        _adam_rows[(len(features),)](
            weight, square, last, features, starts, ids.contiguous(), weights.contiguous(), table, scalars, step, d,
            table.stride(0), UNIT=unit, **_sizes(d, d, weight.dtype), **FUSION)


def _even(matrix: Tensor) -> Tensor:
    """The matrix with the numbers of a row next to one another."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _warps(block: int) -> int:
    """As many as read a row in whole vectors of 16 bytes, so that each column's terms meet in one thread."""
    return min(max(block // 256, 1), 16)


def _sizes(d: int, most: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns of a program that sums segments, entries that it takes at a time, and warps."""
    block = triton.next_power_of_2(min(d, most))
    warps = _warps(block)
    held = HELD * 4 // dtype.itemsize * 32 * warps
    return {"BLOCK": block, "K": min(max(held // block, 1), 16), "num_warps": warps}


@triton.jit
def _marked(pre, threshold, by_row, by_column, row, columns, within, stride):
    """Values of a part of a row, and which are above: both kernels must agree, hence fma, which rounds in one way."""
    values = tl.load(pre + row * stride + columns, mask=within, other=0.0)
    limit = tl.load(threshold + columns, mask=within, other=0.0)
    if by_row is not None:
        limit = tl.fma(-tl.load(by_row + row), tl.load(by_column + columns, mask=within, other=0.0), limit)
    return values, (values > limit) & within


@triton.jit
def _count_above(pre, threshold, by_row, by_column, f, stride, counts, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    _, marks = _marked(pre, threshold, by_row, by_column, row, columns, columns < f, stride)
    tl.store(counts + row * tl.num_programs(1) + part + 1, tl.sum(marks.to(tl.int32), 0))


@triton.jit
def _write_above(
    pre, threshold, by_row, by_column, f, stride, places, out_rows, out_columns, out_values, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    place = places + row * tl.num_programs(1) + part
    start, stop = tl.load(place), tl.load(place + 1)
    within = columns < tl.where(stop > start, f, 0)  # where none is above, nothing is read
    values, marks = _marked(pre, threshold, by_row, by_column, row, columns, within, stride)
    at = start + tl.cumsum(marks.to(tl.int32), 0) - 1
    tl.store(out_rows + at, tl.zeros((BLOCK,), tl.int64) + row, mask=marks)
    tl.store(out_columns + at, columns.to(tl.int64), mask=marks)
    tl.store(out_values + at, values, mask=marks)


@triton.jit
def _segment(
    start, stop, ids, weights, table, stride, columns, within, DTYPE: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr
):
    """The weighted sum over entries start:stop of these columns of the table, K entries at a time."""
    total = tl.zeros((BLOCK,), DTYPE)
    for begin in range(start, stop, K):
        entries = begin + tl.arange(0, K)
        inside = entries < stop
        rows = tl.load(ids + entries, mask=inside, other=0).to(tl.int64)
        factors = tl.load(weights + entries, mask=inside, other=0.0).to(DTYPE)
        values = tl.load(table + rows[:, None] * stride + columns[None, :], mask=inside[:, None] & within[None, :],
                         other=0.0).to(DTYPE)
        total += tl.sum(factors[:, None] * values, 0)
    return total


@triton.jit
def _weighted_sums(starts, ids, weights, table, out, d, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    total = _segment(tl.load(starts + row), tl.load(starts + row + 1), ids, weights, table, stride, columns, within,
                     out.dtype.element_ty, K, BLOCK)
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
    weight, square, last, features, starts, ids, weights, table, scalars, step, d, stride, UNIT: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = weight.dtype.element_ty
    rate, eps, new, log2_beta2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    correction = tl.load(scalars + 4)
    row = tl.load(features + tl.program_id(0))
    columns = tl.arange(0, BLOCK)
    within = columns < d
    grad = _segment(tl.load(starts + row), tl.load(starts + row + 1), ids, weights, table, stride, columns, within,
                    DTYPE, K, BLOCK)
    w = tl.load(weight + row * d + columns, mask=within, other=0.0)
    if UNIT:
        grad -= tl.sum(grad * w, 0) * w
    decay = tl.exp2(log2_beta2 * (step - tl.load(last + row)).to(DTYPE))
    v = tl.load(square + row * d + columns, mask=within, other=0.0) * decay + new * grad * grad
    w = tl.where(within, w - rate * grad / (tl.sqrt(v) * correction + eps), 0.0)
    if UNIT:
        w = w / tl.sqrt(tl.sum(w * w, 0))
    tl.store(weight + row * d + columns, w, mask=within)
    tl.store(square + row * d + columns, v, mask=within)
    tl.store(last + row, step)
