"""A learner: what a step of it changes, what it counts, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_hooks import load_sae
from sae_hooks.errors import SaeWarning, TrainingError
from sae_hooks.sae import SAE
from sae_hooks.training import BatchTopK, JumpReLU, Learner, ReLU, SiteInfo, Trainee, fold_scale, fresh_sae
from sae_hooks.training.learner import project_decoder_gradient
from sae_hooks.training.objectives import Batch, Objective

from . import streams
from .streams import IN, OUT, RMS, WIDTHS

SITES = {site: SiteInfo(d_in=WIDTHS[site], rms_norm=RMS[site], typical_norm=RMS[site]) for site in WIDTHS}
TRAINEES = {trainee.name: trainee for trainee in streams.trainees()}
UNIT = [name for name, trainee in TRAINEES.items() if trainee.objective.unit_decoder]


def batches(n: int, size: int = 50) -> list[dict[str, Tensor]]:
    """Of mean squared norm 1, off the origin."""
    g = torch.Generator().manual_seed(1)
    directions = {site: streams.unit_rows(24, width, g) for site, width in WIDTHS.items()}
    found = [{site: streams.sparse_rows(size, rows, 3, g) + 0.2 for site, rows in directions.items()} for _ in range(n)]
    return [{site: x / x.square().sum(1).mean().sqrt() for site, x in batch.items()} for batch in found]


def learning(trainee: Trainee, steps: int = 6, rate: Callable[[int], float] = lambda step: 1.0) -> Learner:
    learner = Learner(trainee, SITES)
    for step, rows in enumerate(batches(steps)):
        if step == 0:
            learner.start(rows)
        learner.update(rows, step, rate(step))
    return learner


def copies(learner: Learner) -> dict[str, Any]:
    return {name: t.clone() if isinstance(t, Tensor) else t for name, t in learner.state().items()}


# --- the constraints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIT)
def test_decoder_rows_have_norm_1_after_each_step(name: str) -> None:
    learner = Learner(TRAINEES[name], SITES)

    for step, rows in enumerate(batches(5)):
        learner.update(rows, step, 1.0)

        norms = learner.sae.W_dec.double().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", UNIT)
def test_the_gradient_that_adam_sees_is_orthogonal_to_each_decoder_row(name: str) -> None:
    learner = Learner(replace(TRAINEES[name], learning_rate=0.0, betas=(0.9, 0.999)), SITES)
    learner.start(batches(1)[0])
    before = learner.sae.W_dec.detach().clone()

    learner.update(batches(1)[0], 10, 1.0)

    grad = learner.sae.W_dec.grad
    assert grad is not None
    assert grad.norm() > 1e-3
    assert (grad.double() * before).sum(1).abs().max() < 1e-6 * grad.norm(dim=1).max()


def test_the_projection_takes_nothing_but_the_part_along_the_row(sae64: SAE) -> None:
    sae64.W_dec.data /= sae64.W_dec.norm(dim=1, keepdim=True)
    whole = torch.randn(24, 6, dtype=torch.float64)
    sae64.W_dec.grad = whole.clone()

    project_decoder_gradient(sae64)

    along = torch.einsum("fd,fd->f", whole, sae64.W_dec.detach())
    torch.testing.assert_close(sae64.W_dec.grad, whole - along[:, None] * sae64.W_dec.detach())


@pytest.mark.parametrize("name", [name for name in TRAINEES if "threshold" in TRAINEES[name].objective.trained])
def test_thresholds_are_float32_and_never_negative_however_far_a_step_goes(name: str) -> None:
    learner = Learner(replace(TRAINEES[name], learning_rate=0.5), SITES)

    for step, rows in enumerate(batches(8)):
        if step == 0:
            learner.start(rows)
        learner.update(rows, step + 10, 1.0)

        threshold = learner.sae.threshold
        assert threshold is not None
        assert threshold.dtype == torch.float32
        assert threshold.min() >= 0
    assert learner.finished().threshold.dtype == torch.float32  # type: ignore[union-attr]


# --- Adam ---------------------------------------------------------------------------------------------------


def leaves_of(sae: SAE, extra: dict[str, Tensor], objective: Objective) -> list[Tensor]:
    return [*(getattr(sae, name).requires_grad_() for name in objective.trained),
            *(t for t in extra.values() if t.requires_grad)]


@pytest.mark.parametrize("name", ["relu", "gated", "tanh"])
def test_a_step_is_one_of_torch_s_adam_with_the_paper_s_betas(name: str) -> None:
    trainee = replace(TRAINEES[name], centre=False)
    objective, gate = trainee.objective, trainee.objective.gate(24)
    sae: SAE = fresh_sae(16, 24, 16, gate, tied=True, skip=False, seed=0)
    extra = objective.extra(sae)
    leaves = leaves_of(sae, extra, objective)
    adam = torch.optim.Adam(leaves, lr=0.01, betas=(0.0, 0.999), eps=1e-8, foreach=False, fused=False)
    for step, rows in enumerate(batches(6)):
        adam.zero_grad()
        idle = torch.zeros(24, dtype=torch.int64)
        objective(sae, Batch(x=rows[IN], target=rows[IN], step=step, idle=idle), extra).total.backward()  # type: ignore[no-untyped-call]
        adam.param_groups[0]["lr"] = 0.01 * (0.1 + 0.1 * step)
        adam.step()
        if sae.threshold is not None:
            sae.threshold.data.clamp_(min=0)

    learner = learning(trainee, rate=lambda step: 0.1 + 0.1 * step)

    for name_, t in streams.tensors(sae).items():
        torch.testing.assert_close(getattr(learner.sae, name_).detach(), t.detach(), rtol=0, atol=1e-6)
    for name_, t in extra.items():
        torch.testing.assert_close(learner.extra[name_].detach(), t.detach(), rtol=0, atol=1e-6)


def test_a_log_threshold_moves_as_adam_by_hand_moves_the_logarithm() -> None:
    objective = JumpReLU(sparsity=0.05, threshold=0.05)
    learner = Learner(Trainee(name="log", site=IN, d_sae=24, objective=objective, log_threshold=True,
                              learning_rate=0.02), SITES)
    log, second = torch.full((24,), 0.05).log().double(), torch.zeros(24, dtype=torch.float64)
    for step, rows in enumerate(batches(7)):
        if step == 0:
            learner.start(rows)
        twin = SAE(*(t.detach().clone() for t in (learner.sae.W_enc, learner.sae.b_enc, learner.sae.W_dec,
                                                  learner.sae.b_dec)), threshold=log.exp().float()).requires_grad_()
        batch = Batch(x=rows[IN], target=rows[IN], step=step, idle=learner.idle)
        objective(twin, batch, {}).total.backward()  # type: ignore[no-untyped-call]
        assert twin.threshold is not None
        assert twin.threshold.grad is not None
        by_log = (twin.threshold.grad * twin.threshold.detach()).double()
        second = 0.999 * second + 0.001 * by_log**2
        log -= 0.02 * by_log / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)

        learner.update(rows, step, 1.0)

        assert learner.sae.threshold is not None
        torch.testing.assert_close(learner.sae.threshold.detach().double(), log.exp(), rtol=1e-5, atol=0)
    assert log.exp().std() > 0.001


def test_a_log_threshold_that_would_start_at_nothing_is_refused() -> None:
    trainee = Trainee(name="log", site=IN, d_sae=24, objective=JumpReLU(sparsity=0.1, l0=23), log_threshold=True)

    with pytest.raises(TrainingError, match=r"log: a threshold of 0 has no logarithm; .*well below 24"):
        learning(trainee, 1)


# --- the start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jumprelu-l0-batch", "jumprelu-pre-bias", "topk", "gated", "transcoder-skip"])
def test_a_centred_start_reconstructs_the_mean_and_encodes_what_is_off_it(name: str) -> None:
    trainee, rows = TRAINEES[name], batches(1)[0]
    learner = Learner(trainee, SITES)

    learner.start(rows)

    mean, target = rows[IN].mean(0), rows[trainee.site_out or IN].mean(0)
    torch.testing.assert_close(learner.sae.b_dec.detach(), target)
    pre = mean @ learner.sae.W_enc + trainee.objective.encoder(learner.sae).bias()
    assert pre.abs().max() < 1e-6
    if "b_mag" in learner.extra:
        assert torch.equal(learner.extra["b_mag"], learner.sae.b_enc)


def test_thresholds_start_where_twice_the_target_l0_is_met_on_the_first_batch() -> None:
    learner, rows = Learner(TRAINEES["jumprelu-l0-batch"], SITES), batches(1)[0]

    learner.start(rows)

    loss = learner.update(rows, 0, 1.0)
    assert abs(float(loss.l0) - 2 * 3) < 0.03


def test_a_fresh_sae_has_unit_decoder_rows_and_a_tied_encoder_of_its_own_memory() -> None:
    gate = JumpReLU(sparsity=0.1, threshold=0.25).gate(24)
    tied = fresh_sae(16, 24, 16, gate, tied=True, skip=False, seed=4)
    across = fresh_sae(16, 24, 12, gate, tied=False, skip=True, seed=4)

    torch.testing.assert_close(tied.W_dec.norm(dim=1), torch.ones(24))
    assert torch.equal(tied.W_enc, tied.W_dec.T)
    assert tied.W_enc.data_ptr() != tied.W_dec.data_ptr()
    torch.testing.assert_close(across.W_enc.norm(dim=0), torch.ones(24))
    assert (tied.threshold == 0.25).all()  # type: ignore[union-attr]
    assert not any(t.any() for t in (tied.b_enc, tied.b_dec, across.b_enc, across.b_dec, across.W_skip))  # type: ignore[union-attr]
    assert not torch.equal(tied.W_dec, fresh_sae(16, 24, 16, gate, tied=True, skip=False, seed=5).W_dec)


# --- counting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jumprelu-l0-batch", "gated", "relu", "topk", "batchtopk", "transcoder"])
def test_idle_counts_are_those_of_counting_each_token_by_hand(name: str) -> None:
    trainee = replace(TRAINEES[name], dead_after=9)
    learner, last = Learner(trainee, SITES), torch.zeros(24, dtype=torch.int64)
    for step, rows in enumerate(batches(8, size=3)):
        if step == 0:
            learner.start(rows)
        fired = trained_acts(learner, rows[IN]).gt(0).any(0)
        last = torch.where(fired, 0, last + 3)  # a batch counts as a whole

        learner.update(rows, step, 1.0)

        assert torch.equal(learner.idle, last)
        assert learner.dead() == float((last > 9).sum()) / 24
    assert last.unique().numel() > 1


def trained_acts(learner: Learner, x: Tensor) -> Tensor:
    """Activations in training, of an SAE whose decoder norms may be free: which are above 0."""
    sae, objective = learner.sae, learner.objective
    pre = (x @ sae.W_enc + objective.encoder(sae).bias()).detach()
    if learner.trainee.name == "topk":
        return sae.gate(pre)
    if learner.trainee.name == "batchtopk":
        least = pre.flatten().sort().values[-2 * len(x)]
        return pre * ((pre >= least) & (pre > 0))
    if learner.trainee.name == "gated":
        magnitude = learner.extra["r_mag"].exp() * (pre - sae.b_enc) + learner.extra["b_mag"]
        return (magnitude.relu() * (pre > 0)).detach()
    return sae.gate(pre)


# --- raw activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "transcoder", "transcoder-skip", "transcoder-topk"])
def test_folding_the_scale_moves_everything_into_raw_units_exactly(kind: str) -> None:
    g = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=g)

    gate: dict[str, Any] = {"k": 4} if "topk" in kind else {"threshold": normal(24).abs()}
    d_out, out = (5, 0.031) if "transcoder" in kind else (6, 173.2)
    skip = normal(6, d_out) if kind in ("transcoder-skip", "transcoder-topk") else None
    sae = SAE(normal(6, 24), 0.1 * normal(24), normal(24, d_out), normal(d_out), W_skip=skip, **gate)
    x, before = normal(40, 6), {name: t.clone() for name, t in streams.tensors(sae).items()}

    folded = fold_scale(sae, 173.2, out)

    acts = sae.encode(x)
    assert acts.count_nonzero() > 40
    torch.testing.assert_close(folded.encode(173.2 * x), out * acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded(173.2 * x), out * sae(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(folded.W_dec, sae.W_dec)
    assert all(torch.equal(t, before[name]) for name, t in streams.tensors(sae).items())
    if d_out == 6:
        assert torch.equal(fold_scale(sae, 173.2).b_enc, folded.b_enc)


@pytest.mark.parametrize("name", sorted(TRAINEES.keys() - {"batchtopk", "bf16"}))
def test_the_finished_sae_does_on_raw_activations_what_the_one_in_training_does(name: str) -> None:
    learner, rows = learning(TRAINEES[name], 30), batches(31)[-1]
    target = learner.target

    finished = learner.finished()
    loss = learner.update(rows, 30, 0.0)  # counts, and moves nothing

    raw, wanted = RMS[IN] * rows[IN], RMS[target] * rows[target]
    acts = finished.encode(raw)
    error = (finished(raw) - wanted).square().sum(1).mean() / RMS[target] ** 2
    assert (finished.site, finished.site_out) == (IN, target)
    assert float(error) == pytest.approx(float(loss.reconstruction), rel=1e-4)
    assert float((acts > 0).sum(1).double().mean()) == pytest.approx(float(loss.l0), abs=0.021)  # one on an edge
    assert 0.3 < float(loss.l0) < 20
    torch.testing.assert_close(finished.W_dec.norm(dim=1), torch.ones(24))


def test_a_finished_batchtopk_sae_fires_on_raw_activations_as_often_as_in_training() -> None:
    quick = replace(TRAINEES["batchtopk"], objective=BatchTopK(k=2, forget=0.2))
    learner, rows = learning(quick, 60), batches(61)[-1]

    finished = learner.finished()

    l0 = (finished.encode(RMS[IN] * rows[IN]) > 0).sum(1).double().mean()
    assert abs(float(l0) - 2) < 0.3


@pytest.mark.parametrize("name", TRAINEES)
def test_finishing_leaves_the_learner_as_it_was_and_shares_no_memory(name: str) -> None:
    learner = learning(TRAINEES[name], 3)
    before = copies(learner)

    finished = learner.finished()
    for t in finished.parameters():
        t.fill_(7.0)

    after = learner.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [name for name, t in learner.trained.items() if not t.requires_grad] == []
    learner.update(batches(4)[3], 3, 1.0)


@pytest.mark.parametrize("name", TRAINEES)
def test_every_finished_sae_is_saved_and_loaded_with_equal_results(name: str, tmp_path: Path) -> None:
    sae, raw = learning(TRAINEES[name]).finished(), RMS[IN] * batches(7)[-1][IN]

    if name == "transcoder-topk":
        with pytest.warns(SaeWarning, match="SAELens has no topk_skip_transcoder"):
            sae.save_pretrained(tmp_path)
    else:
        sae.save_pretrained(tmp_path)
    loaded = load_sae(tmp_path)

    assert torch.equal(loaded.encode(raw), sae.encode(raw))
    assert torch.equal(loaded.decode(loaded.encode(raw)), sae.decode(sae.encode(raw)))
    assert torch.equal(loaded(raw), sae(raw))
    assert (loaded.site, loaded.site_out) == (sae.site, sae.site_out) == (IN, TRAINEES[name].site_out or IN)
    assert loaded.metadata["typical_norm"] == RMS[IN]


# --- a state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINEES)
def test_a_state_put_into_a_fresh_learner_makes_it_the_same(name: str) -> None:
    learner = learning(TRAINEES[name], 3)
    other = Learner(TRAINEES[name], SITES)

    other.load(copies(learner))

    rows = batches(4)[3]
    for one in (learner, other):
        one.update(rows, 3, 1.0)
    ours, theirs = learner.state(), other.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)  # type: ignore[arg-type]


def test_a_state_before_the_first_step_is_one_to_go_on_from() -> None:
    learner, rows = Learner(TRAINEES["gated"], SITES), batches(1)[0]
    other = Learner(TRAINEES["gated"], SITES)

    other.load(copies(learner))

    for one in (learner, other):
        one.start(rows)
        one.update(rows, 0, 1.0)
    assert streams.unequal({"x": learner.finished()}, {"x": other.finished()}) == []


def test_a_step_whose_loss_is_not_finite_changes_nothing_and_names_the_flaw() -> None:
    learner, rows = learning(TRAINEES["jumprelu"], 2), batches(3)[2]
    before = copies(learner)
    rows[IN][4] = 1e25  # its square overflows

    with pytest.raises(TrainingError, match=r"jumprelu: the loss is inf at step 2 .*lower the learning rate \(0.01\)"):
        learner.update(rows, 2, 1.0)

    assert all(torch.equal(before[key], t) for key, t in learner.state().items())  # type: ignore[arg-type]


def test_objectives_that_warm_up_report_the_coefficient_in_force() -> None:
    learner, coefficients = Learner(Trainee(name="a", site=IN, d_sae=24, objective=ReLU(sparsity=0.2, warmup=4)),
                                    SITES), []
    for step, rows in enumerate(batches(6)):
        coefficients.append(learner.update(rows, step, 1.0).coefficient)

    assert coefficients == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])


def test_a_transcoder_reads_one_site_and_predicts_the_other() -> None:
    sae = learning(TRAINEES["transcoder-skip"], 100).finished()

    rows = batches(101)[-1]
    wanted = RMS[OUT] * rows[OUT]
    fvu = (sae(RMS[IN] * rows[IN]) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert (sae.d_in, sae.d_out) == (16, 12)
    assert fvu < 1.2  # independent noise: nothing to predict but the mean
    assert sae.W_skip is not None
    assert sae.W_skip.abs().max() > 0


def test_a_transcoder_cannot_have_a_pre_encoder_bias_which_would_be_of_the_wrong_site() -> None:
    with pytest.raises(TrainingError, match="pre_bias=False"):
        Learner(replace(TRAINEES["transcoder"], objective=JumpReLU(sparsity=0.05, pre_bias=True)), SITES)
