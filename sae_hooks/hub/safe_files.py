"""Files that nobody vouches for: opened, parsed and followed with care; and files replaced whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import SaeFormatError, SaeNotFoundError, UnsafeFileError

MOST_CONFIG = 2**20  # bytes; a config is a few hundred
MOST_DIGITS = 20
MOST_EVENTS = 5_000  # of a YAML config: PyYAML takes 15 seconds for a MiB of "1,1,1,..."
MOST_DEPTH = 100  # of a YAML config: PyYAML's time grows with the square of the depth

_being_written: set[Path] = set()  # temporary files of this process


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB, strictly: no NaN, no infinity, no duplicate keys, no lone surrogates, no depth.

    A byte order mark is accepted. A file whose name ends in .yaml is YAML (`parse_yaml`). Raises SaeFormatError naming
    the flaw, SaeNotFoundError.
    """
    with open_regular(path) as file:
        raw = file.read(MOST_CONFIG + 1)
    if len(raw) > MOST_CONFIG:
        raise SaeFormatError(f"larger than {MOST_CONFIG} bytes; a config is a few hundred")
    return parse_yaml(raw, "config") if path.suffix == ".yaml" else parse_json(raw, "config")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in these bytes, under the rules of read_config. Raises SaeFormatError."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
                           parse_float=_finite, parse_int=_short)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except RecursionError as error:
        raise SaeFormatError(f"the {what} is nested too deeply") from error
    except SaeFormatError as error:
        raise SaeFormatError(f"the {what} has {error}") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, UnicodeEncodeError
        raise SaeFormatError(f"the {what} is not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise SaeFormatError(f"the {what} is a JSON {type(value).__name__}, expected an object")
    return value


def parse_yaml(raw: bytes, what: str) -> dict[str, Any]:
    """The mapping in the one YAML 1.1 document of these bytes, under the rules of read_config: what JSON could say too.

    Keys are text. A date, and whatever else is no number, true, false or null, stays the text that it is. Aliases,
    anchors, tags, merges (<<), a second document and more than 5,000 parts are refused. Raises SaeFormatError.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(raw.decode("utf-8-sig"))
        value = _document(_events(loader), loader)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except RecursionError as error:
        raise SaeFormatError(f"the {what} is nested too deeply") from error
    except SaeFormatError as error:
        raise SaeFormatError(f"the {what} has {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SaeFormatError(f"the {what} is not YAML in UTF-8: {' '.join(str(error).split())[:400]}") from error
    if not isinstance(value, dict):
        raise SaeFormatError(f"the {what} is a YAML {type(value).__name__}, expected a mapping")
    return value


def json_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as indented JSON. Raises SaeFormatError if something in it is not plain JSON."""
    try:
        return json.dumps(config, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise SaeFormatError(f"metadata must be plain JSON (text, finite numbers, lists, dicts): {error}") from error


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as JSON that read_config takes back. Raises SaeFormatError if it is none, or over 1 MiB."""
    raw = json_bytes(config)
    if len(raw) > MOST_CONFIG:
        raise SaeFormatError(f"the config would have {len(raw)} bytes, and is read up to {MOST_CONFIG}; keep what is "
                             "large out of the metadata")
    parse_json(raw, "config")
    return raw


def check_contained(path: Path, root: Path) -> None:
    """Follow the links of `path`. Raises UnsafeFileError if that leads out of `root`, SaeFormatError for a loop.

    In a Hugging Face cache the links of a snapshot may lead to the blobs of its repository, and on to the shared blobs.
    """
    root = root.resolve()
    repo = next((p for p in (root, *root.parents) if p.name.startswith("models--")), None)
    homes = (root,) if repo is None else (repo, repo.parent / "blobs")
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise SaeNotFoundError(f"{path} does not exist, or is a link to nothing") from error
    except (OSError, RuntimeError) as error:  # a loop: RuntimeError before Python 3.13
        raise SaeFormatError(f"{path} cannot be followed: {error}") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise UnsafeFileError(f"{path} is a link to {real}, outside {homes[0]}; copy the file there if you trust it")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading, and recognise what stands in for one (empty, LFS pointer, HTML page)."""
    if not path.is_file():
        raise SaeNotFoundError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \r\n\t")
        if not start:
            raise SaeFormatError(f"the file is empty ({path.stat().st_size} bytes); download it again")
        if start.startswith(b"version https://git-lfs"):
            raise SaeFormatError("this is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")
        if start[:15].lower().startswith((b"<!doctype html", b"<html")):
            raise SaeFormatError("this is an HTML page (an error or login page saved under the file's name)")
        file.seek(0)
        yield file


def write_atomically(files: Mapping[Path, bytes], remove: Iterable[Path] = ()) -> None:
    """Replace each file whole or not at all; the last one is renamed into place last. Mode as umask says.

    All contents are on the disk, under temporary names beside their targets, before the first is renamed. Just before
    that the files in `remove`, if they are there, are removed: what the new ones belie. What a killed process left
    behind is cleared away by the next call. Raises OSError; nothing is changed then.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp") for path in files}
    _being_written.update(temporary.values())
    try:
        for path, content in files.items():
            _clear_leftovers(path)
            _write_through(temporary[path], content)
        for path in remove:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                sync_folder(path.parent)
        for path in files:
            os.replace(temporary[path], path)
    except BaseException:
        for name in temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise
    finally:
        _being_written.difference_update(temporary.values())
    for folder in {path.parent for path in files}:
        sync_folder(folder)


def _write_through(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # the kernel applies the umask
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make what was renamed or removed in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear_leftovers(path: Path) -> None:
    """Remove temporary files of processes that are no more. In a container the one before may have had our number."""
    for left in path.parent.glob(f".{path.name}.*.*.tmp"):
        pid = left.name.split(".")[-3]
        ours = pid == str(os.getpid())
        if pid.isdigit() and (left not in _being_written if ours else not alive(int(pid))):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, removed after the block; what killed processes left of such is cleared away."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.*.stage"):
        pid = left.name.split(".")[-3]
        if pid.isdigit() and (int(pid) == os.getpid() or not alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f".{folder.name}.{os.getpid()}."
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, suffix=".stage") as stage:
        yield Path(stage)


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise SaeFormatError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return found


def _no_constant(name: str) -> float:
    raise SaeFormatError(f"{name}, which is no finite number")


def _finite(literal: str, parse: Callable[[str], float] = float) -> float:
    value = parse(literal)
    if not math.isfinite(value):
        raise SaeFormatError(f"{literal[:40]}, which is no finite number")
    return value


def _short(literal: str, parse: Callable[[str], int] = int) -> int:
    if len(literal) > MOST_DIGITS:
        raise SaeFormatError(f"a whole number of {len(literal)} digits")
    return parse(literal)


def _events(loader: Any) -> Iterator[Any]:
    """PyYAML's events, one by one: nothing behind a flaw is parsed."""
    for n in itertools.count():
        if n > MOST_EVENTS:
            raise SaeFormatError(f"more than {MOST_EVENTS} keys, values and brackets; a config has some tens")
        yield loader.get_event()


def _document(events: Iterator[Any], loader: Any) -> Any:
    """The value of the one document in a stream, None where there is none."""
    import yaml

    next(events)  # the stream starts
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _value(next(events), events, loader)
    next(events)  # the document ends
    if not isinstance(next(events), yaml.StreamEndEvent):
        raise SaeFormatError("a second document")
    return value


def _value(event: Any, events: Iterator[Any], loader: Any, depth: int = 0) -> Any:
    """The value that starts with this event, the events up to its end taken."""
    import yaml

    if depth > MOST_DEPTH:
        raise RecursionError
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise SaeFormatError(f"the alias or anchor {event.anchor[:40]!r}; with them a short text can mean a long one")
    if event.tag is not None:
        raise SaeFormatError(f"the tag {event.tag[:80]!r}; plain values need none")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, loader)
    inside = itertools.takewhile(lambda one: not isinstance(one, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, loader, depth + 1) for item in inside]
    return _no_duplicates([(_key(key, loader), _value(next(events), events, loader, depth + 1)) for key in inside])


def _key(event: Any, loader: Any) -> str:
    import yaml

    if isinstance(event, yaml.CollectionStartEvent):
        raise SaeFormatError("a list or mapping for a key")
    key = _value(event, iter(()), loader)
    if not isinstance(key, str):
        raise SaeFormatError(f"the key {event.value!r}, which is no text; in quotes it is")
    if key == "<<" and event.implicit[0]:
        raise SaeFormatError("a merge (<<)")
    return key


def _scalar(event: Any, loader: Any) -> Any:
    """What PyYAML's safe loader takes a scalar for, where that is a number, true, false or null; else its text."""
    import yaml

    kind = loader.resolve(yaml.ScalarNode, event.value, event.implicit).rpartition(":")[2]
    node = yaml.ScalarNode(None, event.value)
    if kind == "int":
        return _short(event.value, lambda _: loader.construct_yaml_int(node))
    if kind == "float":
        return _finite(event.value, lambda _: loader.construct_yaml_float(node))
    if kind == "bool":
        return loader.construct_yaml_bool(node)
    return None if kind == "null" else event.value
