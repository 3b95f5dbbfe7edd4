"""Texts, and the windows of token ids that a model reads of them.

`documents` opens a file, a folder or a data set as strings; `windows` cuts them as they are read, so that no text needs
to fit in memory; `context_windows` cuts and shuffles texts that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from sae_hooks.documents import DOCUMENTS_PER_CALL, prefix_ids
from sae_hooks.errors import DataError
from sae_hooks.records import described, records

SHUFFLE_BUFFER = 10_000  # texts that a streamed data set shuffles among, instead of its default of 1,000

Window = np.ndarray[Any, np.dtype[np.int32]]
Position = tuple[int, int]  # texts that are done, and windows of the next one that were read


class Documents:
    """The texts of a source, empty ones left out. Can be read again and again; never reads ahead."""

    def __init__(self, name: str, texts: Callable[[int], Iterator[str]]) -> None:
        """name: for messages. texts: gives the texts of an epoch."""
        self.name, self._texts, self._epoch = name, texts, 0

    def set_epoch(self, epoch: int) -> None:
        """Which of its orders the next reading has, where it was shuffled."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[str]:
        """Raises DataError, also in the midst, for what is no text, and at the end if there was none."""
        empty = True
        for text in self._texts(self._epoch):
            if text.strip():
                empty = False
                yield text
        if empty:
            raise DataError(f"{self.name} holds no text at all: expected at least one that is not empty")

    def __repr__(self) -> str:
        return f"Documents({self.name!r})"


def documents(source: Any, *, field: str = "text", split: str = "train", streaming: bool = True,
              seed: int | None = None) -> Documents:
    """The texts of a source, as strings that can be read again and again.

    source: a JSONL file (.jsonl, .jsonl.xz, .jsonl.gz), a .txt or .md file, a folder of those two (with its
    sub-folders, in sorted order; one text a file), a list or other re-iterable of strings or of mappings, a data set of
    the `datasets` library, or the name of one ("owner/name" or "owner/name:configuration"), of which `split` is read.
    field: where the text stands in a line or row. seed: shuffle the texts, anew for each epoch; this holds them all in
    memory, except those of a data set, which shuffles itself.

    Raises DataError: at once for a file that is missing, while reading for a line or row that holds no text.
    """
    rows = records(source, split=split, streaming=streaming)
    epochs = hasattr(rows.source, "set_epoch")
    if epochs and seed is not None and hasattr(rows.source, "shuffle"):
        rows = records(rows.source.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))

    def texts(epoch: int) -> Iterator[str]:
        if epochs:
            rows.source.set_epoch(epoch)
        return (_field(row, rows.field or field, where) for where, row in rows)

    plain = Documents(rows.name, texts)
    return plain if epochs else _shuffled(plain, seed)


def windows(texts: Iterable[str] | Callable[[int], Iterable[str]], tokenizer: Any, length: int, *,
            add_special_tokens: bool = True) -> Windows:
    """Windows (<= length,) of one text each, tokenised as they are read and in the texts' order.

    texts: `documents`, another re-iterable, or a callable that opens an epoch's.

    Every window, not only a text's first, begins with what the tokenizer puts before a text (Gemma: BOS), since that is
    what a model sees at inference; add_special_tokens=False leaves it out. Raises DataError at once for texts that can
    be read only once, while reading for what is no text, or if nothing is long enough.
    """
    prefix = prefix_ids(tokenizer) if add_special_tokens else ()
    if length < len(prefix) + 2:
        raise DataError(f"windows of {length} tokens leave no room for text after {len(prefix)} special ones")

    def cut_all(some: list[str]) -> list[list[Window]]:
        if other := [text for text in some if not isinstance(text, str)]:
            raise DataError(f"expected texts, got {described(other[0])}; documents(...) takes them from rows")
        ids = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [cut(text, length, prefix) for text in ids]

    return Windows(texts, cut_all)


def context_windows(documents: Iterable[Sequence[int]], length: int, seed: int,
                    prefix: Sequence[int] = ()) -> list[Window]:
    """Cut token id lists into windows (<= length,) of one document each, and shuffle them all with seed.

    prefix: ids that each window begins with (`prefix_ids`); the documents must come without them.
    """
    kept = [window for ids in documents for window in cut(ids, length, prefix)]
    return [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))]


def cut(ids: Sequence[int], length: int, prefix: Sequence[int] = ()) -> list[Window]:
    """The windows of one text's ids, each beginning with prefix. A window of a single token is left out: the first
    token of a window is an attention sink."""
    step = length - len(prefix)
    pieces = ([*prefix, *ids[i : i + step]] for i in range(0, len(ids), step))
    return [np.asarray(piece, dtype=np.int32) for piece in pieces if len(piece) > 1]


class Windows:
    """Windows of token ids that can be opened again at any place: `windows(epoch)` iterates over an epoch's."""

    def __init__(self, texts: Any, cut_all: Callable[[list[Any]], list[list[Window]]] | None = None) -> None:
        """texts: a re-iterable, or a callable epoch -> iterable. cut_all gives the windows of each of some texts;
        None: the texts are windows already. Raises DataError for what can be read only once."""
        check_rereadable(texts)
        self._source, self._cut_all = texts, cut_all or (lambda some: [[text] for text in some])

    def __iter__(self) -> Iterator[Window]:
        return self(0)

    def __call__(self, epoch: int) -> Iterator[Window]:
        """The windows of an epoch."""
        return (window for _, window in self.read(epoch))

    def read(self, epoch: int, start: Position = (0, 0),
             share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Position, Window]]:
        """Yield (the position after it, window) from a position on; texts before it are passed over untokenised.

        share (i, n): only the texts i, i + n, ... Raises DataError if an epoch has no window for this share.
        """
        empty, (first, skip) = start == (0, 0), start
        mine = ((n, t) for n, t in enumerate(self._open(epoch)) if n >= first and n % share[1] == share[0])
        while some := list(islice(mine, DOCUMENTS_PER_CALL)):
            for (n, _), found in zip(some, self._cut_all([text for _, text in some]), strict=True):
                for i, window in enumerate(found):
                    if n > first or i >= skip:
                        empty = False
                        yield ((n, i + 1) if i + 1 < len(found) else (n + 1, 0)), window
        if empty:
            raise DataError(f"the texts (share {share[0]} of {share[1]}) hold no window of two tokens or more")

    def _open(self, epoch: int) -> Iterable[Any]:
        if callable(self._source):
            opened: Iterable[Any] = self._source(epoch)
            return opened
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)
        whole: Iterable[Any] = self._source
        return whole


def check_rereadable(texts: Any) -> None:
    """Raise DataError for an iterator, which would be empty at the second reading, and for a single text."""
    if isinstance(texts, Iterator):
        raise DataError("an iterator can be read only once; give a list, an object that is read anew each time, or a "
                        "callable that opens an epoch's")
    if isinstance(texts, str):
        raise DataError("a text itself goes into a list: [text]; a file or data set into documents(...)")


def _shuffled(plain: Documents, seed: int | None) -> Documents:
    if seed is None:
        return plain
    kept: list[str] = []

    def texts(epoch: int) -> Iterator[str]:
        kept[:] = kept or list(plain)  # a reading that breaks off, at a broken line or by Ctrl-C, leaves none
        return (kept[i] for i in np.random.default_rng((seed, epoch)).permutation(len(kept)))

    return Documents(plain.name, texts)


def _field(row: Any, field: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping) or field not in row:
        raise DataError(f"{where}: expected a text under {field!r}, got {described(row)}; name the field with field=")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: expected a string under {field!r}, got {type(row[field]).__name__}")
    return str(row[field])
