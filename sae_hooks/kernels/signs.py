"""What is above a threshold, decided in float32 at the speed of bfloat16 products, for CPUs that have instructions for
them.

As in screen.py a product of rounded matrices says which pairs may be above, by a bound, and only those are computed
anew. But here it is rounded to bfloat16 itself, and a pass over it in float32 would cost a good part of what it saves.
So its signs tell: both matrices get four more columns, whose products are the most by which rounding can have changed
the sum, and the bias less the threshold. Sums that are not negative may be above. (Where a sum is near 0 the bias less
the threshold is no larger than the product's bound, so that three times that bounds all that is summed.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .screen import ROUNDING, SUMMING
from .search import count, exceeding, marked
from .segments import dots, starts_of
from .tiles import Most, affine, cast, slices, within
from .tracing import is_untraced
from .triplets import Triplets

BESIDE = 4  # columns beside those of the matrices
VANISHING = 2.0**-50  # more than the length of a row whose numbers are taken for 0, or their squares are
HAS_BFLOAT16: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # whether there are instructions for it
TOKENS, PAIRS, WIDTH = 512, 2**22, 256  # tokens, pairs, and numbers of a token, from which a CPU screens
TOGETHER, TILE, ROWS = 2048, 3 * 2**19, 2**21  # tokens, pairs, numbers in rows that it takes, where memory is no matter
MOST = 0.04  # share of pairs up to which to compute those anew takes less long than the screen saves ...
PROBED = 32, 512  # ... of which at most half are above, as so many tokens and features tell beforehand
VAIN_IN = 16  # one tile in so many, and the first, may have more
LOST_OF = 128  # rows whose rounding is measured at once


def signs_for(x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor) -> Signs | None:
    """What finds the features of x (n, d) by signs, rows (m, d), bias and threshold (m), where that pays: on a CPU, of
    many float32 activations, no gradients wanted."""
    if not is_screened(x, rows, bias) or share_above(x, rows, bias, threshold, PROBED) > MOST / 2:
        return None
    return Signs(Most(TOGETHER, min(TILE, min(len(x), TOGETHER) * max(ROWS // x.shape[1], 1))))


def is_screened(x: Tensor, rows: Tensor, bias: Tensor) -> bool:
    """Whether products of x (n, d) and rows (m, d) in bfloat16 may be made first, and are so much quicker that this can
    pay."""
    if not (HAS_BFLOAT16 and x.is_cpu and torch.backends.mkldnn.enabled) or x.dtype != torch.float32:
        return False
    n, m = len(x), len(rows)
    return n >= TOKENS and n * m >= PAIRS and x.shape[1] >= WIDTH and is_untraced(x, rows, bias)


def share_above(x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, probed: tuple[int, int]) -> float:
    """The share of pairs in x (n, d) and rows (m, d) that are above threshold (m), as about so many tokens and features
    tell that lie evenly apart."""
    sizes = zip((len(x), len(rows)), probed, strict=True)
    some, which = (slice(None, None, max(size // most, 1)) for size, most in sizes)
    pre = affine(x[some], rows[which], bias[which])
    return count(pre > threshold[which]) / max(pre.numel(), 1)


class Signs:
    """Finds what is above in one tile after the other."""

    def __init__(self, most: Most) -> None:
        self.most = most  # of a tile, if it may be larger than usual
        self._tiles = self._vain = 0
        self._tokens: tuple[Tensor, Tensor | None] | None = None  # the last ones, and what was made of them
        self._low_rows = self._sums = torch.empty(0, dtype=torch.bfloat16, device="cpu")  # for one tile after the other

    @torch.no_grad()
    def candidates(self, x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor) -> Triplets | None:
        """(tokens, features, values) of all that is above in x @ rows.T + bias > threshold, and of the few more that
        might have been, by token, then by feature: x (tokens, d), bias and threshold (features) float32, rows
        (features, d) of any dtype. None where to compute all values is the quicker way, or some are not finite."""
        self._tiles += 1
        if self._vain * VAIN_IN >= self._tiles:
            return None
        if self._tokens is None or self._tokens[0] is not x:
            self._tokens = x, low_tokens(x)
        low_x = self._tokens[1]
        if low_x is None or (low_rows := self._of_features(rows, bias, threshold)) is None:
            return None
        self._sums = grown(self._sums, len(x) * len(rows))
        sums = torch.mm(low_x, low_rows.T, out=within(self._sums, len(x), len(rows)))
        signs = sums.view(torch.int16)
        marks = exceeding(signs, signs.new_tensor(-1))
        if count(marks) > MOST * marks.numel():
            self._vain += 1
            return None
        tokens, features, _ = marked(signs, marks)
        values = dots(starts_of(tokens, len(x)), tokens.int(), features.int(), x, cast(rows, x.dtype))
        return tokens, features, values + bias.index_select(0, features)

    def _of_features(self, rows: Tensor, bias: Tensor, threshold: Tensor) -> Tensor | None:
        """(features, d + BESIDE) in bfloat16, which `low_tokens` are multiplied by; None where some are not finite."""
        m, d = rows.shape
        self._low_rows = grown(self._low_rows, m * (d + BESIDE))
        out = within(self._low_rows, m, d + BESIDE)
        out[:, d:] = beside(rows, out[:, :d].copy_(rows), bias - threshold)
        return out if bool(out[:, d].isfinite().all()) else None


def beside(rows: Tensor, low: Tensor, above: Tensor) -> Tensor:
    """(features, BESIDE) in bfloat16, what stands beside rows (features, d) that are rounded to low: how long they are,
    how long what they lost, and `above` (features) in two parts."""
    out = low.new_empty(len(rows), BESIDE)
    out[:, 0] = _not_below(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) + VANISHING)
    out[:, 1] = 0 if rows.dtype == torch.bfloat16 else _not_below(_lost(rows, low))
    out[:, 2] = above
    rest = above - out[:, 2]
    out[:, 3] = torch.where(rest.isfinite(), _not_below(rest), 0)
    return out


def low_tokens(x: Tensor) -> Tensor | None:
    """(tokens, d + BESIDE) in bfloat16, of x (tokens, d) in float32; None where some are not finite."""
    n, d = x.shape
    out = x.new_empty(n, d + BESIDE, dtype=torch.bfloat16)
    lost = _lost(x, out[:, :d].copy_(x))
    size = x.norm(dim=1) + lost
    out[:, d] = _not_below(lost + 3 * SUMMING * (d + BESIDE) * size)
    out[:, d + 1] = _not_below(size)
    out[:, d + 2:] = 1
    return out if bool(size.isfinite().all()) else None


def _lost(rows: Tensor, low: Tensor) -> Tensor:
    """The length of what each of some rows lost when it was rounded to low; some at a time, in the cache."""
    return torch.cat([(rows[i] - low[i]).norm(dim=1) for i in slices(len(rows), LOST_OF)]) + VANISHING


def _not_below(numbers: Tensor) -> Tensor:
    """numbers and a little more, so that rounded, here and to bfloat16, they are not below what they are."""
    return numbers + 2 * ROUNDING * numbers.abs()


def grown(room: Tensor, size: int) -> Tensor:
    """room, or more, if that is less than size numbers."""
    return room if room.numel() >= size else room.new_empty(size)
