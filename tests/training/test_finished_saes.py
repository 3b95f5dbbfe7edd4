"""What comes out of an objective: a plain inference SAE that does what the one in training did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_hooks.sae import SAE
from sae_hooks.training.objectives import Loss, Objective
from sae_hooks.training.objectives.base import like

from . import reference_losses as reference
from .objective_cases import BATCH_TOPK, CASES, World, assert_equal, expected, world

FINISHED = {name: CASES[name] for name in ("jumprelu", "tanh", "gated", "relu", "topk")}


def finished(objective: Objective, at: World) -> tuple[SAE, Loss]:
    sae = at.sae(objective)
    extra = at.extra(objective, sae)
    loss = objective(sae, at.batch(), extra)
    with torch.no_grad():
        return objective.finish(like(sae), extra | dict(loss.state)), loss


def with_unit_rows(at: World) -> World:
    """The same with decoder rows of norm 1, as TopK and JumpReLU hold them in training."""
    return replace(at, weights=at.weights | {"W_dec": at.weights["W_dec"] / reference.norms_of(at.weights)[:, None]})


@pytest.mark.parametrize("d_out", [None, 4])
@pytest.mark.parametrize("pre_bias", [False, True])
@pytest.mark.parametrize("name", FINISHED)
def test_the_finished_sae_has_the_activations_and_reconstructions_of_the_one_in_training(
        name: str, pre_bias: bool, d_out: int | None) -> None:
    objective, at = replace(FINISHED[name], pre_bias=pre_bias), world(d_out=d_out, seed=5)
    if pre_bias and d_out:
        pytest.skip("b_dec is not of the input's width")
    at = with_unit_rows(at) if objective.unit_decoder else at
    trained = expected(objective, at)

    sae, loss = finished(objective, at)

    x = torch.from_numpy(at.x)
    assert_equal(sae.encode(x), trained.acts * reference.norms_of(at.weights))
    assert_equal((sae(x) - torch.from_numpy(at.target)).square().sum(-1).mean(), float(loss.reconstruction))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(13, dtype=torch.float64))


@pytest.mark.parametrize("name", [*FINISHED, "batchtopk"])
def test_finishing_leaves_the_sae_in_training_as_it_was_and_keeps_its_site(name: str) -> None:
    objective, at = replace(CASES[name], pre_bias=True), world()
    sae = at.sae(objective)
    sae.site, sae.site_out, sae.metadata = "layers.3.output", "layers.4.output", {"typical_norm": 7.0}
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}

    out = objective.finish(sae, at.extra(objective, sae))

    assert (out.site, out.site_out, out.metadata) == (sae.site, sae.site_out, sae.metadata)
    assert all(torch.equal(before[n], p) for n, p in sae.named_parameters())


def test_a_gated_sae_becomes_a_jumprelu_sae_whose_thresholds_are_never_negative() -> None:
    at = world()
    at.weights["b_mag"][:6], at.weights["b_enc"][:6] = -1.0, 1.0

    sae, _ = finished(CASES["gated"], at)

    assert sae.threshold is not None
    assert not sae.threshold[:6].any()
    assert (sae.threshold[6:] > 0).any()
    assert_equal(sae.encode(torch.from_numpy(at.x)),
                 expected(CASES["gated"], at).acts * reference.norms_of(at.weights))


def test_a_decoder_row_of_nothing_is_left_as_it_is() -> None:
    at = world()
    at.weights["W_dec"][4] = 0
    at.weights["b_enc"][4] = 3.0

    out = CASES["relu"].finish(at.sae(CASES["relu"]), {})

    assert not out.W_dec[4].any()
    assert all(p.isfinite().all() for p in out.parameters())


def test_a_finished_batchtopk_sae_fires_above_the_least_activation_that_was_kept() -> None:
    at = with_unit_rows(world(seed=6))

    sae, loss = finished(BATCH_TOPK, at)

    kept = expected(BATCH_TOPK, at).acts
    least = kept[kept > 0].min()
    acts = sae.encode(torch.from_numpy(at.x)).numpy()
    sure = np.abs(kept - least) > 1e-6  # the running average is held in float32
    assert float(loss.state["least"]) == pytest.approx(least)
    np.testing.assert_allclose(acts[sure], kept[sure], rtol=0, atol=1e-12)
    assert (~sure).sum() == 1


def test_batchtopk_s_threshold_is_a_plain_average_at_first_and_then_forgets() -> None:
    objective, seen = replace(BATCH_TOPK, forget=0.25), []
    state: dict[str, Tensor] = objective.extra(world().sae(objective))
    for seed in range(9):
        at = world(seed=seed)
        loss = objective(at.sae(objective), at.batch(), state)
        kept = expected(objective, at).acts
        seen.append(kept[kept > 0].min())
        state = dict(loss.state)
        if seed == 3:
            assert float(state["least"]) == pytest.approx(np.mean(seen), rel=1e-5)

    average = np.mean(seen[:4])
    for value in seen[4:]:
        average += 0.25 * (value - average)
    assert float(state["least"]) == pytest.approx(average, rel=1e-5)


def test_batchtopk_s_threshold_outlives_a_batch_in_which_nothing_fires() -> None:
    at = world(flaw="nothing_fires")
    sae = at.sae(BATCH_TOPK)
    extra = {"least": torch.tensor(0.7), "batches": torch.tensor(5.0)}

    loss = BATCH_TOPK(sae, at.batch(), extra)

    assert (extra | dict(loss.state))["least"] == torch.tensor(0.7)
