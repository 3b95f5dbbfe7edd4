"""Weight files, .safetensors and .npz: every size is checked before anything is allocated, nothing is ever executed.

Tensors are copies, never a live mmap: a file that is overwritten or cut while its SAE is in use changes nothing.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..errors import SaeFormatError, UnsafeFileError
from .parsing import parse_json
from .safe_files import open_regular

MOST_HEADER = 2**20
MOST_TENSORS = 1000
MOST_BYTES = 2**38  # 256 GiB: more than any SAE has, far from what overflows
MOST_RATIO = 100  # of declared to stored bytes in the whole file; weights hardly compress, a vector of zeros does
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, SyntaxError,
          TypeError, OSError, KeyError, OverflowError, MemoryError)  # what zipfile and numpy raise on a bad file
Shapes = dict[str, tuple[int, ...]]


def read_tensors(path: Path, allowed: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a weight file, on the CPU, in their own dtypes. `allowed`: the names that it may hold.

    Raises SaeNotFoundError, SaeFormatError, UnsafeFileError (objects, bombs, foreign names), all before reading.
    """
    with open_regular(path) as file:
        if path.suffix == ".npz":
            return _read_npz(file, allowed)
        return _read_safetensors(file, allowed)


def read_shapes(path: Path) -> Shapes:
    """The shapes of the tensors in a weight file, from its headers alone. Raises as read_tensors does."""
    with open_regular(path) as file:
        if path.suffix == ".npz":
            with zip_errors(), zipfile.ZipFile(file) as archive:
                return {_name(m): _npy_header(archive, m)[0] for m in zip_members(archive, file)}
        return {name: tuple(info["shape"]) for name, info in _safetensors_header(file)[0].items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata in the header of a .safetensors file, {} where there is none. Raises as read_tensors does."""
    with open_regular(path) as file:
        _, data_at = _safetensors_header(file)
        file.seek(8)
        metadata = parse_json(file.read(data_at - 8), "safetensors header").get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise SaeFormatError naming each tensor with NaN or infinite values, how many, and the first index."""
    wrong = []
    for name, tensor in tensors.items():
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum(dtype=wide))):
            bad = ~tensor.isfinite()  # only now, to name the place: 20 times the cost of the sum
            if bool(bad.any()):
                first = tuple(int(i) for i in bad.nonzero()[0])
                wrong.append(f"{name} has {int(bad.sum())} NaN or infinite values, the first at {first}")
    if wrong:
        raise SaeFormatError("; ".join(wrong))


def check_dtype(dtype: Any) -> None:
    """Raise SaeFormatError for what is no dtype, such as the name of one, which torch would take for a device."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise SaeFormatError(f"dtype must be a torch.dtype, such as torch.bfloat16, got {dtype!r}")


def check_held(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise SaeFormatError where values that are cast to a dtype became infinite, as those above 65,504 in float16."""
    try:
        check_finite(tensors if dtype == torch.float16 else {})
    except SaeFormatError as error:
        raise SaeFormatError(f"{dtype} cannot hold these weights ({error}); take bfloat16 or float32") from error


def safetensors_bytes(tensors: dict[str, Tensor], key: str = "format", value: str = "pt") -> bytes:
    """The tensors (contiguous, on the CPU) as a .safetensors file; each on its own, also where they share memory. Its
    metadata has one key: safetensors writes several in a different order each time, and the same content should be the
    same bytes."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        at = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if at in seen else tensor
        seen.add(at)
    return safetensors.torch.save(own, metadata={key: value})


# --- safetensors: 8 bytes of header length, a JSON header, then the data ------------------------------------


def _safetensors_header(file: IO[bytes]) -> tuple[dict[str, dict[str, Any]], int]:
    """The checked header, name -> {dtype, shape, data_offsets}, and where the data starts."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10:
        raise SaeFormatError(f"cut short: {size} bytes, less than a safetensors header; download it again")
    if length > min(MOST_HEADER, size - 8):
        raise SaeFormatError(f"not a safetensors file of an SAE, or cut short: it declares a header of {length} "
                             f"bytes (at most {MOST_HEADER}), the file has {size}")
    header = _parse_header(file.read(length))
    _check_layout(header, size - 8 - length)
    return header, 8 + length


def _parse_header(raw: bytes) -> dict[str, dict[str, Any]]:
    header = parse_json(raw, "safetensors header")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise SaeFormatError(f"{len(header)} tensors; an SAE has at most {MOST_TENSORS}")
    for name, info in header.items():
        if not name or not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise SaeFormatError(f"tensor {name!r}: expected dtype, shape, data_offsets, got {str(info)[:200]}")
        if not isinstance(info["dtype"], str) or info["dtype"] not in DTYPES:
            raise SaeFormatError(f"tensor {name!r}: dtype {info['dtype']!r}, expected one of {', '.join(DTYPES)}")
        if not _naturals(info["shape"]) or not _naturals(info["data_offsets"]) or len(info["data_offsets"]) != 2:
            raise SaeFormatError(f"tensor {name!r}: shape or data_offsets are no whole numbers that can be: "
                                 f"{str(info)[:200]}")
    return header


