"""One shard, mapped into memory: its header, metadata and row pointers are checked before anything of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SaeFormatError
from ..hub.parsing import parse_json
from ..hub.safe_files import open_regular
from .format import FORMAT, MOST_INDEX_U16, content_checksum, naming, token_checksum

MOST_HEADER = 2**20  # bytes
VALUES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PROVENANCE = {"doc_id": torch.uint32, "position": torch.uint32, "token_id": torch.int32}
PARTS = ("indptr", "indices", "values", "ordinary")
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Entries:
    """The features of one SAE in a shard, as CSR over its n rows; views of the file.

    indptr (n + 1) int64, indices (nnz) uint16 or uint32, values (nnz) float16, bfloat16 or float32, ordinary (n)
    bool: the row was encoded; activations (n, d_in) or None.
    """

    d_sae: int
    indptr: Array
    indices: Array
    values: Tensor
    ordinary: Array
    activations: Tensor | None

    def checked(self, start: int, stop: int) -> Array:
        """indices[start:stop], a view. Raises SaeFormatError if one is not below d_sae, before any use."""
        indices = self.indices[start:stop]
        full = self.d_sae == MOST_INDEX_U16 and indices.dtype == np.uint16
        if not full and indices.size and int(indices.max()) >= self.d_sae:
            raise SaeFormatError(f"a feature index of {int(indices.max())}, d_sae is {self.d_sae}: the shard is broken")
        return indices


class Shard:
    """One shard of a store, mapped.

    stated: its metadata; doc_id and position (n) uint32, token_id (n) int32; entries: SAE's name -> Entries. All are
    views of the file, valid while nobody cuts it: whoever returns something to a user copies it. Raises
    SaeFormatError, SaeNotFoundError naming the file.
    """

    def __init__(self, path: Path, saes: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = path
        with naming(path):
            self.stated, tensors = _mapped(path)
            _check_tensors(tensors, saes, self.stated["rows"])
            self.doc_id, self.position, self.token_id = (tensors[name].numpy() for name in PROVENANCE)
            if not in_order(self.doc_id, self.position):
                raise SaeFormatError("its rows are not in order of document and position; a byte was changed")
            self._tensors = tensors
            self.entries = {name: _entries(tensors, name, sae["d_sae"]) for name, sae in saes.items()}

    def __len__(self) -> int:
        return len(self.doc_id)

    def check_stated(self, expected: Mapping[str, Any]) -> None:
        """Raise SaeFormatError if the metadata says anything else than expected: a foreign shard, or a swapped one."""
        wrong = [f"{key} is {self.stated[key]!r}, expected {value!r}" for key, value in expected.items()
                 if self.stated[key] != value]
        if wrong:
            raise SaeFormatError(f"{self.path}: a shard of another export, or from another place: {'; '.join(wrong)}")

    def check_content(self) -> None:
        """Raise SaeFormatError unless the tokens are those stated and every index is below d_sae."""
        with naming(self.path):
            if token_checksum(self.doc_id, self.position, self.token_id) != self.stated["tokens"]:
                raise SaeFormatError("its tokens are not those that it states; a byte was changed")
            for entries in self.entries.values():
                entries.checked(0, len(entries.indices))

    def check_bytes(self) -> None:
        """Raise SaeFormatError unless every tensor is as it was written, where the shard states its checksum: those of
        before it was stated do not."""
        if self.stated.get("crc32") not in (None, content_checksum(self._tensors)):
            raise SaeFormatError(f"{self.path}: a byte was changed since it was written; delete it, and run the export "
                                 "again to have it written again")


def in_order(doc_id: Array, position: Array) -> bool:
    """Whether rows ascend by document, and by position in each."""
    key = (doc_id.astype(np.uint64) << np.uint64(32)) | position.astype(np.uint64)
    return bool((key[1:] > key[:-1]).all())


def index_dtype(d_sae: int) -> torch.dtype:
    """uint16 while every feature's number fits, else uint32."""
    return torch.uint16 if d_sae <= MOST_INDEX_U16 else torch.uint32


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors on mapped memory. safetensors checks that the header covers every byte exactly once."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        raise SaeFormatError(f"declares a header of {length} bytes, at most {MOST_HEADER}: not a shard, or broken")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise SaeFormatError(f"not a whole safetensors file ({error}): cut short, or broken") from error
    return _stated(metadata), tensors


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    if set(metadata) != {FORMAT}:
        raise SaeFormatError(f"its metadata has the keys {sorted(metadata)}, expected [{FORMAT!r}]: not a shard")
    stated = parse_json(metadata[FORMAT].encode(), "metadata")
    kinds = {"shard": int, "first_row": int, "rows": int, "export": str, "tokens": str, "documents": str}
    kinds |= {"crc32": int} if "crc32" in stated else {}
    if set(stated) != set(kinds) or any(type(stated[key]) is not kind for key, kind in kinds.items()):
        raise SaeFormatError(f"its metadata is {str(stated)[:300]}, expected {', '.join(kinds)}")
    return stated


def _check_tensors(tensors: Mapping[str, Tensor], saes: Mapping[str, Mapping[str, Any]], rows: int) -> None:
    """Names, dtypes and shapes are those that the SAEs and the number of rows mean."""
    required = {*PROVENANCE, *(f"{name}/{part}" for name in saes for part in PARTS)}
    allowed = required | {f"{name}/activations" for name in saes}
    if not required <= set(tensors) <= allowed:
        raise SaeFormatError(f"tensors missing: {sorted(required - set(tensors))}, foreign: "
                             f"{sorted(set(tensors) - allowed)[:10]}; a shard of other SAEs?")
    wrong = [name for name, dtype in PROVENANCE.items() if _kind(tensors[name]) != (dtype, (rows,))]
    for name, sae in saes.items():
        count = (tensors[f"{name}/indices"].numel(),)
        kinds = {"indptr": (torch.int64, (rows + 1,)), "ordinary": (torch.bool, (rows,)),
                 "indices": (index_dtype(sae["d_sae"]), count)}
        wrong += [f"{name}/{part}" for part, kind in kinds.items() if _kind(tensors[f"{name}/{part}"]) != kind]
        values, acts = tensors[f"{name}/values"], tensors.get(f"{name}/activations")
        wrong += [f"{name}/values"] if values.dtype not in VALUES.values() or values.shape != count else []
        odd = acts is not None and (not acts.is_floating_point() or acts.shape != (rows, sae["d_in"]))
        wrong += [f"{name}/activations"] if odd else []
    if wrong:
        raise SaeFormatError("; ".join(f"{n}: {tensors[n].dtype} {tuple(tensors[n].shape)}" for n in wrong)
                             + f": not the dtype or shape of {rows} rows of these SAEs")


def _kind(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _entries(tensors: Mapping[str, Tensor], name: str, d_sae: int) -> Entries:
    indptr, indices, values, ordinary = (tensors[f"{name}/{part}"] for part in PARTS)
    pointers = indptr.numpy()
    if pointers[0] != 0 or pointers[-1] != len(indices) or (pointers[1:] < pointers[:-1]).any():
        raise SaeFormatError(f"{name}/indptr does not ascend from 0 to {len(indices)}; a byte was changed")
    return Entries(d_sae, pointers, indices.numpy(), values, ordinary.numpy(), tensors.get(f"{name}/activations"))
