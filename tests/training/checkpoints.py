"""Checkpoints for the tests: what is saved, and what lies in a folder."""

import torch

from sae_hooks.training.checkpoint import save_checkpoint

PARTS = {"sae": {"W": torch.arange(12.0).reshape(3, 4), "threshold": torch.tensor([0.5, -0.0])},
         "data": {"position": 7, "seed": 3, "buffer": torch.arange(6, dtype=torch.bfloat16)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_two(folder):
    """Steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(folder, step, {**PARTS, "loop": {"step": step}})
    return folder
