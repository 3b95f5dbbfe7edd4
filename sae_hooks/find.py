"""Which features tell one kind of text from another?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .errors import DataError, EditError
from .extract import Extracted, Extractor, extract_features
from .sae import SAE
from .sizes import whole

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class FoundFeature:
    """How a feature tells positive texts from negative ones.

    auroc: the chance that a positive text's strongest activation is above a negative one's (half where they are equal;
    a text in which it never fires has 0). contrast: how much more of its direction an average token of the positive
    texts has: the difference of the means, times the norm of its decoder row. mean: its activation on an average
    token, also those where it does not fire; density: share of tokens, and share: share of texts, on which it fires.
    """

    feature: int
    auroc: float
    contrast: float
    mean_positive: float
    mean_negative: float
    density_positive: float
    density_negative: float
    share_positive: float
    share_negative: float


class FoundFeatures(list[FoundFeature]):
    """Features, the best first; prints as a table, each pair of numbers being of positive and negative texts."""

    def __repr__(self) -> str:
        head = ("feature", "AUROC", "contrast", "mean", "", "tokens", "", "texts", "")
        rows = [(str(f.feature), f"{f.auroc:.2f}", f"{f.contrast:.3g}", f"{f.mean_positive:.3g}",
                 f"{f.mean_negative:.3g}", f"{f.density_positive:.2%}", f"{f.density_negative:.2%}",
                 f"{f.share_positive:.0%}", f"{f.share_negative:.0%}") for f in self]
        wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, wide, strict=True)).rstrip()
                         for row in (head, *rows))

    __str__ = __repr__


def find_features(model: nn.Module, positive: Any, negative: Any, *, tokenizer: Any = None, site: str | None = None,
                  n: int = 20, **reading: Any) -> FoundFeatures:
    """The n features that best tell positive texts from negative ones: by auroc in hundredths, then by contrast.

    model has SAEs attached; site: the name of one, where there are several. positive and negative: texts, rows, files
    or data sets, each a document; `extract_features` runs the model over them, and takes the rest (window, limit,
    field, roles, ...). A handful of texts a side is enough to see what stands out; the more alike they are in all but
    what is looked for, the less else stands out. Special tokens and attention sinks never count; an empty text counts
    as one in which nothing fires. Features that never fire on positive texts are left out, so that fewer than n may
    come. Held in memory beside what extract_features holds: 12 bytes for each text and each feature that fires in it.

    Raises EditError where it is not told which SAE is meant, DataError if a side has no ordinary token, SaeAttachError
    without SAEs.
    """
    n = whole("n", n)
    name, sae = _chosen(model, site)

    def side(texts: Any, called: str) -> _Side:
        parts = extract_features(model, texts, tokenizer=tokenizer, sites=[name], **reading)
        return _pooled(parts, name, sae.d_sae, called)

    return _ranked(side(positive, "positive"), side(negative, "negative"), sae, n)


def _chosen(model: nn.Module, site: str | None) -> tuple[str, SAE]:
    """The one SAE that is meant, loaded, and its name."""
    names = list(getattr(model, "saes", ()))
    if site is None and len(names) > 1:
        raise EditError(f"{len(names)} SAEs are attached; say which, by site=: {', '.join(names)}")
    slots = Extractor(model, None if site is None else [site]).slots
    if len(slots) > 1:
        raise EditError(f"site={site!r} means {len(slots)} SAEs: {', '.join(slot.name for slot in slots)}")
    return slots[0].name, slots[0].sae


@dataclass(frozen=True, eq=False)
class _Side:
    """The features of some texts: sums and tokens where it fires (d_sae); features and their strongest activations,
    one for each text in which one fires."""

    texts: int
    tokens: int
    sums: Array
    fires: Array
    features: Array
    strongest: Array

    @property
    def in_texts(self) -> Array:
        """Number of texts in which each feature fires (d_sae)."""
        return np.bincount(self.features, minlength=len(self.sums))


def _pooled(parts: Iterable[Extracted], name: str, d_sae: int, called: str) -> _Side:
    texts, tokens = 0, 0
    sums, fires = np.zeros(d_sae), np.zeros(d_sae, np.int64)
    strongest: list[tuple[Array, Array]] = []
    for part in parts:
        found = part.features[name]
        features, values = found.indices.numpy(), found.values.float().numpy()
        texts += len(part.documents)
        tokens += int(part.ordinary[name].sum())
        sums += np.bincount(features, weights=values, minlength=d_sae)
        fires += np.bincount(features, minlength=d_sae)
        strongest.append(_largest(found.doc_id[found.rows].numpy() * d_sae + features, values))
    if not tokens:
        raise DataError(f"the {called} texts hold no ordinary token (texts: {texts}); give some with words in them")
    keys, values = _largest(*(np.concatenate(column) for column in zip(*strongest, strict=True)))
    return _Side(texts, tokens, sums, fires, keys % d_sae, values)


def _largest(keys: Array, values: Array) -> tuple[Array, Array]:
    """Each key once, in order, with the largest of its values."""
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    last = np.ones(len(keys), bool)
    last[:-1] = keys[1:] != keys[:-1]
    return keys[last], values[last]


def _ranked(positive: _Side, negative: _Side, sae: SAE, n: int) -> FoundFeatures:
    auroc = _auroc(positive, negative)
    means = positive.sums / positive.tokens, negative.sums / negative.tokens
    norms = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float64).cpu().numpy()
    contrast = (means[0] - means[1]) * norms
    columns = (auroc, contrast, *means, positive.fires / positive.tokens, negative.fires / negative.tokens,
               positive.in_texts / positive.texts, negative.in_texts / negative.texts)
    names = list(FoundFeature.__dataclass_fields__)[1:]
    order = np.lexsort((-contrast, -auroc.round(2)))  # finer differences than hundredths are the texts' chance
    best = order[positive.fires[order] > 0][:n]
    return FoundFeatures(
        FoundFeature(feature=int(f), **{name: float(column[f]) for name, column in zip(names, columns, strict=True)})
        for f in best)


def _auroc(positive: _Side, negative: _Side) -> Array:
    """For each feature (d_sae) the share of (positive, negative) pairs of texts that its strongest activation ranks
    rightly, half for a tie: the Mann-Whitney U statistic over the number of pairs."""
    features = np.concatenate([positive.features, negative.features])
    values = np.concatenate([positive.strongest, negative.strongest])
    is_positive = np.arange(len(features)) < len(positive.features)
    order = np.lexsort((values, features))
    features, values, is_positive = features[order], values[order], is_positive[order].astype(np.int64)
    fresh = np.ones(len(features), bool)
    fresh[1:] = (features[1:] != features[:-1]) | (values[1:] != values[:-1])
    starts = fresh.nonzero()[0]
    of, wins = features[starts], np.add.reduceat(is_positive, starts)
    losses = np.diff(np.append(starts, len(features))) - wins
    silent = positive.texts - positive.in_texts, negative.texts - negative.in_texts
    before = negative.in_texts.cumsum() - negative.in_texts
    below = losses.cumsum() - losses - before[of] + silent[1][of]
    both_silent = silent[0] * silent[1] / 2
    won: Array = np.bincount(of, weights=wins * (below + losses / 2), minlength=len(before)) + both_silent
    return won / (positive.texts * negative.texts)
