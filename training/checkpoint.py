"""Checkpoints of a training: written whole or not at all, hashed, read as plain copies; nothing in them is executed.

folder/step-00001234/ holds a .safetensors file for each part and manifest.json: the scalars, the files' sizes and
SHA-256, the step, and a hash of all this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_hooks.errors import CheckpointError, SaeError, SaeFormatError, SaeWarning, TrainingError
from sae_hooks.hub.parsing import parse_json
from sae_hooks.hub.safe_files import alive, check_contained, open_regular, sync_folder
from sae_hooks.hub.weight_files import DTYPES, MOST_HEADER, MOST_TENSORS, read_tensors

Value = Tensor | int | float | str | bool | None

FORMAT = 1
MANIFEST = "manifest.json"
MOST_MANIFEST = 2**26  # bytes; one of a hundred SAEs has some 100,000
PIECE = 2**26  # bytes hashed and written at once: small beside a tensor, large beside a system call
EXACT = 2**53  # whole numbers below it are exact in every JSON reader
FOLDER = re.compile(r"step-([0-9]{8,})(\.replaced)?")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BROKEN = (SaeError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # what reading can raise


@dataclass(frozen=True)
class Checkpoint:
    """What save_checkpoint was given: tensors as copies on the CPU, scalars equal to what they were, in their order."""

    step: int
    path: Path
    parts: dict[str, dict[str, Value]]


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Mapping[str, Value]], *, keep: int = 2) -> Path:
    """Write folder/step-00001234 durably, then remove all but the `keep` newest whole checkpoints. Returns its path.

    Tensors may be of any dtype and strided layout and on any device; those that share memory are stored apart.
    Costs: room for keep + 1 checkpoints; memory for the largest tensor that is not contiguous on the CPU, else none;
    3.3 s/GB on one core with a local disk, 0.6 of them for hashing; 0.05 s at least. The content of older checkpoints
    is not hashed, only their sizes are checked. One thread of one process (one rank) saves in a folder at a time.

    Raises CheckpointError before anything is touched: a value of another type, or a whole checkpoint of a later step
    in folder, which is another training's. Raises TrainingError if the file system refuses (full disk, rights): the
    older checkpoints are as they were then, and no half one is left.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"expected step >= 0 and keep >= 1, got step={step}, keep={keep}")
    values = {name: {key: _encode(name, key, value) for key, value in part.items()} for name, part in parts.items()}
    layouts = {name: _layout(name, part) for name, part in parts.items()}
    try:
        _begin(folder, step)
        path = _write(folder, step, layouts, values)
    except OSError as error:
        needed = sum(t.nbytes for layout in layouts.values() for t in layout.tensors)
        raise TrainingError(_refusal(folder, step, needed, error)) from error
    _prune(folder, step, keep)
    return path


def load_checkpoint(folder: Path, read: Callable[[Path, int], Checkpoint] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint in folder, every byte verified; None if there is none at all.

    A broken one is passed over with a SaeWarning that names it and the flaw. Raises CheckpointError if all are broken.
    Reads each file twice (1.2 s/GB if the system has cached it), with no more memory than the tensors take. read
    (path, step) stands in for the reader of what one process saved (sharded.py).
    """
    if not folder.exists():
        return None
    flaws = []
    for step, path in _found(folder):
        try:
            checkpoint = (read or _read)(path, step)
        except BROKEN as error:
            flaws.append(f"{path} ({_reason(error)})")
            continue
        for flaw in flaws:
            warnings.warn(f"passed over the broken checkpoint {flaw}; took step {step}", SaeWarning, stacklevel=2)
        return checkpoint
    if flaws:
        raise CheckpointError(f"expected a whole checkpoint, found broken ones only: {'; '.join(flaws)}. Put a whole "
                              "one in their place, or start anew in another folder")
    return None


# --- what a value becomes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A safetensors file to be: its first bytes, and the tensors in the order of their bytes."""

    head: bytes
    tensors: list[Tensor]


def _layout(part: str, values: Mapping[str, Value]) -> _Layout:
    """Widest dtypes first, so that each tensor is aligned. A dtype that the format lacks is stored as its bytes."""
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        t = tensors[name]
        dtype, shape = DTYPE_NAMES.get(t.dtype, "U8"), list(t.shape) if t.dtype in DTYPE_NAMES else [t.nbytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    if len(order) > MOST_TENSORS or len(head) > MOST_HEADER:
        raise CheckpointError(f"part {part!r} has {len(order)} tensors, whose names and shapes take {len(head)} bytes; "
                              f"expected at most {MOST_TENSORS}, {MOST_HEADER} bytes; make several parts of it")
    return _Layout(len(head).to_bytes(8, "little") + head, [tensors[name] for name in order])


def _encode(part: str, key: str, value: object) -> object:
    """A value as JSON that keeps it exactly; a tensor as its dtype and shape. Raises CheckpointError."""
    with contextlib.suppress(UnicodeEncodeError):  # lone surrogates, which UTF-8 cannot hold
        f"{part}{key}{value if isinstance(value, str) else ''}".encode()
        if isinstance(value, Tensor) and key not in ("", "__metadata__") and _is_plain(value):
            return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value) if abs(value) < EXACT else {"int": hex(value)}
        if value is None or isinstance(value, bool | str):
            return value
    raise CheckpointError(f"part {part!r}, value {key!r}: expected a dense tensor with its data here, or an int, "
                          f"float, str, bool or None, named in plain text; got {_kind(value)}")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor.detach()) is Tensor and tensor.layout == torch.strided and tensor.device.type != "meta" \
        and not tensor.is_quantized


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} ({value.layout}, {value.dtype}, device {value.device})"
    return f"{type(value).__name__} {value!r:.100}"


