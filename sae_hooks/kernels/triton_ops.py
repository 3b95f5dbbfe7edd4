"""The sums and products of segments.py, and what is above a threshold, in Triton kernels, without gradients.

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

SCANNED = 1024  # pre-activations that a program of `Above` looks at
COLLECTED, PART = 4096, 16384  # ... that one of `reconstruct_few` looks at at a time, and in all
SUMMED = 512  # columns that a program of `weighted_sums` has; adam_rows' have whole rows
HELD, ROW_HELD = 128, 32  # 32-bit registers of a thread for what a program of the one, and of the other, loads at once
PAIRS, PAIR_COLUMNS = 16, 128  # entries of a program of `dots`, and the columns it takes at a time
FUSION = {"enable_fp_fusion": True}  # said, because Triton's default changes and 3.9 warns of it


class Above:
    """The entries of pre (n, f), plus bias (f), that exceed threshold (f). With slack, a pair of vectors (n) and (f),
    thresholds are less their product, in one rounding. nan is above nothing.

    They are counted at once, but nobody waits for the GPU before asking for `total` or `listed`; with `ahead` then
    only for that, not for what it was given to do since.
    """

    def __init__(self, pre: Tensor, threshold: Tensor, bias: Tensor | None = None,
                 slack: tuple[Tensor, Tensor] | None = None, ahead: bool = False) -> None:
        n, f = pre.shape
        self.pre, bias = _even(pre), None if bias is None else bias.contiguous()
        by_row, by_column = (None, None) if slack is None else (s.to(pre.dtype).contiguous() for s in slack)
        self.args = self.pre, bias, threshold.contiguous(), by_row, by_column, f, self.pre.stride(0)
        self.block = min(_power_of_2(max(f, 1)), SCANNED)
        self.grid = n, _cdiv(f, self.block)
        counts = torch.zeros(n * self.grid[1] + 1, dtype=torch.int64, device=pre.device)
        with _on(pre):
            if n and f:
                _count_above[self.grid](*self.args, counts, BLOCK=self.block, num_warps=_warps(self.block), **FUSION)
            self.places = counts.cumsum(0)
            self._total, self._told = self.places[-1], None
            if ahead and pre.is_cuda:
                self._total = self._total.to("cpu", non_blocking=True)
                self._told = torch.cuda.current_stream().record_event()

    def total(self) -> int:
        """How many they are."""
        if self._told is not None:
            self._told.synchronize()
        return int(self._total)

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, columns, values), by row, then by column: int64, int64, pre's dtype."""
        total, device = self.total(), self.pre.device
        rows, columns = (torch.empty(total, dtype=torch.int64, device=device) for _ in range(2))
        values = self.pre.new_empty(total)
        if total:
            with _on(self.pre):
                _write_above[self.grid](*self.args, self.places, rows, columns, values, BLOCK=self.block,
                                        num_warps=_warps(self.block), **FUSION)
        return rows, columns, values


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
        table = _even(table)
        sizes = _sizes(d, SUMMED, out.dtype)
        to_all, to_each = (None if t is None else t.contiguous() for t in (to_all, to_each))
        with _on(table):
            _weighted_sums[(n, _cdiv(d, sizes["BLOCK"]))](
                starts.contiguous(), ids.contiguous(), weights.contiguous(), table, to_all, to_each, out, d,
                table.stride(0), **sizes, **FUSION)
    return out


