"""Streams: shuffled batches of a model's activations, which a training reads and can go on reading after a stop.

A `CachedStream` reads shards on disk (shards.py); a `LiveStream` (live.py) runs the model on text as it goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sae_hooks.errors import CheckpointError, DataError
from sae_hooks.sizes import whole

from .harvest import SiteInfo
from .shards import Shards

CHUNK_ROWS = 256  # read together: some 300 KB at width 576, enough for a disk to be quick
POOL_CHUNKS = 4096  # shuffled together, so that about a million rows are hot at a time

State = dict[str, Tensor | int | float | str]
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


class Stream(Protocol):
    """What a training reads: the activations of one or several sites of one model."""

    @property
    def sites(self) -> Mapping[str, SiteInfo]:
        """The sites, in the order of the batches' keys."""

    @property
    def model_name(self) -> str:
        """The model that the activations are of."""

    def check_left(self, size: int) -> None:
        """Raise DataError when fewer than `size` rows are left. Takes none."""

    def next(self, size: int) -> dict[str, Tensor]:
        """{site: float32 (size, d_in)}: activations / rms_norm, shuffled, row i of all sites from the same token.

        Raises what `check_left` does, and takes no row then.
        """

    def state_dict(self) -> State:
        """All that the next batches depend on; later batches leave it as it is."""

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Go on where the stream that gave `state` stood: bit-equal batches. Raises CheckpointError if it read
        another source."""


class _Order:
    """The rows 0 ... n - 1, shuffled anew for each epoch: a function of (seed, epoch) that needs little memory.

    Chunks of neighbouring rows are shuffled, and then the rows of each pool of chunks: up to a pool's million rows
    that is a uniform permutation, and beyond it the reads stay within a pool's pages.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._chunks: tuple[int, Rows, Rows] | None = None
        self._pool: tuple[tuple[int, int], Rows] | None = None

    def take(self, epoch: int, start: int, stop: int) -> Rows:
        """The rows at places start ... stop - 1 of an epoch's order."""
        chunks, starts = self._epoch(epoch)
        first, last = np.searchsorted(starts, (start, stop - 1), side="right") - 1
        parts = []
        for pool in range(int(first), int(last) + 1):
            offset = int(starts[pool])
            parts.append(self._rows(epoch, pool, chunks)[max(0, start - offset) : stop - offset])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> tuple[Rows, Rows]:
        """(chunks in their order, the place at which each pool starts)."""
        if self._chunks is None or self._chunks[0] != epoch:
            chunks = np.random.default_rng((self.seed, epoch)).permutation(-(-self.rows // CHUNK_ROWS))
            sizes = np.minimum(CHUNK_ROWS, self.rows - chunks * CHUNK_ROWS)
            starts = (np.cumsum(sizes) - sizes)[::POOL_CHUNKS]
            self._chunks = epoch, chunks, starts
        return self._chunks[1:]

    def _rows(self, epoch: int, pool: int, chunks: Rows) -> Rows:
        if self._pool is None or self._pool[0] != (epoch, pool):
            mine = chunks[pool * POOL_CHUNKS : (pool + 1) * POOL_CHUNKS]
            rows = (mine[:, None] * CHUNK_ROWS + np.arange(CHUNK_ROWS)).ravel()
            rows = np.random.default_rng((self.seed, epoch, pool)).permutation(rows[rows < self.rows])
            self._pool = (epoch, pool), rows
        return self._pool[1]


class _Epochs:
    """Epochs over rows that may become more: what is new comes after the rest of the epoch in which it is met, shuffled
    among itself, and from the next epoch on among all. `ends`: (epoch, rows) from when on there are so many."""

    def __init__(self, ends: Sequence[tuple[int, int]], seed: int) -> None:
        self.ends, self.seed = list(ends), seed
        self._orders: dict[int, _Order] = {}

    def rows(self, epoch: int) -> int:
        """How many an epoch has."""
        return self._bounds(epoch)[-1]

    def take(self, epoch: int, start: int, stop: int) -> Rows:
        """The rows at places start ... stop - 1 of an epoch's order."""
        bounds, parts = self._bounds(epoch), []
        for first, end in pairwise(bounds):
            begin, until = max(start, first) - first, min(stop, end) - first
            if begin < until:
                parts.append(first + self._order(end - first).take(epoch, begin, until))
        return np.concatenate(parts)

    def _bounds(self, epoch: int) -> list[int]:
        """Where the parts of an epoch's order, which are shuffled apart, begin and end."""
        known = [rows for begun, rows in self.ends if begun < epoch] or [self.ends[0][1]]
        return [0, known[-1], *(rows for begun, rows in self.ends[1:] if begun == epoch)]

    def _order(self, rows: int) -> _Order:
        return self._orders.setdefault(rows, _Order(rows, self.seed))


class CachedStream:
    """Shards on disk as a `Stream`: epochs over all rows, each row once an epoch, in an order of seed and epoch alone.

    Batches run over from one epoch into the next. Nothing but the order of a million rows is held in memory: the
    shards are mapped, and many processes may read them at once. A stream that goes on where another one stood may have
    more shards after those: their rows come at the end of that epoch, and the scale stays what it was.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path], sites: Sequence[str] | None = None, *,
                 seed: int = 0, epochs: int | None = 1, share: tuple[int, int] = (0, 1),
                 max_tokens: int | None = None, device: str | torch.device = "cpu") -> None:
        """Map the shards of `sites` (None: all that there are) in one or several folders of the same model.

        epochs: None repeats without end. share (i, n): batches are rows i, i + n, ... of the whole stream's, so that
        n ranks make up each batch together; their positions are equal. max_tokens: only the first so many rows.
        device: where the batches come out. Raises DataError for shards that are broken, missing or don't belong
        together, and for numbers that cannot be.
        """
        self.epochs, self._share = checked_epochs(epochs), checked_share(share)
        most, seed = max_tokens if max_tokens is None else whole("max_tokens", max_tokens), whole("seed", seed, least=0)
        paths = [Path(folders)] if isinstance(folders, str | Path) else [Path(f) for f in folders]
        names = _sites_in(paths[0]) if sites is None else list(sites)
        found = [{name: Shards(path / name) for name in names} for path in paths]
        for shards in found:
            _check_together(shards, found[0])
        common = {name: [_common(shards, name) for shards in found] for name in names}
        self._infos = {name: [shards[name].info for shards in found] for name in names}
        self._parts = {name: [x for parts in folders for x in parts.values()] for name, folders in common.items()}
        self._names = [name for parts in common[names[0]] for name in parts]
        self._ends = np.cumsum([len(x) for x in self._parts[names[0]]])
        self._folder_ends = np.cumsum([sum(map(len, parts.values())) for parts in common[names[0]]])
        self.model_name = found[0][names[0]].info.model_name
        self.rows = min(int(self._ends[-1]), most or int(self._ends[-1]))
        self._device = torch.device(device)
        self._order, self._epoch, self._place = _Epochs([(0, self.rows)], seed), 0, 0
        self.sites: Mapping[str, SiteInfo] = self._measured(self.rows)

    def check_left(self, size: int) -> None:
        """Raise DataError when fewer than `size` rows of the whole stream are left."""
        whole("size", size)
        if self.epochs is None:
            return
        counts = [self._order.rows(epoch) for epoch in range(max(self.epochs, self._epoch))]
        seen = sum(counts[:self._epoch]) + self._place
        if (left := max(0, sum(counts) - seen)) < size:
            raise DataError(
                f"the activations ended: {seen:,} tokens were read, each of {self.rows:,} up to {self.epochs} times, "
                f"and the {left:,} left do not fill a batch of {size:,}. Harvest more into the same folder, or read "
                "them again with epochs= (None: without end); the same training then goes on"
            )

    def next(self, size: int) -> dict[str, Tensor]:
        """{site: float32 (size, d_in)} on the stream's device, or this share of it; see `Stream.next`."""
        self.check_left(size)
        rows = self._advance(size)[self._share[0] :: self._share[1]]
        sorter = np.argsort(rows, kind="stable")
        back = torch.from_numpy(np.argsort(sorter)).to(self._device)
        return {name: info.normalised(_gather(self._parts[name], self._ends, rows[sorter]).to(self._device)[back]
                                      .float()) for name, info in self.sites.items()}

    def state_dict(self) -> State:
        """Its place, which is the same in every share."""
        return {"epoch": self._epoch, "place": self._place, "rows": json.dumps(self._order.ends),
                "source": self._source(self._order.ends)}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Go on at another stream's place; see `Stream.load_state_dict`. What it read must stand first here: the rows
        after that, of shards that were harvested since, come at the end of its epoch."""
        ends = [(int(epoch), int(rows)) for epoch, rows in json.loads(str(state.get("rows", "[]")))]
        if not ends or ends[-1][1] > self.rows or state["source"] != self._source(ends):
            raise CheckpointError(
                f"the training that is to go on read other activations than the first of these {self.rows:,} rows of "
                f"{', '.join(self.sites)}: give the same folders, sites, seed and max_tokens, or start anew. More "
                "shards may only come after those that it read"
            )
        self._epoch, self._place = int(state["epoch"]), int(state["place"])
        self._order, self.sites = _Epochs(ends, self._order.seed), self._measured(ends[0][1])
        if self.rows > ends[-1][1]:
            self._grow()

    def _grow(self) -> None:
        if self._epoch and not self._place:  # else what is new would miss the epoch that has just ended
            self._epoch, self._place = self._epoch - 1, self._order.rows(self._epoch - 1)
        self._order.ends.append((self._epoch, self.rows))

    def _measured(self, rows: int) -> dict[str, SiteInfo]:
        """The scale of the first rows: one that changed on the way would make other features of the same weights."""
        weights = np.diff(np.minimum(self._folder_ends, rows), prepend=0)
        return {name: _joined([info.measured for info in infos], weights) for name, infos in self._infos.items()}

    def _source(self, ends: Sequence[tuple[int, int]]) -> str:
        """Of all that the rows before the last of `ends`, and their order, depend on."""
        rows = ends[-1][1]
        shards, folders = (int(np.searchsorted(all_, rows)) + 1 for all_ in (self._ends, self._folder_ends))
        infos = {name: found[:folders] for name, found in self._infos.items()}
        read = [*zip(self._names[:shards], np.minimum(self._ends, rows).tolist(), strict=False)]
        return _digest((self._order.seed, list(ends), infos, read))

    def _advance(self, size: int) -> Rows:
        """The next `size` rows of the whole stream, across epochs."""
        parts = []
        while size:
            rows = self._order.rows(self._epoch)
            stop = min(self._place + size, rows)
            parts.append(self._order.take(self._epoch, self._place, stop))
            size -= stop - self._place
            self._epoch, self._place = (self._epoch + 1, 0) if stop == rows else (self._epoch, stop)
        return np.concatenate(parts)


def checked_epochs(epochs: int | None) -> int | None:
    """As it is, plain. Raises DataError for what is neither None nor a whole number above 0."""
    return None if epochs is None else whole("epochs", epochs)


def checked_share(share: tuple[int, int]) -> tuple[int, int]:
    """As it is, plain. Raises DataError for what is not the i-th of n parts, counted from 0."""
    if isinstance(share, tuple | list) and len(share) == 2:
        i, n = whole("share[0]", share[0], least=0), whole("share[1]", share[1])
        if i < n:
            return i, n
    raise DataError(f"share must be (i, n), with i from 0 to n - 1; got {share!r}")


def _gather(parts: Sequence[Tensor], ends: Rows, rows: Rows) -> Tensor:
    """The sorted rows of parts laid end to end (ends: where each ends), in the parts' dtype."""
    out = torch.empty(len(rows), parts[0].shape[1], dtype=parts[0].dtype)
    bounds = np.searchsorted(rows, ends)
    start = 0
    for part, first, stop in zip(parts, ends - [len(p) for p in parts], bounds, strict=True):
        if stop > start:
            index = torch.from_numpy(rows[start:stop] - first)
            torch.index_select(part, 0, index, out=out[start:stop])
            start = stop
    return out


def _sites_in(folder: Path) -> list[str]:
    found = sorted(path.parent.name for path in folder.glob("*/harvest.json"))
    if not found:
        raise DataError(f"{folder} holds no harvest: expected a folder for each site, with harvest.json and shards")
    return found


def _common(shards: Mapping[str, Shards], site: str) -> dict[str, Tensor]:
    """The site's shards that every site has, by name; a harvest that is being made may have one more at some."""
    names = set.intersection(*(set(s.names) for s in shards.values()))
    return {name: x for name, x in zip(shards[site].names, shards[site].parts, strict=True) if name in names}


def _check_together(shards: Mapping[str, Shards], others: Mapping[str, Shards]) -> None:
    """Raise DataError unless the sites' rows are of the same tokens, and of the same model as the other folder's."""
    lengths = {site: [len(x) for x in _common(shards, site).values()] for site in shards}
    stated = {s.info.sites for s in shards.values() if s.info.sites}
    apart = len({tuple(n) for n in lengths.values()}) > 1 or any(set(shards) - set(sites) for sites in stated)
    if apart or len(stated) > 1 or not sum(next(iter(lengths.values()))):
        counts = ", ".join(f"{site}: {sum(n):,} rows in {len(n)} shards" for site, n in lengths.items())
        raise DataError(f"the sites' rows are not of the same tokens ({counts}); harvest them together")
    for site, s in shards.items():
        here, there = ((i.model_name, i.d_in) for i in (s.info, others[site].info))
        if here != there:
            raise DataError(f"the folders hold harvests of different models: {site} is of {there} and of {here}")


def _joined(infos: Sequence[SiteInfo], weights: Rows) -> SiteInfo:
    """One scalar for several harvests of a site: the root mean square of all their rows, of which there are weights."""
    if len(infos) == 1:
        return infos[0]
    rms = float(np.sqrt(np.average([i.rms_norm**2 for i in infos], weights=weights)))
    typical = float(np.average([i.typical_norm for i in infos], weights=weights))
    return SiteInfo(d_in=infos[0].d_in, rms_norm=rms, typical_norm=typical)


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
