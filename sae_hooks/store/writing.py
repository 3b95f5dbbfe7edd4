"""Writing a store: export.json, then shard by shard, then the manifest. Each file is there whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import DataError, SaeFormatError
from ..hub.safe_files import write_atomically
from ..sparse import SparseFeatures
from .format import (
    EXPORT,
    FORMAT,
    MANIFEST,
    canonical,
    content_checksum,
    digest,
    documents_bytes,
    documents_name,
    file_digest,
    is_consecutive,
    naming,
    parse_documents,
    read_object,
    shard_name,
    token_checksum,
)
from .shards import PROVENANCE, VALUES, Shard, in_order, index_dtype

MOST_WIDTH = 2**24  # features
SPANS = {"doc_id": 2**32, "position": 2**32, "token_id": 2**31}


def write_export(folder: Path, content: Mapping[str, Any]) -> str:
    """Write export.json, its format added, and return its sha256. The folder is made.

    content: "saes" {name: {"site", "d_in", "d_sae", ...}} and whatever else tells one export from another. Raises
    DataError if it is not plain JSON, or if the disk refuses.
    """
    raw = canonical({**content, "format": FORMAT}, indent=2)
    _write({folder / EXPORT: raw})
    return digest(raw)


def read_export(folder: Path) -> dict[str, Any] | None:
    """What export.json says, or None where there is none. Raises SaeFormatError."""
    if not (folder / EXPORT).exists():
        return None
    content, _ = read_object(folder / EXPORT)
    with naming(folder / EXPORT):
        _check_saes(content.get("saes"))
    return content


def write_manifest(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write manifest.json over the shards' entries, in order: the export is finished. Raises DataError."""
    totals = {key: sum(entry[key] for entry in entries) for key in ("rows", "documents")}
    export = file_digest(folder / EXPORT)
    _write({folder / MANIFEST: canonical({"format": FORMAT, "export": export, "shards": list(entries), **totals}, 1)})


def write_shard(folder: Path, number: int, *, export: str, first_row: int, features: Mapping[str, SparseFeatures],
                ordinary: Mapping[str, Tensor], activations: Mapping[str, Tensor] | None = None,
                documents: Sequence[Mapping[str, Any]], dtype: str = "float16") -> dict[str, Any]:
    """Write one shard and the documents that begin in it; returns its entry for the manifest.

    features: SAE's name -> the same n rows, in order of document and position, on any device; ordinary: name -> (n)
    bool, rows that were encoded (the others have no features); activations: name -> (n, d_in), kept in their dtype;
    documents: {"doc_id", "tokens", "columns"}, numbered one by one. dtype of the values: float16, bfloat16 or float32;
    what it rounds to 0 (in float16, below 3e-8) does not fire and is not written.
    export: sha256 of export.json. Raises DataError, and writes nothing, if a value is not finite in that dtype, if rows
    are out of order or differ between SAEs, if a column is not plain JSON, or if the disk is full.
    """
    tensors = _provenance(features)
    n = len(tensors["doc_id"])
    if not is_consecutive([document["doc_id"] for document in documents]):
        raise DataError(f"shard {number}: the documents that begin in it are not numbered one by one")
    for name, found in features.items():
        tensors |= {f"{name}/{part}": t for part, t in _sae_tensors(name, found, ordinary[name], dtype).items()}
    for name, acts in (activations or {}).items():
        if len(acts) != n:
            raise DataError(f"activations at {name}: {len(acts)} rows, the features have {n}")
        tensors[f"{name}/activations"] = acts.detach().cpu().clone(memory_format=torch.contiguous_format)
    lines = documents_bytes(documents)
    tokens = token_checksum(*(tensors[name] for name in PROVENANCE))
    stated = {"shard": number, "export": export, "first_row": first_row, "rows": n, "tokens": tokens,
              "documents": digest(lines), "crc32": content_checksum(tensors)}
    raw = save(tensors, metadata={FORMAT: canonical(stated).decode()})
    _write({folder / documents_name(number): lines, folder / shard_name(number): raw})
    nonzeros = {name: len(tensors[f"{name}/indices"]) for name in features}
    return _entry(stated, digest(raw), len(raw), len(documents), nonzeros)


def read_entry(folder: Path, number: int, export: str) -> dict[str, Any] | None:
    """The entry of a shard that is there and whole, recomputed from its files; None where there is no such shard.

    export: sha256 of the folder's export.json. Raises SaeFormatError if the shard is broken or of another export.
    """
    path, lines = folder / shard_name(number), folder / documents_name(number)
    if not path.exists():
        return None
    content = read_export(folder)
    if content is None or file_digest(folder / EXPORT) != export:
        raise SaeFormatError(f"{folder / EXPORT} is not the one that was expected (sha256 {export})")
    shard = Shard(path, content["saes"])
    shard.check_stated({"shard": number, "export": export})
    shard.check_content()
    shard.check_bytes()
    if not lines.exists():
        raise SaeFormatError(f"{lines} is missing, its shard is there; delete the shard to write both again")
    raw = lines.read_bytes()
    with naming(lines):
        documents = parse_documents(raw)
    shard.check_stated({"documents": digest(raw)})
    nonzeros = {name: len(entries.indices) for name, entries in shard.entries.items()}
    return _entry(shard.stated, file_digest(path), path.stat().st_size, len(documents), nonzeros)


