"""Schedules: factors in [0, 1] by the step, which counts from 0."""

from __future__ import annotations

import math


def linear_warmup(step: int, length: int) -> float:
    """From 0 at step 0 up to 1 at step `length`, then 1. The sparsity coefficient's (Gemma Scope 1, 3.2)."""
    return min(1.0, step / length) if length else 1.0


def cosine_warmup(step: int, length: int, start: float = 0.1) -> float:
    """From `start` up to 1 at step `length` along half a cosine, then 1. The learning rate's (Gemma Scope 1, 3.2)."""
    if step >= length:
        return 1.0
    return start + (1 - start) * (1 - math.cos(math.pi * step / length)) / 2


def linear_end(step: int, total: int, share: float) -> float:
    """1 until the last `share` of the `total` steps, then linearly down to 0 at `total`; 1 throughout for share 0."""
    length = total * share
    return min(1.0, max(0.0, (total - step) / length)) if length else 1.0
