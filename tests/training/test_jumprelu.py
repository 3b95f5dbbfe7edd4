"""The objective: which term trains what, and the sparse form against the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_hooks.sae import SAE
from sae_hooks.training.objectives import JumpReLUObjective, dense_loss, sparse_loss
from sae_hooks.training.schedules import linear_warmup

BANDWIDTH, SPARSITY = 0.5, 0.07
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def inputs(n: int = 300) -> Tensor:
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(sae: SAE, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [getattr(sae, n) for n in NAMES], allow_unused=True)
    return {name: torch.zeros_like(getattr(sae, name)) if grad is None else grad
            for name, grad in zip(NAMES, found, strict=True)}


def test_dense_gradients_are_those_written_out_by_hand(sae64: SAE) -> None:
    sae, x = sae64.requires_grad_(True), inputs()

    found = gradients(sae, dense_loss(sae, x, SPARSITY, BANDWIDTH).total)

    with torch.no_grad():
        pre = x @ sae.W_enc + sae.b_enc
        acts = pre * (pre > sae.threshold)
        to_x_hat = 2 * (acts @ sae.W_dec + sae.b_dec - x) / len(x)
        to_acts = to_x_hat @ sae.W_dec.T
        to_pre = to_acts * (pre > sae.threshold)
        kernel = ((pre - sae.threshold) / BANDWIDTH).abs() < 0.5
        to_threshold = -(kernel * (sae.threshold * to_acts + SPARSITY / len(x))).sum(0) / BANDWIDTH
    expected = {"W_enc": x.T @ to_pre, "b_enc": to_pre.sum(0), "W_dec": acts.T @ to_x_hat,
                "b_dec": to_x_hat.sum(0), "threshold": to_threshold}
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [1, 255, 256, 600])
def test_the_sparse_form_equals_the_dense_one(sae64: SAE, n: int) -> None:
    sae, x = sae64.requires_grad_(True), inputs(n)

    dense, sparse = (form(sae, x, SPARSITY, BANDWIDTH) for form in (dense_loss, sparse_loss))

    for a, b in ((dense.total, sparse.total), (dense.reconstruction, sparse.reconstruction),
                 (dense.l0, sparse.l0)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    expected, found = gradients(sae, dense.total), gradients(sae, sparse.total)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


def test_the_sparse_form_survives_a_batch_in_which_nothing_fires(sae64: SAE) -> None:
    sae = sae64.requires_grad_(True)
    with torch.no_grad():
        sae.threshold += 1000  # type: ignore[operator]

    loss = sparse_loss(sae, inputs(10), SPARSITY, BANDWIDTH)

    assert loss.l0 == 0
    assert not gradients(sae, loss.total)["W_enc"].any()


@pytest.mark.parametrize("form", [dense_loss, sparse_loss])
def test_the_sparsity_term_trains_the_threshold_only(sae64: SAE, form: object) -> None:
    sae, x = sae64.requires_grad_(True), inputs()

    with_term, without = (gradients(sae, form(sae, x, s, BANDWIDTH).total) for s in (1.0, 0.0))  # type: ignore[operator]

    changed = [name for name in NAMES if not torch.equal(with_term[name], without[name])]
    assert changed == ["threshold"]


@pytest.mark.parametrize("form", [dense_loss, sparse_loss])
def test_the_encoder_learns_only_through_active_features(sae64: SAE, form: object) -> None:
    sae, x = sae64.requires_grad_(True), inputs()
    with torch.no_grad():  # feature 3 never fires, but all its pre-activations lie in the window
        sae.W_enc[:, 3], sae.b_enc[3], sae.threshold[3] = 0, 0.5, 0.6  # type: ignore[index]

    found = gradients(sae, form(sae, x, SPARSITY, BANDWIDTH).total)  # type: ignore[operator]

    assert not found["W_enc"][:, 3].any()
    assert not found["b_enc"][3].any()
    assert not found["W_dec"][3].any()
    assert found["threshold"][3] != 0


def test_the_sparsity_warms_up(sae64: SAE) -> None:
    objective = JumpReLUObjective(sparsity=0.2, warmup=linear_warmup(10), sparse=False)

    assert [objective(sae64, inputs(4), step).sparsity for step in (0, 5, 10, 99)] == [0.0, 0.1, 0.2, 0.2]


def test_a_topk_sae_is_refused() -> None:
    topk = SAE(torch.ones(2, 3), torch.zeros(3), torch.ones(3, 2), torch.zeros(2), k=1)

    with pytest.raises(TypeError, match="TopK"):
        dense_loss(topk, torch.ones(1, 2), 0.1, 0.1)
