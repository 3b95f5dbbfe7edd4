"""The processes that `accelerate launch` or torchrun started: which of them this is, what they share, waiting for the
others, and the end."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

LET_GO = 0.1  # seconds


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


def from_first(value: Any) -> Any:
    """What the first process has, in every process; they wait for it. It must pickle."""
    if "WORLD_SIZE" not in os.environ:
        return value
    from accelerate.utils import broadcast_object_list

    held = [value]
    broadcast_object_list(held)
    return held[0]


def end_group() -> None:
    """End this process' group, if it is in one, when all is done.

    gloo's threads let go of a tensor some time after its sum is there, for which they need Python's lock. If the
    interpreter ends first, they abort the process (PyTorch 2.13), and a launcher takes what was done for a failure.
    So they get the lock here, also those of a group that PyTorch itself still holds.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(LET_GO)
