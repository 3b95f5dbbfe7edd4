"""The part `sweep` of speed_gpu.py: from many active features to few, where the library chooses between sparse and
dense. Not run by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from speed_gpu_parts import (
    RATE,
    SITE,
    Bench,
    Builds,
    Case,
    Dense,
    Failed,
    Result,
    attempt,
    dense_ways,
    measure,
    new_learner,
    random_sae,
    ratio,
    set_thresholds,
)

from sae_hooks import SAE

SHAPES, TOKENS = ((768, 2048), (3584, 16384), (3584, 65536)), 4096
SHARES = (0.5, 0.1, 0.03, 0.015, 0.007, 0.002)
SLOWER = 1.05
HEAD = f"{'d_in':>5}{'d_sae':>7}{'active':>8}" + "".join(
    f"  {way + ' ms':>8}{'/dense':>8}" for way in ("step", "bf16", "f32"))


def step_builds(d_in: int, d_sae: int, tokens: int, bench: Bench) -> Builds:
    """A training step, and a dense one."""
    x, number = torch.randn(tokens, d_in, device=bench.device) / d_in**0.5, itertools.count()

    def ours() -> Case:
        learner = new_learner(x, d_sae, bench)
        return Case(lambda: learner.update({SITE: x}, next(number), RATE), warm_ups=3)  # the first asks what pays

    def dense() -> Case:
        sae = random_sae(d_in, d_sae, torch.float32, bench.device)
        set_thresholds(sae, x, bench.l0)
        way = Dense(sae, bench.bandwidth)
        return Case(lambda: way.step(x))

    return {"ours": ours, "dense": dense}


@torch.no_grad()
def splice_builds(d_in: int, d_sae: int, tokens: int, bench: Bench) -> dict[str, Builds]:
    """A splice and a dense one, by dtype of the weights."""
    x = torch.randn(tokens, d_in, device=bench.device).bfloat16()
    narrow = random_sae(d_in, d_sae, torch.bfloat16, bench.device)
    set_thresholds(narrow, x, bench.l0)
    wide = SAE(narrow.W_enc.float(), narrow.b_enc, narrow.W_dec.float(), narrow.b_dec, threshold=narrow.threshold)

    def builds(sae: SAE) -> dict[str, Callable[[], Case]]:
        return {"ours": lambda: Case(lambda: sae(x, torch.float32)), "dense": lambda: Case(dense_ways(sae, x)[0])}

    return {"bf16": builds(narrow), "f32": builds(wide)}


def cells(found: dict[str, Result]) -> tuple[str, bool]:
    """Milliseconds of ours, and what it takes over dense; whether that is too much."""
    ours, dense = found["ours"], found["dense"]
    if isinstance(ours, Failed) or isinstance(dense, Failed):
        return f"  {ours if isinstance(ours, Failed) else dense}", False
    over = ratio(ours, dense)
    return f"  {1e3 * ours.seconds:8.3f}{over:8.2f}", over > SLOWER


def row(d_in: int, d_sae: int, share: float, tokens: int, bench: Bench) -> None:
    """A line of the table."""
    torch.manual_seed(0)
    told = replace(bench, l0=max(round(share * d_sae), 1))
    parts = [cells(measure(step_builds(d_in, d_sae, tokens, told), told))]
    with torch.no_grad():
        parts += [cells(measure(builds, told)) for builds in splice_builds(d_in, d_sae, tokens, told).values()]
    slower = ", ".join(name for name, (_, too) in zip(("step", "bf16", "f32"), parts, strict=True) if too)
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
