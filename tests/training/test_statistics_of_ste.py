"""The pseudo-derivatives as estimators: their mean over data of a known density, against the derivative of the expected
loss, which no kernel enters (arXiv 2407.14435 section 4).

The step's estimate is biased by O(bandwidth^2). The reconstruction's is biased by O(bandwidth): on the upper half of
the window the feature is active with pre instead of with the threshold, which adds
-2 threshold ||d||^2 (p + threshold p') m bandwidth, for p the density of pre at the threshold and m the kernel's
half moment. The tests take this term off, so that what is left is small enough to tell a wrong factor. HALF_MOMENT and
VARIANCE are the kernels', in units of the bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_hooks.sae import SAE
from sae_hooks.training.harvest import SiteInfo
from sae_hooks.training.learner import Learner, Trainee
from sae_hooks.training.objectives import Batch, JumpReLU, Objective, TanhJumpReLU
from sae_hooks.training.ste import KERNELS, Kernel

from .reference_losses import Array

HALF_MOMENT = {"rectangle": 1 / 8, "triangle": 1 / 6, "epanechnikov": 3 / 16, "gaussian": 1 / math.sqrt(2 * math.pi)}
VARIANCE = {"rectangle": 1 / 12, "triangle": 1 / 6, "epanechnikov": 1 / 5, "gaussian": 1.0}
GRID = 3e-4  # what is left of the noise of 100,000 quantiles
SPARSITY, STEP = 0.15, 1e-4  # STEP: of the finite differences


@dataclass(frozen=True)
class Toy:
    """Features that do not meet: coordinate i of x is Laplace of scale s_i around 0, read by feature i alone with the
    bias b_i, and written by it alone with the strength d_i; beta is b_dec. Everything has a closed form."""

    scale: Array
    threshold: Array
    bias: Array
    strength: Array
    beta: Array

    def density(self) -> Array:
        """Of pre at the threshold; all thresholds lie above the bias."""
        return np.exp(-(self.threshold - self.bias) / self.scale) / (2 * self.scale)

    def expected_loss(self, sparsity: float, pre_act: float, threshold: Array, bias: Array) -> Array:
        """Each coordinate's part, from the partial moments of x beyond t = threshold - bias."""
        t, s, d = threshold - bias, self.scale, self.strength
        tail = np.exp(-t / s) / 2
        m0, m1, m2 = tail, tail * (t + s), tail * (t**2 + 2 * t * s + 2 * s**2)
        offset = d * bias + self.beta  # active: x - x_hat = (1 - d) x - offset; else x - beta
        active = (1 - d) ** 2 * m2 - 2 * (1 - d) * offset * m1 + offset**2 * m0
        silent = 2 * s**2 + self.beta**2 - (m2 - 2 * self.beta * m1 + self.beta**2 * m0)
        short = t + m1 - t * m0  # E relu(t - x)
        return active + silent + sparsity * m0 + pre_act * short * np.abs(d)

    def derivatives(self, sparsity: float, pre_act: float = 0.0) -> tuple[Array, Array]:
        """Of the expected loss, by threshold and by bias: central differences."""
        def loss(up: float, along: float) -> Array:
            return self.expected_loss(sparsity, pre_act, self.threshold + up, self.bias + along)
        return (loss(STEP, 0) - loss(-STEP, 0)) / (2 * STEP), (loss(0, STEP) - loss(0, -STEP)) / (2 * STEP)

    def lean(self, kernel: Kernel) -> Array:
        """The estimate's bias by bandwidth."""
        p = self.density()
        return -2 * self.threshold * self.strength**2 * (p - self.threshold * p / self.scale) * HALF_MOMENT[kernel]

    def sae(self) -> SAE:
        """This toy."""
        n = len(self.scale)
        tensors = (np.eye(n), self.bias, np.diag(self.strength), self.beta)
        return SAE(*(torch.from_numpy(t) for t in tensors),
                   threshold=torch.from_numpy(self.threshold)).requires_grad_(True)

    def quantiles(self, n: int) -> Tensor:
        """n rows that hold each coordinate's quantiles in an order of its own: means over them are means over the
        density, to O(1 / n)."""
        rng = np.random.default_rng(0)
        u = (np.stack([rng.permutation(n) for _ in self.scale], axis=1) + 0.5) / n - 0.5
        return torch.from_numpy(-self.scale * np.sign(u) * np.log1p(-2 * np.abs(u)))


