"""What is above a threshold, decided in float32 at the speed of bfloat16 products, for GPUs, which make those ten times
as quickly as exact ones, and for CPUs that have instructions for them, which make them more than twice as quickly.

The product of the matrices rounded to bfloat16 says which pairs may be above: those that are so by the threshold less
the most by which rounding can have changed the product (Cauchy and Schwarz: no assumption about the data). Only those
are computed anew, from the matrices as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .search import count, exceeding, marked
from .segments import dots, starts_of, triton_for
from .tiles import CPU_TOKENS, affine, cast, half_product, is_untraced, wants_gradient, within
from .triplets import Triplets

SCREEN_ON = ("cuda",)  # kinds of device
SCREEN_FROM = 128  # tokens: fewer are a matter of reading the weights
ROUNDING = 2.0**-8  # most that rounding to bfloat16 changes a number by, as a share of it
SUMMING = 2.0**-23  # ... that adding a term to a sum in float32 does, even where it is cut off, not rounded
VANISHING = 2.0**-50  # more than a row's length whose numbers' squares are nothing in float32, or they themselves
CPU_SCREENS: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # whether it has the instructions
CPU_FROM, CPU_LEAST, CPU_THIN = 512, 2**22, 256  # tokens, pairs, and numbers of a token, from which it screens
CPU_TILE, CPU_ROWS = 2**20, 2**21  # pairs, and numbers in rows, that it takes together
CPU_MOST = 0.04  # share of pairs up to which to compute those anew takes less long than the screen saves ...
PROBED = 32, 512  # ... of which half must be above, as so many tokens and features tell beforehand
VAIN_IN = 16  # one tile in so many, and the first, may have more
BESIDE = 4  # columns that a CPU's product has beside those of the matrices


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


def signs_for(x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor) -> Signs | None:
    """What finds the features (rows) of x on a CPU, where that is to be by signs; see `screens`."""
    if not (CPU_SCREENS and x.is_cpu and torch.backends.mkldnn.enabled) or x.dtype != torch.float32:
        return None
    n, m = len(x), len(rows)
    if n < CPU_FROM or n * m < CPU_LEAST or x.shape[1] < CPU_THIN or not is_untraced(x, rows, bias):
        return None
    some, which = (slice(None, None, max(size // probed, 1)) for size, probed in zip((n, m), PROBED, strict=True))
    pre = affine(x[some], rows[which], bias[which])
    if count(pre > threshold[which]) > CPU_MOST / 2 * pre.numel():
        return None
    return Signs(min(CPU_TILE, min(n, CPU_TOKENS) * max(CPU_ROWS // x.shape[1], 1)))


class Signs:
    """The same on a CPU, for one tile after the other. Its bfloat16 products are rounded to bfloat16, and a pass over
    them costs more than on a GPU. So their signs tell: both matrices get more columns, whose products are the most by
    which rounding can have changed the sum, and the bias less the threshold. Sums that are not negative may be above.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # pairs of a tile
        self._tiles = self._vain = 0
        self._tokens: tuple[Tensor, Tensor | None] | None = None  # the last ones, and what was made of them
        self._low_rows = self._sums = torch.empty(0, dtype=torch.bfloat16)  # memory for one tile after the other

    @torch.no_grad()
    def candidates(self, x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor) -> Triplets | None:
        """(tokens, features, values) of what may be above, by token, then by feature, of what Candidates takes. None
        where to compute all values is the quicker way, or some numbers are not finite."""
        self._tiles += 1
        if self._vain * VAIN_IN >= self._tiles:
            return None
        with torch.autocast("cpu", enabled=False):
            if self._tokens is None or self._tokens[0] is not x:
                self._tokens = x, _low_tokens(x)
            low_x, low_rows = self._tokens[1], self._of_features(rows, bias, threshold)
            if low_x is None or low_rows is None:
                return None
            self._sums = _grown(self._sums, len(x) * len(rows))
            sums = torch.mm(low_x, low_rows.T, out=within(self._sums, len(x), len(rows)))
            signs = sums.view(torch.int16)
            marks = exceeding(signs, signs.new_tensor(-1))
            if count(marks) > CPU_MOST * marks.numel():
                self._vain += 1
                return None
            tokens, features, _ = marked(signs, marks)
            values = dots(starts_of(tokens, len(x)), tokens.int(), features.int(), x, cast(rows, x.dtype))
            return tokens, features, values + bias.index_select(0, features)

    def _of_features(self, rows: Tensor, bias: Tensor, threshold: Tensor) -> Tensor | None:
        """(features, d + BESIDE) in bfloat16, which `_low_tokens` are multiplied by."""
        m, d = rows.shape
        self._low_rows = _grown(self._low_rows, m * (d + BESIDE))
        out = within(self._low_rows, m, d + BESIDE)
        low = out[:, :d].copy_(rows)
        size = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) + VANISHING
        above = bias - threshold + 2 * SUMMING * (d + BESIDE) * (bias.abs() + threshold.abs())
        out[:, d] = _not_below(size)
        out[:, d + 1] = 0 if rows.dtype == torch.bfloat16 else _not_below((rows - low).norm(dim=1) + VANISHING)
        out[:, d + 2] = above
        rest = above - out[:, d + 2]
        out[:, d + 3] = torch.where(rest.isfinite(), _not_below(rest), 0)
        return out if bool(size.isfinite().all()) else None


def _low_tokens(x: Tensor) -> Tensor | None:
    """(tokens, d + BESIDE) in bfloat16, of x (tokens, d) in float32; None where some are not finite."""
    n, d = x.shape
    out = x.new_empty(n, d + BESIDE, dtype=torch.bfloat16)
    lost = (x - out[:, :d].copy_(x)).norm(dim=1) + VANISHING
    size = x.norm(dim=1) + lost
    out[:, d] = _not_below(lost + 2 * SUMMING * (d + BESIDE) * size)
    out[:, d + 1] = _not_below(size)
    out[:, d + 2:] = 1
    return out if bool(size.isfinite().all()) else None


def _not_below(numbers: Tensor) -> Tensor:
    """numbers and a little more, so that rounded, here and to bfloat16, they are not below what they are."""
    return numbers + 2 * ROUNDING * numbers.abs()


def _grown(room: Tensor, size: int) -> Tensor:
    """room, or more, if that is less than size numbers."""
    return room if room.numel() >= size else room.new_empty(size)
