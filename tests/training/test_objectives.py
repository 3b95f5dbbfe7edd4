"""Every objective against its second implementation (reference_losses.py), in both forms of a batch's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_hooks.training import codes
from sae_hooks.training.codes import DenseCode, Encoder, SparseCode, encode
from sae_hooks.training.objectives import OBJECTIVES, BatchTopK, JumpReLU, Objective

from . import reference_losses as reference
from .objective_cases import (
    CASES,
    FLAWS,
    FORMS,
    JUMPRELU,
    TANH,
    TOPK,
    WIDE,
    World,
    assert_equal,
    expected,
    gradients,
    run,
    world,
)


def assert_as_expected(objective: Objective, at: World, form: str, factor: float = 1.0) -> None:
    loss, found = run(objective, at, form, factor)
    second = expected(objective, at)
    assert_equal(loss.total.detach(), second.total)
    assert_equal(loss.reconstruction, second.reconstruction)
    assert float(loss.l0) == pytest.approx((second.acts > 0).sum(1).mean(), rel=1e-6)
    assert loss.fired.tolist() == (second.acts > 0).sum(0).tolist()
    assert second.gradients.keys() <= found.keys()
    for name, value in found.items():
        assert_equal(value, factor * second.gradients.get(name, np.zeros(tuple(value.shape))))


each_case = pytest.mark.parametrize("name", CASES)
each_form = pytest.mark.parametrize("form", FORMS)


@each_form
@pytest.mark.parametrize("pre_bias", [False, True])
@each_case
def test_loss_and_gradients_are_those_written_out_by_hand(name: str, pre_bias: bool, form: str) -> None:
    assert_as_expected(replace(CASES[name], pre_bias=pre_bias), world(), form)


@each_form
@pytest.mark.parametrize("flaw", FLAWS)
@each_case
def test_they_are_where_a_batch_is_degenerate(name: str, flaw: str, form: str) -> None:
    if isinstance(CASES[name], BatchTopK) and flaw == "tied_with_the_threshold":
        pytest.skip("which of equal activations are kept is not promised")

    assert_as_expected(CASES[name], world(flaw=flaw, seed=1), form)


@each_form
@pytest.mark.parametrize("sizes", [(1, 3, 5), (5, 1, 3), (2, 9, 7), (256, 5, 11), (513, 4, 31)])
@each_case
def test_they_are_at_every_size(name: str, sizes: tuple[int, int, int], form: str) -> None:
    objective = CASES[name]
    if isinstance(objective, JumpReLU) and objective.prefixes:
        objective = replace(objective, prefixes=(0, 2))

    assert_as_expected(objective, world(*sizes, seed=2), form)


@each_form
@each_case
def test_they_are_for_a_transcoder_with_a_skip(name: str, form: str) -> None:
    assert_as_expected(CASES[name], world(d_out=4, seed=3), form)


@each_form
@each_case
def test_gradients_scale_with_the_gradient_that_comes_from_above(name: str, form: str) -> None:
    assert_as_expected(CASES[name], world(seed=4), form, factor=-3.5)


@each_form
@pytest.mark.parametrize("l0", [None, 2.5])
def test_the_l0_term_gives_the_encoder_and_the_decoder_exactly_nothing(l0: float | None, form: str) -> None:
    at = world()

    (_, with_term), (_, without) = (run(replace(JUMPRELU, sparsity=s, l0=l0), at, form) for s in (1.0, 0.0))

    assert [n for n in with_term if not torch.equal(with_term[n], without[n])] == ["threshold"]


@each_form
@pytest.mark.parametrize("objective", [JUMPRELU, TANH], ids=["jumprelu", "tanh"])
def test_a_feature_that_never_fires_but_lies_in_the_window(objective: Objective, form: str) -> None:
    at = world()
    at.weights["W_enc"][:, 3], at.weights["b_enc"][3], at.weights["threshold"][3] = 0, 0.5, 0.6

    _, found = run(replace(objective, pre_act=0.0) if objective is TANH else objective, at, form)

    assert found["threshold"][3] != 0
    assert bool(found["b_enc"][3] != 0) == (objective is TANH)  # the paper's learns only where it fires
    assert not found["W_dec"][3].any()


@each_form
def test_negative_pre_activations_in_the_window_count_as_the_step_acts_on_pre_activations(form: str) -> None:
    at = world(flaw="thresholds_of_zero")
    narrow, wide = (run(replace(JUMPRELU, bandwidth=b, sparsity=1.0), at, form)[1]["threshold"] for b in (0.5, WIDE))
    pre = reference.pre_activations(at.weights, at.x, pre_bias=False)

    for found, bandwidth in ((narrow, 0.5), (wide, WIDE)):  # at a threshold of 0 only the L0 term is left
        assert_equal(found, -(np.abs(pre) < bandwidth / 2).mean(0) / bandwidth)
    assert (pre < 0).any(0).sum() == 12  # all but the one that is tied with 0


@each_form
@each_case
def test_what_is_said_to_be_trained_gets_gradients_and_nothing_else_does(name: str, form: str) -> None:
    sae = (at := world(d_out=4)).sae(CASES[name])
    extra = at.extra(CASES[name], sae)

    CASES[name](sae, at.batch(form), extra).total.backward()

    touched = {n for n, p in sae.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {*CASES[name].trained, "W_skip"}
    assert all(value.grad is not None and value.grad.any() for value in extra.values() if value.requires_grad)


@each_case
def test_an_objective_changes_neither_the_sae_nor_the_batch_nor_its_extra_tensors(name: str) -> None:
    at = world()
    sae, batch = at.sae(CASES[name]), at.batch("sparse")
    extra = at.extra(CASES[name], sae)
    everything = [*sae.parameters(), *extra.values(), batch.x, batch.target, batch.idle]
    before = [value.detach().clone() for value in everything]

    CASES[name](sae, batch, extra).total.backward()

    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


@pytest.mark.parametrize("objective", [JUMPRELU, TANH, CASES["gated"], CASES["relu"]], ids=lambda o: type(o).__name__)
def test_the_sparsity_warms_up(objective: Objective) -> None:
    objective, at = replace(objective, sparsity=0.2, warmup=10), world()
    sae = at.sae(objective)
    extra = at.extra(objective, sae)

    losses = [objective(sae, at.batch(step=step), extra) for step in (0, 5, 10, 99)]

    assert [loss.coefficient for loss in losses] == [0.0, 0.1, 0.2, 0.2]
    assert_equal(losses[0].total.detach(), expected(replace(objective, sparsity=0.0), at).total)
    assert_equal(losses[1].total.detach(), expected(replace(objective, sparsity=0.1), at).total)


@pytest.mark.parametrize("objective", [JUMPRELU, TANH], ids=["jumprelu", "tanh"])
def test_a_topk_sae_is_refused_where_thresholds_are_trained(objective: Objective) -> None:
    at = world()

    with pytest.raises(TypeError, match="TopK"):
        objective(at.sae(TOPK), at.batch(), {})


def test_the_form_is_dense_while_much_is_active_and_sparse_afterwards() -> None:
    weights = world(d_sae=130).weights
    x, W_enc, b_enc = torch.randn(300, 6), torch.from_numpy(weights["W_enc"]).float(), torch.zeros(130)

    assert isinstance(encode(x, Encoder(W_enc, b_enc), torch.zeros(130)), DenseCode)
    assert isinstance(encode(x, Encoder(W_enc, b_enc), torch.full((130,), 9.0)), SparseCode)


@pytest.mark.parametrize(("active", "form"), [
    (slice(40), DenseCode), (slice(90, 130), DenseCode), (slice(0, 13), SparseCode), (slice(117, 130), SparseCode)])
def test_some_features_from_all_over_tell_which_form_to_take(
        active: slice, form: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "PROBED", 26)
    floor = torch.full((130,), 1.0)
    floor[active] = -1.0

    code = encode(torch.zeros(40, 6), Encoder(torch.zeros(6, 130), torch.zeros(130)), floor)

    assert isinstance(code, form)


def shard(at: World, part: slice) -> World:
    """The world of a process that holds some of the features."""
    split: dict[str, Any] = dict.fromkeys(("b_enc", "W_dec", "threshold", "r_mag", "b_mag"), part)
    split["W_enc"] = (slice(None), part)
    return replace(at, weights={n: v[split[n]] if n in split else v for n, v in at.weights.items()}, idle=at.idle[part])


def run_shard(objective: Objective, at: World, part: slice, form: Any, over_shards: Callable[[Tensor], Tensor]) -> Any:
    at = shard(at, part)
    sae = at.sae(objective)
    extra = at.extra(objective, sae)
    loss = objective(sae, replace(at.batch(form), over_shards=over_shards, first_feature=part.start), extra)
    return loss, gradients(loss.total, sae, extra)


def recorded(objective: Objective, at: World, part: slice, form: Any) -> list[Tensor]:
    """What a process hands to over_shards, in order."""
    seen: list[Tensor] = []

    def listen(value: Tensor) -> Tensor:
        seen.append(value.detach())
        return value

    run_shard(objective, at, part, form, listen)
    return seen


@each_form
@pytest.mark.parametrize("pre_bias", [False, True], ids=["plain", "pre-bias"])
@pytest.mark.parametrize("name", [n for n, o in CASES.items() if o.shardable])
def test_features_split_over_two_processes_get_the_loss_and_gradients_of_the_whole(name: str, pre_bias: bool,
                                                                                   form: str) -> None:
    objective, at = replace(CASES[name], pre_bias=pre_bias), world(seed=8)
    whole, wanted = run(objective, at, form)
    parts, b_dec = [slice(0, 5), slice(5, 13)], torch.zeros(6, dtype=torch.float64)

    for mine, theirs in (parts, parts[::-1]):
        said: Iterator[Tensor] = iter(recorded(objective, at, theirs, form))
        loss, found = run_shard(objective, at, mine, form, lambda value, said=said: value + next(said))

        assert_equal(loss.total.detach(), whole.total.detach())
        assert float(loss.l0) == pytest.approx(float(whole.l0))
        b_dec += found.pop("b_dec")  # each process has a part of its gradient
        for weight, grad in found.items():
            assert_equal(grad, wanted[weight][mine] if weight == "W_dec" else wanted[weight][..., mine])
    assert_equal(b_dec, wanted["b_dec"])


def test_an_l0_target_is_of_the_mean_over_the_processes_that_share_the_tokens() -> None:
    objective, at = replace(JUMPRELU, l0=2.5), world()
    sae = at.sae(objective)

    loss = objective(sae, replace(at.batch(), over_batches=lambda value: value * 0 + 5.0), {})

    assert_equal((loss.total - loss.reconstruction).detach(), objective.sparsity * (5.0 / 2.5 - 1) ** 2)


def test_the_names_are_those_of_the_command_line() -> None:
    assert list(OBJECTIVES) == ["jumprelu", "tanh", "gated", "topk", "batchtopk", "relu"]


def test_published_thresholds_start_where_the_objective_says() -> None:
    for objective in (JUMPRELU, TANH):
        gate = replace(objective, threshold=0.125).gate(5)

        assert torch.equal(gate["threshold"], torch.full((5,), 0.125))


@each_form
@each_case
def test_a_step_done_again_gives_the_same_bits(name: str, form: str) -> None:
    at = world(batch=513, d_in=4, d_sae=31, seed=6)
    (loss, found), (again, same) = (run(CASES[name], at, form) for _ in range(2))
    assert torch.equal(loss.total, again.total)
    assert all(torch.equal(found[key], same[key]) for key in found)