TOY = Toy(scale=np.array([0.5, 1.0, 0.7, 0.4]), threshold=np.array([0.6, 0.8, 0.9, 0.3]), bias=np.zeros(4),
          strength=np.array([1.0, 0.7, -0.5, 1.2]), beta=np.array([0.0, 0.1, -0.2, 0.05]))


def gradients(objective: Objective, sae: SAE, x: Tensor, form: Any = "dense") -> tuple[Array, Array]:
    """By threshold and by encoder bias."""
    batch = Batch(x=x, target=x, step=0, idle=torch.zeros(sae.d_sae), form=form)
    assert sae.threshold is not None
    found = torch.autograd.grad(objective(sae, batch, {}).total, [sae.threshold, sae.b_enc])
    return found[0].numpy(), found[1].numpy()


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_threshold_s_gradient_tends_to_the_finite_difference_of_the_expected_loss(
        kernel: Kernel, form: str) -> None:
    x, (truth, _) = TOY.quantiles(100_000), TOY.derivatives(SPARSITY)

    for bandwidth in (0.08, 0.04, 0.02):
        objective = JumpReLU(sparsity=SPARSITY, bandwidth=bandwidth, kernel=kernel)
        found, _ = gradients(objective, TOY.sae(), x, form)

        rest = found - truth - bandwidth * TOY.lean(kernel)
        assert np.abs(rest).max() < VARIANCE[kernel] * bandwidth**2 + GRID
    assert (np.abs(truth) > 0.05).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_meets_the_finite_difference_within_the_standard_error_of_random_samples(kernel: Kernel) -> None:
    rng, bandwidth, (truth, _) = np.random.default_rng(1), 0.05, TOY.derivatives(SPARSITY)
    objective, sae = JumpReLU(sparsity=SPARSITY, bandwidth=bandwidth, kernel=kernel), TOY.sae()

    found = np.stack([gradients(objective, sae, torch.from_numpy(rng.laplace(0, TOY.scale, size=(10_000, 4))))[0]
                      for _ in range(60)])

    error = found.std(0, ddof=1) / math.sqrt(len(found))
    allowed = 4 * error + VARIANCE[kernel] * bandwidth**2
    assert (np.abs(found.mean(0) - truth - bandwidth * TOY.lean(kernel)) < allowed).all()
    assert (allowed < 0.25 * np.abs(truth)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_with_the_kernel_on_pre_activations_too_the_encoder_s_gradient_is_that_of_the_expected_loss(
        kernel: Kernel) -> None:
    toy = Toy(TOY.scale, TOY.threshold, np.array([0.1, 0.3, -0.2, 0.05]), TOY.strength, TOY.beta)
    x, pre_act, (by_threshold, by_bias) = toy.quantiles(100_000), 0.2, toy.derivatives(0.0, 0.2)

    for bandwidth in (0.08, 0.02):
        objective = TanhJumpReLU(sparsity=0.0, pre_act=pre_act, bandwidth=bandwidth, kernel=kernel)
        to_threshold, to_bias = gradients(objective, toy.sae(), x)

        lean = bandwidth * toy.lean(kernel)
        assert np.abs(to_threshold - by_threshold - lean).max() < VARIANCE[kernel] * bandwidth**2 + GRID
        assert np.abs(to_bias - by_bias + lean).max() < VARIANCE[kernel] * bandwidth**2 + GRID


def test_the_logarithm_of_the_threshold_learns_by_the_derivative_by_the_logarithm() -> None:
    toy = Toy(TOY.scale, TOY.threshold, TOY.bias, np.ones(4), TOY.beta)  # the learner holds decoder rows at norm 1
    objective, info = JumpReLU(sparsity=SPARSITY, bandwidth=0.02), SiteInfo(d_in=4, rms_norm=1.0, typical_norm=1.0)
    learner = Learner(Trainee(name="toy", site="a", d_sae=4, objective=objective, log_threshold=True), {"a": info})
    with torch.no_grad():
        for mine, theirs in zip(learner.sae.parameters(), toy.sae().parameters(), strict=True):
            mine.copy_(theirs)
        learner.trained["log_threshold"].copy_(torch.from_numpy(toy.threshold).log())

    learner.update({"a": toy.quantiles(100_000).float()}, step=0, rate=0.0)

    found, (truth, _) = learner.trained["log_threshold"].grad, toy.derivatives(SPARSITY)
    assert found is not None
    wanted = toy.threshold * (truth + 0.02 * toy.lean("rectangle"))
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=3e-3)
    assert (np.abs(wanted - truth) > 9e-3).all()  # the chain's factor tells


