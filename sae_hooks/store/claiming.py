"""Whose a folder is: an export takes it before it writes there, and holds it against others that come meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..identity import differences
from ..processes import held
from .format import EXPORT, MANIFEST, TOKENIZER, file_digest
from .writing import read_export, write_export


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While nobody else is in here with this folder, which is made, where there are locks (on NFS, on Windows there may
    be none). Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error}; take another folder") from error
    holding = held(folder, wait=True)
    try:
        yield
    finally:
        if holding is not None:
            os.close(holding)


def claim(folder: Path, asked: Mapping[str, Any], tokenizer: Any, resume: bool) -> str:
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


def check_ours(folder: Path, export: str, shard: str | None = None) -> None:
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
