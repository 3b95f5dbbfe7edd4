"""The JumpReLU objective, mean_b(||x - x_hat||^2 + sparsity * L0): arXiv 2407.14435 eq. 9.

Two forms with equal gradients: `dense_loss`, plain autograd, which is the reference; `sparse_loss`, which
visits only the features near or above their threshold, and is the quicker one where those are few.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sae_hooks.sae import SAE

from ..schedules import Schedule, constant
from ..ste import jump, step
from .base import Loss
from .sparse_step import SparseStep


@dataclass(frozen=True, kw_only=True)
class JumpReLUObjective:
    """sparsity: squared error (of a unit mean square) bought by one active feature; bandwidth: width of the
    kernel, in the units of normalised pre-activations; warmup: factor on sparsity by step.
    """
    sparsity: float
    bandwidth: float = 0.03
    warmup: Schedule = constant
    sparse: bool = True

    def __call__(self, sae: SAE, x: Tensor, step: int) -> Loss:
        form = sparse_loss if self.sparse else dense_loss
        return form(sae, x, self.sparsity * self.warmup(step), self.bandwidth)


def dense_loss(sae: SAE, x: Tensor, sparsity: float, bandwidth: float) -> Loss:
    """The objective of x (batch, d_in) in plain autograd: the reference. O(batch * d_sae * d_in)."""
    threshold = threshold_of(sae)
    pre = sae.pre_activations(x)
    x_hat = sae.decode(jump(pre, threshold, bandwidth))
    reconstruction = (x - x_hat).square().sum(-1).mean()
    l0 = step(pre, threshold, bandwidth).sum(-1).mean()
    return Loss(reconstruction + sparsity * l0, reconstruction.detach(), l0.detach(), sparsity)


def sparse_loss(sae: SAE, x: Tensor, sparsity: float, bandwidth: float) -> Loss:
    """The same loss and gradients as `dense_loss`, to rounding, at a cost that follows L0 after the encoder's
    product. x (batch, d_in), in the SAE's own dtype, gets no gradient."""
    reconstruction, l0 = SparseStep.apply(  # type: ignore[no-untyped-call]
        x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, threshold_of(sae), bandwidth)
    return Loss(reconstruction + sparsity * l0, reconstruction.detach(), l0.detach(), sparsity)


def threshold_of(sae: SAE) -> Tensor:
    """The SAE's threshold (d_sae); TypeError for a TopK SAE, which has none to train."""
    if sae.threshold is None:
        raise TypeError("the JumpReLU objective trains a threshold; this SAE has a TopK gate")
    return sae.threshold
