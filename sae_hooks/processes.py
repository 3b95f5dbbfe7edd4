"""The processes that `accelerate launch` or torchrun started: which of them this is, and waiting for the others."""

from __future__ import annotations

import os

import torch


def launched_share() -> tuple[int, int]:
    """(rank, processes) under `accelerate launch` or torchrun; (0, 1) in a process that stands alone.

    Starts accelerate's process group if nobody has yet.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    return state.process_index, state.num_processes


def wait_for_all() -> None:
    """Until every process is here; at once in one that stands alone."""
    if "WORLD_SIZE" in os.environ:
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()
