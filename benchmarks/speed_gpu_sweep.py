"""The part `sweep` of speed_gpu.py: from many active features to few, where the library chooses between sparse and
dense. Not run by itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch
from speed_gpu_dense import dense_ways
from speed_gpu_parts import (
    Bench,
    Builds,
    Case,
    Failed,
    Result,
    attempt,
    by_dtype,
    measure,
    ratio,
    step_ways,
)
from torch import Tensor

from sae_hooks import SAE

SHAPES, TOKENS = ((768, 2048), (3584, 16384), (3584, 65536)), 4096
SHARES = (0.5, 0.1, 0.03, 0.015, 0.007, 0.002)
SLOWER, WAYS = 1.05, ("step", "bf16", "f32")
HEAD = f"{'d_in':>5}{'d_sae':>7}{'active':>8}" + "".join(
    f"  {way + ' ms':>8}{'/dense':>8}" for way in WAYS)


def splice_builds(sae: SAE, x: Tensor) -> Builds:
    """A splice of x (tokens, d_in) and a dense one."""
    return {"ours": lambda: Case(lambda: sae(x, torch.float32)), "dense": lambda: Case(dense_ways(sae, x)[0])}


def cells(ours: Result, dense: Result) -> tuple[str, bool]:
    """Milliseconds of ours, and what it takes over dense; whether that is too much."""
    if isinstance(ours, Failed) or isinstance(dense, Failed):
        return f"  {ours if isinstance(ours, Failed) else dense}", False
    over = ratio(ours, dense)
    return f"  {1e3 * ours.seconds:8.3f}{over:8.2f}", over > SLOWER


def row(d_in: int, d_sae: int, share: float, tokens: int, bench: Bench) -> None:
    """A line of the table."""
    torch.manual_seed(0)
    told = replace(bench, l0=max(round(share * d_sae), 1))
    steps = step_ways(d_in, d_sae, tokens, told, {})
    found = measure({way: steps[way] for way in ("ours", "dense autograd")}, told)
    parts = [cells(found["ours"], found["dense autograd"])]
    with torch.no_grad():
        saes, x = by_dtype(d_in, d_sae, tokens, told)
        for sae in saes.values():
            found = measure(splice_builds(sae, x), told)
            parts.append(cells(found["ours"], found["dense"]))
    slower = ", ".join(name for name, (_, too) in zip(WAYS, parts, strict=True) if too)
    bench.say(f"{d_in:5}{d_sae:7}{share:8.1%}" + "".join(text for text, _ in parts)
              + (f"   slower than dense: {slower}" if slower else ""))


def sweep(bench: Bench) -> None:
    """The part `sweep`: a line for each shape and share of active features."""
    bench.say(HEAD)
    shapes, tokens = (((32, 256),), 64) if bench.smoke else (SHAPES, TOKENS)
    for (d_in, d_sae), share in itertools.product(shapes, SHARES):
        failed = attempt(partial(row, d_in, d_sae, share, tokens, bench))
        if isinstance(failed, Failed):
            bench.say(f"{d_in:5}{d_sae:7}{share:8.1%}  {failed}")
