"""The training loop, to be read from top to bottom, and what comes before and after it.

Input has mean squared norm 1; decoder rows keep unit norm; the state is `sae, optimizer, step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_hooks.sae import SAE

from .objectives import Loss, Objective
from .schedules import Schedule, constant

Report = Callable[[int, Loss], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """learning_rate: Adam's peak; schedule: its factor by step. betas: the paper's, without momentum."""
    learning_rate: float = 1e-3
    schedule: Schedule = constant
    betas: tuple[float, float] = (0.0, 0.999)
    adam_eps: float = 1e-8


def fresh_sae(d_in: int, d_sae: int, *, mean: Tensor, threshold: float, seed: int) -> SAE:
    """An SAE at the start, for activations of mean squared norm 1: the same threshold for every feature.

    Decoder rows are He-uniform, then of unit norm; the encoder is the decoder's transpose. b_dec starts at
    mean (d_in), which b_enc takes off again, as a pre-encoder bias would.
    """
    bound = (6 / d_in) ** 0.5
    W_dec = torch.empty(d_sae, d_in).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return SAE(W_dec.T.clone(), -W_dec @ mean, W_dec, mean.clone(), threshold=torch.full((d_sae,), threshold))


def train(sae: SAE, batches: Iterable[Tensor], objective: Objective, config: TrainConfig,
          report: Report = lambda step, loss: None) -> SAE:
    """Minimise objective over batches (batch, d_in), in place; returns sae, with requires_grad off again.

    report(step, loss) is called after each update.
    """
    sae.requires_grad_(True)
    optimizer = torch.optim.Adam(sae.parameters(), betas=config.betas, eps=config.adam_eps, fused=True)
    for step, x in enumerate(batches):
        optimizer.param_groups[0]["lr"] = config.learning_rate * config.schedule(step)
        loss = objective(sae, x, step)
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        project_decoder_gradient(sae)
        optimizer.step()
        constrain(sae)
        report(step, loss)
    return sae.requires_grad_(False)


@torch.no_grad()
def project_decoder_gradient(sae: SAE) -> None:
    """Take from each decoder row's gradient the part along the row, before Adam sees it (Gemma Scope 1,
    3.2).
    """
    grad = sae.W_dec.grad
    assert grad is not None
    grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec


@torch.no_grad()
def constrain(sae: SAE) -> None:
    """Back to unit decoder rows and thresholds >= 0, after an update."""
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    if sae.threshold is not None:
        sae.threshold.clamp_(min=0.0)


def fold_scale(sae: SAE, scale: float) -> SAE:
    """The SAE for raw activations scale * x, given the one for x. Gemma Scope 1, appendix A.

    Features, thresholds and reconstruction come out scale times as large; the matrices are shared, decoder
    rows stay of unit norm. ValueError for a TopK SAE.
    """
    if sae.threshold is None:
        raise ValueError("fold_scale scales a threshold; this SAE has a TopK gate")
    return SAE(sae.W_enc, sae.b_enc * scale, sae.W_dec, sae.b_dec * scale, threshold=sae.threshold * scale,
               site=sae.site, site_out=sae.site_out, metadata=sae.metadata)
