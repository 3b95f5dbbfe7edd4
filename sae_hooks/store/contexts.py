"""Tokens in their text: a row's context, and the contexts in which a feature is strongest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, SaeFormatError
from .folder import ShardFolder
from .format import TOKENIZER
from .shards import Array, Shard

MARGIN = 8  # tokens decoded on each side beyond the context: a character is of four bytes, so of four tokens, at most


@dataclass(frozen=True)
class Context:
    """A token in its text: before + token + after is the text as decoded.

    token: the whole character where the token is part of one. activation: of the feature asked for, None where none
    was. row in the store, doc_id, position in the document. str() marks the token: before«token»after.
    """

    before: str
    token: str
    after: str
    activation: float | None
    row: int
    doc_id: int
    position: int

    def __str__(self) -> str:
        return f"{self.before}«{self.token}»{self.after}"


def load_tokenizer(folder: ShardFolder) -> Any:
    """The tokenizer that was kept with the store. Raises DataError if there is none, SaeFormatError if it is gone;
    never runs code of it."""
    path: Path = folder.path / TOKENIZER
    if not path.is_dir() and (folder.export.get("tokenizer") or not folder.path.is_dir()):
        raise SaeFormatError(f"{path} is missing; the export wrote it. Was the folder moved?")
    if not path.is_dir():
        raise DataError(f"{folder.path} has no tokenizer (it was exported from token ids), so no text; read token_id")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def decode(tokenizer: Any, ids: Array) -> str:
    """The text of token ids (n), special tokens included, nothing tidied up."""
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def provenance(folder: ShardFolder, start: int, stop: int) -> tuple[Array, Array, Array]:
    """doc_id, position and token_id of rows start to stop, int64 copies."""
    columns = [(s.doc_id[a:b], s.position[a:b], s.token_id[a:b]) for s, a, b in folder.parts(start, stop)]
    none: Array = np.zeros(0, dtype=np.int64)
    doc_id, position, token_id = (np.concatenate([none, *column]) for column in zip(*columns, strict=True))
    return doc_id, position, token_id


def context_of(folder: ShardFolder, tokenizer: Any, row: int, context: int, activation: float | None = None) -> Context:
    """A row with up to `context` tokens on each side, of its document and without a gap."""
    reach = context + MARGIN
    start = max(row - reach, 0)
    doc_id, position, token_id = provenance(folder, start, min(row + reach + 1, folder.rows))
    at = row - start
    same = (doc_id == doc_id[at]) & (position - position[at] == np.arange(len(position)) - at)
    first, last = int(np.flatnonzero(~same[:at])[-1]) + 1 if not same[:at].all() else 0, len(same)
    last = at + int(np.argmin(same[at:])) if not same[at:].all() else last
    before, token, after = _cut(tokenizer, token_id[first:last], at - first, context)
    return Context(before, token, after, activation, row, int(doc_id[at]), int(position[at]))


def _cut(tokenizer: Any, ids: Array, at: int, context: int) -> tuple[str, str, str]:
    """The text of ids from `context` tokens before number `at` to as many after it, cut at characters: before, token,
    after.

    How far tokens reach is seen by decoding all up to them: an unfinished character decodes to U+FFFD, which is not in
    common with the whole text.
    """
    whole = decode(tokenizer, ids)

    def reach(count: int) -> tuple[int, bool]:
        text = decode(tokenizer, ids[: max(count, 0)])
        common = _in_common(whole, text)
        return common, common == len(text)

    begin, (end, finished) = reach(at)[0], reach(at + 1)
    for stop in range(at + 2, min(at + MARGIN, len(ids)) + 1):
        if not finished:
            end, finished = reach(stop)
    first, last = reach(at - context)[0], reach(at + 1 + context)[0]
    return whole[first:begin], whole[begin:end], whole[end : max(last, end)]


def _in_common(one: str, other: str) -> int:
    """How many characters the two begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def column_of(shard: Shard, name: str, feature: int) -> tuple[Array, Array]:
    """Rows of a shard on which a feature fires, ascending, and its activations there, float32."""
    entries = shard.entries[name]
    at = _places(entries.indices, feature)
    rows = np.searchsorted(entries.indptr, at, side="right") - 1
    return rows, np.asarray(entries.values[at].float().numpy())


def _places(indices: Array, feature: int, piece: int = 2**18) -> Array:
    """Where an index occurs; in pieces that stay in the processor's cache with their comparison."""
    found = [np.flatnonzero(indices[i : i + piece] == feature) + i for i in range(0, len(indices), piece)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def strongest(folder: ShardFolder, name: str, feature: int, n: int) -> list[tuple[float, int]]:
    """(activation, row) of the n documents in which a feature is strongest, each at its strongest token; the earlier
    row first where activations are equal."""
    best: dict[int, tuple[float, int]] = {}  # document -> (minus activation, row)
    for number in range(len(folder.entries)):
        shard = folder.shard(number)
        rows, values = column_of(shard, name, feature)
        order = np.argsort(-values, kind="stable")
        firsts = np.unique(shard.doc_id[rows[order]], return_index=True)[1]
        for place in np.sort(firsts)[:n]:
            row = int(rows[order[place]])
            found = (-float(values[order[place]]), row + int(folder.first_rows[number]))
            document = int(shard.doc_id[row])
            best[document] = min(found, best.get(document, found))
        best = dict(sorted(best.items(), key=lambda item: item[1])[:n])
    return [(-value, row) for value, row in best.values()]
