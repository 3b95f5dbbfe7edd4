"""JumpReLU with Anthropic's tanh penalty and pre-activation loss (Conerly et al., January 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_hooks.sae import SAE

from ..codes import Code, encode
from ..settings import expect
from ..ste import Kernel, jump_and_step, support
from .base import Batch, Extra, Loss, Objective, firings, reconstruct, squared_error
from .jumprelu import threshold_of


@dataclass(frozen=True, kw_only=True)
class TanhJumpReLU(Objective):
    """||x - x_hat||^2 + sparsity * sum_i tanh(scale f_i ||d_i||) + pre_act * sum_i relu(threshold_i - pre_i) ||d_i||.

    The decoder's norms are free, and folded away at the end; straight-through gradients reach the pre-activations as
    well as the thresholds. The second term gives features that never fire a gradient. bandwidth, threshold and scale
    are in the units of normalised pre-activations (mean squared norm 1). Published for inputs of mean norm sqrt(d_in),
    2, 0.1 and 4 become 2 / sqrt(d_in), 0.1 / sqrt(d_in), 4 * sqrt(d_in) here; pre_act, 3e-6, becomes 3e-6 / sqrt(d_in),
    and the sparsity, 10 to 20, is divided by d_in. The published warm-up takes the whole training.
    """

    scale: float = 100.0
    pre_act: float = 1e-7
    bandwidth: float = 0.08
    threshold: float = 0.004
    kernel: Kernel = "rectangle"

    trained: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    unit_decoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, above_0=("scale", "bandwidth"), from_0=("pre_act", "threshold"))

    def gate(self, d_sae: int) -> dict[str, Tensor | int]:
        """A threshold a feature."""
        return {"threshold": torch.full((d_sae,), self.threshold, dtype=torch.float32)}

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        threshold, encoder = threshold_of(sae), self.encoder(sae, batch)
        # Pairs below the threshold are needed only inside the kernel; pairs above it always.
        code = encode(batch.x, encoder, threshold.detach() - support(self.kernel) * self.bandwidth, batch.form)
        norms = sae.W_dec.norm(dim=1)
        acts, active = jump_and_step(code.pre, code.of(threshold), self.bandwidth, self.kernel, to_pre=True)
        error = squared_error(reconstruct(sae, code, acts, batch), batch.target)
        crowd = batch.over_shards(code.per_token(torch.tanh(self.scale * acts * code.of(norms)))).mean()
        below = self.shortfall(sae, code, threshold, encoder.bias(), norms, batch)
        coefficient = self.coefficient(batch.step)
        l0, fired = firings(code, active.detach(), batch)
        return Loss(total=error + coefficient * crowd + self.pre_act * below, reconstruction=error.detach(), l0=l0,
                    fired=fired, coefficient=coefficient)

    def shortfall(self, sae: SAE, code: Code, threshold: Tensor, bias: Tensor, norms: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch of sum_i relu(threshold_i - pre_i) ||d_i||, without every pre-activation: the sum over
        all features is linear in x, and the active ones, which are at hand, are taken out again."""
        linear = (norms * (threshold - bias - batch.x.mean(0) @ sae.W_enc)).sum()
        above = (code.pre - code.of(threshold)).clamp(min=0) * code.of(norms)
        return batch.over_shards(linear + code.per_token(above).mean())
