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


def density(u: Tensor, kernel: Kernel) -> Tensor:
    """K(u), elementwise: an even density of integral 1. The rectangle is 1 for |u| < 1/2."""
    if kernel == "rectangle":
        return (u.abs() < 0.5).to(u.dtype)
    if kernel == "triangle":
        return (1 - u.abs()).clamp(min=0)
    if kernel == "epanechnikov":
        return 0.75 * (1 - u.square()).clamp(min=0)
    return torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)


def support(kernel: Kernel) -> float:
    """The u from which on K(u) is 0; infinity for the Gaussian."""
    return {"rectangle": 0.5, "triangle": 1.0, "epanechnikov": 1.0, "gaussian": math.inf}[kernel]


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, kernel: Kernel, to_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.kernel, ctx.to_pre = bandwidth, kernel, to_pre
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        pre, threshold = ctx.saved_tensors
        at_jump = grad * threshold / ctx.bandwidth * density((pre - threshold) / ctx.bandwidth, ctx.kernel)
        to_pre = grad * (pre > threshold)
        return to_pre + at_jump if ctx.to_pre else to_pre, -at_jump, None, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.kernel = bandwidth, kernel
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        return None, -grad / ctx.bandwidth * density((pre - threshold) / ctx.bandwidth, ctx.kernel), None, None


def jump(pre: Tensor, threshold: Tensor, bandwidth: float, kernel: Kernel = "rectangle",
         to_pre: bool = False) -> Tensor:
    """pre where it exceeds threshold (of pre's shape, or broadcast to it), else 0.

    Backward: d/d pre = 1[pre > threshold], d/d threshold = -(threshold / bandwidth) K((pre - threshold) / bandwidth);
    to_pre adds the kernel term, with a plus, to d/d pre. Thresholds and bandwidth are in pre's units.
    """
    out: Tensor = _Jump.apply(pre, threshold.expand_as(pre), bandwidth, kernel, to_pre)  # type: ignore[no-untyped-call]
    return out


def step(pre: Tensor, threshold: Tensor, bandwidth: float, kernel: Kernel = "rectangle") -> Tensor:
    """1 where pre exceeds threshold (of pre's shape, or broadcast to it), else 0. Its sum over features is L0.

    Backward: d/d pre = 0, d/d threshold = -(1 / bandwidth) K((pre - threshold) / bandwidth).
    """
    out: Tensor = _Step.apply(pre, threshold.expand_as(pre), bandwidth, kernel)  # type: ignore[no-untyped-call]
    return out