# Features that meet: x is Gaussian, so x given pre_i = threshold_i can be drawn, and the derivative of the expected
# loss is p_i(threshold_i) E[loss with feature i silent - loss with it active | pre_i = threshold_i].


def gaussian_sae() -> SAE:
    g = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=g)

    return SAE(normal(3, 5), 0.2 * normal(5), 0.6 * normal(5, 3), 0.2 * normal(3),
               threshold=0.4 + 0.3 * normal(5).abs()).requires_grad_(True)


def losses(sae: SAE, acts: Tensor, x: Tensor, sparsity: float, l0: float | None) -> Tensor:
    """Of each token."""
    count = (acts > 0).sum(-1)
    penalty = count if l0 is None else 2 / l0 * (count - l0) ** 2
    return (acts @ sae.W_dec + sae.b_dec - x).square().sum(-1) + sparsity * penalty


@torch.no_grad()
def conditional_derivative(sae: SAE, i: int, l0: float | None, n: int = 100_000) -> tuple[float, float, float]:
    """(derivative of the expected loss by threshold i, its standard error, the estimate's bias by bandwidth and half
    moment), for x of the standard normal distribution."""
    assert sae.threshold is not None
    theta, norm = sae.threshold[i], sae.W_enc[:, i].norm()
    along = sae.W_enc[:, i] / norm
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + i))
    x = x - (x @ along)[:, None] * along + (theta - sae.b_enc[i]) / norm * along
    pre = x @ sae.W_enc + sae.b_enc
    acts = pre * (pre > sae.threshold)
    acts[:, i] = theta
    active = losses(sae, acts, x, SPARSITY, l0)
    acts[:, i] = 0
    gain = losses(sae, acts, x, SPARSITY, l0) - active
    u = (theta - sae.b_enc[i]) / norm
    p = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi) / norm
    lean = -2 * theta * sae.W_dec[i].square().sum() * p * (1 - theta * u / norm)
    return float(p * gain.mean()), float(p * gain.std() / math.sqrt(n)), float(lean)


@pytest.mark.parametrize("l0", [None, 1.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_derivative_of_the_expected_loss_where_features_meet(kernel: Kernel, l0: float | None) -> None:
    sae, g, bandwidth = gaussian_sae(), torch.Generator().manual_seed(7), 0.06
    truth, truth_error, lean = np.array([conditional_derivative(sae, i, l0) for i in range(5)]).T
    objective = JumpReLU(sparsity=SPARSITY, bandwidth=bandwidth, kernel=kernel, l0=l0, form="token")

    found = np.stack([gradients(objective, sae, torch.randn(20_000, 3, dtype=torch.float64, generator=g))[0]
                      for _ in range(40)])

    error = np.hypot(found.std(0, ddof=1) / math.sqrt(len(found)), truth_error)
    rest = found.mean(0) - truth - bandwidth * HALF_MOMENT[kernel] * lean
    assert (np.abs(rest) < 4 * error + VARIANCE[kernel] * bandwidth**2).all()
    assert (4 * error + VARIANCE[kernel] * bandwidth**2 < 0.3 * np.abs(truth)).sum() >= 3
