"""The objectives a second time: losses and gradients written out by hand in NumPy float64, dense, without autograd.

Written from the formulas alone, so that it can be held against the implementation. Weights are a dict of arrays named
as in SAE (W_enc (d_in, d_sae), W_dec (d_sae, d_out), ...); x (batch, d_in), target (batch, d_out). A gradient that a
term does not give is absent from its dict, and counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Reference:
    """Loss, the whole SAE's squared error, the features' activations (batch, d_sae), the loss' gradient by weight."""

    total: float
    reconstruction: float
    acts: Array
    gradients: Arrays


def density(u: Array, kernel: str) -> Array:
    """K(u), of integral 1. Rectangle: arXiv 2407.14435 section 3; the others: its ablation."""
    if kernel == "rectangle":
        return np.where(np.abs(u) < 0.5, 1.0, 0.0)
    if kernel == "triangle":
        return np.maximum(0.0, 1.0 - np.abs(u))
    if kernel == "epanechnikov":
        return np.where(np.abs(u) < 1.0, 0.75 * (1.0 - u**2), 0.0)
    assert kernel == "gaussian"
    return np.exp(-0.5 * u**2) / np.sqrt(2.0 * np.pi)


def summed(*gradients: Arrays) -> Arrays:
    """Add gradients of several terms, weight by weight."""
    total: Arrays = {}
    for part in gradients:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def encoder_input(weights: Arrays, x: Array, pre_bias: bool) -> Array:
    """What the encoder sees: x, or x - b_dec."""
    return x - weights["b_dec"] if pre_bias else x


def pre_activations(weights: Arrays, x: Array, pre_bias: bool) -> Array:
    """pre (batch, d_sae)."""
    return encoder_input(weights, x, pre_bias) @ weights["W_enc"] + weights["b_enc"]


def through_encoder(weights: Arrays, x: Array, to_pre: Array, pre_bias: bool) -> Arrays:
    """Gradients of the encoder from d loss / d pre (batch, d_sae)."""
    found = {"W_enc": encoder_input(weights, x, pre_bias).T @ to_pre, "b_enc": to_pre.sum(0)}
    if pre_bias:
        found["b_dec"] = -(to_pre @ weights["W_enc"].T).sum(0)
    return found


def squared_error(weights: Arrays, acts: Array, x: Array, target: Array,
                  prefixes: tuple[int, ...] = ()) -> tuple[float, Arrays, Array]:
    """(mean over tokens and sizes of ||target - x_hat||^2, gradients of the decoder, d loss / d acts). Sizes: the
    prefixes and the whole (Matryoshka)."""
    sizes = (*prefixes, acts.shape[1])
    loss, parts, to_acts = 0.0, [], np.zeros_like(acts)
    for size in sizes:
        x_hat = acts[:, :size] @ weights["W_dec"][:size] + weights["b_dec"]
        if "W_skip" in weights:
            x_hat = x_hat + x @ weights["W_skip"]
        loss += ((target - x_hat) ** 2).sum() / len(x) / len(sizes)
        to_x_hat = -2.0 * (target - x_hat) / len(x) / len(sizes)
        to_acts[:, :size] += to_x_hat @ weights["W_dec"][:size].T
        to_dec = np.zeros_like(weights["W_dec"])
        to_dec[:size] = acts[:, :size].T @ to_x_hat
        parts.append({"W_dec": to_dec, "b_dec": to_x_hat.sum(0)})
        if "W_skip" in weights:
            parts.append({"W_skip": x.T @ to_x_hat})
    return loss, summed(*parts), to_acts


def whole_error(weights: Arrays, acts: Array, x: Array, target: Array) -> float:
    """Mean squared error of all features together."""
    return squared_error(weights, acts, x, target)[0]


def norms_of(weights: Arrays) -> Array:
    """||d_i||_2 (d_sae)."""
    return np.sqrt((weights["W_dec"] ** 2).sum(1))


