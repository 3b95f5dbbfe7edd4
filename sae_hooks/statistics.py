"""How often and how strongly each feature fires: measured once over many tokens, kept beside the SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import DataError, SaeFormatError, SaeMismatchError

LEVELS = (0.5, 0.9, 0.99)  # of the quantiles
AT_ONCE = 2**25  # activations sorted at a time: 256 MiB
VALUE_BITS = np.int64(2**32 - 1)


class Features(Protocol):
    """What is read of a `SparseFeatures`."""

    @property
    def indices(self) -> Tensor:
        """(nnz) features."""

    @property
    def values(self) -> Tensor:
        """(nnz) their activations."""

    @property
    def d_sae(self) -> int:
        """Number of features."""


Parts = Callable[[], Iterable[Features]] | Iterable[Features]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """How often and how strongly each feature of an SAE fired over `tokens` ordinary tokens.

    A feature fires where its activation is above 0. frequency (d_sae): share of tokens on which it fires; mean, max
    (d_sae) and quantiles (3, d_sae) at LEVELS: of its activations where it fires, in the SAE's own units, 0 for a
    feature that never fired. A quantile is an activation that occurred: numpy's method "nearest". All are float32 on
    the CPU. Raises SaeMismatchError for tensors that do not fit together, SaeFormatError naming a tensor whose values
    no activations can have.
    """

    tokens: int
    frequency: Tensor
    mean: Tensor
    max: Tensor
    quantiles: Tensor

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_values(self)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.max)

    @property
    def fired(self) -> Tensor:
        """Which features fired at all (d_sae), boolean."""
        return self.max > 0

    def __repr__(self) -> str:
        alive = int(self.fired.sum())
        l0 = float(self.frequency.sum(dtype=torch.float64))
        return f"FeatureStatistics({self.d_sae} features over {self.tokens} tokens: {alive} fired, L0 {l0:.1f})"


def feature_statistics(parts: Parts, tokens: int, d_sae: int) -> FeatureStatistics:
    """The statistics of all rows of `parts`, which hold the features of `tokens` ordinary tokens (and empty rows).

    parts: a function that gives the parts anew at each call, or an iterable; one that can be walked only once (a
    generator) is kept in memory whole. They are walked once to count and sum (in float64), then once for every
    AT_ONCE (2^25) activations, or part of that, to sort them: 256 MiB, or 8 bytes for each time that the most
    frequent feature fires if that is more, besides the parts and 16 bytes a feature. Everything is exact.

    Raises DataError for activations below 0 or not finite, and for a feature that fires on more than `tokens` rows;
    SaeMismatchError if a part is of another d_sae.
    """
    walk = _walker(parts)
    counts, sums = np.zeros(d_sae, np.int64), np.zeros(d_sae)
    for features, values in _fired(walk(), d_sae):
        counts += np.bincount(features, minlength=d_sae)
        sums += np.bincount(features, weights=values, minlength=d_sae)
    if d_sae and counts.max() > tokens:
        raise DataError(f"feature {counts.argmax()} fires on {counts.max()} rows, but there are {tokens} tokens")
    mean, frequency = sums / np.maximum(counts, 1), counts / max(tokens, 1)
    strongest = np.zeros(d_sae, np.float32)
    quantiles = np.zeros((len(LEVELS), d_sae), np.float32)
    for first, stop in _groups(counts):
        ordered = _sorted_values(_fired(walk(), d_sae), first, stop, int(counts[first:stop].sum()))
        _read_off(ordered, counts[first:stop], strongest[first:stop], quantiles[:, first:stop])
    return FeatureStatistics(tokens, _float32(frequency), _float32(mean), _float32(strongest), _float32(quantiles))


def _walker(parts: Parts) -> Callable[[], Iterable[Features]]:
    if callable(parts):
        return parts
    kept = list(parts) if isinstance(parts, Iterator) else parts
    return lambda: kept


def _fired(parts: Iterable[Features], d_sae: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Features (int64) and activations (float32) of each part, without the zeros that a half dtype left behind."""
    for part in parts:
        if part.d_sae != d_sae:
            raise SaeMismatchError(f"features of an SAE of {part.d_sae}, expected {d_sae}")
        features, values = part.indices.cpu().numpy(), part.values.detach().float().cpu().numpy()
        wrong = ~((values >= 0) & (values < np.inf))
        if wrong.any():
            at = int(wrong.argmax())
            raise DataError(f"feature {features[at]} has the activation {values[at]}; they are finite and >= 0")
        above = values > 0
        yield (features, values) if above.all() else (features[above], values[above])


