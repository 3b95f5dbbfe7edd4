"""The processes that `accelerate launch` or torchrun started: which of them this is, what they share, waiting for the
others, and the end; and folders that one process holds against all others."""

from __future__ import annotations

import os
import time
from pathlib import Path
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

    told = [value]
    broadcast_object_list(told)
    return told[0]


def held(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds a folder against whoever asks for it likewise, in this process, too: until it is closed,
    or the process ends, however it does. None where the system has no such locks. Raises BlockingIOError where somebody
    else holds it, and that is not to be waited for."""
    try:
        import fcntl

        opened = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # what cannot be written to is told when it is to be
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:  # a file system without them
        pass
    return opened


def end_group() -> None:
    """End this process' group, if it is in one, when all is done.

    gloo's threads let go of a tensor some time after its sum is there, for which they need Python's lock. If the
    interpreter ends first, they abort the process (PyTorch 2.13), and a launcher takes what was done for a failure.
    So they get the lock here, also those of a group that PyTorch itself still holds.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(LET_GO)