def _decode(value: Any, tensor: Tensor | None) -> Value:
    match value:
        case {"tensor": [str(name), list(shape)]} if tensor is not None:
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype):
                raise SaeFormatError(f"{name!r} is no dtype of torch {torch.__version__}")
            return tensor.view(dtype).reshape(shape)
        case {"float": str(text)}:
            return float(text)
        case {"int": str(text)}:
            return int(text, 16)
        case None | bool() | int() | float() | str():
            return value
    raise SaeFormatError(f"{str(value)[:100]!r} is no value that this version writes")


# --- writing ------------------------------------------------------------------------------------------------


def _write(folder: Path, step: int, layouts: Mapping[str, _Layout], values: Mapping[str, Any]) -> Path:
    """Everything is on the disk, the manifest last, before the folder gets its name."""
    path, scratch = folder / f"step-{step:08d}", _scratch(folder, step)
    scratch.mkdir()
    try:
        content: dict[str, Any] = {"format": FORMAT, "step": step, "parts": {}}
        for n, (name, layout) in enumerate(layouts.items()):
            file = f"{n:03d}-{re.sub('[^A-Za-z0-9._-]+', '-', name)[:60]}.safetensors"
            written = _write_tensors(scratch / file, layout)
            content["parts"][name] = {"file": file, **written, "values": values[name]}
        _seal(scratch, path, content)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return path


def _begin(folder: Path, step: int) -> None:
    """Make the folder ready for a new checkpoint. Raises CheckpointError if it is another training's."""
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_another_training(folder, step)
    _clear_leftovers(folder)


def _seal(scratch: Path, path: Path, content: dict[str, Any]) -> None:
    """The manifest, then the name."""
    _write_manifest(scratch / MANIFEST, content)
    sync_folder(scratch)
    _put(scratch, path)
    sync_folder(path.parent)


