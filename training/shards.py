"""Harvested activations on disk: folder/site/harvest.json and shard-NNNNN.safetensors, one tensor "x" (n,
d_in) each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .harvest import Window, harvest


@dataclass(frozen=True, kw_only=True)
class HarvestInfo:
    """What a folder of shards says of itself.

    typical_norm and rms_norm: median and root mean square of the L2 norms of ordinary tokens, in the
    model's units. window: tokens of context.
    """

    site: str
    model_name: str
    typical_norm: float
    rms_norm: float
    d_in: int
    window: int
    seed: int


def write_shards(model: nn.Module, folder: Path, infos: Sequence[HarvestInfo], windows: Sequence[Window],
                 special_ids: Sequence[int], *, windows_per_shard: int, worker: int = 0,
                 workers: int = 1) -> Iterator[int]:
    """Write every shard N = worker (mod workers) that is not there yet, for all sites; yield the tokens of
    each.

    Shard N holds windows [N * windows_per_shard, ...) and is seen whole or not at all, so that a harvest
    that was cut off goes on where it stopped. Raises ValueError if folder holds another harvest.
    """
    for info in infos:
        _claim(folder / info.site, info)
    for n in range(worker, -(-len(windows) // windows_per_shard), workers):
        missing = {i.site: i.typical_norm for i in infos if not _path(folder, i.site, n).exists()}
        if missing:
            mine = windows[n * windows_per_shard:(n + 1) * windows_per_shard]
            found = harvest(model, missing, mine, special_ids)
            for site, x in found.items():
                _save(x, _path(folder, site, n))
            yield max(map(len, found.values()))


def read_info(folder: Path) -> HarvestInfo:
    """The harvest.json of a site's folder."""
    return HarvestInfo(**json.loads((folder / "harvest.json").read_text()))


class Shards:
    """The activations in one site's folder, read shuffled; `len(shards)` tokens, memory-mapped."""

    def __init__(self, folder: Path, max_tokens: int | None = None) -> None:
        """Map the shards that are there, in order, until max_tokens are reached. FileNotFoundError if there
        are none.
        """
        self.info = read_info(folder)
        self.parts: list[Tensor] = []
        for path in sorted(folder.glob("shard-*.safetensors")):
            if max_tokens is None or len(self) < max_tokens:
                with safe_open(path, framework="pt") as f:
                    self.parts.append(f.get_tensor("x"))
        if not self.parts:
            raise FileNotFoundError(f"{folder} holds no shard-*.safetensors; harvest first")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Yield one epoch of float32 batches (size, d_in) of mean squared norm 1, shuffled across all shards.

        The division is by rms_norm. The last, smaller batch is left out.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for rows in torch.split(order, size)[:len(self) // size]:
            yield self._rows(rows).float() / self.info.rms_norm

    def _rows(self, rows: Tensor) -> Tensor:
        ends = torch.tensor([len(p) for p in self.parts]).cumsum(0)
        part = torch.searchsorted(ends, rows, right=True)
        out = torch.empty(len(rows), self.info.d_in, dtype=self.parts[0].dtype)
        for p in set(part.tolist()):
            out[part == p] = self.parts[p][rows[part == p] - (ends[p] - len(self.parts[p]))]
        return out


def _path(folder: Path, site: str, n: int) -> Path:
    return folder / site / f"shard-{n:05d}.safetensors"


def _save(x: Tensor, path: Path) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"x": x}, scratch)
    os.replace(scratch, path)


def _claim(folder: Path, info: HarvestInfo) -> None:
    """Write folder/harvest.json, or raise ValueError if there is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "harvest.json"
    if not path.exists():
        scratch = folder / f".harvest.{os.getpid()}"
        scratch.write_text(json.dumps(asdict(info), indent=1))
        os.replace(scratch, path)
    if (found := read_info(folder)) != info:
        raise ValueError(f"{folder} holds another harvest; take a new folder: expected {info}, found {found}")