def _entry(stated: Mapping[str, Any], sha256: str, size: int, documents: int, nonzeros: dict[str, int]
           ) -> dict[str, Any]:
    return {"rows": stated["rows"], "documents": documents, "bytes": size, "sha256": sha256, "nonzeros": nonzeros,
            "documents_sha256": stated["documents"], "tokens": stated["tokens"]}


def _provenance(features: Mapping[str, SparseFeatures]) -> dict[str, Tensor]:
    """doc_id, position, token_id: of all SAEs the same, in order, and within what the format can hold."""
    first = next(iter(features.values()), None)
    if first is None:
        raise DataError("no SAE's features to write")
    for name, other in features.items():
        if not all(torch.equal(getattr(other, part).cpu(), getattr(first, part).cpu()) for part in SPANS):
            raise DataError(f"the rows of {name} are other tokens than those of {next(iter(features))}")
    columns = {part: getattr(first, part).cpu() for part in SPANS}
    for part, column in columns.items():
        lowest = -1 if part == "token_id" else 0
        if len(column) and (int(column.min()) < lowest or int(column.max()) >= SPANS[part]):
            raise DataError(f"{part} from {int(column.min())} to {int(column.max())}: a store holds {lowest} to "
                            f"{SPANS[part] - 1}")
    if not in_order(columns["doc_id"].numpy(), columns["position"].numpy()):
        raise DataError("rows are not in order of document and position, or a token is there twice")
    return {part: column.to(PROVENANCE[part]) for part, column in columns.items()}


def _sae_tensors(name: str, features: SparseFeatures, ordinary: Tensor, dtype: str) -> dict[str, Tensor]:
    """The CSR of one SAE in the dtypes of the store."""
    indptr, indices, values = (getattr(features, part).detach().cpu() for part in ("indptr", "indices", "values"))
    encoded = ordinary.cpu().bool().clone()
    if len(encoded) != len(features) or bool((indptr.diff()[~encoded] != 0).any()):
        raise DataError(f"{name}: {len(encoded)} marks of ordinary tokens for {len(features)} rows, or features on a "
                        "row that is marked as not encoded")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < features.d_sae:
        raise DataError(f"{name}: features {int(indices.min())} to {int(indices.max())}, d_sae is {features.d_sae}")
    narrow = _narrowed(name, features, values, dtype)
    if not bool((kept := narrow != 0).all()):
        before = torch.cat([indptr.new_zeros(1), kept.cumsum(0)])  # of each entry: how many are kept
        indptr, indices, narrow = before[indptr], indices[kept], narrow[kept]
    return {"indptr": indptr.to(torch.int64).clone(), "indices": indices.to(index_dtype(features.d_sae)).clone(),
            "values": narrow, "ordinary": encoded}


def check_dtype(dtype: Any) -> None:
    """Raise DataError for what is no name of a dtype that values are kept in."""
    if not isinstance(dtype, str) or dtype not in VALUES:
        raise DataError(f"dtype={dtype!r}: values are kept in one of {', '.join(map(repr, VALUES))}; give its name")


def _narrowed(name: str, features: SparseFeatures, values: Tensor, dtype: str) -> Tensor:
    """The values in the dtype asked for. Raises DataError naming the first that is not finite there."""
    check_dtype(dtype)
    narrow = values.to(VALUES[dtype], copy=True)
    if not bool(narrow.isfinite().all()):
        at = int((~narrow.isfinite()).nonzero()[0])
        row = int(features.rows.cpu()[at])
        where = f"document {int(features.doc_id[row])}, position {int(features.position[row])}"
        remedy = "" if not np.isfinite(float(values[at])) else f" is too large for {dtype}; take dtype='bfloat16'"
        raise DataError(f"{name}: feature {int(features.indices[at])} is {float(values[at]):g} at {where}{remedy}")
    return narrow


def _write(files: Mapping[Path, bytes]) -> None:
    folder = next(iter(files)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(files)
    except OSError as error:
        needed = sum(map(len, files.values())) / 1e6
        free = f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free)" if error.errno == errno.ENOSPC else ""
        names = " and ".join(path.name for path in files)
        raise DataError(f"{names} could not be written in {folder}: {error}. {needed:,.1f} MB are needed{free}; make "
                        "room or take another folder, and run it again with resume") from error


def _check_saes(saes: Any) -> None:
    """Every SAE has a name, a site and widths. Raises SaeFormatError."""
    if not isinstance(saes, dict) or not saes:
        raise SaeFormatError("no SAEs in it, expected {name: {site, d_in, d_sae}}")
    for name, sae in saes.items():
        sizes = [sae.get(key) for key in ("d_in", "d_sae")] if isinstance(sae, dict) else [None]
        natural = all(type(size) is int and 0 < size <= MOST_WIDTH for size in sizes)
        if not natural or not isinstance(sae.get("site"), str):
            raise SaeFormatError(f"SAE {name!r} is {str(sae)[:200]}, expected site, d_in and d_sae")
