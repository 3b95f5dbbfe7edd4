"""Training SAEs: harvest activations, minimise an objective, measure what came out.

Imported as `sae_hooks.training`; pyproject.toml maps the folder `training/` of the repository there.
"""

from __future__ import annotations

if __name__ != "sae_hooks.training":
    raise ImportError(f"import sae_hooks.training, not {__name__}: `pip install -e .` maps the folder there")

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .harvest import SiteInfo, harvest, measure_sites, padded_batches, site_activations
from .learner import Learner, TrainConfig, Trainee, fold_scale, fresh_sae
from .live import LiveStream
from .metrics import Evaluation, evaluate, evaluate_all
from .objectives import OBJECTIVES, Batch, BatchTopK, Gated, JumpReLU, Loss, Objective, ReLU, TanhJumpReLU, TopK
from .parallel import Parallel, parallel
from .recipes import Recipe, paper, quick
from .shards import HarvestInfo, Shards, harvest_infos, read_info, write_shards
from .stream import CachedStream, Stream
from .text import Documents, Windows, context_windows, documents, windows
from .trainer import train

__all__ = [
    "OBJECTIVES",
    "Batch",
    "BatchTopK",
    "CachedStream",
    "Checkpoint",
    "Documents",
    "Evaluation",
    "Gated",
    "HarvestInfo",
    "JumpReLU",
    "Learner",
    "LiveStream",
    "Loss",
    "Objective",
    "Parallel",
    "ReLU",
    "Recipe",
    "Shards",
    "SiteInfo",
    "Stream",
    "TanhJumpReLU",
    "TopK",
    "TrainConfig",
    "Trainee",
    "Windows",
    "context_windows",
    "documents",
    "evaluate",
    "evaluate_all",
    "fold_scale",
    "fresh_sae",
    "harvest",
    "harvest_infos",
    "load_checkpoint",
    "measure_sites",
    "padded_batches",
    "paper",
    "parallel",
    "quick",
    "read_info",
    "save_checkpoint",
    "site_activations",
    "train",
    "windows",
    "write_shards",
]