def reconstruct_few(
    pre: Tensor, bias: Tensor | None, threshold: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """b_dec (d) plus the rows of W_dec (f, d) times the entries of pre (n, f), plus bias (f), that exceed threshold:
    (n, d) in pre's dtype. Rows of pre with an entry that is not finite become nan. Nobody waits for the GPU; but there
    is room for every entry of pre."""
    (n, f), d = pre.shape, W_dec.shape[1]
    out = pre.new_empty(n, d)
    if out.numel():
        pre, W_dec, bias = _even(pre), _even(W_dec), None if bias is None else bias.contiguous()
        parts, sizes = _cdiv(f, PART), _sizes(d, SUMMED, out.dtype)
        columns = torch.empty(n * parts * (PART + 1), dtype=torch.int32, device=pre.device)
        values = torch.empty_like(columns, dtype=pre.dtype)
        block = min(_power_of_2(max(f, 1)), COLLECTED)
        with _on(pre):
            _collect[(n, parts)](pre, bias, threshold.contiguous(), f, pre.stride(0), columns, values, PART=PART,
                                 BLOCK=block, num_warps=_warps(block), **FUSION)
            _decode_collected[(n, _cdiv(d, sizes["BLOCK"]))](
                columns, values, W_dec, b_dec.contiguous(), out, parts, d, W_dec.stride(0), PART=PART, **sizes,
                **FUSION)
    return out


def dots(starts: Tensor, rows: Tensor, ids: Tensor, by_row: Tensor, by_id: Tensor) -> Tensor:
    """by_row[rows[j]] . by_id[ids[j]] of every entry j (entries). rows, ids (entries) int32 or int64; by_row (n, d),
    by_id (m, d) of any dtype; float32 or float64, as `wide` has it. `starts` is not read, nor need rows ascend."""
    count, d = len(ids), by_id.shape[1]
    out = torch.zeros(count, dtype=wide(by_row, by_id), device=by_id.device)
    if count and d:
        by_row, by_id = _even(by_row), _even(by_id)
        block = min(_power_of_2(d), PAIR_COLUMNS)
        with _on(by_id):
            _dots[(_cdiv(count, PAIRS),)](
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
    starts, table = starts.contiguous(), _even(table)
    # In a tensor, since Triton's kernels take Python's floats as float32.
    scalars = torch.tensor([rate, eps, 1 - beta2, log2(beta2) if beta2 else -torch.inf, (1 - beta2**step) ** -0.5],
                           dtype=weight.dtype).to(weight.device, non_blocking=True)
    with _on(weight):
        _adam_rows[(programs,)](
            weight, square, last, lengths.contiguous(), features.contiguous(), starts, ids.contiguous(),
            weights.contiguous(), table, scalars, step, d, table.stride(0), UNIT=unit,
            **_sizes(d, d, weight.dtype, ROW_HELD), **FUSION)


def _even(matrix: Tensor) -> Tensor:
    """The matrix with the numbers of a row next to one another."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _power_of_2(n: int) -> int:
    """The next one from n on. As triton.next_power_of_2 and, below, triton.cdiv, but without what is wrapped around
    those, which a short call feels."""
    return 1 << (n - 1).bit_length()


def _cdiv(n: int, size: int) -> int:
    """How many parts of a size n has."""
    return -(-n // size)


def _warps(block: int, each: int = 256) -> int:
    """As many as give each thread `each` / 32 columns, whole vectors of 16 bytes."""
    return min(max(block // each, 1), 16)


@cache
def _sizes(d: int, most: int, dtype: torch.dtype, held: int = HELD) -> dict[str, int]:
    """Columns of a program that sums segments, entries that it takes at a time, and warps."""
    block = _power_of_2(min(d, most))
    warps = _warps(block, 512)
    entries = held * 4 // dtype.itemsize * 32 * warps // block
    return {"BLOCK": block, "K": min(max(entries, 1), 16), "num_warps": warps}


@triton.jit
def _marked(pre, bias, threshold, by_row, by_column, row, columns, within, stride):
    """Values of a part of a row, and which are above: both kernels must agree, hence fma, which rounds in one way."""
    values = tl.load(pre + row * stride + columns, mask=within, other=0.0)
    if bias is not None:
        values += tl.load(bias + columns, mask=within, other=0.0)
    limit = tl.load(threshold + columns, mask=within, other=0.0)
    if by_row is not None:
        limit = tl.fma(-tl.load(by_row + row), tl.load(by_column + columns, mask=within, other=0.0), limit)
    return values, (values > limit) & within


@triton.jit
def _count_above(pre, bias, threshold, by_row, by_column, f, stride, counts, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    _, marks = _marked(pre, bias, threshold, by_row, by_column, row, columns, columns < f, stride)
    tl.store(counts + row * tl.num_programs(1) + part + 1, tl.sum(marks.to(tl.int32), 0))


@triton.jit
def _write_above(
    pre, bias, threshold, by_row, by_column, f, stride, places, out_rows, out_columns, out_values, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    place = places + row * tl.num_programs(1) + part
    start = tl.load(place)
    if tl.load(place + 1) == start:
        return
    values, marks = _marked(pre, bias, threshold, by_row, by_column, row, columns, columns < f, stride)
    at = start + tl.cumsum(marks.to(tl.int32), 0) - 1
    tl.store(out_rows + at, tl.zeros((BLOCK,), tl.int64) + row, mask=marks)
    tl.store(out_columns + at, columns.to(tl.int64), mask=marks)
    tl.store(out_values + at, values, mask=marks)


@triton.jit
def _collect(
    pre, bias, threshold, f, stride, out_columns, out_values, PART: tl.constexpr, BLOCK: tl.constexpr
):
    """The entries of a part of a row that are above, one after the other from where the part has its PART + 1 places;
    in the last place their number, and whether all of it is finite: 0, else nan."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (row * tl.num_programs(1) + part) * (PART + 1)
    count = 0
    nothing = tl.zeros((BLOCK,), out_values.dtype.element_ty)
    for begin in range(part * PART, tl.minimum(part * PART + PART, f), BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        values, marks = _marked(pre, bias, threshold, None, None, row, columns, columns < f, stride)
        nothing += values - values
        at = first + count + tl.cumsum(marks.to(tl.int32), 0) - 1
        tl.store(out_columns + at, columns, mask=marks)
        tl.store(out_values + at, values, mask=marks)
        count += tl.sum(marks.to(tl.int32), 0)
    tl.store(out_columns + first + PART, count)
    tl.store(out_values + first + PART, tl.sum(nothing, 0))


@triton.jit
def _decode_collected(
    ids, weights, table, base, out, parts, d, stride, PART: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    DTYPE: tl.constexpr = out.dtype.element_ty
    total = tl.load(base + columns, mask=within, other=0.0).to(DTYPE)
    for part in range(parts):
        start = (row * parts + part) * (PART + 1)
        stop = start + tl.load(ids + start + PART)
        total += _segment(start, stop, ids, weights, table, stride, columns, within, DTYPE, K, BLOCK)
        total += tl.load(weights + start + PART)
    tl.store(out + row * d + columns, total, mask=within)


@triton.jit
def _segment(
    start, stop, ids, weights, table, stride, columns, within, DTYPE: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr
):
    """The weighted sum over entries start:stop of these columns of the table, K entries at a time: while the rows of
    some are on their way, so are the numbers of the next."""
    total = tl.zeros((BLOCK,), DTYPE)
    first = start + tl.arange(0, K)
    rows = tl.load(ids + first, mask=first < stop, other=0).to(tl.int64)
    factors = tl.load(weights + first, mask=first < stop, other=0.0).to(DTYPE)
    for begin in range(start, stop, K):
        inside = begin + tl.arange(0, K) < stop
        values = tl.load(table + rows[:, None] * stride + columns[None, :], mask=inside[:, None] & within[None, :],
                         other=0.0).to(DTYPE)
        entries = begin + K + tl.arange(0, K)
        rows = tl.load(ids + entries, mask=entries < stop, other=0).to(tl.int64)
        total += tl.sum(factors[:, None] * values, 0)
        factors = tl.load(weights + entries, mask=entries < stop, other=0.0).to(DTYPE)
    return total


@triton.jit
def _weighted_sums(
    starts, ids, weights, table, to_all, to_each, out, d, stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    total = _segment(tl.load(starts + row), tl.load(starts + row + 1), ids, weights, table, stride, columns, within,
                     out.dtype.element_ty, K, BLOCK)
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
    grad = _segment(start, start + length, ids, weights, table, stride, columns, within, DTYPE, K, BLOCK)
    if UNIT:
        grad -= tl.sum(grad * w, 0) * w
    v = v * decay + new * grad * grad
    w = tl.where(within, w - rate * grad / (tl.sqrt(v) * correction + eps), 0.0)
    if UNIT:
        w = w / tl.sqrt(tl.sum(w * w, 0))
    tl.store(weight + row * d + columns, w, mask=within)
    tl.store(square + row * d + columns, v, mask=within)
    tl.store(last + row, step)
