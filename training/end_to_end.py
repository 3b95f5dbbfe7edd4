"""A short fine-tuning of a trained SAE on what the model says when it lives on the reconstruction.

Loss: (squared error + a b KL) / (1 + b) + sparsity * L0, with a = squared error / KL held constant, so that
the two terms weigh alike whatever their units (Gemma Scope 2, 3). KL runs from the clean model's
predictions to the spliced one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_hooks.sae import SAE

from .harvest import ordinary
from .metrics import replaced, with_change
from .objectives import Loss, threshold_of
from .schedules import Schedule, constant
from .ste import jump, step
from .trainer import constrain, project_decoder_gradient


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    """sparsity, bandwidth: as in training. kl_weight: b. scale: raw activations over the SAE's (its
    rms_norm).
    """

    sparsity: float
    scale: float
    bandwidth: float = 0.03
    kl_weight: float = 1.0
    learning_rate: float = 1e-4
    schedule: Schedule = constant


@dataclass(frozen=True)
class EndToEndLoss(Loss):
    """A Loss with its KL divergence, in nats per prediction."""

    kl: Tensor


Report = Callable[[int, EndToEndLoss], None]


def finetune(model: nn.Module, sae: SAE, batches: Iterable[tuple[Tensor, Tensor]], special_ids: Sequence[int],
             config: EndToEndConfig, report: Report = lambda step, loss: None) -> SAE:
    """Minimise the loss over batches of (input_ids, attention_mask), in place; returns sae.

    sae is as in training (not folded yet) and names its site; model's parameters must not require gradients.
    """
    sae.requires_grad_(True)
    optimizer = torch.optim.Adam(sae.parameters(), betas=(0.0, 0.999), fused=True)
    for i, (ids, mask) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = config.learning_rate * config.schedule(i)
        loss = end_to_end_loss(model, sae, ids, mask, special_ids, config)
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        project_decoder_gradient(sae)
        optimizer.step()
        constrain(sae)
        report(i, loss)
    return sae.requires_grad_(False)


def end_to_end_loss(model: nn.Module, sae: SAE, ids: Tensor, mask: Tensor, special_ids: Sequence[int],
                    config: EndToEndConfig) -> EndToEndLoss:
    """The loss of one batch of ids, mask (batch, length): two forward passes, the second with gradients."""
    splice = _Splice(sae, ids, mask, special_ids, config)
    with torch.no_grad():
        clean = with_change(model, sae.site or "", ids, mask, None)
    spliced = with_change(model, sae.site or "", ids, mask, splice)
    kl = divergence(clean[splice.where], spliced[splice.where])
    balance = config.kl_weight * (splice.error / (kl + 1e-8)).detach()
    total = (splice.error + balance * kl) / (1 + config.kl_weight) + config.sparsity * splice.l0
    return EndToEndLoss(total, splice.error.detach(), splice.l0.detach(), config.sparsity, kl.detach())


def divergence(clean: Tensor, spliced: Tensor) -> Tensor:
    """Mean KL(clean || spliced) in nats, from logits (n, vocabulary)."""
    return F.kl_div(spliced.float().log_softmax(-1), clean.float().log_softmax(-1), reduction="batchmean",
                    log_target=True)


class _Splice:
    """Puts the reconstruction in place of one batch's ordinary positions, with gradients; keeps its error
    and L0.
    """

    where: Tensor
    error: Tensor
    l0: Tensor

    def __init__(self, sae: SAE, ids: Tensor, mask: Tensor, special_ids: Sequence[int],
                 config: EndToEndConfig) -> None:
        self.sae, self.ids, self.mask, self.special_ids, self.config = sae, ids, mask, special_ids, config

    def __call__(self, raw: Tensor) -> Tensor:
        typical = float(self.sae.metadata["typical_norm"])
        self.where = ordinary(raw, self.ids, self.mask, self.special_ids, typical)
        x, threshold = raw[self.where].float() / self.config.scale, threshold_of(self.sae)
        pre = self.sae.pre_activations(x)
        x_hat = self.sae.decode(jump(pre, threshold, self.config.bandwidth))
        self.error = (x - x_hat).square().sum(-1).mean()
        self.l0 = step(pre, threshold, self.config.bandwidth).sum(-1).mean()
        return replaced(raw, self.where, x_hat * self.config.scale)
