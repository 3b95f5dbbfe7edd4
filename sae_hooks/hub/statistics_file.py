"""feature_statistics.safetensors, which stands beside cfg.json: how often and how strongly each feature fires."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import SaeFormatError, SaeMismatchError
from ..formats import Entry
from ..identity import sae_digest
from ..sae import SAE
from ..statistics import LEVELS, FeatureStatistics
from .sources import STATISTICS
from .weight_files import Shapes, check_finite, read_metadata, read_shapes, read_tensors, safetensors_bytes

WEIGHTS = "sae_hooks.weights"  # key of the metadata: a digest of the weights that the statistics are of


def beside(entry: Entry) -> str | None:
    """Where an SAE's statistics are if it has any, as a path in its source; None where its dialect has none."""
    folder = entry.weights.rpartition("/")[0]
    return f"{folder}/{STATISTICS}".lstrip("/") if entry.dialect == "saelens" else None


def read_statistics(path: Path, d_sae: int) -> FeatureStatistics:
    """The statistics in a file, of an SAE of d_sae features. Sizes are told from the header before anything is read.

    Raises SaeMismatchError naming every tensor of another shape, SaeFormatError for other tensors and for values that
    no activations can have, and what read_tensors raises.
    """
    expected = _shapes(d_sae)
    shapes = read_shapes(path)
    odd = [f"no {name}" for name in expected if name not in shapes]
    odd += [f"unknown tensor {name!r}" for name in shapes if name not in expected][:10]
    if odd:
        raise SaeFormatError(f"statistics of features hold {', '.join(expected)}: {'; '.join(odd)}")
    wrong = [f"{name} is {shapes[name]}, expected {shape}" for name, shape in expected.items() if shapes[name] != shape]
    if wrong:
        raise SaeMismatchError(f"statistics of another SAE; this one has {d_sae} features: {'; '.join(wrong)}")
    tensors = read_tensors(path, expected)
    kinds = dict.fromkeys(expected, torch.float32) | {"levels": torch.float64, "tokens": torch.int64}
    foreign = [f"{name} is {tensors[name].dtype}, expected {kind}" for name, kind in kinds.items()
               if tensors[name].dtype != kind]
    if foreign:
        raise SaeFormatError("; ".join(foreign))
    check_finite(tensors)
    levels = tuple(tensors.pop("levels").tolist())
    if levels != LEVELS:
        raise SaeFormatError(f"quantiles at levels {levels}; this version reads {LEVELS}")
    return FeatureStatistics(int(tensors.pop("tokens")), **tensors)


def of_other_weights(path: Path, sae: SAE) -> bool:
    """Whether the file states that its statistics are of other weights than these; files of before they did do not."""
    stated = read_metadata(path).get(WEIGHTS)
    return stated is not None and stated != sae_digest(sae)


def statistics_bytes(sae: SAE, measured: FeatureStatistics) -> bytes:
    """The file of an SAE's statistics, which states what weights they are of."""
    arrays = {name: getattr(measured, name).clone(memory_format=torch.contiguous_format)
              for name in ("frequency", "mean", "max", "quantiles")}
    known = {"tokens": torch.tensor([measured.tokens], device="cpu"),
             "levels": torch.tensor(LEVELS, dtype=torch.float64, device="cpu")}
    return safetensors_bytes(arrays | known, WEIGHTS, sae_digest(sae))


def _shapes(d_sae: int) -> Shapes:
    arrays = dict.fromkeys(("frequency", "mean", "max"), (d_sae,))
    return {**arrays, "quantiles": (len(LEVELS), d_sae), "tokens": (1,), "levels": (len(LEVELS),)}
