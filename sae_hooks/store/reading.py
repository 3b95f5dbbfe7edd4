"""open_features and FeatureStore: what a finished export holds, read as little as is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..extras import needed
from ..sizes import whole
from ..sparse import SparseFeatures
from ..statistics import FeatureStatistics, feature_statistics
from . import contexts, convert, pooling
from .contexts import Context
from .folder import ShardFolder
from .shards import Array

if TYPE_CHECKING:
    from datasets import Dataset
    from scipy.sparse import csr_matrix

How = Literal["max", "mean", "sum", "last", "any"]
Rows = int | slice | Sequence[int] | Array | Tensor


def open_features(folder: str | Path) -> FeatureStore:
    """Open what `export_features` wrote. Milliseconds, whatever its size: two JSON files and the sizes of the others.

    Raises SaeNotFoundError if it holds no export, SaeFormatError if the export is not finished or a file is missing, of
    another size or of another export (the content of a shard is looked at when it is first used; `verify` reads all).
    """
    return FeatureStore(ShardFolder(Path(folder).absolute()))


class FeatureStore:
    """Features of many tokens on disk: a row a token, in order of document and position; `len` is their number.

    Shards are mapped into memory, and what is returned is copied: it stays good if the files go. Every method takes
    site=: the name of an SAE or the end of one that is unique, None where there is one only; else SiteError lists them.
    Activations are returned in float32. Pickled, it is the folder's path, opened anew. IndexError for rows, features
    and documents that are not there; SaeFormatError for a shard that is missing, cut, swapped or foreign.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return self._folder.rows

    def __repr__(self) -> str:
        folder = self._folder
        nonzeros = {name: sum(entry["nonzeros"][name] for entry in folder.entries) for name in folder.saes}
        saes = [f"{name} ({sae['d_sae']} features, {nonzeros[name] / max(len(self), 1):.1f} active per token)"
                for name, sae in folder.saes.items()]
        size = f"{len(self)} tokens of {self.documents} documents"
        return f"FeatureStore({str(folder.path)!r}: {size}; {', '.join(saes)})"

    @property
    def export(self) -> dict[str, Any]:
        """What export.json says: model, tokenizer, SAEs, settings."""
        return self._folder.export

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the SAEs."""
        return tuple(self._folder.saes)

    @property
    def documents(self) -> int:
        """Number of documents, also those without tokens."""
        return self._folder.documents

    def d_sae(self, site: str | None = None) -> int:
        """Number of features of an SAE."""
        return int(self._folder.saes[self._folder.name(site)]["d_sae"])

    def verify(self) -> None:
        """Read every byte and compare it with the manifest's hashes. Raises SaeFormatError naming what differs."""
        self._folder.verify()

    # --- rows ---

    def rows(self, index: Rows, site: str | None = None) -> SparseFeatures:
        """Features of rows: a number, a slice, several numbers in any order, or booleans (rows,)."""
        name, numbers = self._folder.name(site), self._numbers(index)
        if isinstance(numbers, range):
            return self._folder.copy(name, numbers.start, numbers.stop)
        return self._folder.gather(name, numbers)

    def shards(self, site: str | None = None) -> Iterator[SparseFeatures]:
        """All rows, a shard at a time: for stores larger than memory."""
        name = self._folder.name(site)
        bounds = self._folder.first_rows.tolist()
        return (self._folder.copy(name, start, stop) for start, stop in pairwise(bounds))

    def csr(self, site: str | None = None) -> csr_matrix:
        """All features as a scipy CSR matrix (rows, d_sae), float32: 8 bytes a non-zero. Raises DataError without scipy
        (the extra `probes`)."""
        csr_matrix = needed("scipy.sparse").csr_matrix
        indptr, indices, values = self._arrays(self._folder.name(site), np.int32)
        return csr_matrix((values, indices, indptr), shape=(len(self), self.d_sae(site)))

    def torch(self, site: str | None = None) -> Tensor:
        """All features as a torch sparse CSR tensor (rows, d_sae), float32: 12 bytes a non-zero."""
        indptr, indices, values = map(torch.from_numpy, self._arrays(self._folder.name(site), np.int64))
        return torch.sparse_csr_tensor(indptr, indices, values, size=(len(self), self.d_sae(site)),
                                       check_invariants=False)

    def activations(self, site: str | None = None, index: Rows = slice(None)) -> Array:
        """The site's raw activations (rows, d_in) in float32, of the rows of an index as in `rows`. Raises DataError
        if the export did not keep them."""
        name, numbers = self._folder.name(site), self._numbers(index)
        found = np.empty((len(numbers), self._folder.saes[name]["d_in"]), dtype=np.float32)
        if isinstance(numbers, range):
            done = 0
            for shard, first, last in self._folder.parts(numbers.start, numbers.stop):
                found[done : done + last - first] = pooling.raw(shard, name, slice(first, last))
                done += last - first
            return found
        shard_of = np.searchsorted(self._folder.first_rows, numbers, side="right") - 1
        for number in np.unique(shard_of):
            rows = numbers[shard_of == number] - self._folder.first_rows[number]
            found[shard_of == number] = pooling.raw(self._folder.shard(int(number)), name, rows)
        return found

    # --- documents ---

    def pooled(self, how: How, site: str | None = None, of: Literal["features", "activations"] = "features") -> Any:
        """One row a document, also for empty ones (zeros): scipy CSR (documents, d_sae), or with of="activations" an
        array (documents, d_in); float32.

        how: "max", "mean" and "sum" over the document's ordinary tokens, "last" the last of them, "any" 1 where a
        feature fires at all. Special tokens and attention sinks never count. Sums are made in float64. Raises DataError
        for another word, if the export kept no activations, or for features without scipy (the extra `probes`).
        """
        if of not in ("features", "activations"):
            raise DataError(f"of={of!r}: expected features or activations")
        pool = pooling.pool_features if of == "features" else pooling.pool_activations
        return pool(self._folder, self._folder.name(site), how)

    def labels(self, name: str) -> list[Any]:
        """A column of the documents, one value each, None where a document lacks it. Raises DataError listing the
        columns if none has it."""
        columns = [document["columns"] for number in range(len(self._folder.entries))
                   for document in self._folder.documents_of(number)]
        known = {key for column in columns for key in column}
        if not isinstance(name, str) or name not in known:
            raise DataError(f"no document has {name!r}; columns: {', '.join(sorted(known)) or 'none'}")
        return [column.get(name) for column in columns]

    def document_text(self, doc_id: int) -> str:
        """The text of a document's rows, special tokens included. Raises DataError without a tokenizer."""
        number = _found(doc_id, self.documents, "document")
        start, stop = (self._folder.first_row_of(document) for document in (number, number + 1))
        if stop == start:
            return ""
        return contexts.decode(self._tokenizer, contexts.provenance(self._folder, start, stop)[2])

    # --- features ---

    def column(self, feature: int, site: str | None = None) -> tuple[Array, Array]:
        """All tokens on which a feature fires: rows (n) int64, ascending, and activations (n) float32.

        Reads 2 bytes a non-zero of the store: some 36 ms of CPU time for a million tokens at an L0 of 60.
        """
        name = self._folder.name(site)
        feature = self._feature(feature, name)
        found = [contexts.column_of(self._folder.shard(number), name, feature)
                 for number in range(len(self._folder.entries))]
        rows = [rows + first for (rows, _), first in zip(found, self._folder.first_rows, strict=False)]
        return (np.concatenate([np.zeros(0, dtype=np.int64), *rows]),
                np.concatenate([np.zeros(0, dtype=np.float32), *(values for _, values in found)]))

    def top(self, feature: int, n: int = 10, site: str | None = None, context: int = 10) -> list[Context]:
        """The contexts in which a feature is strongest, strongest first: at most one of each document, so fewer than n
        where it fires in fewer; each with up to `context` tokens on each side. Raises DataError without a tokenizer,
        and for an n or a context below 0."""
        name, n, context = self._folder.name(site), whole("n", n, 0), whole("context", context, 0)
        best = contexts.strongest(self._folder, name, self._feature(feature, name), n)
        return [contexts.context_of(self._folder, self._tokenizer, row, context, value) for value, row in best]

    def text(self, row: int, context: int = 10) -> Context:
        """The token of one row (-1 is the last) with up to `context` tokens of its document on each side. Raises
        DataError without a tokenizer, and for a context below 0."""
        context, row = whole("context", context, 0), _found(row, len(self), "row", least=-len(self)) % len(self)
        return contexts.context_of(self._folder, self._tokenizer, row, context)

    def statistics(self, site: str | None = None) -> FeatureStatistics:
        """How often and how strongly each feature fires over the ordinary tokens; see `FeatureStatistics`."""
        name = self._folder.name(site)
        tokens = sum(int(shard.entries[name].ordinary[a:b].sum()) for shard, a, b in self._folder.parts())
        return feature_statistics(lambda: self.shards(name), tokens, self.d_sae(name))

    # --- other formats ---

    def to_parquet(self, path: str | Path, site: str | None = None) -> None:
        """Write all rows to a Parquet file: doc_id, position, token_id, indices (list), values (list, float32).
        Raises DataError without pyarrow (the extra `probes`)."""
        convert.write_parquet(self._folder, self._folder.name(site), Path(path))

    def to_dataset(self, site: str | None = None) -> Dataset:
        """All rows as a `datasets.Dataset` with the columns of `to_parquet`, memory-mapped from datasets' cache folder,
        where a copy is written at the first call. Raises DataError without datasets (the extra `train`)."""
        return convert.as_dataset(self._folder, self._folder.name(site))

    @cached_property
    def _tokenizer(self) -> Any:
        return contexts.load_tokenizer(self._folder)

    def _feature(self, feature: int, name: str) -> int:
        return _found(feature, self.d_sae(name), "feature", f" at {name}")

    def _numbers(self, index: Rows) -> range | Array:
        """Row numbers from 0: a range with step 1, or an array."""
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            return chosen if chosen.step == 1 else np.array(chosen, dtype=np.int64)
        numbers: Array = np.atleast_1d(np.asarray(index))
        if numbers.dtype == bool:
            if numbers.shape != (len(self),):
                raise IndexError(f"{numbers.size} booleans for {len(self)} rows")
            return np.flatnonzero(numbers)
        numbers = numbers.astype(np.int64) if numbers.size == 0 else numbers
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise IndexError(f"rows are whole numbers, a slice or booleans, not {numbers.dtype} {numbers.shape}")
        wrong = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} of {len(self)}")
        return np.where(numbers < 0, numbers + len(self), numbers).astype(np.int64)

    def _arrays(self, name: str, small: type[np.signedinteger[Any]]) -> tuple[Array, Array, Array]:
        """indptr, indices, values of all rows, filled shard by shard."""
        count = sum(entry["nonzeros"][name] for entry in self._folder.entries)
        kind = np.int64 if count >= 2**31 else small
        indptr, indices = np.zeros(len(self) + 1, dtype=kind), np.empty(count, dtype=kind)
        values, row, at = np.empty(count, dtype=np.float32), 0, 0
        for shard, first, last in self._folder.parts():
            entries = shard.entries[name]
            start, stop = (int(pointer) for pointer in entries.indptr[[first, last]])
            indptr[row + 1 : row + 1 + last - first] = entries.indptr[first + 1 : last + 1] + (at - start)
            indices[at : at + stop - start] = entries.checked(start, stop)
            values[at : at + stop - start] = entries.values[start:stop].float().numpy()
            row, at = row + last - first, at + stop - start
        return indptr, indices, values


def _found(value: Any, size: int, what: str, where: str = "", least: int = 0) -> int:
    """The number of one of several. Raises IndexError if there is none of that number."""
    with suppress(DataError):
        if (number := whole(what, value, least)) < size:
            return number
    raise IndexError(f"{what} {value!r} of {size}{where}; give one whole number, {least} to {size - 1}")
