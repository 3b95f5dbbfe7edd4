"""What the feature store weighs and how quick it is: python benchmarks/store.py [--record]

A million tokens in 40 shards, 60 of 16,384 features on each, random. Written with hashes and fsync; read with the
pages in the cache, one thread. Medians; columns differ in features.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_hooks import SparseFeatures, open_features
from sae_hooks.store.writing import write_export, write_manifest, write_shard

RESULT = Path(__file__).parent / "results" / "store.txt"
SHARDS, ROWS, L0, D_SAE, DOCUMENT = 40, 25_000, 60, 16_384, 200
SITE = "model.layers.15.output"


def random_shard(number: int) -> tuple[SparseFeatures, torch.Tensor, list[dict[str, Any]]]:
    """(features, ordinary rows, documents); the first token of each document is none of the ordinary."""
    rng, rows = np.random.default_rng(number), np.arange(number * ROWS, (number + 1) * ROWS)
    ordinary, width = rows % DOCUMENT != 0, D_SAE // L0
    counts, kept = np.where(ordinary, L0, 0), np.repeat(ordinary, L0)
    indices = (rng.integers(0, width, (ROWS, L0)) + np.arange(L0) * width).ravel()[kept]
    values = rng.lognormal(size=len(indices)).astype(np.float32)
    columns = [np.concatenate([[0], counts.cumsum()]), indices, values]
    origin = [rows // DOCUMENT, rows % DOCUMENT, rng.integers(0, 49_152, ROWS)]
    indptr, indices_, values_, *where = map(torch.from_numpy, (*columns, *origin))
    documents = [{"doc_id": int(d), "tokens": DOCUMENT, "columns": {"domain": str(d % 14)}}
                 for d in np.unique(origin[0])]
    return SparseFeatures(indptr, indices_, values_, D_SAE, *where), torch.from_numpy(ordinary), documents


def written(folder: Path) -> str:
    """Write the store; how fast, how large."""
    export = write_export(folder, {"saes": {SITE: {"site": SITE, "d_in": 576, "d_sae": D_SAE}}})
    entries, wall, cpu = [], 0.0, 0.0
    for number in range(SHARDS):
        features, ordinary, documents = random_shard(number)
        started = time.perf_counter(), time.process_time()
        entries.append(write_shard(folder, number, export=export, first_row=number * ROWS, features={SITE: features},
                                   ordinary={SITE: ordinary}, documents=documents))
        wall, cpu = wall + time.perf_counter() - started[0], cpu + time.process_time() - started[1]
    write_manifest(folder, entries)
    size = sum(path.stat().st_size for path in folder.iterdir())
    nonzeros = sum(entry["nonzeros"][SITE] for entry in entries)
    return (f"{size / 1e6:.0f} MB, {size / nonzeros:.2f} bytes a non-zero; written at {size / 1e6 / wall:.0f} MB/s "
            f"({size / 1e6 / cpu:.0f} MB a second of CPU time)")


def timed(what: str, do: Callable[[int], object], rounds: int) -> str:
    """Median CPU and wall time of do(0), do(1), ..."""
    taken = []
    for i in range(rounds):
        started = time.process_time(), time.perf_counter()
        do(i)
        taken.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    cpu, wall = (statistics.median(column) * 1e3 for column in zip(*taken, strict=True))
    return f"{what}: {cpu:.1f} ms CPU, {wall:.1f} ms"


def main() -> None:
    """Measure and print; --record keeps it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    p.add_argument("--folder", type=Path, help="where to write it, for a while")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        lines = [written(Path(scratch)), timed("open", lambda i: open_features(scratch), 9)]
        store = open_features(scratch)
        random_rows = np.random.default_rng(0).integers(0, len(store), 1000)
        lines += [timed("a feature's column", lambda i: store.column(100 + i), 15),
                  timed("1,000 random rows", lambda i: store.rows(random_rows), 9),
                  *(timed(f"pooled {how}", lambda i, how=how: store.pooled(how), 3) for how in ("max", "mean", "last")),
                  timed("verify", lambda i: store.verify(), 3)]
    told = "\n".join([*lines, f"({os.cpu_count()}-core CPU, torch {torch.__version__})"])
    print(told)
    if args.record:
        RESULT.write_text(told + "\n")


if __name__ == "__main__":
    main()
