"""The store on disk: names of its files, its JSON, its checksums. Format "sae_hooks.features/1".

    export.json                what was asked: model, tokenizer, SAEs, settings; written first
    tokenizer/                 the tokenizer, where there is one
    documents-00000.jsonl      a line for each document that begins in the shard: its number, tokens, columns, and the
                               sha256 of its token ids where only those of some roles have rows
    shard-00000.safetensors    rows (tokens) in order of document and position
    manifest.json              what each shard holds; written last: with it, the export is finished

Every byte is a function of the input: JSON has sorted keys, and the one key of a shard's metadata is the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, SaeFormatError, SaeNotFoundError
from ..hub.parsing import parse_json
from ..hub.safe_files import open_regular

FORMAT = "sae_hooks.features/1"
EXPORT, MANIFEST, TOKENIZER = "export.json", "manifest.json", "tokenizer"
MOST_INDEX_U16 = 2**16  # features up to which an index fits in 16 bits


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def documents_name(number: int) -> str:
    """File name of the documents that begin in a shard."""
    return f"documents-{number:05d}.jsonl"


def canonical(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The one JSON of this content: keys sorted, UTF-8, no NaN. Raises DataError if it is not plain JSON."""
    try:
        return json.dumps(content, sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"not plain JSON (text, finite numbers, lists, mappings with text keys): {error}") from error


def digest(raw: bytes) -> str:
    """sha256 in hexadecimal digits."""
    return hashlib.sha256(raw).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces. Raises SaeNotFoundError, SaeFormatError (an empty file)."""
    with open_regular(path) as file:
        return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


def token_checksum(doc_id: Any, position: Any, token_id: Any) -> str:
    """sha256 over which tokens these rows are: doc_id and position as uint32, token_id as int32 (each (n), one after
    the other, little-endian), whatever dtype they come in."""
    kinds = ((doc_id, "<u4"), (position, "<u4"), (token_id, "<i4"))
    return digest(b"".join(np.asarray(numbers).astype(kind).tobytes() for numbers, kind in kinds))


def content_checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over the bytes of tensors (on the CPU), in order of their names: what tells a shard that has rotted, at
    2.8 GB a second on one core (sha256: 1.5)."""
    crc = 0
    for name in sorted(tensors):
        if tensors[name].numel():
            crc = zlib.crc32(cast(Any, tensors[name].reshape(-1).view(torch.uint8).numpy()), crc)
    return crc


def read_object(path: Path) -> tuple[dict[str, Any], bytes]:
    """A JSON file of the store, of this format, and its bytes. Raises SaeNotFoundError, SaeFormatError naming it."""
    with naming(path):
        with open_regular(path) as file:
            raw = file.read()
        content = parse_json(raw, "file")
        if content.get("format") != FORMAT:
            raise SaeFormatError(f"its format is {content.get('format')!r}, expected {FORMAT!r}")
    return content, raw


def documents_bytes(documents: Iterable[Mapping[str, Any]]) -> bytes:
    """The lines of a documents file. Raises DataError naming the document that is not plain JSON."""
    lines = []
    for document in documents:
        try:
            lines.append(canonical(document))
        except DataError as error:
            raise DataError(f"document {document.get('doc_id')}: {error}") from error
    return b"".join(lines)


def parse_documents(raw: bytes) -> list[dict[str, Any]]:
    """The documents of a file: {"doc_id", "tokens", "columns"}, numbered one by one. Raises SaeFormatError."""
    try:
        documents = [json.loads(line) for line in raw.split(b"\n")[:-1]]
        numbers = [document["doc_id"] for document in documents]
        complete = all(isinstance(document["columns"], dict) for document in documents)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SaeFormatError(f"not the documents of a store: {error!r}") from error
    if not complete or not raw.endswith(b"\n"[: len(raw)]) or not is_consecutive(numbers):
        raise SaeFormatError("not the documents of a store, or cut short")
    return documents


def is_consecutive(numbers: Sequence[Any]) -> bool:
    """Whether these are whole numbers, each one more than the one before."""
    return all(type(n) is int for n in numbers) and list(numbers) == [numbers[0] + i for i in range(len(numbers))]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about a file, with its path before them."""
    try:
        yield
    except SaeNotFoundError:
        raise  # open_regular names it
    except SaeFormatError as error:
        raise SaeFormatError(f"{path}: {error}") from error
