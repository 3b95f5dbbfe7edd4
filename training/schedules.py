"""Schedules: functions from the step (0-based) to a factor in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(step: int) -> float:
    """1 at every step."""
    return 1.0


def linear_warmup(steps: int) -> Schedule:
    """From 0 at step 0 up to 1 at `steps`, then 1. The sparsity coefficient's (Gemma Scope 1, 3.2)."""
    return lambda step: min(1.0, step / steps) if steps else 1.0


def cosine_warmup(steps: int, start: float = 0.1) -> Schedule:
    """From `start` up to 1 at `steps` along half a cosine, then 1. The learning rate's (Gemma Scope 1,
    3.2).
    """
    def factor(step: int) -> float:
        if step >= steps:
            return 1.0
        return start + (1 - start) * (1 - math.cos(math.pi * step / steps)) / 2
    return factor


def linear_end(total: int, share: float) -> Schedule:
    """1 until the last `share` of the `total` steps, then linearly down to 0 at `total`."""
    length = max(1.0, total * share)
    return lambda step: min(1.0, max(0.0, (total - step) / length))


def product(*schedules: Schedule) -> Schedule:
    """The product of schedules: a warm-up times an end."""
    return lambda step: math.prod(s(step) for s in schedules)
