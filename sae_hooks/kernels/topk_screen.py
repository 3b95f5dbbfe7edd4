"""The k largest features of each token, decided in float32 at the speed of bfloat16 products, for CPUs that have
instructions for them.

As in signs.py, columns beside the rounded matrices make their product no less than the exact one. It gives a guess at
each token's k-th largest activation; only features whose product is not below the guess are computed anew. If k of
those are not below it either, the k largest are among them, however the guess was made. Where fewer are, it was too
high, and all of the token's features are computed. (Sums lose more beside a bias that is larger than the product, but
less than half of a bfloat16 number's last place, so that rounding to the nearest one makes up for it.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .search import GROUPS, count, exceeding, group_maxima, kth_of, largest, marked, most_of_each
from .segments import dots, starts_of
from .signs import BESIDE, LOST_OF, MOST, beside, grown, is_screened, low_tokens
from .tiles import linear, slices, within
from .triplets import Triplets, by_row, moved

HELD, FEWEST = 2**23, 256  # products that are held: 16 MB, or those of so many tokens, for whom rows are rounded again
TILE = 2**20  # products that are made at a time
CLOSE = 1 - 2.0**-7  # a number rounded to bfloat16 is at most so much above what it was
LONG = 2  # standard deviations by which features are taken to be longer than usual
WRONG = 1 / 8  # share of tokens whose guess was too high from which guessing is left alone


def topk_screen_for(x: Tensor, rows: Tensor, bias: Tensor, k: int) -> TopkScreen | None:
    """What finds the k largest features of x (n, d), rows (m, d), bias (m), where that pays, as `is_screened` says."""
    if k > MOST / 2 * len(rows) or not is_screened(x, rows, bias):
        return None
    return TopkScreen(rows, bias, k)


class TopkScreen:
    """Finds the k largest features of some tokens after the others."""

    @torch.no_grad()
    def __init__(self, rows: Tensor, bias: Tensor, k: int) -> None:
        self.rows, self.bias, self.k = rows, bias, k
        self.tokens = max(HELD // len(rows), FEWEST)  # at a time
        self._beside = torch.cat([beside(rows[f], rows[f].bfloat16(), bias[f]) for f in slices(len(rows), LOST_OF)])
        lengths = self._beside[:, :2].float()
        self._usual = lengths.mean(0) + LONG * lengths.std(0, correction=0)
        self._pays = bool(self._beside.isfinite().all())
        self._low_rows = self._products = torch.empty(0, dtype=torch.bfloat16, device="cpu")

    @torch.no_grad()
    def largest(self, x: Tensor) -> Triplets | None:
        """(tokens, features, values) of the k largest positive entries of each row of x (n, d) @ rows.T + bias, as
        `search.largest` gives them; None where to compute all of them is quicker, or some tokens are not finite."""
        low_x = low_tokens(x) if self._pays else None
        if low_x is None:
            return None
        products = self._not_below(low_x)
        guess = self._guess(low_x, [part for _, part in products])
        marks = [exceeding(part, guess - 1) for _, part in products]
        self._pays = sum(map(count, marks)) <= MOST * len(x) * len(self.rows)
        if not self._pays:
            return None
        parts = [moved(marked(part, here), 0, f.start) for (f, part), here in zip(products, marks, strict=True)]
        return self._decided(x, by_row(parts, len(x), guess), guess.view(torch.bfloat16).float())

    def _not_below(self, low_x: Tensor) -> list[tuple[slice, Tensor]]:
        """(features, products (n, features)) of all features, none of which is below the exact one: numbers of bfloat16
        as integers, which order those from 0 on as they do."""
        (n, width), m = low_x.shape, len(self.rows)
        self._products = grown(self._products, n * m)
        found = []
        for f in slices(m, max(TILE // n, 1)):
            some = f.stop - f.start
            self._low_rows = grown(self._low_rows, some * width)
            low = within(self._low_rows, some, width)
            low[:, :-BESIDE], low[:, -BESIDE:] = self.rows[f], self._beside[f]
            product = torch.mm(low_x, low.T, out=within(self._products[n * f.start:], n, some))
            found.append((f, product.view(torch.int16)))
        return found

    def _guess(self, low_x: Tensor, products: list[Tensor]) -> Tensor:
        """What is likely not above each token's k-th largest entry, and not below 0: (n, 1), integers as above."""
        size = max(len(self.rows) // (GROUPS * self.k), 1)
        maxima = torch.cat([group_maxima(part, min(size, part.shape[1])) for part in products], 1)
        high = torch.from_numpy(kth_of(maxima, self.k)).view(torch.bfloat16).float()
        error = low_x[:, -BESIDE:-BESIDE + 2].float() @ self._usual
        guess = (high * CLOSE - error[:, None]).clamp(min=0)
        return (guess.view(torch.int32) >> 16).short()

    def _decided(self, x: Tensor, candidates: Triplets, guess: Tensor) -> Triplets:
        """The k largest of each token's candidates, or of all its features, if fewer candidates reach the guess."""
        (tokens, features, _), n = candidates, len(x)
        values = dots(starts_of(tokens, n), tokens.int(), features.int(), x, self.rows)
        values += self.bias.index_select(0, features)
        kept = (values >= guess[:, 0].index_select(0, tokens)) & (values > 0)
        found = tokens[kept], features[kept], values[kept]
        fewer = (torch.bincount(found[0], minlength=n) < self.k) & (guess[:, 0] > 0)
        found = most_of_each(found, n, self.k)
        if not bool(fewer.any()):
            return found
        again = fewer.nonzero().view(-1)
        self._pays = len(again) <= WRONG * n
        rows, columns, numbers = largest(linear(x[again], self.rows, self.bias), self.k)
        right = ~fewer[found[0]]
        return by_row([(found[0][right], found[1][right], found[2][right]), (again[rows], columns, numbers)], n, x)
