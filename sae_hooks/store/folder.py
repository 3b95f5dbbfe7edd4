"""The shards of a finished export as one table of rows, by document and position; mapped as they are needed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import SaeFormatError, SaeNotFoundError, SiteError
from ..sparse import SparseFeatures, concatenate
from .format import (
    EXPORT,
    MANIFEST,
    digest,
    documents_name,
    file_digest,
    naming,
    parse_documents,
    read_object,
    shard_name,
)
from .shards import Array, Shard
from .writing import read_export

MAPPED = 8  # shards held mapped, so that reading a large store keeps few of its pages
AT_ONCE = 4096  # rows of a part: some 250,000 entries at an L0 of 60
LEAST_ROW, LEAST_ENTRY = 12, 4  # bytes that a row and a non-zero take in a shard, at least
LEAST_LINE = len('{"columns": {}, "doc_id": 0, "tokens": 0}\n')
ENTRY = {"rows": int, "documents": int, "bytes": int, "sha256": str, "documents_sha256": str, "tokens": str,
         "nonzeros": dict}


class ShardFolder:
    """A finished export. rows, documents: numbers of them; saes: what export.json says of each; first_rows
    (shards + 1): the number of each shard's first row, and the number of rows.

    Opening reads the two JSON files and the sizes of all others. Raises SaeNotFoundError, and SaeFormatError for an
    export that is not finished, or of which a file is missing or of another size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.export, self.export_digest = _read_export(path)
        self.saes: dict[str, dict[str, Any]] = self.export["saes"]
        self.entries = _read_entries(path, self.export_digest, set(self.saes))
        self.first_rows = np.cumsum([0, *(entry["rows"] for entry in self.entries)])
        self.first_documents = np.cumsum([0, *(entry["documents"] for entry in self.entries)])
        self.shard = lru_cache(maxsize=MAPPED)(self._map)
        self._filled = [number for number, entry in enumerate(self.entries) if entry["rows"]]
        self._last_document = lru_cache(maxsize=None)(lambda number: int(self.shard(number).doc_id[-1]))

    def __reduce__(self) -> tuple[type[ShardFolder], tuple[Path]]:
        """For pickle: opened anew where it is unpickled."""
        return ShardFolder, (self.path,)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.first_rows[-1])

    @property
    def documents(self) -> int:
        """Number of documents, also empty ones."""
        return int(self.first_documents[-1])

    def name(self, site: str | None) -> str:
        """The SAE meant by a name or site, or by the end of one that only one has; None: the only one. Raises
        SiteError."""
        ends = [name for name, sae in self.saes.items()
                if site is None or any(full == site or full.endswith(f".{site}") for full in (name, sae["site"]))]
        found = [site] if site in self.saes else ends
        if len(found) != 1:
            asked = "several SAEs, so say which" if site is None else f"{len(found)} SAEs at {site!r}"
            raise SiteError(f"the features in {self.path} are of {asked}: {', '.join(self.saes)}")
        return str(found[0])

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Shard, int, int]]:
        """Rows start to stop (all) as (shard, first, last): rows first to last of that shard, AT_ONCE at most."""
        stop = self.rows if stop is None else stop
        number = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        while start < stop:
            base, end = (int(row) for row in self.first_rows[number : number + 2])
            for first in range(start - base, min(stop, end) - base, AT_ONCE):
                yield self.shard(number), first, min(first + AT_ONCE, min(stop, end) - base)
            start, number = max(start, end), number + 1

    def first_row_of(self, document: int) -> int:
        """The first row whose document is this one or a later one: where it starts, and the one before it stops."""
        place = bisect_left(self._filled, document, key=self._last_document)
        if place == len(self._filled):
            return self.rows
        number = self._filled[place]
        return int(self.first_rows[number] + np.searchsorted(self.shard(number).doc_id, document))

    def copy(self, name: str, start: int, stop: int) -> SparseFeatures:
        """Rows start to stop of an SAE, as copies."""
        parts = [copied(shard, name, first, last) for shard, first, last in self.parts(start, stop)]
        return concatenate(parts) if parts else _no_rows(self.saes[name]["d_sae"])

    def gather(self, name: str, numbers: Array) -> SparseFeatures:
        """The rows of these numbers (from 0, in any order, repeated or not), as copies."""
        order = np.argsort(numbers, kind="stable")
        shard_of = np.searchsorted(self.first_rows, numbers[order], side="right") - 1
        parts = [picked(self.shard(int(number)), name, numbers[order][shard_of == number] - self.first_rows[number])
                 for number in np.unique(shard_of)]
        if not parts:
            return _no_rows(self.saes[name]["d_sae"])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return concatenate(parts)[torch.from_numpy(back)]

    def documents_of(self, number: int) -> list[dict[str, Any]]:
        """The documents that begin in a shard. Raises SaeFormatError if the file is not the one that was written."""
        path = self.path / documents_name(number)
        _size(path)
        raw = path.read_bytes()
        with naming(path):
            if digest(raw) != self.entries[number]["documents_sha256"]:
                raise SaeFormatError("not the file that was written: its sha256 is another")
            documents = parse_documents(raw)
            first, count = int(self.first_documents[number]), self.entries[number]["documents"]
            if len(documents) != count or (documents and documents[0]["doc_id"] != first):
                raise SaeFormatError(f"expected {count} documents from number {first} on")
        return documents

    def verify(self) -> None:
        """Read every byte and compare it with the manifest. Raises SaeFormatError naming the first file that differs.

        A second for some 500 MB.
        """
        for number, entry in enumerate(self.entries):
            path = self.path / shard_name(number)
            with naming(path):
                if file_digest(path) != entry["sha256"]:
                    raise SaeFormatError("not the file that was written: its sha256 is another")
            self.shard(number).check_content()
            self.documents_of(number)
        if (beyond := self.path / shard_name(len(self.entries))).exists():
            raise SaeFormatError(f"{beyond} is there, but the manifest ends before it: an entry was taken out, or a "
                                 "longer export was begun here and not finished")

    def _map(self, number: int) -> Shard:
        entry = self.entries[number]
        path = self.path / shard_name(number)
        _check_size(path, entry["bytes"])
        shard = Shard(path, self.saes)
        shard.check_stated({"shard": number, "export": self.export_digest, "rows": entry["rows"],
                            "first_row": int(self.first_rows[number]), "tokens": entry["tokens"],
                            "documents": entry["documents_sha256"]})
        counts = {name: len(entries.indices) for name, entries in shard.entries.items()}
        if counts != entry["nonzeros"] or (len(shard) and shard.doc_id[-1] >= self.documents):
            raise SaeFormatError(f"{path}: {counts} entries, the manifest says {entry['nonzeros']}; or a document that "
                                 f"is none of the {self.documents}")
        return shard


