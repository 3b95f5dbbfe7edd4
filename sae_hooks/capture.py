"""Captured: the features of the forward passes inside a `capture()` block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .errors import SaeAttachError, SaeMismatchError
from .generation import Generation
from .sae import SAE
from .sparse import SparseFeatures, concatenate
from .tokens import Pass


class Captured(Mapping[str, SparseFeatures]):
    """Features by name of the SAE; filled while the block runs, readable at any time.

    `captured[name]` has one row for each token computed, ordered by doc_id and position. Every plain forward pass
    adds its rows of the batch as new documents, every call of `generate` adds its rows (times beams or return
    sequences) once. A token computed twice (no cache, prompt lookup) counts once, with its last values; guesses that
    never made it into the text, and the last token generated, which no pass has read, have no row. Padding has none
    either; special tokens and attention sinks have an empty one, unless `special_tokens=True`. `passes(name)` gives
    each pass as it came. In a beam search a document is a place in the beam: its generated rows are what was computed
    there step by step, not the text of one hypothesis. Of activations (batch, height, width, d), as models of images
    have them, position counts the places of a row of the batch.
    """

    def __init__(self, saes: Mapping[str, Callable[[torch.device], SAE]]) -> None:
        self._saes = saes
        self._parts: dict[str, list[_Part]] = {name: [] for name in saes}
        self._documents: dict[str, _Documents] = {name: _Documents() for name in saes}

    def __getitem__(self, name: str) -> SparseFeatures:
        parts = self._parts[name]
        if not parts:
            raise SaeMismatchError(f"no forward pass has reached {name} yet")
        device = parts[0][0].values.device
        final = torch.cat([_final(part) for part in parts]).to(device)
        joined = concatenate([features for features, *_ in parts])
        return joined[_last_of_each(joined, final)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Captured({ {name: len(parts) for name, parts in self._parts.items()} } passes)"

    def passes(self, name: str) -> list[SparseFeatures]:
        """The features of each forward pass, in the order they ran; generated tokens one pass at a time."""
        return [features for features, *_ in self._parts[name]]

    def sink(self, name: str) -> Callable[[Tensor, Tensor, Pass], None]:
        """What the hook calls with (x, chosen, pass)."""

        def take(x: Tensor, chosen: Tensor, now: Pass) -> None:
            if now.generation is not None and now.generation.guesses:
                return  # what the text takes of them is computed again, to be verified
            if now.shape is not None and chosen.numel() != math.prod(now.shape):
                raise SaeAttachError(
                    f"{name} gives activations {tuple(x.shape)} for tokens {now.shape}; capture needs one a token"
                )
            first = self._documents[name].first(now, x)
            features, column = _features(self._saes[name](x.device), x.detach(), chosen, now, first)
            self._parts[name].append((features, first, column, now.generation))

        return take


_Part = tuple[SparseFeatures, int, Tensor, Generation | None]  # of a pass, with its first document and the columns


class _Documents:
    """Numbers documents: a new batch for each plain pass and each call of generate; a cache continued keeps its
    numbers, and so does a module that a pass runs again."""

    def __init__(self) -> None:
        self.base, self.rows, self.generation = 0, 0, None  # type: int, int, Generation | None
        self.last: Pass | None = None

    def first(self, now: Pass, x: Tensor) -> int:
        rows = now.shape[0] if now.shape else x.shape[0] if x.ndim > 2 else 1
        fresh = int(now.start) == 0
        same = now.generation is self.generation if now.generation is not None else not fresh and rows == self.rows
        if not same and now is not self.last:
            self.base += self.rows
        self.rows, self.generation, self.last = rows, now.generation, now
        return self.base


def _features(sae: SAE, x: Tensor, chosen: Tensor, now: Pass, first: int) -> tuple[SparseFeatures, Tensor]:
    """Rows for the tokens of x (..., d) that are not padding, empty where not chosen; and the column of each."""
    flat, at = x.flatten(0, -2), chosen.flatten().nonzero().view(-1)
    indptr, indices, values = sae.encode_sparse(flat[at])
    counts = torch.zeros(len(flat), dtype=indptr.dtype, device=x.device)
    counts[at] = indptr.diff()
    rows = [counts, *_provenance(now, x)]
    if (real := now.keep()) is not None:
        kept = real.to(x.device).flatten().nonzero().view(-1)
        rows = [t[kept] for t in rows]
    counts, doc, position, token, column = rows
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseFeatures(indptr, indices, values, sae.d_sae, doc + first, position, token), column


def _provenance(now: Pass, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row of the batch, position, token id and column of each token of x (..., d), flattened."""
    batch = x.shape[0] if x.ndim > 2 else 1
    batch, length = now.shape or (batch, math.prod(x.shape[:-1]) // max(batch, 1))
    rows = torch.arange(batch, device=x.device).repeat_interleave(length)
    if now.shape is None:
        places = torch.arange(length, device=x.device).repeat(batch)
        return rows, places, torch.full_like(rows, -1), places
    ids = torch.full_like(rows, -1) if now.ids is None else now.ids.to(x.device, torch.int64, copy=True).flatten()
    return rows, now.positions(x.device).flatten(), ids, now.columns(x.device).repeat(batch)


def _final(part: _Part) -> Tensor:
    """Which rows of a pass are tokens that the text kept, and that plain decoding would have read."""
    features, first, column, generation = part
    if generation is None:
        return torch.ones_like(column, dtype=torch.bool)
    return generation.read(features.doc_id - first, column)


def _last_of_each(features: SparseFeatures, final: Tensor) -> Tensor:
    """Row numbers, by document and position, of the last time that each token was computed."""
    rows = final.nonzero().flatten()
    if not len(rows):
        return rows
    key = features.doc_id[rows] * (int(features.position.max()) + 1) + features.position[rows]
    key, order = torch.sort(key, stable=True)
    last = torch.cat([key[1:] != key[:-1], torch.ones(1, dtype=torch.bool, device=key.device)])
    return rows[order[last]]
