"""The pseudo-derivatives, against formulas written out number by number in float64 (arXiv 2407.14435 eqs. 11-12)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_hooks.training.ste import KERNELS, Kernel, density_, jump_and_step, support

WIDTHS = [0.05, 0.4, 3.0]  # the last reaches past the smallest thresholds, to negative pre-activations


def jump(*arguments: Any) -> Tensor:
    """The activations alone."""
    return jump_and_step(*arguments)[0]


def step(*arguments: Any) -> Tensor:
    """The mask alone."""
    return jump_and_step(*arguments)[1]


def by_hand(pre: float, threshold: float, bandwidth: float, kernel: Kernel) -> float:
    """K((pre - threshold) / bandwidth) / bandwidth."""
    u = (pre - threshold) / bandwidth
    heights = {
        "rectangle": 1.0 if -0.5 < u < 0.5 else 0.0,
        "triangle": 1.0 - abs(u) if -1 < u < 1 else 0.0,
        "epanechnikov": 0.75 * (1.0 - u * u) if -1 < u < 1 else 0.0,
        "gaussian": math.exp(-u * u / 2) / math.sqrt(2 * math.pi),
    }
    return heights[kernel] / bandwidth


def case() -> tuple[Tensor, Tensor, Tensor]:
    """pre (50, 9), threshold (9), upstream gradient: with ties, a threshold of 0, negative and far pre-activations."""
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(50, 9, dtype=torch.float64, generator=g)
    threshold = 0.3 + torch.rand(9, dtype=torch.float64, generator=g)
    threshold[4], threshold[5] = 0, 1e-3
    pre[7], pre[8] = threshold, threshold + 40
    return pre.requires_grad_(), threshold.requires_grad_(), torch.randn(50, 9, dtype=torch.float64, generator=g)


def gradients(function: Any, *arguments: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """d/d pre and d/d threshold; zeros where none is given."""
    found = torch.autograd.grad(function(*arguments), arguments[:2], grad, allow_unused=True)
    return tuple(torch.zeros_like(a) if g is None else g  # type: ignore[return-value]
                 for a, g in zip(arguments[:2], found, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_an_even_density_of_integral_1_and_zero_beyond_its_support(kernel: Kernel) -> None:
    u = torch.linspace(-9, 9, 180_001, dtype=torch.float64)

    k = density_(u.clone(), kernel)

    assert torch.equal(k, k.flip(0))
    assert (k >= 0).all()
    assert float(torch.trapezoid(k, u)) == pytest.approx(1, abs=2e-4)
    assert not k[u.abs() >= support(kernel)].any()
    assert k[u.abs() < min(support(kernel), 9) - 1e-3].all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_are_those_of_the_formulas(kernel: Kernel) -> None:
    u = [-1.2, -1.0, -0.75, -0.5, -0.4999, 0.0, 0.25, 0.4999, 0.5, 0.999, 1.0, 2.0]

    k = density_(torch.tensor(u, dtype=torch.float64), kernel)

    assert k.tolist() == pytest.approx([by_hand(v, 0.0, 1.0, kernel) for v in u], abs=1e-15)


def test_the_forward_passes_are_jumprelu_and_heaviside_with_a_strict_comparison() -> None:
    pre, threshold = torch.tensor([[-1.0, 0.5, 0.5001, 2.0]]), torch.full((4,), 0.5)

    assert jump(pre, threshold, 0.4).tolist() == [[0.0, 0.0, pre[0, 2].item(), 2.0]]
    assert step(pre, threshold, 0.4).tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("to_pre", [False, True])
@pytest.mark.parametrize("bandwidth", WIDTHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_jump_trains_active_pre_activations_and_through_the_kernel_the_threshold(
        kernel: Kernel, bandwidth: float, to_pre: bool) -> None:
    pre, threshold, grad = case()

    found_pre, found_threshold = gradients(jump, pre, threshold, bandwidth, kernel, to_pre, grad=grad)

    expected_pre, expected_threshold = torch.zeros_like(pre), torch.zeros_like(threshold)
    for row in range(50):
        for i in range(9):
            z, t, g = pre[row, i].item(), threshold[i].item(), grad[row, i].item()
            at_jump = g * t * by_hand(z, t, bandwidth, kernel)
            expected_pre[row, i] = (g if z > t else 0.0) + (at_jump if to_pre else 0.0)
            expected_threshold[i] -= at_jump
    torch.testing.assert_close(found_pre, expected_pre, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found_threshold, expected_threshold, rtol=0, atol=1e-11)
    assert expected_threshold[4] == 0  # a threshold of 0 is no jump
    assert expected_threshold.count_nonzero() >= 6


@pytest.mark.parametrize("bandwidth", WIDTHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_step_trains_the_threshold_only(kernel: Kernel, bandwidth: float) -> None:
    pre, threshold, grad = case()

    found_pre, found_threshold = gradients(step, pre, threshold, bandwidth, kernel, grad=grad)

    expected = torch.zeros_like(threshold)
    for row in range(50):
        for i in range(9):
            expected[i] -= grad[row, i].item() * by_hand(pre[row, i].item(), threshold[i].item(), bandwidth, kernel)
    assert not found_pre.any()
    torch.testing.assert_close(found_threshold, expected, rtol=0, atol=1e-11)
    assert expected.count_nonzero() >= 7


@pytest.mark.parametrize("to_pre", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_together_they_train_as_one_and_the_other_do(kernel: Kernel, to_pre: bool) -> None:
    pre, threshold, grad = case()

    def both(*arguments: Any) -> Tensor:
        acts, active = jump_and_step(*arguments)
        return acts + 3 * active

    found = gradients(both, pre, threshold, 0.4, kernel, to_pre, grad=grad)

    each = zip(gradients(jump, pre, threshold, 0.4, kernel, to_pre, grad=grad),
               gradients(step, pre, threshold, 0.4, kernel, to_pre, grad=3 * grad), strict=True)
    for ours, (of_jump, of_step) in zip(found, each, strict=True):
        torch.testing.assert_close(ours, of_jump + of_step, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
def test_negative_pre_activations_inside_the_window_push_the_threshold_up(kernel: Kernel) -> None:
    pre = torch.full((1, 1), -0.1, dtype=torch.float64, requires_grad=True)
    threshold = torch.full((1,), 0.05, dtype=torch.float64, requires_grad=True)

    for function, height in ((step, 1.0), (jump, 0.05)):
        _, to_threshold = gradients(function, pre, threshold, 0.4, kernel, grad=torch.ones(1, 1, dtype=torch.float64))

        assert to_threshold.item() == pytest.approx(-height * by_hand(-0.1, 0.05, 0.4, kernel))
        assert to_threshold < 0


@pytest.mark.parametrize(("function", "options"), [(jump, (False,)), (jump, (True,)), (step, ())])
def test_gradients_grow_with_the_upstream_gradient(function: Any, options: tuple[bool, ...]) -> None:
    pre, threshold, grad = case()

    once = gradients(function, pre, threshold, 0.4, "triangle", *options, grad=grad)
    scaled = gradients(function, pre, threshold, 0.4, "triangle", *options, grad=-2.0 * grad)

    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(-2.0 * a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("function", [jump, step])
def test_a_threshold_of_pre_s_shape_gets_the_summands_of_a_broadcast_one(function: Any) -> None:
    pre, threshold, grad = case()
    spread = threshold.detach().expand_as(pre).clone().requires_grad_()

    to_pre, summed = gradients(function, pre, threshold, 0.4, grad=grad)
    to_pre_spread, summands = gradients(function, pre, spread, 0.4, grad=grad)

    assert torch.equal(function(pre, threshold, 0.4), function(pre, spread, 0.4))
    assert torch.equal(to_pre, to_pre_spread)
    torch.testing.assert_close(summands.sum(0), summed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [jump, step])
def test_leading_dimensions_are_summed_over_and_lists_of_numbers_do_as_well(function: Any) -> None:
    pre, threshold, grad = case()
    _, flat = gradients(function, pre, threshold, 0.4, grad=grad)

    _, deep = gradients(function, pre.view(5, 10, 9), threshold, 0.4, grad=grad.view(5, 10, 9))
    listed = pre.detach().reshape(-1).requires_grad_(), threshold.detach().repeat(50).requires_grad_()
    _, each = gradients(function, *listed, 0.4, grad=grad.reshape(-1))

    torch.testing.assert_close(deep, flat, rtol=0, atol=1e-12)
    torch.testing.assert_close(each.view(50, 9).sum(0), flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 9), (3, 0)])
def test_nothing_in_gives_nothing_out(shape: tuple[int, int]) -> None:
    pre, threshold = torch.zeros(shape).requires_grad_(), torch.ones(shape[1]).requires_grad_()

    for function in (jump, step):
        to_pre, to_threshold = gradients(function, pre, threshold, 0.4, grad=torch.ones(shape))

        assert to_pre.shape == shape
        assert not to_threshold.any()


def test_the_logarithm_of_a_threshold_learns_with_the_chain_s_factor() -> None:
    pre, threshold, grad = case()
    logarithm = threshold.detach().clamp(min=1e-3).log().requires_grad_()

    _, to_log = gradients(lambda pre, log: jump(pre, log.exp(), 0.4), pre, logarithm, grad=grad)
    _, to_itself = gradients(jump, pre, logarithm.exp().detach().requires_grad_(), 0.4, grad=grad)

    torch.testing.assert_close(to_log, to_itself * logarithm.exp(), rtol=1e-12, atol=0)