def through_norms(weights: Arrays, to_norms: Array) -> Arrays:
    """Gradient of W_dec from d loss / d ||d_i|| (d_sae)."""
    return {"W_dec": (to_norms / norms_of(weights))[:, None] * weights["W_dec"]}


def jumprelu(weights: Arrays, x: Array, target: Array, *, sparsity: float, bandwidth: float,
             kernel: str = "rectangle", l0: float | None = None, form: str = "batch",
             prefixes: tuple[int, ...] = (), pre_bias: bool = False) -> Reference:
    """Squared error plus L0 (arXiv 2407.14435 eq. 9, derivatives eqs. 11-12), or plus its distance from `l0`: of the
    batch's mean, (L0 / l0 - 1)^2, or of each token, 2 / l0 (L0 - l0)^2 (Gemma Scope 2 eq. 5)."""
    batch, threshold = len(x), weights["threshold"]
    pre = pre_activations(weights, x, pre_bias)
    active = pre > threshold
    near = density((pre - threshold) / bandwidth, kernel) / bandwidth
    acts = pre * active
    error, decoder, to_acts = squared_error(weights, acts, x, target, prefixes)
    per_token = active.sum(1)
    mean = per_token.mean()
    if l0 is None:
        penalty, to_count = sparsity * mean, np.full(batch, sparsity / batch)
    elif form == "batch":
        penalty = sparsity * (mean / l0 - 1) ** 2
        to_count = np.full(batch, sparsity * 2 * (mean / l0 - 1) / l0 / batch)
    else:
        penalty = sparsity * (2 / l0 * (per_token - l0) ** 2).mean()
        to_count = sparsity * 4 / l0 * (per_token - l0) / batch
    to_threshold = -threshold * (near * to_acts).sum(0) - (near * to_count[:, None]).sum(0)
    gradients = summed(decoder, through_encoder(weights, x, to_acts * active, pre_bias), {"threshold": to_threshold})
    return Reference(error + penalty, whole_error(weights, acts, x, target), acts, gradients)


def tanh(weights: Arrays, x: Array, target: Array, *, sparsity: float, steepness: float, pre_act: float,
         bandwidth: float, kernel: str = "rectangle", pre_bias: bool = False) -> Reference:
    """Anthropic, January 2025: squared error + sparsity sum tanh(c f ||d||) + pre_act sum relu(threshold - pre) ||d||;
    the kernel term goes to the threshold and, with the other sign, to the pre-activation."""
    batch, threshold, norms = len(x), weights["threshold"], norms_of(weights)
    pre = pre_activations(weights, x, pre_bias)
    active = pre > threshold
    acts = pre * active
    near = density((pre - threshold) / bandwidth, kernel) / bandwidth
    error, decoder, to_acts = squared_error(weights, acts, x, target)
    saturation = np.tanh(steepness * acts * norms)
    slope = sparsity / batch * (1 - saturation**2) * steepness
    to_acts = to_acts + slope * norms
    short = np.maximum(0.0, threshold - pre)
    below = (threshold > pre) * pre_act / batch * norms
    jump = threshold * near * to_acts
    to_norms = (slope * acts).sum(0) + pre_act / batch * short.sum(0)
    gradients = summed(decoder, through_norms(weights, to_norms), {"threshold": (below - jump).sum(0)},
                       through_encoder(weights, x, to_acts * active + jump - below, pre_bias))
    total = error + sparsity * saturation.sum() / batch + pre_act * (short * norms).sum() / batch
    return Reference(total, error, acts, gradients)