def _groups(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of features (first, stop) that fire AT_ONCE times or less together, or are one feature."""
    ends = counts.cumsum()
    first, total = 0, 0
    while first < len(ends) and ends[-1] > total:
        stop = max(int(np.searchsorted(ends, total + AT_ONCE, side="right")), first + 1)
        yield first, stop
        first, total = stop, int(ends[stop - 1])


def _sorted_values(fired: Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]], first: int, stop: int,
                   number: int) -> npt.NDArray[np.float32]:
    """The activations (number) of features first to stop, by feature and within each from weak to strong.

    The bits of floats above 0 are in the order of the floats, so one sort of (feature, bits) does both.
    """
    keys, filled = np.empty(number, np.int64), 0
    for features, values in fired:
        inside = (features >= first) & (features < stop)
        found = features[inside].astype(np.int64) << 32 | values[inside].view(np.int32)
        keys[filled:filled + len(found)] = found
        filled += len(found)
    keys.sort()
    keys &= VALUE_BITS
    return keys.astype(np.int32).view(np.float32)


def _read_off(ordered: npt.NDArray[np.float32], counts: npt.NDArray[np.int64], strongest: npt.NDArray[np.float32],
              quantiles: npt.NDArray[np.float32]) -> None:
    """Fill in the largest (features) and the quantiles (levels, features) of each run of `ordered`."""
    fires = counts > 0
    number = counts[fires]
    starts = number.cumsum() - number
    strongest[fires] = ordered[starts + number - 1]
    for level, row in zip(LEVELS, quantiles, strict=True):
        row[fires] = ordered[starts + np.rint(level * (number - 1)).astype(np.int64)]


def _float32(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _check_kinds(given: FeatureStatistics) -> None:
    """Raise SaeMismatchError naming each tensor of another shape, dtype or device than FeatureStatistics says."""
    d_sae = given.max.shape[0] if given.max.ndim else 0
    shapes = dict.fromkeys(("frequency", "mean", "max"), (d_sae,)) | {"quantiles": (len(LEVELS), d_sae)}
    wrong = [f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}, expected {shape} torch.float32 on cpu"
             for name, shape in shapes.items() for t in [getattr(given, name)]
             if (tuple(t.shape), t.dtype, t.device.type) != (shape, torch.float32, "cpu")]
    if wrong:
        raise SaeMismatchError("statistics of features: " + "; ".join(wrong))


def _check_values(given: FeatureStatistics) -> None:
    """Raise SaeFormatError for values that no activations can have; NaN fails every comparison."""
    frequency, mean, strongest = given.frequency, given.mean, given.max
    ladder = torch.cat([torch.zeros_like(strongest)[None], given.quantiles, strongest[None]])
    sound = {
        "tokens (a number >= 0)": torch.tensor(given.tokens >= 0, device="cpu"),
        "frequency (0 to 1)": (frequency >= 0) & (frequency <= 1),
        "max (finite; above 0 where frequency is)": (strongest < torch.inf) & ((strongest > 0) == (frequency > 0)),
        "mean (above 0 where max is, and not above it)": (mean <= strongest) & ((mean > 0) == (strongest > 0)),
        "quantiles (from 0 to max, rising)": (ladder.diff(dim=0) >= 0).all(dim=0),
    }
    wrong = [f"{name}: feature {int((~ok).nonzero()[0]) if ok.ndim else '-'}" for name, ok in sound.items()
             if not bool(ok.all())]
    if wrong:
        raise SaeFormatError(f"statistics of features that no activations have: {'; '.join(wrong)}")
