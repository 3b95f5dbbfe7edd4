"""Files that nobody vouches for: opened and followed with care; and files replaced whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from ..errors import SaeFormatError, SaeNotFoundError, UnsafeFileError

_being_written: set[Path] = set()  # temporary files of this process


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
