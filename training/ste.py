"""Straight-through jump and step: the pseudo-derivatives of JumpReLU training, arXiv 2407.14435 eqs. 11-12.

The kernel K is the rectangle: 1 where |pre - threshold| < bandwidth / 2. The kernel term trains the
threshold only; giving it to the pre-activations too leads to dead features (paper, App. H.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((pre - threshold) / bandwidth) as a boolean mask, in pre's shape."""
    return (pre - threshold).abs() < bandwidth / 2


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        kernel = in_window(pre, threshold, ctx.bandwidth)
        to_threshold = -(threshold / ctx.bandwidth) * (kernel * grad).flatten(0, -2).sum(0)
        return grad * (pre > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        kernel = in_window(pre, threshold, ctx.bandwidth)
        return None, -(1 / ctx.bandwidth) * (kernel * grad).flatten(0, -2).sum(0), None


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """pre (..., d_sae) where it exceeds threshold (d_sae), else 0. Backward: d/d pre = 1[pre > threshold],
    d/d threshold = -(threshold / bandwidth) K. Thresholds and bandwidth are in pre's units."""
    out: Tensor = _Jump.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return out


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where pre (..., d_sae) exceeds threshold (d_sae), else 0. Backward: d/d pre = 0,
    d/d threshold = -(1 / bandwidth) K. Its sum over features is L0."""
    out: Tensor = _Step.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return out
