"""RowAdam, row by row and block by block, is torch's Adam: the same weights, from the same states, whatever form the
gradients have."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_hooks.training import JumpReLU, TrainConfig, Trainee, row_adam, train
from sae_hooks.training import learner as learning
from sae_hooks.training.codes import Factor
from sae_hooks.training.learner import Learner
from sae_hooks.training.objectives.base import Objective
from sae_hooks.training.row_adam import RowAdam

from . import streams

TRAINEES = [trainee for trainee in streams.trainees() if not trainee.bf16]


WAYS = {"rows": (("cpu",), ()), "blocks": ((), ("cpu",)), "torch's": ((), ())}


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kinds in zip(("ROWS_ON", "BLOCKS_ON"), WAYS[way], strict=True):
        monkeypatch.setattr(row_adam, name, kinds)


@pytest.fixture(params=["rows", "blocks"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of our ways, in blocks of a few rows."""
    take(request.param, monkeypatch)
    monkeypatch.setattr(row_adam, "BLOCK", 100)
    return str(request.param)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return streams.store(tmp_path / "shards", rows=100)


def exact(trainee: Trainee) -> Trainee:
    return replace(trainee, betas=(0.0, 0.99), clip=None, learning_rate=1e-2)


def stepped(shards: Path, trainee: Trainee, steps: int) -> Learner:
    stream = streams.cached(shards)
    learner = Learner(trainee, stream.sites)
    for step in range(steps):
        rows = stream.next(40)
        if step == 0:
            learner.start(rows)
        learner.update(rows, step, 1.0)
    return learner


def close(ours: Learner, theirs: Learner) -> None:
    """That two are at the same place; the last gradients, which torch's Adam keeps as first moments, apart."""
    state, wanted = ({name: t for name, t in learner.state().items() if not name.endswith("exp_avg")}
                     for learner in (ours, theirs))
    assert state.keys() == wanted.keys()
    for name in wanted:
        if isinstance(wanted[name], Tensor):
            torch.testing.assert_close(state[name], wanted[name], rtol=2e-4, atol=2e-6, msg=name)


# --- the optimiser by itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [False, True])
def test_sparse_dense_and_summed_gradients_move_weights_as_torch_does(unit: bool, ours: str) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(30, 6, generator=random, dtype=torch.float64), dim=1)
    plain = rows.clone().requires_grad_()
    adam = torch.optim.Adam([plain], lr=1e-2, betas=(0.0, 0.99))
    moving = RowAdam({"W": rows}, 0.99, 1e-8)
    for step in range(40):
        factors = [factor(random, active=step % 7) for _ in range(step % 3)]
        dense = torch.randn(30, 6, generator=random, dtype=torch.float64) if step % 5 == 0 else None
        plain.grad = sum((written_out(f) for f in factors), torch.zeros(30, 6, dtype=torch.float64))
        plain.grad += 0 if dense is None else dense
        with torch.no_grad():
            if unit:
                plain.grad -= (plain.grad * plain).sum(1, keepdim=True) * plain
            adam.step()
            if unit:
                plain /= plain.norm(dim=1, keepdim=True)
        moving.step({"W": factors}, {"W": dense}, 1e-2, ["W"] if unit else [])
        torch.testing.assert_close(rows, plain.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(moving.moments()["W"], adam.state[plain]["exp_avg_sq"], rtol=1e-12, atol=0)


def factor(random: torch.Generator, active: int) -> Factor:
    features = torch.randperm(30, generator=random)[:active].repeat_interleave(3).sort().values
    starts = torch.searchsorted(features, torch.arange(31))
    ids = torch.randint(9, (len(features),), generator=random)
    weights, table = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((len(ids),), (9, 6)))
    return Factor(starts, ids, weights, table)


def written_out(f: Factor) -> Tensor:
    grad = torch.zeros(30, 6, dtype=torch.float64)
    for row in range(30):
        for j in range(int(f.starts[row]), int(f.starts[row + 1])):
            grad[row] += f.weights[j] * f.table[f.ids[j]]
    return grad