def gated(weights: Arrays, x: Array, target: Array, *, sparsity: float, pre_bias: bool = False) -> Reference:
    """Gated SAE, arXiv 2404.16014 section 3.2 with the RI-L1 penalty: squared error + sparsity sum relu(gate) ||d|| +
    ||target - decode(relu(gate))||^2. The norms in the penalty and the last term's decoder (W_dec, b_dec, W_skip) are
    constant. Weights also hold r_mag and b_mag."""
    batch, scale, norms = len(x), np.exp(weights["r_mag"]), norms_of(weights)
    gate = pre_activations(weights, x, pre_bias)
    product = gate - weights["b_enc"]
    magnitude = product * scale + weights["b_mag"]
    on = (gate > 0) & (magnitude > 0)
    acts = magnitude * on
    error, decoder, to_acts = squared_error(weights, acts, x, target)
    to_magnitude = to_acts * on
    open_gate = np.maximum(0.0, gate)
    auxiliary, _, to_open = squared_error(weights, open_gate, x, target)
    to_gate = (to_open + sparsity / batch * norms) * (gate > 0)
    via_magnitude = through_encoder(weights, x, to_magnitude * scale, pre_bias)
    del via_magnitude["b_enc"]
    gradients = summed(
        decoder, via_magnitude, through_encoder(weights, x, to_gate, pre_bias),
        {"b_mag": to_magnitude.sum(0), "r_mag": (to_magnitude * product * scale).sum(0)})
    total = error + sparsity * (open_gate * norms).sum() / batch + auxiliary
    return Reference(total, error, acts, gradients)


def relu(weights: Arrays, x: Array, target: Array, *, sparsity: float, pre_bias: bool = False) -> Reference:
    """Squared error + sparsity sum f ||d||, f = relu(pre): RI-L1."""
    batch, norms = len(x), norms_of(weights)
    pre = pre_activations(weights, x, pre_bias)
    active = pre > 0
    acts = pre * active
    error, decoder, to_acts = squared_error(weights, acts, x, target)
    to_pre = (to_acts + sparsity / batch * norms) * active
    gradients = summed(decoder, through_encoder(weights, x, to_pre, pre_bias),
                       through_norms(weights, sparsity / batch * acts.sum(0)))
    return Reference(error + sparsity * (acts * norms).sum() / batch, error, acts, gradients)


def topk(weights: Arrays, x: Array, target: Array, *, k: int, over_batch: bool, aux: float, aux_k: int,
         dead: NDArray[np.bool_], pre_bias: bool = False) -> Reference:
    """Squared error of the k largest positive pre-activations a token (arXiv 2406.04093), or k * batch of the batch
    (arXiv 2412.06410), + aux * AuxK: the squared error of the aux_k largest dead ones at what is lacking, a constant,
    relative to its variance, in units of the target's; 0 where nothing varies."""
    pre = pre_activations(weights, x, pre_bias)
    acts = np.maximum(0.0, pre)
    acts = acts * (largest(acts.reshape(1, -1), k * len(x)) if over_batch else largest(acts, k)).reshape(acts.shape)
    error, decoder, to_acts = squared_error(weights, acts, x, target)
    lack = target - acts @ weights["W_dec"] - weights["b_dec"]
    if "W_skip" in weights:
        lack = lack - x @ weights["W_skip"]
    candidates = np.maximum(0.0, pre) * dead
    helpers = candidates * largest(candidates, min(aux_k, int(dead.sum())))
    scale = aux * spread(target) / spread(lack) if dead.any() and aux_k and spread(lack) > 0 else 0.0
    miss = helpers @ weights["W_dec"] - lack
    to_found = 2.0 * scale / len(x) * miss
    to_pre = to_acts * (acts > 0) + (to_found @ weights["W_dec"].T) * (helpers > 0)
    gradients = summed(decoder, {"W_dec": helpers.T @ to_found}, through_encoder(weights, x, to_pre, pre_bias))
    return Reference(error + scale * (miss**2).sum() / len(x), error, acts, gradients)


def largest(values: Array, k: int) -> NDArray[np.bool_]:
    """Where the k largest of each row are."""
    keep = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(keep, np.argsort(-values, axis=1)[:, :k], True, axis=1)
    return keep


def spread(values: Array) -> float:
    """Mean squared distance of the rows from their mean."""
    return float(((values - values.mean(0)) ** 2).sum() / len(values))
