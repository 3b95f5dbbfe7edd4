"""Straight-through jump and step: the pseudo-derivatives of JumpReLU training, arXiv 2407.14435 eqs. 11-12.

Both are functions of single numbers, so they serve a whole matrix of pre-activations or a list of the few that
matter. The kernel term trains the threshold only; giving it to the pre-activations too leads to dead features (paper,
App. H.1), but is what Anthropic's recipe of January 2025 does (`to_pre`).
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["rectangle", "triangle", "epanechnikov", "gaussian"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


def density_(u: Tensor, kernel: Kernel) -> Tensor:
    """K(u), elementwise, in u's place: an even density of integral 1. The rectangle is 1 for |u| < 1/2."""
    if kernel == "rectangle":
        return u.abs_().lt_(0.5)
    if kernel == "triangle":
        return u.abs_().neg_().add_(1).clamp_(min=0)
    if kernel == "epanechnikov":
        return u.square_().neg_().add_(1).clamp_(min=0).mul_(0.75)
    return u.square_().mul_(-0.5).exp_().mul_((2 * math.pi) ** -0.5)


def support(kernel: Kernel) -> float:
    """The u from which on K(u) is 0; infinity for the Gaussian."""
    return {"rectangle": 0.5, "triangle": 1.0, "epanechnikov": 1.0, "gaussian": math.inf}[kernel]


class _JumpAndStep(torch.autograd.Function):
    """Both at once: they share the mask and, in the backward pass, the kernel. In place where it can be, for in the
    dense form each tensor has an entry a feature and token."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, kernel: Kernel,
                to_pre: bool) -> tuple[Tensor, Tensor]:
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        ctx.set_materialize_grads(False)
        ctx.bandwidth, ctx.kernel, ctx.to_pre = bandwidth, kernel, to_pre
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, to_acts: Tensor | None,
                 to_active: Tensor | None) -> tuple[Tensor | None, Tensor, None, None, None]:
        pre, threshold, active = ctx.saved_tensors
        heights = density_((pre - threshold).div_(ctx.bandwidth), ctx.kernel)
        if to_acts is None:
            assert to_active is not None
            return None, heights.mul_(to_active).div_(-ctx.bandwidth), None, None, None
        to_pre, to_step = to_acts * active, to_acts * threshold
        if ctx.to_pre:
            to_pre.addcmul_(to_step, heights, value=1 / ctx.bandwidth)
        if to_active is not None:
            to_step += to_active
        return to_pre, to_step.mul_(heights).div_(-ctx.bandwidth), None, None, None


def jump_and_step(pre: Tensor, threshold: Tensor, bandwidth: float, kernel: Kernel = "rectangle",
                  to_pre: bool = False) -> tuple[Tensor, Tensor]:
    """(acts, active): pre where it exceeds threshold (of pre's shape, or broadcast to it), else 0; and 1 there, else 0,
    whose sum over features is L0.

    Backward: d acts / d pre = 1[pre > threshold], d acts / d threshold = -(threshold / bandwidth) K((pre - threshold) /
    bandwidth); to_pre adds the kernel term, with a plus, to the former. d active / d pre = 0, d active / d threshold =
    -(1 / bandwidth) K((pre - threshold) / bandwidth). Thresholds and bandwidth are in pre's units.
    """
    acts, active = _JumpAndStep.apply(  # type: ignore[no-untyped-call]
        pre, threshold.expand_as(pre), bandwidth, kernel, to_pre)
    return acts, active