def copied(shard: Shard, name: str, first: int, last: int) -> SparseFeatures:
    """Rows first to last of a shard with values in float32: copies, good after the file is gone."""
    entries = shard.entries[name]
    start, stop = (int(pointer) for pointer in entries.indptr[[first, last]])
    indices = entries.checked(start, stop).astype(np.int64)
    return _features(shard, slice(first, last), entries.indptr[first : last + 1] - start, indices,
                     entries.values[start:stop].to(torch.float32, copy=True), entries.d_sae)


def picked(shard: Shard, name: str, rows: Array) -> SparseFeatures:
    """Rows of a shard, any, with values in float32: copies."""
    entries = shard.entries[name]
    starts, counts = entries.indptr[rows], entries.indptr[rows + 1] - entries.indptr[rows]
    indptr = np.concatenate([[0], counts.cumsum()])
    at = np.repeat(starts - indptr[:-1], counts) + np.arange(indptr[-1])
    indices = entries.indices[at].astype(np.int64)
    if indices.size and int(indices.max()) >= entries.d_sae:
        raise SaeFormatError(f"{shard.path}: a feature index of {indices.max()}, d_sae is {entries.d_sae}")
    return _features(shard, rows, indptr, indices, entries.values[torch.from_numpy(at)].float(), entries.d_sae)


