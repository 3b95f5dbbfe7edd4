"""Features of documents to a folder: shards as they come, the manifest last, and on from where it was cut off.

Every shard is a function of the documents and the settings alone. So any number of processes can write them, one that
was killed leaves whole shards or nothing, and whatever happened the folder ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .documents import Document
from .edits import Edits
from .errors import DataError, SaeFormatError
from .extract import TOKENS_PER_BATCH, TOKENS_PER_PART, Extractor, Part
from .identity import adapters_identity, autocast_identity, model_identity, sae_identity, tokenizer_identity
from .processes import from_first, launched_share, wait_for_all
from .runtime import EditRequest, Request, SpliceRequest, WatchRequest
from .sizes import whole
from .store import FeatureStore, open_features
from .store.claiming import alone, check_ours, claim
from .store.folder import read_manifest
from .store.format import digest, documents_bytes, shard_name, token_checksum
from .store.writing import check_dtype, read_entry, write_manifest, write_shard

Digests = tuple[str, str]  # digests of a part's tokens, and of the documents that begin in it
Entry = dict[str, Any]  # of a shard, in the manifest


def export_features(model: nn.Module, documents: Any, folder: str | Path, *, tokenizer: Any = None,
                    sites: Sequence[str] | None = None, dtype: Literal["float16", "bfloat16", "float32"] = "float16",
                    activations: bool = False, special_tokens: bool = False, window: int | None = None,
                    overlap: int = 0, tokens_per_shard: int = TOKENS_PER_PART,
                    tokens_per_batch: int = TOKENS_PER_BATCH, resume: bool = True,
                    progress: Callable[[int, int], object] = lambda rows, documents: None,
                    **reading: Any) -> FeatureStore:
    """Write the features of all tokens of documents to folder, and open it.

    What `extract_features` takes, and: dtype of the stored values; activations: store x, too; tokens_per_shard: what is
    held in memory at once, and lost by a kill. resume: go on in a folder where this export was begun. progress is told
    of each shard that is there its rows and the number of documents that begin in it. Under `accelerate launch` or
    torchrun each process writes every n-th shard, and all return when the whole is there.

    Raises DataError for a folder that holds something else, or the export of another model, SAE, tokenizer, text or
    setting, or one made with other edits, splices, adapters or another autocast in effect, naming what differs; where
    another export into the folder overtakes this one; and for a value that dtype cannot hold. Raises SaeFormatError for
    a shard that was changed since it was written. What is there stays; but an export that was begun, and has no shard
    yet, gives way to another.
    """
    folder, tokens_per_shard = Path(folder), whole("tokens_per_shard", tokens_per_shard)
    extractor = Extractor(model, sites, activations=activations, special_tokens=special_tokens, window=window,
                          overlap=overlap, tokens_per_part=tokens_per_shard, tokens_per_batch=tokens_per_batch)
    check_dtype(dtype)
    to_come = extractor.parts(documents, tokenizer, **reading)
    first = list(islice(to_come, 1))  # what cannot be read or cut is told before the folder is claimed for it
    rank, processes = launched_share()
    export = claim(folder, _identity(extractor, tokenizer, dtype), tokenizer, resume) if rank == 0 else ""
    shards = _Shards(folder, from_first(export), extractor, dtype, resume)
    for part in chain(first, to_come):
        shards.add(part)
        if part.number % processes == rank:
            shards.make(part)
            progress(part.rows, len(part.documents))
    wait_for_all()
    if rank == 0:
        shards.commit()
    wait_for_all()
    return open_features(folder)


def _identity(extractor: Extractor, tokenizer: Any, dtype: str) -> dict[str, Any]:
    """All that the features depend on, but the text."""
    settings = {"dtype": dtype, "activations": extractor.activations, "special_tokens": extractor.special_tokens,
                "window": extractor.window, "overlap": extractor.overlap,
                "tokens_per_shard": extractor.tokens_per_part, "tokens_per_batch": extractor.tokens_per_batch}
    requests = extractor.saes._runtime.requests()
    edits = Edits(tuple(request.edit for request in requests if isinstance(request, EditRequest)))
    only_some = {"adapters": adapters_identity(extractor.model), "autocast": autocast_identity(extractor.model)}
    return {"model": model_identity(extractor.model), "tokenizer": tokenizer_identity(tokenizer),
            "saes": {slot.name: sae_identity(slot.sae) | {"site": slot.read.key} for slot in extractor.slots},
            "settings": settings, "special_ids": sorted(extractor.saes.special_ids), "edits": edits.to_json(),
            **{key: value for key, value in only_some.items() if value}, **_in_effect(requests)}


def _in_effect(requests: Sequence[Request]) -> dict[str, Any]:
    """The open splices, and the SAEs that these and the open edits compute with, exported or not; {} if none is open.
    What only watches, such as a capture, changes nothing."""
    changing = [request for request in requests if not isinstance(request, WatchRequest)]
    if not changing:
        return {}
    splices = [{"name": request.slot.name, "special_tokens": request.special_tokens,
                "tokens": request.tokens.tolist() if isinstance(request.tokens, Tensor) else request.tokens}
               for request in changing if isinstance(request, SpliceRequest)]
    slots = {request.slot.name: request.slot for request in changing}
    return {"splices": splices,
            "open_saes": {name: sae_identity(slot.sae) | {"site": slot.read.key, "site_out": slot.write.key}
                          for name, slot in slots.items()}}


# --- shards -------------------------------------------------------------------------------------------------

class _Shards:
    """The shards of an export in its folder, part by part of the text."""

    def __init__(self, folder: Path, export: str, extractor: Extractor, dtype: str, resume: bool) -> None:
        """export: sha256 of export.json. Raises SaeFormatError for a manifest that is broken."""
        self.folder, self.export, self.extractor = folder, export, extractor
        self.dtype, self.resume = dtype, resume
        self.texts: list[Digests] = []
        self.mine: dict[int, Entry] = {}
        try:
            self.finished = read_manifest(folder, export, {slot.name for slot in extractor.slots}) or []
        except SaeFormatError as error:
            raise SaeFormatError(f"{error}; delete it to have it made anew from the shards") from error

    def add(self, part: Part) -> None:
        """Tell which text comes next, whoever makes its shard."""
        self.texts.append((token_checksum(*part.origins()), digest(documents_bytes(_lines(part)))))

    def make(self, part: Part) -> None:
        """Write the shard of a part that was added, unless it is there and this export goes on."""
        there = self._present(part.number) if self.resume else None
        self.mine[part.number] = there or self._written(part)

    def commit(self) -> None:
        """Write the manifest over all shards. Raises DataError where another process did not write one of its own."""
        if (self.folder / shard_name(len(self.texts))).exists():
            raise DataError(f"{self.folder} holds shards of a longer text ({shard_name(len(self.texts))}); give all of "
                            "it, or a new folder")
        entries = [self.mine.get(number) or self._present(number) for number in range(len(self.texts))]
        if None in entries:
            raise DataError(f"{self.folder / shard_name(entries.index(None))} is missing: was its process stopped? Run "
                            "it again")
        with alone(self.folder):
            check_ours(self.folder, self.export)
            write_manifest(self.folder, [entry for entry in entries if entry is not None])

    def _present(self, number: int) -> Entry | None:
        """The entry of a shard that is there. Raises DataError if it is of another text, SaeFormatError if it is
        broken, or not the one that the manifest of a finished export states: a new manifest would state it."""
        entry = read_entry(self.folder, number, self.export)
        if entry is None:
            return None
        path, (tokens, documents) = self.folder / shard_name(number), self.texts[number]
        if (entry["tokens"], entry["documents_sha256"]) != (tokens, documents):
            what = "tokens" if entry["tokens"] != tokens else "columns, or turns of other roles,"
            raise DataError(f"{path} was made of other documents: their {what} differ. Give the same text, or a new "
                            "folder")
        if number < len(self.finished) and entry["sha256"] != self.finished[number]["sha256"]:
            raise SaeFormatError(f"{path} was changed since it was written: its sha256 is not the manifest's. Delete "
                                 "the shard, and run the export again to have it written again")
        return entry

    def _written(self, part: Part) -> Entry:
        found = self.extractor.run(part)
        with alone(self.folder):
            check_ours(self.folder, self.export, shard_name(part.number))
            return write_shard(
                self.folder, part.number, export=self.export, first_row=part.first_row, features=found.features,
                ordinary=found.ordinary, activations=found.activations, documents=_lines(part), dtype=self.dtype)


def _lines(part: Part) -> list[dict[str, Any]]:
    """Of the documents that begin in a part, for its documents file."""
    return [_line(document) for document in part.documents]


def _line(d: Document) -> dict[str, Any]:
    """Where some tokens get no row, with a digest of all that the model reads of the document."""
    line = {"doc_id": d.number, "tokens": len(d.ids), "columns": dict(d.columns)}
    return line if d.wanted is None else line | {"ids": digest(d.ids.astype("<i4").tobytes())}
