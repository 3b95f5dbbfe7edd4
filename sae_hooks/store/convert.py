"""A store as Arrow tables, one row a token: Parquet files and `datasets`. Needs pyarrow (the extra `probes`)."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import needed
from .folder import ShardFolder, copied
from .format import MANIFEST, file_digest

if TYPE_CHECKING:
    from datasets import Dataset


def write_parquet(folder: ShardFolder, name: str, path: Path) -> None:
    """One row group for some thousand tokens; the file is there whole or not at all. Raises OSError."""
    pq = needed("pyarrow.parquet")
    _write_whole(path, lambda file: pq.ParquetWriter(file, _schema(), compression="zstd"), folder, name)


def as_dataset(folder: ShardFolder, name: str) -> Dataset:
    """A `datasets.Dataset` on an Arrow file in datasets' cache folder, which is written once a store and site."""
    datasets, pa = needed("datasets"), needed("pyarrow")
    key = f"{file_digest(folder.path / MANIFEST)[:32]}-{sorted(folder.saes).index(name)}"
    path = Path(datasets.config.HF_DATASETS_CACHE) / "sae_hooks.features" / f"{key}.arrow"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, lambda file: pa.ipc.new_stream(file, _schema()), folder, name)
    made: Dataset = datasets.Dataset.from_file(str(path))
    return made


def _write_whole(path: Path, writer: Callable[[str], Any], folder: ShardFolder, name: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with writer(str(scratch)) as opened:
            for batch in _batches(folder, name):
                opened.write_batch(batch)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def _schema() -> Any:
    pa = needed("pyarrow")
    return pa.schema([("doc_id", pa.uint32()), ("position", pa.uint32()), ("token_id", pa.int32()),
                      ("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))])


def _batches(folder: ShardFolder, name: str) -> Iterator[Any]:
    """Record batches over all rows, of bounded size."""
    pa = needed("pyarrow")
    for shard, first, last in folder.parts():
        features = copied(shard, name, first, last)
        offsets = pa.array(features.indptr.numpy().astype(np.int32))
        indices = pa.array(features.indices.numpy().astype(np.uint32))
        lists = [pa.ListArray.from_arrays(offsets, flat) for flat in (indices, pa.array(features.values.numpy()))]
        kinds = ((features.doc_id, np.uint32), (features.position, np.uint32), (features.token_id, np.int32))
        columns = [pa.array(column.numpy().astype(kind)) for column, kind in kinds]
        yield pa.record_batch([*columns, *lists], schema=_schema())
