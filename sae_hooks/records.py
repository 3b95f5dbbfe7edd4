"""Rows of any source: files, folders, lists and data sets, each with the place that it comes from."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError
from .extras import needed

TEXT_FILES = (".txt", ".md")
OPENERS: Mapping[str, Callable[..., Any]] = {".jsonl": open, ".xz": lzma.open, ".gz": gzip.open}
DATA_SET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/\s]+)?")  # "owner/name:configuration"

Row = tuple[str, Any]  # where it stands, for messages; and the row itself


class Records:
    """The rows of a source, each as (where, row). Can be read again and again; never reads ahead.

    name: of the source, for messages. field: where the text stands in every row, None if that is for the reader to say.
    source: the iterable behind the rows, None for files.
    """

    def __init__(self, name: str, rows: Callable[[], Iterator[Row]], *, field: str | None = None,
                 source: Any = None) -> None:
        """rows: opens them anew."""
        self.name, self.field, self.source, self._rows = name, field, source, rows

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError, also in the midst, for a file that cannot be read or a line that is not JSON."""
        return self._rows()

    def __repr__(self) -> str:
        return f"Records({self.name!r})"


def records(source: Any, *, split: str = "train", streaming: bool = True) -> Records:
    """The rows of a source, as they stand: nothing is skipped but the blank lines of a file.

    source: a JSONL file (.jsonl, .jsonl.xz, .jsonl.gz); a .txt or .md file, or a folder of those two (with its
    sub-folders, in sorted order), each file one row {"text", "path"}; a list or other re-iterable; a data set of the
    `datasets` library, or the name of one ("owner/name" or "owner/name:configuration"), of which `split` is read, from
    the network as it is needed if streaming.

    Raises DataError: at once for what is missing or of no known kind, while reading for a file that is broken.
    """
    if isinstance(source, Records):
        return source
    if isinstance(source, str | Path):
        if os.path.isdir(source):  # unlike Path.is_dir, it takes a text of any length, which is then none
            return _folder(Path(source))
        if os.path.isfile(source):
            return _file(Path(source))
        source = _data_set(source, split, streaming)
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f"the data set has no split {split!r}; it has {', '.join(map(str, source))}")
        source = source[split]
    return _iterable(source)


def described(row: Any) -> str:
    """What a row is, for messages: the names of its fields, or its beginning."""
    if isinstance(row, Mapping):
        return f"an object with {', '.join(map(str, row)) or 'nothing'}"
    return f"{type(row).__name__} {repr(row)[:60]}"


def _iterable(source: Any) -> Records:
    name = type(source).__name__
    if isinstance(source, Iterator):
        raise DataError("an iterator can be read only once; give a list, or an object that is read anew each time")
    if hasattr(source, "iterrows"):  # iterating over a data frame gives the names of its columns
        raise DataError(f"expected rows, got a {name}; give its rows: frame.to_dict('records')")
    if not hasattr(source, "__iter__") or isinstance(source, bytes | bytearray):
        raise DataError(f"expected a path, the name of a data set, or an iterable of texts; got {name}")
    return Records(name, lambda: ((f"{name}, row {i}", row) for i, row in enumerate(source)), source=source)


def _folder(path: Path) -> Records:
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES and file.is_file())
    if not files:
        raise DataError(f"{path} holds no {' or '.join(TEXT_FILES)} file, nor does any folder in it")
    return Records(str(path), lambda: (_whole_file(file, path) for file in files), field="text")


def _file(path: Path) -> Records:
    if path.suffix in TEXT_FILES:
        return Records(str(path), lambda: iter([_whole_file(path, path.parent)]), field="text")
    if path.suffix not in OPENERS or ".jsonl" not in path.suffixes:
        raise DataError(f"{path} is of no known kind: expected .jsonl, .jsonl.xz, .jsonl.gz or {', '.join(TEXT_FILES)}")
    return Records(str(path), lambda: _lines(path))


def _whole_file(path: Path, folder: Path) -> Row:
    try:
        return str(path), {"text": path.read_text(encoding="utf-8"), "path": path.relative_to(folder).as_posix()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with OPENERS[path.suffix](path, "rb") as file:  # decoded here, a line at a time: nothing is read ahead
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed(line, where)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {number}: {error or type(error).__name__}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object, got {line.decode(errors='replace').strip()[:60]!r} ({error})"
                        ) from error


def _data_set(source: str | Path, split: str, streaming: bool) -> Iterable[Any]:
    """Load a data set by its name."""
    name, _, configuration = str(source).partition(":")
    if isinstance(source, Path) or Path(name).suffix in (*OPENERS, *TEXT_FILES) or name.startswith(("/", ".", "~")):
        raise DataError(f"there is no file or folder {source}")
    if not DATA_SET.fullmatch(source):
        raise DataError(f"there is no file or folder {source[:60]!r}; a text itself goes into a list: [text]")
    try:
        datasets = needed("datasets")
    except DataError as error:
        raise DataError(f"there is no file or folder {source}; as the name of a data set, {error}") from error
    try:
        found: Iterable[Any] = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise DataError(f"the data set {source} (split {split!r}) cannot be loaded: {error}") from error
    return found
