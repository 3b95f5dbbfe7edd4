"""Weights whose name says which format they are of, without the config that belongs to them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a partial download leaves, and two published sets of transcoders (mwhanna/qwen3-14b-transcoders).
CONFIGS = (
    (re.compile(r"(?:^|/)sae_weights\.safetensors$"), "cfg.json (SAELens) or config.json (Llama Scope) beside it"),
    (re.compile(r"(?:^|/)sae\.safetensors$"), "cfg.json (sparsify) beside it"),
    (re.compile(r"(?:^|/)ae\.pt$"), "config.json (dictionary_learning) beside it"),
    (re.compile(r"(?:^|/)checkpoints/final\.safetensors$"), "hyperparams.json (Llama Scope) in the folder above"),
    (re.compile(r"(?:^|/)layer_\d+\.safetensors$"),
     "config.yaml (circuit-tracer) beside it, which says what it reads and writes: its keys are model_name, model_kind "
     "(transcoder_set), feature_input_hook and feature_output_hook"),
)


def lacking(files: Iterable[str]) -> str | None:
    """Which of these files, where none is an SAE with its config, are known by their names, and what they lack."""
    paths = list(files)
    for weights, config in CONFIGS:
        found = [path for path in paths if weights.search(path)]
        if found:
            return f"{found[0]} has no {config}" + (f"; nor have {len(found) - 1} more" if len(found) > 1 else "")
    return None
