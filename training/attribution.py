"""How evenly an SAE's active features share in a prediction: the uniformity of active latent importance.

Gemma Scope 1 (arXiv 2408.05147, C.3), as in arXiv 2407.14435: y = f(x) * (W_dec grad), where grad is the gradient, at
the place that the SAE reconstructs, of the correct next token's logit less the mean of all logits; p = |y| / sum |y|;
r = exp(entropy of p) / ||y||_0, in [1 / ||y||_0, 1]. 1: all active features matter alike; near 0: very few matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_hooks import kernels
from sae_hooks.measure import Group, Trial, ratio
from sae_hooks.runtime import SpliceRequest
from sae_hooks.sae import SAE

Places = tuple[Tensor, Tensor]


class Uniformity:
    """The running mean over tokens of `importance_uniformity`."""

    def __init__(self) -> None:
        self.tokens, self._total = 0, 0.0

    def update(self, sae: SAE, x: Tensor, gradient: Tensor) -> None:
        """Take in tokens, as `importance_uniformity` does; those on which no feature has a part are left out."""
        found = importance_uniformity(sae, x, gradient)
        found = found[~found.isnan()]
        self.tokens += len(found)
        self._total += float(found.sum())

    @property
    def mean(self) -> float:
        """r averaged over tokens; nan without any."""
        return ratio(self._total, self.tokens)


def importance_uniformity(sae: SAE, x: Tensor, gradient: Tensor) -> Tensor:
    """r (n) in float64 for activations x (n, d_in) and gradients (n, d_out) at what the SAE writes; nan where y is 0.

    All on the SAE's device.
    """
    indptr, indices, values = sae.encode_sparse(x)
    rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), indptr.diff())
    size = (values * kernels.dots(indptr, rows, indices, gradient, sae.W_dec)).abs().double()
    nothing = size.new_zeros(len(x))
    p = size / nothing.index_add(0, rows, size)[rows]
    entropy = -nothing.index_add(0, rows, torch.xlogy(p, p))
    count = nothing.index_add(0, rows, (size > 0).double())
    return torch.where(count > 0, entropy.exp() / count, float("nan"))


def own_gradients(trial: Trial, group: Group, per_window: int) -> Places:
    """x (n, d_in) and gradients (n, d_out), float32 or wider, at some ordinary positions of a trial just measured.

    The gradient at a position is that of its own next token's centred logit alone, not of later ones', which takes a
    backward pass for each position of a window (all windows at once): so at most per_window of them, evenly spread.
    Only the layers above the site keep anything for the backward pass.
    """
    assert group.ordinary is not None  # measure has seen to it
    ordinary = group.ordinary.reshape(trial.ids.shape)
    rounds = _spread(trial.counted(ordinary), per_window)
    read: list[Tensor] = []

    def rebuild(sae: SAE, x: Tensor, target: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # from here up; what ends the block below turns it off again
        read.extend((x.to(target.dtype), target.detach().requires_grad_()))
        return read[1]

    with torch.no_grad(), group.replay.play():
        ids = trial.ids.clone()  # what was made in inference mode could take no part in a backward pass
        again = Trial(trial.model, trial.runtime, ids, trial.mask.clone())
        logits = again.logits(SpliceRequest(group.slot, rebuild=rebuild))
        x, leaf = read
        last = len(rounds) - 1
        gradients = [_gradient(logits, ids, at, leaf, ordinary, retain=i < last) for i, at in enumerate(rounds)]
    kept = [x[_numbers(ordinary, at)] for at in rounds]
    return torch.cat([x[:0], *kept]), torch.cat([leaf[:0].detach(), *gradients])


def _gradient(logits: Tensor, ids: Tensor, at: Places, leaf: Tensor, ordinary: Tensor, retain: bool) -> Tensor:
    rows, columns = (part.to(logits.device) for part in at)
    chosen = logits[rows, columns].to(torch.promote_types(logits.dtype, torch.float32))
    correct = chosen.gather(1, ids.to(logits.device)[rows, columns + 1][:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad((correct - chosen.mean(1)).sum(), leaf, retain_graph=retain)
    return gradient[_numbers(ordinary, at)]


def _numbers(ordinary: Tensor, at: Places) -> Tensor:
    """Which of the ordinary positions (batch, tokens), counted row by row, the places are."""
    number = ordinary.flatten().cumsum(0).view_as(ordinary) - 1
    return number[at]


def _spread(counted: Tensor, most: int) -> list[Places]:
    """At most `most` positions of each row of counted (batch, tokens - 1), evenly spread: (rows, columns) of the first
    in every row, of the second, and so on."""
    picked = []
    for row in counted:
        at = row.nonzero().flatten()
        steps = torch.linspace(0, max(len(at) - 1, 0), min(len(at), most), device=at.device)
        picked.append(at[steps.round().long()].tolist())
    rounds = [[(row, at[i]) for row, at in enumerate(picked) if i < len(at)] for i in range(max(map(len, picked)))]
    device = counted.device
    return [(torch.tensor([r for r, _ in at], device=device), torch.tensor([c for _, c in at], device=device))
            for at in rounds]
