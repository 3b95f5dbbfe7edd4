"""Training SAEs: harvest activations, minimise an objective, measure what came out.

Imported as `sae_hooks.training`; pyproject.toml maps the folder `training/` of the repository there.
"""

from __future__ import annotations

if __name__ != "sae_hooks.training":
    raise ImportError(f"import sae_hooks.training, not {__name__}: `pip install -e .` maps the folder there")

from .contexts import Context, TopContexts, top_contexts
from .harvest import context_windows, harvest, measure_norms, padded_batches, site_activations
from .metrics import Evaluation, evaluate
from .objectives import JumpReLUObjective, Loss, Objective
from .shards import HarvestInfo, Shards, read_info, write_shards
from .trainer import TrainConfig, fold_scale, fresh_sae, train

__all__ = [
    "Context",
    "Evaluation",
    "HarvestInfo",
    "JumpReLUObjective",
    "Loss",
    "Objective",
    "Shards",
    "TopContexts",
    "TrainConfig",
    "context_windows",
    "evaluate",
    "fold_scale",
    "fresh_sae",
    "harvest",
    "measure_norms",
    "padded_batches",
    "read_info",
    "site_activations",
    "top_contexts",
    "train",
    "write_shards",
]
