"""Weights that PyTorch pickled (.pt, .pth, .bin): read where the caller allows it, by torch's weights_only loader.

Two looks come first. The zip's directory: whole, the one that torch finds, too, nothing compressed, no larger unpacked
than the file is, so nothing that torch allocates is. The pickle in it, opcode by opcode, which runs nothing: plain
tensors call for two functions of torch and one of Python's, and what calls for anything else is refused by name,
whatever torch has been told to trust.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import SaeFormatError, UnsafeFileError
from .safe_files import open_regular
from .weight_files import check_names, zip_errors, zip_members

MOST_PICKLE = 2**20  # bytes; for ten tensors torch writes 2,000
MOST_TUPLES = 500  # in a pickle, four a tensor; hashing one that nests ten thousands deep ends the process
# What ends a zip file without a comment, and before it, as torch.save writes them, too, its forms of 64 bits.
END, LOCATOR, END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = frozenset({"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict",
                   *(f"torch {kind}Storage" for kind in STORAGES)})
OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "BINPUT", "LONG_BINPUT",
    "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "NEWTRUE", "NEWFALSE",
    "NONE"})


def read_pickle(path: Path, allowed: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote of one flat dict, each on its own, contiguous, on the CPU, in its own
    dtype; a number in it is a tensor without dimensions. `allowed`: the names that it may hold.

    Raises SaeNotFoundError; UnsafeFileError for calls and bombs, before torch opens it, and for foreign names and views
    that repeat their values, before they are copied; SaeFormatError for broken files, other content, and everything
    else that torch.load raises.
    """
    with open_regular(path) as file:
        _check_zip(file)
        with zip_errors("file of torch.save"), zipfile.ZipFile(file) as archive:
            _check_pickle(_only_pickle(archive, file))
            if damaged := archive.testzip():  # torch itself compares no checksums
                raise SaeFormatError(f"{damaged!r} in it is damaged: its checksum is wrong; download it again")
        file.seek(0)
        found = _flat(_loaded(file))
    check_names(found, allowed)
    taken: set[int] = set()
    return {name: _plain(name, value, taken) for name, value in found.items()}


def _check_zip(file: IO[bytes]) -> None:
    """Raise SaeFormatError for what is no zip file, or not one from its first byte to its last: torch and Python would
    then differ on which directory is its."""
    start, size = file.read(4), os.fstat(file.fileno()).st_size
    if start[:2] != b"PK":
        raise SaeFormatError("not a zip file, which torch.save has written since PyTorch 1.6; no other pickle is read. "
                             "If you trust it, save it anew: torch.save(torch.load(path, weights_only=True), path)")
    file.seek(max(size - END.size - LOCATOR.size - END_64.size, 0))
    tail = file.read()
    file.seek(0)
    if len(tail) < END.size or tail[-END.size:][:4] != b"PK\x05\x06":
        raise SaeFormatError("cut short, or something follows its zip directory; download it again")
    if _directory_end(tail, size) is None:
        raise SaeFormatError("its zip directory is not where its last bytes say, as in a file that something was put "
                             "before; download it again")


def _directory_end(tail: bytes, size: int) -> int | None:
    """Where the zip directory ends by the records in the last bytes of a file of `size`, None unless they follow it."""
    *_, length, at, _ = END.unpack(tail[-END.size:])
    ends = size - END.size
    locator = tail[-END.size - LOCATOR.size:-END.size]
    if locator[:4] == b"PK\x06\x07":
        ends -= LOCATOR.size + END_64.size
        if LOCATOR.unpack(locator)[2] != ends or tail[ends - size:][:4] != b"PK\x06\x06":
            return None
        *_, length, at = END_64.unpack(tail[ends - size:][:END_64.size])
    return ends if at + length == ends else None


