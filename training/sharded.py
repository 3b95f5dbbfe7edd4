"""Checkpoints of several processes, by torch.distributed.checkpoint: each writes what it holds, any number read it.

folder/step-00001234/ holds a safetensors file a process, whose header says which rows of what it has, and the manifest
of checkpoint.py. What one process saved is read by several, and the other way round. The library is imported where
it is called, for it takes a second and a half.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sae_hooks.errors import TrainingError

from .checkpoint import (
    FORMAT,
    Checkpoint,
    Value,
    _begin,
    _decode,
    _encode,
    _manifest,
    _parts,
    _prune,
    _refusal,
    _scratch,
    _seal,
    _verified,
    load_checkpoint,
    save_checkpoint,
)
from .parallel import ALONE, FEATURES, Parallel, feature_first, is_per_feature

OWN = "_stream"  # the part that differs between processes that read different rows


def save_shards(folder: Path, step: int, parts: Mapping[str, Mapping[str, Value]], parallel: Parallel, *,
                keep: int = 2) -> Path:
    """save_checkpoint by all processes, in a folder that all of them see. Raises in all what it raises in one.

    Takes as much of the CPU's memory as the process' tensors do, for the library makes a file before it writes it.
    """
    if parallel.mesh is None:
        return save_checkpoint(folder, step, parts, keep=keep)
    tensors, values = _flat(parts, parallel)
    try:
        scratch = parallel.by_main(_prepare, folder, step)
        try:
            files = parallel.together(_write, scratch, tensors)
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, (files, values))
            return parallel.by_main(_finish, scratch, folder, step, found, keep)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except OSError as error:
        raise TrainingError(_refusal(folder, step, sum(t.nbytes for t in tensors.values()), error)) from error


def load_shards(folder: Path, parallel: Parallel) -> Checkpoint | None:
    """load_checkpoint in all processes: of each tensor what this one holds. One of them checks every byte."""
    if parallel.mesh is None:
        return load_checkpoint(folder, lambda path, step: _read(path, step, _verified(path, step), parallel))
    newest = parallel.by_main(load_checkpoint, folder, _checked)
    if newest is None:
        return None
    return parallel.together(lambda: _read(newest.path, newest.step, _manifest(newest.path, newest.step), parallel))


def _flat(parts: Mapping[str, Mapping[str, Value]],
          parallel: Parallel) -> tuple[dict[str, Tensor], dict[str, dict[str, object]]]:
    """({"part/name": tensor}, {part: {name: value as JSON}}) of this process."""
    named = {f"{name}.{parallel.share[0]}" if name == OWN else name: part for name, part in parts.items()}
    values = {name: {key: _encode(name, key, value) for key, value in part.items()} for name, part in named.items()}
    tensors = {f"{name}/{key}": _placed(key, value.detach(), parallel if name in parts else ALONE)
               for name, part in named.items() for key, value in part.items() if isinstance(value, Tensor)}
    return tensors, values


def _placed(key: str, t: Tensor, parallel: Parallel) -> Tensor:
    """A tensor, features first, that knows which rows it has."""
    rows = feature_first(key, t)
    if parallel.mesh is None or parallel.shards == 1 or not is_per_feature(key, t):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(rows, parallel.mesh[FEATURES], [Shard(0)], run_check=False)


def _prepare(folder: Path, step: int) -> Path:
    _begin(folder, step)
    scratch = _scratch(folder, step)
    scratch.mkdir()
    return scratch


def _write(scratch: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write this process' file; {its name: what the manifest says of it}. What several have is written once."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # no Exception; has the one of each process that failed
        cause = next(iter(error.failures.values()))[0]
        raise (cause if isinstance(cause, OSError) else TrainingError(str(cause))) from error
    mine = sorted(scratch.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
    return {path.name: {"file": path.name, **_hashed(path), "values": {}} for path in mine}


def _hashed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _finish(scratch: Path, folder: Path, step: int, found: list[Any], keep: int) -> Path:
    """The manifest and the folder's name, once every process has written."""
    content: dict[str, Any] = {"format": FORMAT, "step": step, "parts": {}, "values": {}}
    for files, values in found:
        content["parts"] |= files
        content["values"] |= values
    path = folder / f"step-{step:08d}"
    _seal(scratch, path, content)
    _prune(folder, step, keep)
    return path


def _checked(path: Path, step: int) -> Checkpoint:
    """A checkpoint whose files are whole; nothing is read of it yet."""
    _verified(path, step)
    return Checkpoint(step, path, {})


def _read(path: Path, step: int, content: dict[str, Any], parallel: Parallel) -> Checkpoint:
    if "values" in content:
        return Checkpoint(step, path, _read_shards(path, content["values"], parallel))
    parts = _parts(path, content)
    for name in parts.keys() - {OWN}:
        parts[name] = {key: parallel.local(key, value) if isinstance(value, Tensor) else value
                       for key, value in parts[name].items()}
    return Checkpoint(step, path, parts)


def _read_shards(path: Path, values: Mapping[str, Mapping[str, Any]],
                 parallel: Parallel) -> dict[str, dict[str, Value]]:
    """Of the streams this process' own, or, where fewer were saved, the first: it knows what it can go on from."""
    own = f"{OWN}.{parallel.share[0]}" if f"{OWN}.{parallel.share[0]}" in values else f"{OWN}.0"
    wanted = {name: part for name, part in values.items() if name == own or not name.startswith(f"{OWN}.")}
    room = _room(path, {f"{name}/{key}": (key, ALONE if name == own else parallel) for name, part in wanted.items()
                        for key, value in part.items() if isinstance(value, dict) and "tensor" in value})
    parts = {name: {key: room[f"{name}/{key}"] if f"{name}/{key}" in room else _decode(value, None)
                    for key, value in part.items()} for name, part in wanted.items()}
    parts[OWN] = parts.pop(own)
    return parts


def _room(path: Path, wanted: Mapping[str, tuple[str, Parallel]]) -> dict[str, Tensor]:
    """{"part/name": what the process holds of it}, read from the files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    room = {}
    for full, (key, parallel) in wanted.items():
        size, dtype = list(saved[full].size), saved[full].properties.dtype
        if is_per_feature(key, torch.empty(size, device="meta")):
            size[0] //= parallel.shards
        room[full] = _placed(key, feature_first(key, torch.empty(size, dtype=dtype)), parallel)
    with warnings.catch_warnings():  # it says that each process reads by itself, which is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(room, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return {full: feature_first(wanted[full][0], _plain(t)) for full, t in room.items()}


def _plain(t: Tensor) -> Tensor:
    local: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return local
