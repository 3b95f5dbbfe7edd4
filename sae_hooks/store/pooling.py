"""One row for each document: its tokens' features, or activations, reduced; memory grows with the result alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..extras import needed
from .folder import ShardFolder
from .shards import Array, Shard

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

HOWS = ("max", "mean", "sum", "last", "any")
CELLS = 2**22  # documents times columns reduced at a time: 32 MiB in float64


def pool_features(folder: ShardFolder, name: str, how: str) -> csr_matrix:
    """(documents, d_sae) float32; at the peak two and a half times the result is held. See FeatureStore.pooled."""
    _check_how(how, HOWS)
    csr_matrix = needed("scipy.sparse").csr_matrix
    d_sae = folder.saes[name]["d_sae"]
    if how == "last":
        rows = _last_rows(folder, name)
        features = folder.gather(name, rows[rows >= 0])
        counts = np.zeros(folder.documents, dtype=np.int64)
        counts[rows >= 0] = features.indptr.diff().numpy()
        parts = [[counts], [features.indices.numpy()], [features.values.numpy()]]
    else:
        blocks = (_reduced(folder, name, how, start, stop) for start, stop in _blocks(folder.documents, d_sae))
        parts = [list(column) for column in zip(*blocks, strict=True)] or [[], [], []]
    counts, indices, values = map(_joined, parts)
    indptr = np.concatenate([[0], counts.cumsum()])
    small = np.int32 if len(indices) < 2**31 else np.int64
    matrix = (values.astype(np.float32, copy=False), indices.astype(small, copy=False), indptr.astype(small))
    return csr_matrix(matrix, shape=(folder.documents, d_sae))


def pool_activations(folder: ShardFolder, name: str, how: str) -> Array:
    """(documents, d_in) float32. See FeatureStore.pooled."""
    _check_how(how, tuple(h for h in HOWS if h != "any"))
    d_in = folder.saes[name]["d_in"]
    pooled = np.zeros((folder.documents, d_in), dtype=np.float32)
    for start, stop in _blocks(folder.documents, d_in):
        cells = np.full((stop - start, d_in), -np.inf if how == "max" else 0.0)
        tokens = np.zeros(stop - start)
        for shard, first, last in _rows_of(folder, start, stop):
            kept = first + np.flatnonzero(shard.entries[name].ordinary[first:last])
            if len(kept):
                _reduce_activations(cells, shard.doc_id[kept].astype(np.int64) - start, raw(shard, name, kept), how)
                np.add.at(tokens, shard.doc_id[kept].astype(np.int64) - start, 1)
        cells[tokens == 0] = 0
        pooled[start:stop] = cells / np.maximum(tokens, 1)[:, None] if how == "mean" else cells
    return pooled


def raw(shard: Shard, name: str, rows: Array | slice) -> Array:
    """Activations (rows, d_in) of rows of a shard, as float64 copies. Raises DataError if none were stored."""
    activations = shard.entries[name].activations
    if activations is None:
        raise DataError(f"{shard.path.parent} has no activations of {name}; export it with activations=True")
    return np.asarray(activations[rows].double().numpy())


def _reduce_activations(cells: Array, documents: Array, x: Array, how: str) -> None:
    """Merge activations x (n, d_in) of documents (n), ascending, into cells (documents, d_in)."""
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    where = documents[starts]
    if how == "max":
        cells[where] = np.maximum(cells[where], np.maximum.reduceat(x, starts, axis=0))
    elif how == "last":
        cells[where] = x[np.append(starts[1:], len(x)) - 1]
    else:
        cells[where] += np.add.reduceat(x, starts, axis=0)


def _reduced(folder: ShardFolder, name: str, how: str, start: int, stop: int) -> tuple[Array, Array, Array]:
    """Features of documents start to stop as (entries in each document, indices, values)."""
    d_sae = folder.saes[name]["d_sae"]
    cells, tokens = np.zeros((stop - start) * d_sae), np.zeros(stop - start)
    for shard, first, last in _rows_of(folder, start, stop):
        entries = shard.entries[name]
        documents = shard.doc_id[first:last].astype(np.int64) - start
        tokens += np.bincount(documents[entries.ordinary[first:last]], minlength=len(tokens))
        begin, end = (int(pointer) for pointer in entries.indptr[[first, last]])
        at = np.repeat(documents * d_sae, np.diff(entries.indptr[first : last + 1])) + entries.checked(begin, end)
        if how == "any":
            cells[at] = 1
        else:
            reduce = np.maximum if how == "max" else np.add
            reduce.at(cells, at, entries.values[begin:end].double().numpy())
    places = np.flatnonzero(cells != 0)  # of booleans: three times as fast as of numbers
    documents, indices = np.divmod(places, d_sae)
    values = cells[places] / tokens[documents] if how == "mean" else cells[places]
    return np.bincount(documents, minlength=stop - start), indices.astype(np.int32), values.astype(np.float32)


def _joined(parts: list[Array]) -> Array:
    """The arrays as one; the list is emptied, so that no more than one column is in memory twice."""
    joined: Array = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    parts.clear()
    return joined


def _last_rows(folder: ShardFolder, name: str) -> Array:
    """The row of each document's last ordinary token (documents), -1 where it has none."""
    rows: Array = np.full(folder.documents, -1)
    base = 0
    for shard, first, last in folder.parts():
        kept = np.flatnonzero(shard.entries[name].ordinary[first:last])
        rows[shard.doc_id[first + kept]] = base + kept  # of rows of the same document, numpy keeps the last
        base += last - first
    return rows


def _rows_of(folder: ShardFolder, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
    return folder.parts(folder.first_row_of(start), folder.first_row_of(stop))


def _blocks(documents: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, CELLS // width)
    return ((start, min(start + step, documents)) for start in range(0, documents, step))


def _check_how(how: Any, known: tuple[str, ...]) -> None:
    if how not in known:
        raise DataError(f"pooled({how!r}): expected one of {', '.join(known)}"
                        + ("; activations do not fire, so any is of features only" if how == "any" else ""))