def _features(shard: Shard, rows: slice | Array, indptr: Array, indices: Array, values: torch.Tensor, d_sae: int
              ) -> SparseFeatures:
    columns = (torch.from_numpy(column[rows].astype(np.int64))
               for column in (shard.doc_id, shard.position, shard.token_id))
    return SparseFeatures(torch.from_numpy(indptr), torch.from_numpy(indices), values, d_sae, *columns)


def _no_rows(d_sae: int) -> SparseFeatures:
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    return SparseFeatures(none.new_zeros(1), none, none.float(), d_sae, none, none, none)


def _read_export(path: Path) -> tuple[dict[str, Any], str]:
    export = read_export(path)
    if export is None:
        raise SaeNotFoundError(f"{path} holds no features: there is no {EXPORT} in it")
    return export, file_digest(path / EXPORT)


def _read_entries(path: Path, export: str, names: set[str]) -> list[dict[str, Any]]:
    """The manifest's entries, with every file there and of its size."""
    entries = read_manifest(path, export, names)
    if entries is None:
        count = len(list(path.glob("shard-*.safetensors")))
        raise SaeFormatError(f"the export in {path} is not finished: {count} shards are there; run it again with "
                             "resume")
    for number, entry in enumerate(entries):
        _check_size(path / shard_name(number), entry["bytes"])
        least = LEAST_ROW * entry["rows"] + LEAST_ENTRY * sum(entry["nonzeros"].values())
        if least > entry["bytes"] or LEAST_LINE * entry["documents"] > _size(path / documents_name(number)):
            raise SaeFormatError(f"{path / MANIFEST}: says that shard {number} has {entry['rows']} rows and "
                                 f"{entry['documents']} documents, more than its files can hold")
    return entries


def read_manifest(path: Path, export: str, names: set[str]) -> list[dict[str, Any]] | None:
    """The manifest's entries, or None where there is no manifest. export: sha256 of export.json; names: its SAEs.

    Raises SaeFormatError for a broken manifest, or one of another export.
    """
    if not (path / MANIFEST).exists():
        return None
    manifest, _ = read_object(path / MANIFEST)
    with naming(path / MANIFEST):
        entries = manifest.get("shards")
        if manifest.get("export") != export:
            raise SaeFormatError(f"it is not of this export: the sha256 of {EXPORT} is another")
        if not isinstance(entries, list) or not all(_is_entry(entry, names) for entry in entries):
            raise SaeFormatError(f"its shards are not as expected: {', '.join(ENTRY)} of each")
        totals = {key: sum(entry[key] for entry in entries) for key in ("rows", "documents")}
        if wrong := {key: manifest.get(key) for key, total in totals.items() if manifest.get(key) != total}:
            raise SaeFormatError(f"it states {wrong}, its shards have {totals} together: was an entry taken out?")
    return entries


def _is_entry(entry: Any, names: set[str]) -> bool:
    return (isinstance(entry, dict) and set(entry) == set(ENTRY) and set(entry["nonzeros"]) == names
            and all(type(entry[key]) is kind for key, kind in ENTRY.items())
            and all(type(n) is int for n in entry["nonzeros"].values())
            and min(entry["rows"], entry["documents"], *entry["nonzeros"].values()) >= 0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise SaeFormatError(f"{path} is missing; the manifest says that it was written") from None


def _check_size(path: Path, size: int) -> None:
    if (found := _size(path)) != size:
        raise SaeFormatError(f"{path} has {found} bytes, {size} were written: cut short, or another file")
