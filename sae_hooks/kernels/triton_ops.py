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

WORD = 32  # marks that one number holds
MARKED, LISTED = 1024, 256  # pre-activations that a program of `Above` marks, and such numbers that one lists
COLLECTED, PART = 4096, 16384  # ... that one of `reconstruct_few` looks at at a time, and in all
SUMMED = 512  # columns that a program of `weighted_sums` has; adam_rows' have whole rows
LONG, ROWS = 512, 128  # entries above which a segment has its own programs, and segments in which one looks for such
APART, APART_OF_FEW, APART_COLUMNS = 128, 32, 128  # sums side by side in such a program, or for few tokens; its columns
HELD, ROW_HELD = 128, 32  # 32-bit registers of a thread for what a program of the one, and of the other, loads at once
PAIRS, PAIR_COLUMNS = 16, 128  # entries of a program of `dots`, and the columns it takes at a time
FUSION = {"enable_fp_fusion": True}  # said, because Triton's default changes and 3.9 warns of it


class Above:
    """The entries of pre (n, f), plus bias (f), that exceed threshold (f). With slack, a pair of vectors (n) and (f),
    thresholds are less their product, in one rounding. nan is above nothing.

    They are marked and counted at once, but nobody waits for the GPU before asking for `total` or `listed`; with
    `ahead` then only for that, not for what it was given to do since.
    """

    def __init__(self, pre: Tensor, threshold: Tensor, bias: Tensor | None = None,
                 slack: tuple[Tensor, Tensor] | None = None, ahead: bool = False) -> None:
        n, f = pre.shape
        self.pre, self.bias = _even(pre), None if bias is None else bias.contiguous()
        by_row, by_column = (None, None) if slack is None else (s.to(pre.dtype).contiguous() for s in slack)
        self.parts = max(_cdiv(f, MARKED), 1)
        self.marks = torch.empty(n, self.parts * MARKED // WORD, dtype=torch.int32, device=pre.device)
        counts = torch.zeros(n * self.parts + 1, dtype=torch.int64, device=pre.device)
        with _on(pre):
            if n and f:
                _mark_above[(n, self.parts)](
                    self.pre, self.bias, threshold.contiguous(), by_row, by_column, f, self.pre.stride(0), self.marks,
                    counts, BLOCK=MARKED, WORD=WORD, num_warps=_warps(MARKED), **FUSION)
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
        return rows, columns, self._list(total, columns, rows)

    def first(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """CSR (starts int64, columns int32, values) of the first `most` of them, without asking how many they are:
        what stands in columns and values behind the last is arbitrary."""
        columns = torch.empty(most, dtype=torch.int32, device=self.pre.device)
        values = self._list(most, columns)
        return self.places[::self.parts].clamp(max=most), columns, values

    def _list(self, most: int, columns: Tensor, rows: Tensor | None = None) -> Tensor:
        """Write the columns and rows of the first `most` where they belong, and give their values."""
        values = self.pre.new_empty(most)
        if most and self.pre.numel():
            words = self.marks.shape[1]
            with _on(self.pre):
                _list_marked[(len(self.pre), _cdiv(words, LISTED))](
                    self.pre, self.bias, self.pre.stride(0), self.marks, words, self.places, most, rows, columns,
                    values, BLOCK=LISTED, WORD=WORD, PART=MARKED // WORD, num_warps=_warps(LISTED, 64), **FUSION)
        return values


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
        to_all, to_each = (None if t is None else t.contiguous() for t in (to_all, to_each))
        args = (starts.contiguous(), ids.contiguous(), weights.contiguous(), table, to_all, to_each, out, n, d,
                table.stride(0), LONG)
        with _on(table):
            sizes = _sizes(d, SUMMED, out.dtype)
            _weighted_sums[(n, _cdiv(d, sizes["BLOCK"]))](*args, **sizes, **FUSION)
            if len(ids) > LONG:
                sizes = _sizes_apart(d, APART, out.dtype)
                _long_sums[(_cdiv(n, ROWS), _cdiv(d, sizes["BLOCK"]))](*args, ROWS=ROWS, **sizes, **FUSION)
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
        parts, sizes = _cdiv(f, PART), _sizes_apart(d, APART_OF_FEW, out.dtype)
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


def _sizes_apart(d: int, apart: int, dtype: torch.dtype) -> dict[str, int]:
    """The same of a program that has several sums side by side."""
    block = _power_of_2(min(d, APART_COLUMNS))
    return {"BLOCK": block, "K": apart * 4 // dtype.itemsize, "num_warps": max(apart // 16, 1)}


@triton.jit
def _marked(pre, bias, threshold, by_row, by_column, row, columns, within, stride):
    """Values of a part of a row, and which are above."""
    values = tl.load(pre + row * stride + columns, mask=within, other=0.0)
    if bias is not None:
        values += tl.load(bias + columns, mask=within, other=0.0)
    limit = tl.load(threshold + columns, mask=within, other=0.0)
    if by_row is not None:
        limit = tl.fma(-tl.load(by_row + row), tl.load(by_column + columns, mask=within, other=0.0), limit)
    return values, (values > limit) & within


@triton.jit
def _mark_above(
    pre, bias, threshold, by_row, by_column, f, stride, marks, counts, BLOCK: tl.constexpr, WORD: tl.constexpr
):
    """A bit for each entry of a part of a row, and how many are set."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    words = part * (BLOCK // WORD) + tl.arange(0, BLOCK // WORD)
    bits = tl.arange(0, WORD)[None, :]
    columns = words[:, None] * WORD + bits
    _, above = _marked(pre, bias, threshold, by_row, by_column, row, columns, columns < f, stride)
    above = above.to(tl.uint32)
    found = tl.sum(above << bits.to(tl.uint32), 1)
    tl.store(marks + row * tl.num_programs(1) * (BLOCK // WORD) + words, found.to(tl.int32, bitcast=True))
    tl.store(counts + row * tl.num_programs(1) + part + 1, tl.sum(_ones(found).to(tl.int32), 0))


@triton.jit
def _ones(words):
    """How many bits are set in each, uint32."""
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _list_marked(
    pre, bias, stride, marks, words, places, most, out_rows, out_columns, out_values, BLOCK: tl.constexpr,
    WORD: tl.constexpr, PART: tl.constexpr
):
    """The entries marked in some words of a row's, to their places: the first of each word, then the second."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    index = first + tl.arange(0, BLOCK)
    left = tl.load(marks + row * words + index, mask=index < words, other=0).to(tl.uint32, bitcast=True)
    counts = _ones(left).to(tl.int32)
    at = tl.load(places + row * (words // PART) + first // PART) + tl.cumsum(counts, 0) - counts
    for _ in range(tl.max(counts, 0)):
        others = left & (left - 1)
        columns = index * WORD + _ones((left ^ others) - 1).to(tl.int32)
        inside = (left != 0) & (at < most)
        values = tl.load(pre + row * stride + columns, mask=inside, other=0.0)
        if bias is not None:
            values += tl.load(bias + columns, mask=inside, other=0.0)
        if out_rows is not None:
            tl.store(out_rows + at, tl.zeros((BLOCK,), tl.int64) + row, mask=inside)
        tl.store(out_columns + at, columns.to(out_columns.dtype.element_ty), mask=inside)
        tl.store(out_values + at, values, mask=inside)
        left = others
        at += 1


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
    total, nothing = tl.zeros((K, BLOCK), DTYPE), tl.zeros((1,), DTYPE)
    for part in range(parts):
        start = (row * parts + part) * (PART + 1)
        stop = start + tl.load(ids + start + PART)
        total = _apart(total, start, stop, ids, weights, table, stride, columns, within, K)
        nothing += tl.load(weights + start + PART)
    tl.store(out + row * d + columns, tl.sum(total, 0) + tl.load(base + columns, mask=within, other=0.0) + nothing,
             mask=within)


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
def _apart(total, start, stop, ids, weights, table, stride, columns, within, K: tl.constexpr):
    """The same in K sums, each of every K-th entry, to be added up at the end, plus total (K, BLOCK): many entries are
    on their way at once."""
    first = start + tl.arange(0, K)
    rows = tl.load(ids + first, mask=first < stop, other=0).to(tl.int64)
    factors = tl.load(weights + first, mask=first < stop, other=0.0).to(total.dtype)
    for begin in range(start, stop, K):
        inside = begin + tl.arange(0, K) < stop
        values = tl.load(table + rows[:, None] * stride + columns[None, :], mask=inside[:, None] & within[None, :],
                         other=0.0).to(total.dtype)
        entries = begin + K + tl.arange(0, K)
        rows = tl.load(ids + entries, mask=entries < stop, other=0).to(tl.int64)
        total += factors[:, None] * values
        factors = tl.load(weights + entries, mask=entries < stop, other=0.0).to(total.dtype)
    return total


@triton.jit(do_not_specialize=["n"])
def _weighted_sums(
    starts, ids, weights, table, to_all, to_each, out, n, d, stride, LONG: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    if stop - start > LONG:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    total = _segment(start, stop, ids, weights, table, stride, columns, within, out.dtype.element_ty, K, BLOCK)
    _store_sum(total, to_all, to_each, out, row, d, columns, within)


@triton.jit(do_not_specialize=["n"])
def _long_sums(
    starts, ids, weights, table, to_all, to_each, out, n, d, stride, LONG: tl.constexpr, ROWS: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr
):
    """Of ROWS segments, which lie far from each other, those that are long."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    looked = first + tl.arange(0, ROWS) * step
    starting = tl.load(starts + looked, mask=looked < n, other=0)
    if tl.max(tl.load(starts + looked + 1, mask=looked < n, other=0) - starting, 0) <= LONG:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    for row in range(first, n, step):
        start, stop = tl.load(starts + row), tl.load(starts + row + 1)
        if stop - start > LONG:
            total = tl.zeros((K, BLOCK), out.dtype.element_ty)
            total = _apart(total, start, stop, ids, weights, table, stride, columns, within, K)
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
