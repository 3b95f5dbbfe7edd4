"""Gated SAEs, arXiv 2404.16014 section 3.2, with the reparametrisation-invariant L1 of arXiv 2407.14435."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_hooks.sae import SAE

from ..codes import encode
from .base import Batch, Extra, Loss, Objective, firings, like, reconstruct, squared_error, unit_rows, without_pre_bias


@dataclass(frozen=True, kw_only=True)
class Gated(Objective):
    """||x - x_hat||^2 + sparsity * sum_i relu(gate_i) ||d_i|| + ||x - x_hat_frozen(relu(gate))||^2.

    The norms in the L1 term are detached, as the third term's decoder is: else they shrink, the magnitudes make up for
    it, and the third term has nobody to hold against it (tried: gamma 0.85, and FVU half as large again).

    The SAE in training holds the gate's encoder (W_enc, b_enc); r_mag and b_mag (d_sae) make the magnitudes:
    f = 1[gate > 0] relu(exp(r_mag) (gate - b_enc) + b_mag). The third term's decoder, its bias and the skip are
    detached. What comes out is the equal JumpReLU SAE: threshold max(0, b_mag - exp(r_mag) b_gate).
    """

    unit_decoder: ClassVar[bool] = False

    def extra(self, sae: SAE) -> dict[str, Tensor]:
        """r_mag at 0, b_mag as the gate's bias."""
        r_mag = torch.zeros_like(sae.b_enc).requires_grad_()
        return {"r_mag": r_mag, "b_mag": sae.b_enc.detach().clone().requires_grad_()}

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        code = encode(batch.x, self.encoder(sae, batch), torch.zeros_like(sae.b_enc), batch.form)
        gate = code.pre.relu()
        magnitude = code.of(extra["r_mag"].exp()) * (code.pre - code.of(sae.b_enc)) + code.of(extra["b_mag"])
        acts = magnitude.relu() * (gate > 0)
        error = squared_error(reconstruct(sae, code, acts, batch), batch.target)
        frozen = reconstruct(sae, code, gate, batch, frozen=True)
        l1 = batch.over_shards(code.per_token(gate * code.of(sae.W_dec.detach().norm(dim=1)))).mean()
        coefficient = self.coefficient(batch.step)
        l0, fired = firings(code, acts.detach() > 0, batch)
        return Loss(total=error + coefficient * l1 + squared_error(frozen, batch.target), reconstruction=error.detach(),
                    l0=l0, fired=fired, coefficient=coefficient)

    def finish(self, sae: SAE, extra: Extra) -> SAE:
        """Fold gate and magnitude into one encoder and a threshold (arXiv 2404.16014, App. E)."""
        growth = extra["r_mag"].detach().exp()
        threshold = (extra["b_mag"].detach() - growth * sae.b_enc).clamp(min=0)
        folded = like(sae, W_enc=sae.W_enc * growth, b_enc=extra["b_mag"].detach(), threshold=threshold)
        return unit_rows(without_pre_bias(folded, self.pre_bias))
