"""The ReLU SAE with an L1 penalty, in the reparametrisation-invariant form (Conerly et al., April 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sae_hooks.sae import SAE

from ..codes import encode
from .base import Batch, Extra, Loss, Objective, firings, reconstruct, squared_error


@dataclass(frozen=True, kw_only=True)
class ReLU(Objective):
    """||x - x_hat||^2 + sparsity * sum_i f_i ||d_i||; decoder norms are free, and folded away at the end."""

    unit_decoder: ClassVar[bool] = False

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        code = encode(batch.x, self.encoder(sae, batch), torch.zeros_like(sae.b_enc), batch.form)
        acts = code.pre.relu()
        error = squared_error(reconstruct(sae, code, acts, batch), batch.target)
        l1 = batch.over_shards(code.per_token(acts * code.of(sae.W_dec.norm(dim=1)))).mean()
        coefficient = self.coefficient(batch.step)
        l0, fired = firings(code, acts.detach() > 0, batch)
        return Loss(total=error + coefficient * l1, reconstruction=error.detach(), l0=l0, fired=fired,
                    coefficient=coefficient)
