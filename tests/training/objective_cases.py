"""What the tests of the objectives share: one of each kind, random worlds for them, sound and flawed, and the second
implementation's word on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_hooks.sae import SAE
from sae_hooks.training.objectives import (
    Batch,
    BatchTopK,
    Gated,
    JumpReLU,
    Loss,
    Objective,
    ReLU,
    TanhJumpReLU,
    TopK,
)

from . import reference_losses as reference
from .reference_losses import Arrays, Reference

FORMS = ("dense", "sparse")
WIDE = 5.0  # a bandwidth whose window reaches past every threshold to negative pre-activations

JUMPRELU = JumpReLU(sparsity=0.07, bandwidth=0.5)
TANH = TanhJumpReLU(sparsity=0.3, scale=0.8, pre_act=0.05, bandwidth=0.5)
TOPK = TopK(k=3, aux=0.5, aux_k=2, dead_after=100)
BATCH_TOPK = BatchTopK(k=3, aux=0.5, aux_k=2, dead_after=100)
CASES: dict[str, Objective] = {
    "jumprelu": JUMPRELU,
    "jumprelu-narrow": replace(JUMPRELU, bandwidth=0.02),
    "jumprelu-wide": replace(JUMPRELU, bandwidth=WIDE),
    "jumprelu-triangle": replace(JUMPRELU, kernel="triangle"),
    "jumprelu-epanechnikov": replace(JUMPRELU, kernel="epanechnikov"),
    "jumprelu-gaussian": replace(JUMPRELU, kernel="gaussian"),
    "jumprelu-l0-batch": replace(JUMPRELU, l0=2.5),
    "jumprelu-l0-token": replace(JUMPRELU, l0=2.5, form="token"),
    "jumprelu-prefixes": replace(JUMPRELU, prefixes=(1, 4)),
    "jumprelu-free": replace(JUMPRELU, sparsity=0.0),
    "tanh": TANH,
    "tanh-wide": replace(TANH, bandwidth=WIDE),
    "tanh-gaussian": replace(TANH, kernel="gaussian"),
    "tanh-without-pre-act": replace(TANH, pre_act=0.0),
    "gated": Gated(sparsity=0.2),
    "relu": ReLU(sparsity=0.2),
    "topk": TOPK,
    "topk-without-aux": replace(TOPK, aux_k=0),
    "topk-more-aux-than-dead": replace(TOPK, aux_k=50),
    "batchtopk": BATCH_TOPK,
}
FLAWS: dict[str, Callable[[Arrays, reference.Array], None]] = {}


@dataclass(frozen=True)
class World:
    """Weights and a batch, in NumPy; the same as the implementation takes them."""

    weights: Arrays
    x: reference.Array
    target: reference.Array
    idle: Tensor

    @property
    def dead(self) -> Any:
        """Features that count as dead: those idle for over 100 tokens."""
        return self.idle.numpy() > 100

    def sae(self, objective: Objective) -> SAE:
        """The SAE in training."""
        named = {name: torch.from_numpy(value.copy()) for name, value in self.weights.items()}
        gate: dict[str, Any] = objective.gate(len(self.weights["b_enc"]))
        if "threshold" in objective.trained:
            gate = {"threshold": named["threshold"]}
        return SAE(named["W_enc"], named["b_enc"], named["W_dec"], named["b_dec"], W_skip=named.get("W_skip"),
                   **gate).requires_grad_(True)

    def extra(self, objective: Objective, sae: SAE) -> dict[str, Tensor]:
        """The objective's extra tensors, the trained ones with this world's values."""
        found = objective.extra(sae)
        for name in found.keys() & self.weights.keys():
            found[name] = torch.from_numpy(self.weights[name].copy()).requires_grad_()
        return found

    def batch(self, form: Any = "dense", step: int = 10**9) -> Batch:
        """The batch."""
        return Batch(x=torch.from_numpy(self.x), target=torch.from_numpy(self.target), step=step, idle=self.idle,
                     form=form)


def world(batch: int = 67, d_in: int = 6, d_sae: int = 13, d_out: int | None = None, flaw: str | None = None,
          seed: int = 0) -> World:
    """A random world; a transcoder with a skip where d_out is given. Thresholds lie amid the pre-activations."""
    rng = np.random.default_rng(seed)
    weights = {"W_enc": rng.normal(size=(d_in, d_sae)), "b_enc": 0.3 * rng.normal(size=d_sae),
               "W_dec": rng.normal(size=(d_sae, d_out or d_in)), "b_dec": 0.5 * rng.normal(size=d_out or d_in),
               "threshold": np.abs(rng.normal(size=d_sae)), "r_mag": 0.4 * rng.normal(size=d_sae),
               "b_mag": 0.5 * rng.normal(size=d_sae)}
    x = rng.normal(size=(batch, d_in))
    if d_out:
        weights["W_skip"] = rng.normal(size=(d_in, d_out))
    if flaw:
        FLAWS[flaw](weights, x)
    idle = torch.from_numpy(np.where(np.arange(d_sae) % 3 == 0, 1000, 3))
    return World(weights, x, rng.normal(size=(batch, d_out)) if d_out else x, idle)


def flawed(function: Callable[[Arrays, reference.Array], None]) -> Callable[[Arrays, reference.Array], None]:
    FLAWS[function.__name__] = function
    return function


@flawed
def tied_with_the_threshold(weights: Arrays, x: reference.Array) -> None:
    weights["W_enc"][:, 2] = 0
    weights["b_enc"][2] = weights["threshold"][2] = 0.5


@flawed
def thresholds_of_zero(weights: Arrays, x: reference.Array) -> None:
    weights["threshold"][:] = 0
    weights["W_enc"][:, 1] = weights["b_enc"][1] = 0  # and ties with them


@flawed
def empty_rows(weights: Arrays, x: reference.Array) -> None:
    weights["b_enc"][:] = -0.1
    x[::3] *= 1e-3


@flawed
def nothing_fires(weights: Arrays, x: reference.Array) -> None:
    weights["b_enc"] -= 100


@flawed
def everything_fires(weights: Arrays, x: reference.Array) -> None:
    weights["b_enc"] += 20


@flawed
def tiny_activations(weights: Arrays, x: reference.Array) -> None:
    for name in ("b_enc", "b_dec", "threshold", "b_mag"):
        weights[name] *= 1e-3
    x *= 1e-3


def expected(objective: Objective, at: World) -> Reference:
    """What the second implementation says."""
    given: dict[str, Any] = {"pre_bias": objective.pre_bias}
    if isinstance(objective, TopK):
        given |= {"k": objective.k, "over_batch": isinstance(objective, BatchTopK), "aux": objective.aux,
                  "aux_k": objective.aux_k, "dead": at.dead}
        return reference.topk(at.weights, at.x, at.target, **given)
    given["sparsity"] = objective.sparsity
    if isinstance(objective, JumpReLU):
        given |= {name: getattr(objective, name) for name in ("bandwidth", "kernel", "l0", "form", "prefixes")}
    if isinstance(objective, TanhJumpReLU):
        given |= {name: getattr(objective, name) for name in ("bandwidth", "kernel", "pre_act")}
        given["steepness"] = objective.scale
    second = {JumpReLU: reference.jumprelu, TanhJumpReLU: reference.tanh, Gated: reference.gated, ReLU: reference.relu}
    return second[type(objective)](at.weights, at.x, at.target, **given)


def gradients(loss: Tensor, sae: SAE, extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss' gradient by every weight, zeros where it has none."""
    leaves = dict(sae.named_parameters()) | {name: value for name, value in extra.items() if value.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)}


def run(objective: Objective, at: World, form: Any = "dense", factor: float = 1.0) -> tuple[Loss, dict[str, Tensor]]:
    """The implementation's loss, and the gradients of `factor` times it."""
    sae = at.sae(objective)
    extra = at.extra(objective, sae)
    loss = objective(sae, at.batch(form), extra)
    return loss, gradients(factor * loss.total, sae, extra)


def assert_equal(found: Tensor | float, wanted: Any) -> None:
    """Equal to 1e-10 of the largest number."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), wanted, rtol=0,
                               atol=1e-10 * max(1.0, float(wanted.abs().max())))
