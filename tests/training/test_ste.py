"""The pseudo-derivatives, against formulas written out by hand in float64 (arXiv 2407.14435 eqs. 11-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_hooks.training.ste import jump, step

BANDWIDTH = 0.4


def case() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(50, 9, dtype=torch.float64, generator=g).requires_grad_()
    threshold = (0.3 + torch.rand(9, dtype=torch.float64, generator=g)).requires_grad_()
    return pre, threshold, torch.randn(50, 9, dtype=torch.float64, generator=g)


def test_the_forward_passes_are_jumprelu_and_heaviside_with_a_strict_comparison() -> None:
    pre, threshold = torch.tensor([[-1.0, 0.5, 0.5001, 2.0]]), torch.full((4,), 0.5)

    assert jump(pre, threshold, BANDWIDTH).tolist() == [[0.0, 0.0, pre[0, 2].item(), 2.0]]
    assert step(pre, threshold, BANDWIDTH).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_the_jump_sends_gradient_to_active_pre_activations_and_through_the_kernel_to_the_threshold() -> None:
    pre, threshold, grad = case()

    jump(pre, threshold, BANDWIDTH).backward(grad)

    expected_pre, expected_threshold = torch.zeros_like(pre), torch.zeros_like(threshold)
    for row in range(50):
        for i in range(9):
            if pre[row, i] > threshold[i]:
                expected_pre[row, i] = grad[row, i]
            if abs((pre[row, i] - threshold[i]) / BANDWIDTH) < 0.5:
                expected_threshold[i] -= threshold[i] / BANDWIDTH * grad[row, i]
    assert pre.grad is not None
    assert threshold.grad is not None
    torch.testing.assert_close(pre.grad, expected_pre, rtol=0, atol=1e-14)
    torch.testing.assert_close(threshold.grad, expected_threshold, rtol=0, atol=1e-12)
    assert expected_threshold.count_nonzero() > 5


def test_the_step_trains_the_threshold_only() -> None:
    pre, threshold, grad = case()

    step(pre, threshold, BANDWIDTH).backward(grad)

    kernel = ((pre - threshold) / BANDWIDTH).abs() < 0.5
    assert pre.grad is None or not pre.grad.any()
    assert threshold.grad is not None
    torch.testing.assert_close(threshold.grad, -(kernel * grad).sum(0) / BANDWIDTH, rtol=0, atol=1e-12)


def test_leading_dimensions_are_summed_over() -> None:
    pre, threshold, grad = case()
    jump(pre, threshold, BANDWIDTH).backward(grad)
    flat, threshold.grad = threshold.grad, None

    jump(pre.detach().view(5, 10, 9), threshold, BANDWIDTH).backward(grad.view(5, 10, 9))

    assert torch.equal(flat, threshold.grad)