def _check_layout(header: dict[str, dict[str, Any]], data_size: int) -> None:
    """Every byte of the data belongs to exactly one tensor, of the size that its shape and dtype mean."""
    end = 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        needed = math.prod(info["shape"]) * DTYPES[info["dtype"]].itemsize
        if start != end or stop - start != needed:
            raise SaeFormatError(f"tensor {name!r}: bytes {start} to {stop}, expected {needed} bytes from {end} on")
        end = stop
    if end > data_size:
        raise SaeFormatError(f"cut short: has {data_size} bytes of data, needs {end}; download it again "
                             "(`hf download --force-download`)")
    if end < data_size:
        raise SaeFormatError(f"{data_size - end} bytes follow the last tensor; it is not what its header says")


def _read_safetensors(file: IO[bytes], allowed: Collection[str]) -> dict[str, Tensor]:
    header, data_at = _safetensors_header(file)
    check_names(header, allowed)
    tensors = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        raw = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
        file.seek(data_at + start)
        if stop > start and cast(io.BufferedReader, file).readinto(cast(Any, raw.numpy())) != stop - start:
            raise SaeFormatError(f"tensor {name!r}: the file was cut short while it was read")
        tensors[name] = raw.view(DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors


# --- npz: a zip of .npy files ---------------------------------------------------------------------------------


def _read_npz(file: IO[bytes], allowed: Collection[str]) -> dict[str, Tensor]:
    with zip_errors(), zipfile.ZipFile(file) as archive:
        members = zip_members(archive, file)
        check_names([_name(member) for member in members], allowed)
        for member in members:
            shape, dtype, header = _npy_header(archive, member)
            needed = header + math.prod(shape) * dtype.itemsize
            if needed != member.file_size:
                raise UnsafeFileError(f"{member.filename}: {shape} of {dtype} is {needed} bytes, the directory "
                                      f"says {member.file_size}")
        return {_name(member): _read_npy(archive, member) for member in members}


def zip_members(archive: zipfile.ZipFile, file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """The members, checked by the zip's directory alone. Raises UnsafeFileError."""
    members, size = archive.infolist(), os.fstat(file.fileno()).st_size
    if len(members) > MOST_TENSORS:
        raise UnsafeFileError(f"{len(members)} members; an SAE has at most {MOST_TENSORS}")
    names = [member.filename for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsafeFileError(f"members that occur twice: {', '.join(map(repr, twice))}")
    stored = min(sum(member.compress_size for member in members), size)
    bomb = sum(member.file_size for member in members) > MOST_RATIO * stored
    for member in sorted(members, key=lambda member: -member.file_size):
        if bomb or member.file_size > MOST_BYTES or member.compress_size > size or member.flag_bits & 1:
            raise UnsafeFileError(f"{member.filename!r}: {member.file_size} bytes declared, {member.compress_size} "
                                  f"stored, in a file of {size}: encrypted, or the file unpacks over {MOST_RATIO} to 1")
    return members


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and header length of a member; the header is parsed as a literal, never evaluated."""
    with archive.open(member) as raw:
        version = np.lib.format.read_magic(raw)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(raw)
        else:
            raise SaeFormatError(f"{member.filename}: npy version {version} is unknown")
        if dtype.hasobject:
            raise UnsafeFileError(f"{member.filename} holds Python objects: reading it could run code")
        if any(n < 0 for n in shape):
            raise SaeFormatError(f"{member.filename}: negative size in shape {shape}")
        return shape, dtype, raw.tell()


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as raw:
        array = np.lib.format.read_array(raw, allow_pickle=False)
    if array.dtype.kind not in "fiub":
        raise SaeFormatError(f"{member.filename} is {array.dtype}; weights are floating-point numbers")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


@contextlib.contextmanager
def zip_errors(what: str = "npz file") -> Iterator[None]:
    """Everything that a broken file makes zipfile and numpy raise, as SaeFormatError."""
    try:
        yield
    except SaeFormatError:
        raise
    except BROKEN as error:
        told = error or type(error).__name__
        raise SaeFormatError(f"not a readable {what} ({told}); download it again") from error


def check_names(names: Collection[str], allowed: Collection[str]) -> None:
    """Raise UnsafeFileError naming those that are not allowed."""
    foreign = [name for name in names if name not in allowed]
    if foreign:
        raise UnsafeFileError(f"tensors that this format does not know: {', '.join(map(repr, foreign[:10]))} "
                              f"(known: {', '.join(sorted(allowed))})")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
