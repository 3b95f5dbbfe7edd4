"""What each published format computes, in float64 numpy from its documentation: shares no code with sae_hooks."""

import numpy as np
import torch

D_IN, D_SAE, D_OUT, TOKENS = 6, 40, 5, 64


def weights(*names, d_in=D_IN, d_sae=D_SAE, d_out=D_IN, seed=0):
    """Random float64 arrays of the usual shapes by SAELens' names; thresholds that a third of the positives miss."""
    draw = np.random.default_rng(seed)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    found = {name: draw.standard_normal(shapes.get(name, (d_sae,))) for name in names}
    for name in ("b_enc", "b_gate", "b_mag", "r_mag", "b_dec"):
        if name in found:
            found[name] *= 0.4
    if "threshold" in found:
        found["threshold"] = np.abs(found["threshold"]) + 0.1
    return found


def inputs(d_in=D_IN, seed=9):
    return np.random.default_rng(seed).standard_normal((TOKENS, d_in))


def relu(pre):
    return np.maximum(pre, 0)


def jumprelu(w, x):
    """arXiv 2407.14435 eq. 8."""
    pre = x @ w["W_enc"] + w["b_enc"]
    return relu(pre) * (pre > w["threshold"])


def standard(w, x):
    return relu(x @ w["W_enc"] + w["b_enc"])


def gated(w, x):
    """arXiv 2404.16014 section 3.2: two paths with tied weights; SAELens saes/gated_sae.py."""
    gate = x @ w["W_enc"] + w["b_gate"] > 0
    return gate * relu(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])


def topk(w, x, k):
    """arXiv 2406.04093: the k largest pre-activations, then ReLU."""
    pre = x @ w["W_enc"] + w["b_enc"]
    kept = np.zeros_like(pre)
    for row, values in enumerate(pre):
        best = np.argsort(values)[-k:]
        kept[row, best] = relu(values[best])
    return kept


def openmoss_2024(w, x, keep, norm_in, norm_out, weighed=True):
    """Features and reconstruction as OpenMOSS' loader of 2024 has them (lm_saes sae.py, from_config): the decoder to
    the raw scale, then its rows to norm 1, if they weigh; `keep` tells which of the features stay."""
    s_in, s_out = (np.sqrt(x.shape[1]) / norm for norm in (norm_in, norm_out))
    W_enc, b_enc = w["W_enc"], w["b_enc"] / s_in
    W_dec = w["W_dec"] * s_in / s_out
    if weighed:
        norms = np.linalg.norm(W_dec, axis=1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    pre = x @ W_enc + b_enc
    acts = pre * keep(pre)
    return acts, acts @ W_dec + w["b_dec"] / s_out


def openmoss(w, x, keep, norm_in, norm_out, weighed=True):
    """The same by llamascopium 2.0.0b34 (models/sae.py): normalize_activations, encode, decode, denormalize."""
    s_in, s_out = (np.sqrt(x.shape[1]) / norm for norm in (norm_in, norm_out))
    norms = np.linalg.norm(w["W_dec"], axis=1) if weighed else 1
    pre = (x * s_in) @ w["W_enc"] + w["b_enc"]
    acts = pre * norms * keep(pre * norms) / norms
    return acts, (acts @ w["W_dec"] + w["b_dec"]) / s_out


def largest(k):
    """Which of the values of each row are above 0 and among its k largest."""
    return lambda pre: (pre >= np.sort(pre, axis=1)[:, -k, None]) & (pre > 0)


def decode(w, acts):
    return acts @ w["W_dec"] + w["b_dec"]


def as_tensors(w, dtype=torch.float64):
    """Copies: a dialect may fold in place what it is given."""
    return {name: torch.from_numpy(array).to(dtype, copy=True) for name, array in w.items()}


def assert_agrees(sae, x, acts, x_hat, rel=1e-6):
    """Encode, decode and the whole of `sae` on x (float64) give acts and x_hat, to rel of the largest value."""
    x, acts, x_hat = (torch.from_numpy(np.asarray(a)) for a in (x, acts, x_hat))
    assert sae.encode(x).dtype == torch.float64
    torch.testing.assert_close(sae.encode(x), acts, rtol=rel, atol=rel * float(acts.abs().max()))
    skip = sae.skip(x)
    torch.testing.assert_close(sae.decode(acts) + skip, x_hat, rtol=rel, atol=rel * float(x_hat.abs().max()))
    torch.testing.assert_close(sae(x), x_hat, rtol=rel, atol=rel * float(x_hat.abs().max()))
