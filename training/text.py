"""Texts, and the windows of token ids that a model reads of them.

`documents` opens a file, a folder or a data set as strings; `windows` cuts them as they are read, so that no text needs
to fit in memory; `context_windows` cuts and shuffles texts that do.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from sae_hooks.errors import DataError

TEXT_FILES = (".txt", ".md")
OPENERS: Mapping[str, Callable[..., IO[str]]] = {".jsonl": open, ".xz": lzma.open, ".gz": gzip.open}
DOCUMENTS_PER_CALL = 64  # a fast tokenizer spreads the texts of one call over the cores
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
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return _shuffled(_folder(path), seed)
        if path.is_file():
            return _shuffled(_file(path, field), seed)
        source = _data_set(source, split, streaming)
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f"the data set has no split {split!r}; it has {', '.join(map(str, source))}")
        source = source[split]
    if isinstance(source, Iterator):
        raise DataError("an iterator can be read only once; give a list, or an object that is read anew each time")
    return _rows(source, field, seed)


def windows(texts: Iterable[str] | Callable[[int], Iterable[str]], tokenizer: Any, length: int, *,
            add_special_tokens: bool = True) -> Windows:
    """Windows (<= length,) of one text each, tokenised as they are read and in the texts' order.

    texts: `documents`, another re-iterable, or a callable that opens an epoch's.

    Every window, not only a text's first, begins with what the tokenizer puts before a text (Gemma: BOS), since that is
    what a model sees at inference; add_special_tokens=False leaves it out. Raises DataError if nothing is long enough.
    """
    prefix = prefix_ids(tokenizer) if add_special_tokens else ()
    if length < len(prefix) + 2:
        raise DataError(f"windows of {length} tokens leave no room for text after {len(prefix)} special ones")

    def cut_all(some: list[str]) -> list[list[Window]]:
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


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text; most put one, BOS, or none."""
    plain, whole = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return tuple(whole[: starts[0]]) if starts else ()


class Windows:
    """Windows of token ids that can be opened again at any place: `windows(epoch)` iterates over an epoch's."""

    def __init__(self, texts: Any, cut_all: Callable[[list[Any]], list[list[Window]]] | None = None) -> None:
        """texts: a re-iterable, or a callable epoch -> iterable. cut_all gives the windows of each of some texts;
        None: the texts are windows already."""
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


def _shuffled(plain: Documents, seed: int | None) -> Documents:
    if seed is None:
        return plain
    kept: list[str] = []

    def texts(epoch: int) -> Iterator[str]:
        kept.extend(() if kept else plain)
        return (kept[i] for i in np.random.default_rng((seed, epoch)).permutation(len(kept)))

    return Documents(plain.name, texts)


def _folder(path: Path) -> Documents:
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES and file.is_file())
    if not files:
        raise DataError(f"{path} holds no {' or '.join(TEXT_FILES)} file, nor does any folder in it")
    return Documents(str(path), lambda epoch: map(_whole_file, files))


def _file(path: Path, field: str) -> Documents:
    if path.suffix in TEXT_FILES:
        return Documents(str(path), lambda epoch: iter([_whole_file(path)]))
    if path.suffix not in OPENERS or ".jsonl" not in path.suffixes:
        raise DataError(f"{path} is of no known kind: expected .jsonl, .jsonl.xz, .jsonl.gz or {', '.join(TEXT_FILES)}")
    return Documents(str(path), lambda epoch: _lines(path, field))


def _whole_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _lines(path: Path, field: str) -> Iterator[str]:
    number = 0
    try:
        with OPENERS[path.suffix](path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _field(_parsed(line, f"{path}, line {number}"), field, f"{path}, line {number}")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read after line {number}: {error or type(error).__name__}") from error


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: expected a JSON object, got {line.strip()[:60]!r} ({error})") from error


def _rows(source: Any, field: str, seed: int | None) -> Documents:
    """Of strings or mappings; `datasets` objects are such, and shuffle themselves."""
    name = type(source).__name__
    if not hasattr(source, "__iter__"):
        raise DataError(f"expected a path, the name of a data set, or an iterable of texts; got {name}")
    if seed is not None and hasattr(source, "set_epoch") and hasattr(source, "shuffle"):
        source = source.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)

    def texts(epoch: int) -> Iterator[str]:
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        for number, row in enumerate(source):
            yield row if isinstance(row, str) else _field(row, field, f"{name}, row {number}")

    plain = Documents(name, texts)
    return plain if hasattr(source, "set_epoch") else _shuffled(plain, seed)


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, Mapping) or field not in row:
        has = f"an object with {', '.join(map(str, row)) or 'nothing'}" if isinstance(row, Mapping) else repr(row)[:60]
        raise DataError(f"{where}: expected a text under {field!r}, got {has}; name the field with field=")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: expected a string under {field!r}, got {type(row[field]).__name__}")
    return str(row[field])


def _data_set(source: str | Path, split: str, streaming: bool) -> Any:
    """Load a data set by its name."""
    name, _, configuration = str(source).partition(":")
    if isinstance(source, Path) or Path(name).suffix in (*OPENERS, *TEXT_FILES) or name.startswith(("/", ".", "~")):
        raise DataError(f"there is no file or folder {source}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"there is no file or folder {source}, and to read it as the name of a data set "
            "needs the datasets library: pip install 'sae-hooks[train]'"
        ) from error
    try:
        return load_dataset(name, configuration or None, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise DataError(f"the data set {source} (split {split!r}) cannot be loaded: {error}") from error