def _only_pickle(archive: zipfile.ZipFile, file: IO[bytes]) -> bytes:
    """The one pickle of the archive, if what its directory says can be."""
    members = zip_members(archive, file)
    stored, size = sum(member.file_size for member in members), os.fstat(file.fileno()).st_size
    if stored > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnsafeFileError(f"its parts have {stored} bytes in a file of {size}, or are compressed, which torch.save "
                              "never does")
    pickles = [member for member in members if member.filename.lower().endswith("data.pkl")]  # to torch A is a
    if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLE:
        told = ", ".join(f"{member.filename} ({member.file_size} bytes)" for member in pickles[:4]) or "none"
        raise UnsafeFileError(f"expected one data.pkl of at most {MOST_PICKLE} bytes, found {told}")
    return archive.read(pickles[0])


def _check_pickle(raw: bytes) -> None:
    """Raise UnsafeFileError naming what a pickle calls for beside plain tensors.

    Names and texts alone may be meant again: a short pickle could build tuples of tuples that take years to hash, or
    copy one dict a hundred thousand times.
    """
    again: set[Any] = set()  # what BINGET may fetch
    before, tuples = "", 0
    for opcode, argument, _ in pickletools.genops(raw):
        name = opcode.name
        tuples += name.startswith("TUPLE")
        if name not in OPCODES or (name == "GLOBAL" and argument not in NAMES):
            what = ".".join(str(argument).split()) if name == "GLOBAL" else f"the opcode {name}"
            raise UnsafeFileError(f"its pickle calls for {what}, which plain tensors do not need: reading it could run "
                                  "code. Sparse, quantised and subclassed tensors, whole modules and training states "
                                  "are not read")
        if name.endswith("BINPUT"):
            (again.add if before in ("GLOBAL", "BINUNICODE") else again.discard)(argument)
        if tuples > MOST_TUPLES or (name.endswith("BINGET") and argument not in again):
            what = f"more than {MOST_TUPLES} tuples" if tuples > MOST_TUPLES else "one value in several places"
            raise UnsafeFileError(f"its pickle has {what}, which can take memory and time without end. Save a flat "
                                  "dict of tensors, each an object of its own")
        before = name


def _loaded(file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"torch's weights_only loader refuses it: {error}") from error
    except Exception as error:  # the loader interprets what it reads, and may fail in any way
        raise SaeFormatError(f"torch cannot read it ({type(error).__name__}: {error}); download it again") from error


def _flat(found: Any) -> dict[str, Tensor]:
    """A flat dict of tensors and numbers. Raises SaeFormatError for any other content."""
    if not isinstance(found, dict):
        raise SaeFormatError(f"holds a {type(found).__name__}, expected a dict of tensors")
    items = list(dict.items(found))  # an OrderedDict may have been given an `items` of its own
    other = [f"{name!r:.80} is a {type(value).__name__}" for name, value in items
             if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, (Tensor, int, float))]
    if other:
        raise SaeFormatError(f"expected a dict of tensors, but {', '.join(other[:10])}: a checkpoint from the middle "
                             "of a training, perhaps; the finished SAE's file holds tensors alone")
    return {name: value if isinstance(value, Tensor) else _number(name, value) for name, value in items}


def _number(name: str, value: float) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64, device="cpu")
    except (ValueError, RuntimeError, OverflowError) as error:
        raise SaeFormatError(f"{name} is no number that fits 64 bits") from error


def _plain(name: str, tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor on memory of its own; `taken` are the storages that others have, to which its own is added. Raises
    UnsafeFileError for one that is larger than what the file has of it."""
    storage, needed = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
    if needed > storage.nbytes():
        raise UnsafeFileError(f"{name} {tuple(tensor.shape)} has {needed} bytes, of which the file holds "
                              f"{storage.nbytes()}: a view that repeats its values. Save a contiguous copy")
    own = tensor.detach().resolve_neg()
    if storage.data_ptr() in taken or not own.is_contiguous() or needed < storage.nbytes():
        return own.clone(memory_format=torch.contiguous_format)
    taken.add(storage.data_ptr())
    return own