def _write_tensors(path: Path, layout: _Layout) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in _pieces(layout):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _pieces(layout: _Layout) -> Iterator[memoryview]:
    yield memoryview(layout.head)
    for tensor in layout.tensors:
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        raw = plain.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), PIECE):
            yield raw[start:start + PIECE]


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    raw = json.dumps({"content": content, "sha256": _hash(content)}, indent=1).encode() + b"\n"
    if len(raw) > MOST_MANIFEST:
        raise CheckpointError(f"the scalars take {len(raw)} bytes of JSON, expected at most {MOST_MANIFEST}; "
                              "store long texts as tensors of bytes")
    with path.open("xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _put(scratch: Path, path: Path) -> None:
    """Rename scratch to path. What was there is set aside under a name that load_checkpoint knows, for _prune."""
    aside = path.with_name(f"{path.name}.replaced")
    moved = path.exists()
    if moved:
        _discard(aside)
        os.rename(path, aside)
    try:
        os.rename(scratch, path)
    except BaseException:
        if moved:
            os.rename(aside, path)
        raise


def _refusal(folder: Path, step: int, needed: int, error: OSError) -> str:
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB"
    whole = [found for found, path in _found(folder) if _passes(_manifest, path, found)]
    resume = f"then resume: training goes on from step {whole[0]}" if whole else "no earlier checkpoint is there"
    return (f"step {step} could not be saved in {folder}: {error}. It needs {needed / 1e6:,.1f} MB beside what is "
            f"there, free are {free}. Nothing was changed. Make room, or set right what the error names; {resume}")


# --- what is there ------------------------------------------------------------------------------------------


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of all that is named as a checkpoint, newest first, one that was to be replaced after its heir."""
    names = [(match, path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := FOLDER.fullmatch(path.name))]
    names.sort(key=lambda item: (-int(item[0][1]), bool(item[0][2])))
    return [(int(match[1]), path) for match, path in names]


def _read(path: Path, step: int) -> Checkpoint:
    content = _verified(path, step)
    if "values" in content:
        raise SaeFormatError("several processes saved it together; training goes on from it, in any number of them "
                             "where activations are cached")
    return Checkpoint(step, path, _parts(path, content))


def _parts(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Value]]:
    parts: dict[str, dict[str, Value]] = {}
    for name, part in content["parts"].items():
        values = part["values"]
        names = {key for key, value in values.items() if isinstance(value, dict) and "tensor" in value}
        tensors = read_tensors(path / part["file"], names)
        parts[name] = {key: _decode(value, tensors.get(key)) for key, value in values.items()}
    return parts


def _verified(path: Path, step: int) -> dict[str, Any]:
    """The manifest's content, after hashing all files. Raises one of BROKEN."""
    content = _manifest(path, step)
    for part in content["parts"].values():
        with open_regular(path / part["file"]) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:  # type: ignore[arg-type]
                raise SaeFormatError(f"{part['file']} was changed or damaged: its SHA-256 is not the manifest's")
    return content


def _manifest(path: Path, step: int) -> dict[str, Any]:
    """The manifest's content, if it is whole, of this step, and the files have their sizes. Raises one of BROKEN."""
    check_contained(path / MANIFEST, path)
    with open_regular(path / MANIFEST) as file:
        raw = file.read(MOST_MANIFEST + 1)
    if len(raw) > MOST_MANIFEST:
        raise SaeFormatError(f"{MANIFEST} is larger than {MOST_MANIFEST} bytes")
    manifest = parse_json(raw, "manifest")
    content: dict[str, Any] = manifest["content"]
    if manifest["sha256"] != _hash(content):
        raise SaeFormatError(f"{MANIFEST} was changed or damaged: its hash is not its content's")
    if content["format"] != FORMAT:
        raise SaeFormatError(f"format {content['format']!r}, this version of sae_hooks reads {FORMAT}")
    if content["step"] != step:
        raise SaeFormatError(f"{MANIFEST} says step {content['step']!r}, the folder's name {step}")
    for part in content["parts"].values():
        check_contained(path / part["file"], path)
        if (size := (path / part["file"]).stat().st_size) != part["bytes"]:
            raise SaeFormatError(f"{part['file']} has {size} bytes, expected {part['bytes']}")
    return content


def _passes(check: Callable[[Path, int], object], path: Path, step: int) -> bool:
    try:
        check(path, step)
    except BROKEN:
        return False
    return True


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, SaeError) else f"{type(error).__name__}: {error}"


def _refuse_another_training(folder: Path, step: int) -> None:
    for found, path in _found(folder):
        if found > step and _passes(_verified, path, found):
            raise CheckpointError(f"{path} is of a later step than {step}, which was to be saved: of another training? "
                                  "Load it and go on from there, or take another folder")


# --- taking away --------------------------------------------------------------------------------------------


def _prune(folder: Path, saved: int, keep: int) -> None:
    """Keep `keep` whole ones from the saved step down; later ones are broken, or saving would have been refused."""
    kept: set[int] = set()
    for step, path in _found(folder):
        if step <= saved and step not in kept and len(kept) < keep and _passes(_manifest, path, step):
            kept.add(step)
        else:
            _discard(path)


def _discard(path: Path) -> None:
    """Rename, then delete: a process that is killed meanwhile leaves nothing that looks like a checkpoint."""
    if not path.exists():
        return
    try:
        gone = _scratch(path.parent, 0)
        os.rename(path, gone)
        shutil.rmtree(gone)
    except OSError as error:
        warnings.warn(f"could not remove {path}, which is no longer needed: {error}", SaeWarning, stacklevel=4)


def _scratch(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _clear_leftovers(folder: Path) -> None:
    """What killed processes left: temporary folders go, a step set aside whose heir never came gets its name back.

    Our own process id counts as dead: in a container every run may have the same.
    """
    for left in folder.glob(".step-*.*.*.tmp"):
        pid = left.name.split(".")[-3]
        if pid.isdigit() and (int(pid) == os.getpid() or not alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    for _, aside in _found(folder):
        if aside.suffix and not aside.with_suffix("").exists():
            os.rename(aside, aside.with_suffix(""))
