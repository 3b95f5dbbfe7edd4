"""What speed_gpu.py compares with: dense code as one would write it. Not run by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_hooks import SAE

RATE = 1e-6  # of the learning rate: what is trained stays as it was, so that every step costs the same
SPARSITY = 6e-4


class Jump(torch.autograd.Function):
    """pre where it exceeds the threshold, else 0; straight through to the threshold, arXiv 2407.14435 eq. 11."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold.to(pre.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        at = threshold.to(pre.dtype)
        near = (pre - at).abs() < ctx.bandwidth / 2
        return grad * (pre > at), -(grad * near).sum(0, dtype=threshold.dtype) * threshold / ctx.bandwidth, None


class Step(torch.autograd.Function):
    """1 where pre exceeds the threshold, else 0; straight through to the threshold, eq. 12."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold.to(pre.dtype)).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold.to(pre.dtype)).abs() < ctx.bandwidth / 2
        return None, -(grad * near).sum(0, dtype=threshold.dtype) / ctx.bandwidth, None


class Dense:
    """Training as one would write it: all pre-activations, autograd under autocast to bfloat16, fused Adam."""

    def __init__(self, sae: SAE, bandwidth: float) -> None:
        tensors = sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold
        self.leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
        self.bandwidth = bandwidth
        self.adam = torch.optim.Adam(self.leaves, lr=1e-3 * RATE, betas=(0.0, 0.999), fused=True)

    def loss(self, x: Tensor) -> Tensor:
        """Squared error and a price on L0."""
        W_enc, b_enc, W_dec, b_dec, threshold = self.leaves
        with torch.autocast(x.device.type, torch.bfloat16):
            pre = F.linear(x, W_enc, b_enc)
            x_hat = Jump.apply(pre, threshold, self.bandwidth) @ W_dec + b_dec  # type: ignore[no-untyped-call]
            l0 = Step.apply(pre, threshold, self.bandwidth).sum(-1, dtype=x.dtype)  # type: ignore[no-untyped-call]
        return (x - x_hat).square().sum(-1).mean() + SPARSITY * l0.mean()

    def step(self, x: Tensor) -> None:
        """A step of Adam; decoder rows stay of norm 1, with the gradient's part along them taken off."""
        self.adam.zero_grad()
        self.loss(x).backward()  # type: ignore[no-untyped-call]
        W_dec, threshold = self.leaves[2], self.leaves[4]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            self.adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            threshold.clamp_(min=0)


def dense_ways(sae: SAE, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """(splice, encode to triplets) as one would write them, all in the dtype of the SAE's weights."""
    assert sae.threshold is not None
    x, b_enc, b_dec, threshold = (t.to(sae.dtype) for t in (x, sae.b_enc, sae.b_dec, sae.threshold))

    def acts() -> Tensor:
        pre = F.linear(x, sae.W_enc.T, b_enc)
        return pre * (pre > threshold)

    def encode() -> tuple[Tensor, ...]:
        found = acts()
        at = found.nonzero(as_tuple=True)
        return *at, found[at]

    return lambda: acts() @ sae.W_dec + b_dec, encode