# --- in a training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainee", TRAINEES, ids=lambda t: t.name)
def test_every_objective_is_trained_alike(trainee: Trainee, shards: Path, ours: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    moved = stepped(shards, exact(trainee), 6)
    assert moved.rows is not None
    assert "W_enc" not in {n.split(".")[1] for n in moved.state() if n.endswith("exp_avg")}
    take("torch's", monkeypatch)
    plain = stepped(shards, exact(trainee), 6)
    assert plain.rows is None
    close(moved, plain)


@pytest.mark.parametrize("trainee", TRAINEES, ids=lambda t: t.name)
def test_torch_s_adam_moves_the_sae_s_own_memory_as_it_lies(trainee: Trainee, shards: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    take("torch's", monkeypatch)
    learner = stepped(shards, exact(trainee), 2)

    assert learner.moved.keys() == learner.trained.keys()
    for name, moved in learner.moved.items():
        assert moved.is_contiguous(), name  # fused Adam copies gradients that are not
        assert moved.data_ptr() == learner.trained[name].data_ptr()
        assert moved.grad is None  # or two steps' gradients would be held at once


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("pre_bias", [False, True])
def test_both_forms_and_the_pre_encoder_bias(form: str, pre_bias: bool, shards: Path, ours: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    objective: Objective = JumpReLU(l0=4, bandwidth=0.3, pre_bias=pre_bias)
    monkeypatch.setattr(learning, "Batch", partial(learning.Batch, form=form))
    moved = stepped(shards, exact(replace(TRAINEES[0], objective=objective)), 6)
    assert moved.rows is not None
    assert (moved.sae.W_enc.grad is None) == (form == "sparse"), "a gradient of the matrix was made"
    take("torch's", monkeypatch)
    close(moved, stepped(shards, exact(replace(TRAINEES[0], objective=objective)), 6))


def test_on_a_cpu_blocks_are_torch_s_adam_to_the_bit(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_adam, "BLOCK", 100)
    states = []
    for way in ("blocks", "torch's"):
        take(way, monkeypatch)
        states.append(stepped(shards, exact(TRAINEES[0]), 6).state())
    blocks, plain = states
    assert {name for name, t in blocks.items() if isinstance(t, Tensor) and not torch.equal(t, plain[name])} == set()


@pytest.mark.parametrize(("before", "after"), [("rows", "torch's"), ("blocks", "torch's"), ("torch's", "rows"),
                                               ("torch's", "blocks"), ("rows", "blocks"), ("blocks", "rows")])
def test_a_state_goes_on_under_another_way(before: str, after: str, shards: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    trainee = exact(TRAINEES[0])
    take(before, monkeypatch)
    learner = stepped(shards, trainee, 4)
    state = {name: t.clone() if isinstance(t, Tensor) else t for name, t in learner.state().items()}
    take(after, monkeypatch)
    other = stepped(shards, trainee, 1)
    other.load(state)
    stream = streams.cached(shards)
    for step in range(4, 8):
        rows = stream.next(40)
        for way, each in ((before, learner), (after, other)):
            take(way, monkeypatch)
            each.update(rows, step, 1.0)
    close(other, learner)


def test_telling_its_state_does_not_change_where_a_training_goes(shards: Path, ours: str) -> None:
    watched, alone = (Learner(exact(TRAINEES[0]), streams.cached(shards).sites) for _ in range(2))
    stream = streams.cached(shards)
    for step in range(6):
        rows = stream.next(40)
        for learner in (watched, alone):
            if step == 0:
                learner.start(rows)
            learner.update(rows, step, 1.0)
        watched.state()
    close(watched, alone)


@pytest.mark.parametrize("change", [{"betas": (0.9, 0.999)}, {"clip": 2.0}], ids=str)
def test_momentum_and_clipping_need_the_whole_gradients(change: dict[str, Any], shards: Path, ours: str) -> None:
    learner = stepped(shards, replace(exact(TRAINEES[0]), **change), 1)
    assert learner.rows is None
    assert learner.sae.W_enc.grad is not None


def test_a_whole_training_comes_out_the_same(shards: Path, ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(steps=8, batch_size=40, warmup=3, report_every=4)
    moved = train(streams.cached(shards), [exact(TRAINEES[0])], config, progress=False)[TRAINEES[0].name]
    take("torch's", monkeypatch)
    plain = train(streams.cached(shards), [exact(TRAINEES[0])], config, progress=False)[TRAINEES[0].name]
    for name, t in streams.tensors(moved).items():
        torch.testing.assert_close(t, streams.tensors(plain)[name], rtol=2e-4, atol=2e-6)
