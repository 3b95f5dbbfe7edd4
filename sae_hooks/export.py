"""Features of documents to a folder: shards as they come, the manifest last, and on from where it was cut off.

Every shard is a function of the documents and the settings alone. So any number of processes can write them, one that
was killed leaves whole shards or nothing, and whatever happened the folder ends with the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .documents import Document
from .edits import Edits
from .errors import DataError, SaeFormatError
from .extract import TOKENS_PER_BATCH, TOKENS_PER_PART, Extractor, Part
from .identity import (
    adapters_identity,
    autocast_identity,
    differences,
    model_identity,
    sae_identity,
    tokenizer_identity,
)
from .processes import from_first, launched_share, wait_for_all
from .runtime import EditRequest, Request, SpliceRequest, WatchRequest
from .sizes import whole
from .store import FeatureStore, open_features
from .store.folder import read_manifest
from .store.format import EXPORT, MANIFEST, TOKENIZER, digest, document_digest, file_digest, shard_name, token_checksum
from .store.writing import alone, check_dtype, read_entry, read_export, write_export, write_manifest, write_shard

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
    export = from_first(_claim(folder, _identity(extractor, tokenizer, dtype), tokenizer, resume)
                        if rank == 0 else "")
    finished = _finished(folder, export, {slot.name for slot in extractor.slots})
    texts, entries = [], {}
    for part in chain(first, to_come):
        texts.append(_text(part))
        if part.number % processes == rank:
            there = _present(folder, part.number, export, texts[-1], finished) if resume else None
            entries[part.number] = there or _written(folder, part, extractor, export, dtype)
            progress(part.rows, len(part.documents))
    wait_for_all()
    if rank == 0:
        _commit(folder, export, texts, entries)
    wait_for_all()
    return open_features(folder)


# --- the folder ---------------------------------------------------------------------------------------------

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


def _claim(folder: Path, asked: Mapping[str, Any], tokenizer: Any, resume: bool) -> str:
    """Make the folder this export's, or find that it is, and return the sha256 of its export.json. One that was begun,
    and has no shard yet, gives way."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new folder")
    with alone(folder):
        _take(folder, asked, resume)
        if tokenizer is not None and not (folder / TOKENIZER).exists():
            _save_tokenizer(folder, tokenizer)
        return file_digest(folder / EXPORT)


def _take(folder: Path, asked: Mapping[str, Any], resume: bool) -> None:
    """Write export.json, unless it is there already. Raises DataError where that, or what else is there, forbids it."""
    there = read_export(folder)
    other = differences({k: v for k, v in there.items() if k != "format"}, asked) if there else []
    written = (folder / MANIFEST).exists() or any(folder.glob("shard-*.safetensors"))
    if there is None:
        if foreign := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            raise DataError(f"{folder} is not empty ({', '.join(foreign[:5])}) and holds no export; give a new folder")
        write_export(folder, asked)
    elif other and not written:
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        write_export(folder, asked)
    elif other:
        raise DataError(f"{folder} holds another export; give a new folder, or what made that one: {'; '.join(other)}")
    elif written and not resume:
        raise DataError(f"{folder} holds features already; say resume to go on there, or give a new folder")


def _check_ours(folder: Path, export: str, shard: str | None = None) -> None:
    """Raise DataError where another export has taken the folder, or written the shard that is to come."""
    ours = (folder / EXPORT).exists() and file_digest(folder / EXPORT) == export
    if not ours or (shard and (folder / shard).exists()):
        what = f"{shard} is there already" if ours else f"{EXPORT} is another one"
        raise DataError(f"this export was overtaken by another export into {folder} ({what}); nothing of that was "
                        "changed. Give a new folder, or let that one end and run this one again with resume")


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Beside the features, so that their tokens can be read without the model."""
    scratch = folder / f".{TOKENIZER}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed here
    try:
        tokenizer.save_pretrained(scratch)
        os.replace(scratch, folder / TOKENIZER)
    except Exception as error:  # tokenizers raises nothing narrower where a disk is full
        shutil.rmtree(scratch, ignore_errors=True)
        raise DataError(f"the tokenizer could not be written in {folder}: {error}; make room or take another folder, "
                        "and run it again with resume") from error


def _finished(folder: Path, export: str, names: set[str]) -> list[Entry]:
    """The shards as the manifest states them, if the export was finished before."""
    try:
        return read_manifest(folder, export, names) or []
    except SaeFormatError as error:
        raise SaeFormatError(f"{error}; delete it to have it made anew from the shards") from error


def _commit(folder: Path, export: str, texts: Sequence[Digests], mine: Mapping[int, Entry]) -> None:
    """Write the manifest over all shards. Raises DataError where another process did not write one of its own."""
    if (folder / shard_name(len(texts))).exists():
        raise DataError(f"{folder} holds shards of a longer text ({shard_name(len(texts))}); give all of it, or a new "
                        "folder")
    entries = [mine.get(number) or _present(folder, number, export, text) for number, text in enumerate(texts)]
    if None in entries:
        raise DataError(f"{folder / shard_name(entries.index(None))} is missing: was its process stopped? Run it again")
    with alone(folder):
        _check_ours(folder, export)
        write_manifest(folder, [entry for entry in entries if entry is not None])


# --- shards -------------------------------------------------------------------------------------------------

def _lines(documents: Sequence[Document]) -> list[dict[str, Any]]:
    return [_line(document) for document in documents]


def _line(d: Document) -> dict[str, Any]:
    """Of a document of which some tokens get no row, with a digest of all that the model reads of it."""
    line = {"doc_id": d.number, "tokens": len(d.ids), "columns": dict(d.columns)}
    return line if d.wanted is None else line | {"ids": digest(d.ids.astype("<i4").tobytes())}


def _text(part: Part) -> Digests:
    return token_checksum(*part.origins()), document_digest(_lines(part.documents))


def _present(folder: Path, number: int, export: str, text: Digests, finished: Sequence[Entry] = ()) -> Entry | None:
    """The entry of a shard that is there. Raises DataError if it is of another text, SaeFormatError if it is broken, or
    not the one that the manifest of a `finished` export states: a new manifest would state it."""
    entry = read_entry(folder, number, export)
    if entry is not None and (entry["tokens"], entry["documents_sha256"]) != text:
        what = "tokens" if entry["tokens"] != text[0] else "columns, or turns of other roles,"
        raise DataError(f"{folder / shard_name(number)} was made of other documents: their {what} differ. Give the "
                        "same text, or a new folder")
    if entry is not None and number < len(finished) and entry["sha256"] != finished[number]["sha256"]:
        raise SaeFormatError(f"{folder / shard_name(number)} was changed since it was written: its sha256 is not the "
                             "manifest's. Delete the shard, and run the export again to have it written again")
    return entry


def _written(folder: Path, part: Part, extractor: Extractor, export: str, dtype: str) -> Entry:
    found = extractor.run(part)
    with alone(folder):
        _check_ours(folder, export, shard_name(part.number))
        return write_shard(folder, part.number, export=export, first_row=part.first_row, features=found.features,
                           ordinary=found.ordinary, activations=found.activations, documents=_lines(part.documents),
                           dtype=dtype)
