"""What is above a threshold in Triton kernels, without gradients, and with triton_edit.py and triton_sums.py all that
Triton does here."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_edit import edit_few
from .triton_sums import FUSION, adam_rows, cdiv, dots, even, on, power_of_2, segment, sizes_apart, warps, weighted_sums

__all__ = ["Above", "adam_rows", "dots", "edit_few", "gated_parts", "reconstruct_few", "weighted_sums"]

WORD = 32  # marks that one number holds
MARKED, LISTED = 1024, 256  # pre-activations that a program of `Above` marks, and such numbers that one lists
COLLECTED, PART = 4096, 16384  # ... that one of `reconstruct_few` looks at at a time, and in all
APART = 32  # sums that one of its programs has side by side


class Above:
    """The entries of pre (n, f), plus bias (f), that exceed threshold (f). With slack, a pair of vectors (n) and (f),
    thresholds are less their product, in one rounding. nan is above nothing.

    They are marked and counted at once, but nobody waits for the GPU before asking for `total` or `listed`; with
    `ahead` then only for that, not for what it was given to do since.
    """

    def __init__(self, pre: Tensor, threshold: Tensor, bias: Tensor | None = None,
                 slack: tuple[Tensor, Tensor] | None = None, ahead: bool = False) -> None:
        n, f = pre.shape
        self.pre, self.bias = even(pre), None if bias is None else bias.contiguous()
        by_row, by_column = (None, None) if slack is None else (s.to(pre.dtype).contiguous() for s in slack)
        self.parts = max(cdiv(f, MARKED), 1)
        self.marks = torch.empty(n, self.parts * MARKED // WORD, dtype=torch.int32, device=pre.device)
        counts = torch.zeros(n * self.parts + 1, dtype=torch.int64, device=pre.device)
        with on(pre):
            if n and f:
                _mark_above[(n, self.parts)](
                    self.pre, self.bias, threshold.contiguous(), by_row, by_column, f, self.pre.stride(0), self.marks,
                    counts, BLOCK=MARKED, WORD=WORD, num_warps=warps(MARKED), **FUSION)
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

    def at_most(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """CSR (starts int64, columns int32, values) of them, without asking how many they are; of none, if they are
        more than `most`. What stands in columns and values behind the last is arbitrary."""
        columns = torch.empty(most, dtype=torch.int32, device=self.pre.device)
        values, starts = self._list(most, columns), self.places[::self.parts]
        return starts * (starts[-1] <= most), columns, values

    def _list(self, most: int, columns: Tensor, rows: Tensor | None = None) -> Tensor:
        """Write the columns and rows of the first `most` where they belong, and give their values."""
        values = self.pre.new_empty(most)
        if most and self.pre.numel():
            words = self.marks.shape[1]
            with on(self.pre):
                _list_marked[(len(self.pre), cdiv(words, LISTED))](
                    self.pre, self.bias, self.pre.stride(0), self.marks, words, self.places, most, rows, columns,
                    values, BLOCK=LISTED, WORD=WORD, PART=MARKED // WORD, num_warps=warps(LISTED, 64), **FUSION)
        return values


def gated_parts(pre: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """The entries of pre (n, f), plus bias (f), that exceed threshold (f), and 0 in place of the others, as the sum of
    three matrices in bfloat16, which has 8 of float32's 24 bits: (3 n, f), one after the other."""
    n, f = pre.shape
    out = pre.new_empty(3 * n, f, dtype=torch.bfloat16)
    if out.numel():
        pre, bias = even(pre), None if bias is None else bias.contiguous()
        with on(pre):
            _gated_parts[(n, cdiv(f, MARKED))](
                pre, bias, threshold.contiguous(), f, pre.stride(0), out, BLOCK=MARKED, num_warps=warps(MARKED),
                **FUSION)
    return out


def reconstruct_few(
    pre: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    old: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """b_dec (d) plus the rows of W_dec (f, d) times the entries of pre (n, f), plus bias (f), that exceed threshold:
    (n, d) in pre's dtype. Rows of pre with an entry that is not finite become nan. Nobody waits for the GPU; but there
    is room for every entry of pre. old (..., d), of n rows: put into a copy of it; chosen (...), boolean: only where
    it is True."""
    (n, f), d = pre.shape, W_dec.shape[1]
    out = pre.new_empty(n, d) if old is None else torch.empty_like(old, memory_format=torch.contiguous_format)
    if out.numel():
        pre, W_dec, bias = even(pre), even(W_dec), None if bias is None else bias.contiguous()
        parts, sizes = cdiv(f, PART), sizes_apart(d, APART, pre.dtype)
        columns = torch.empty(n * parts * (PART + 1), dtype=torch.int32, device=pre.device)
        values = torch.empty_like(columns, dtype=pre.dtype)
        if chosen is not None and old is not None:
            chosen, old = chosen.contiguous(), old.contiguous()
        block = min(power_of_2(max(f, 1)), COLLECTED)
        with on(pre):
            _collect[(n, parts)](pre, bias, threshold.contiguous(), f, pre.stride(0), columns, values, PART=PART,
                                 BLOCK=block, num_warps=warps(block), **FUSION)
            _decode_collected[(n, cdiv(d, sizes["BLOCK"]))](
                columns, values, W_dec, b_dec.contiguous(), old, chosen, out, parts, d, W_dec.stride(0), PART=PART,
                **sizes, **FUSION)
    return out


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
def _gated_parts(pre, bias, threshold, f, stride, out, BLOCK: tl.constexpr):
    """Of some numbers of a row what they are rounded to, n rows further on what that leaves, and so again."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values, above = _marked(pre, bias, threshold, None, None, row, columns, columns < f, stride)
    values *= above.to(values.dtype)
    for _ in tl.static_range(3):
        part = values.to(out.dtype.element_ty)
        tl.store(out + row * f + columns, part, mask=columns < f)
        values -= part.to(values.dtype)
        row += tl.num_programs(0)


@triton.jit
def _ones(words):
    """How many bits are set in each, uint32."""
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit(do_not_specialize=["most"])
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
    ids, weights, table, base, old, chosen, out, parts, d, stride, PART: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr
):
    """A row of the sum where it is chosen, else of old."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d
    DTYPE: tl.constexpr = weights.dtype.element_ty
    total, nothing = tl.zeros((K, BLOCK), DTYPE), tl.zeros((1,), DTYPE)
    for part in range(parts):
        start = (row * parts + part) * (PART + 1)
        stop = start + tl.load(ids + start + PART)
        total = segment(total, start, stop, ids, weights, table, stride, columns, within, K)
        nothing += tl.load(weights + start + PART)
    found = tl.sum(total, 0) + tl.load(base + columns, mask=within, other=0.0) + nothing
    found = found.to(out.dtype.element_ty)
    if chosen is not None:
        here = tl.load(chosen + row) != 0
        found = tl.where(here, found, tl.load(old + row * d + columns, mask=within, other=0.0))
    tl.store(out + row * d + columns, found, mask=within)
