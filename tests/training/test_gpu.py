"""On a GPU a training is what it is on the CPU, but for rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

from sae_hooks.kernels import remove_along
from sae_hooks.sae import SAE
from sae_hooks.training import BatchTopK, JumpReLU, Loss, TopK, TrainConfig, Trainee, evaluate, train
from sae_hooks.training.learner import Learner

from . import streams

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ONE = Trainee(name="one", site=streams.IN, d_sae=24, objective=streams.JUMPRELU, dead_after=64)
CONFIG: dict[str, Any] = {"steps": 6, "batch_size": 40, "warmup": 3, "report_every": 1, "checkpoint_every": 3}


class Crash(Exception):
    pass


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return streams.store(tmp_path / "shards", rows=100)


def stepped(shards: Path, trainee: Trainee, device: str, steps: int = 3) -> tuple[Learner, list[Loss]]:
    """A learner after some steps on a device, and the loss of each."""
    stream = streams.cached(shards, device=device)
    learner, losses = Learner(trainee, stream.sites, device), []
    for step in range(steps):
        rows = stream.next(40)
        if step == 0:
            learner.start(rows)
        losses.append(learner.update(rows, step, 1.0))
    return learner, losses


def trained(shards: Path, folder: Path | None, device: str, crash: int = 0, **changes: Any) -> SAE:
    def log(row: dict[str, Any]) -> None:
        if row["step"] == crash:
            raise Crash

    return train(streams.cached(shards, device=device), [ONE], TrainConfig(**CONFIG | changes), folder, log=log,
                 device=device, progress=False)["one"]


def across(name: str, grad: Tensor, learner: Learner) -> Tensor:
    """A gradient without what no step follows: the part along the rows of a decoder of unit norm."""
    grad = grad.clone()
    if name == "W_dec" and learner.objective.unit_decoder:
        remove_along(grad, learner.sae.W_dec.detach())
    return grad


def cosine(x: Tensor, y: Tensor) -> float:
    x, y = (t.detach().double().cpu().flatten() for t in (x, y))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def on_device(t: Tensor) -> bool:
    return t.device.type == torch.device(DEVICE).type


# --- steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainee", [t for t in streams.trainees() if not t.bf16], ids=lambda t: t.name)
def test_steps_of_every_objective_are_those_of_the_cpu(trainee: Trainee, shards: Path) -> None:
    there, losses = stepped(shards, trainee, DEVICE)
    here, wanted = stepped(shards, trainee, "cpu")

    assert all(on_device(t) for t in (*there.sae.parameters(), *there.extra.values(), there.idle))
    for ours, theirs in zip(losses, wanted, strict=True):
        torch.testing.assert_close(ours.reconstruction.cpu(), theirs.reconstruction, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.l0.cpu(), theirs.l0, rtol=1e-2, atol=0.05)
    for name, leaf in here.trained.items():
        if (grad := there.trained[name].grad) is None:  # matrices are moved by the gradient's factors
            assert there.rows is not None
            assert name in there.rows.weights
        else:
            assert leaf.grad is None or cosine(across(name, grad, there), across(name, leaf.grad, here)) > 0.999, name
        assert cosine(there.trained[name], leaf) > 0.999, name


@pytest.mark.parametrize("objective", [JumpReLU(sparsity=0.05, bandwidth=0.1, threshold=0.1), TopK(k=3),
                                       BatchTopK(k=3)], ids=lambda o: type(o).__name__)
def test_in_bfloat16_a_step_is_almost_that_of_float32_and_thresholds_stay_float32(objective: Any, shards: Path) -> None:
    exact = replace(ONE, objective=objective)

    there, (loss,) = stepped(shards, replace(exact, bf16=True), DEVICE, steps=1)
    here, (wanted,) = stepped(shards, exact, "cpu", steps=1)

    assert {t.dtype for t in (*there.sae.parameters(), *there.trained.values(), loss.total)} == {torch.float32}
    torch.testing.assert_close(loss.reconstruction.cpu(), wanted.reconstruction, rtol=0.03, atol=0)
    torch.testing.assert_close(loss.l0.cpu(), wanted.l0, rtol=0.03, atol=0.2)
    for name, leaf in here.trained.items():
        grad = there.trained[name].grad
        assert grad is None or cosine(across(name, grad, there), across(name, leaf.grad, here)) > 0.98, name


# --- streams and checkpoints --------------------------------------------------------------------------------


def test_cached_rows_come_out_on_the_gpu_with_the_bits_of_the_cpu(shards: Path) -> None:
    there, here = streams.cached(shards, device=DEVICE), streams.cached(shards)

    for size in (40, 70, 1):
        ours, theirs = there.next(size), here.next(size)
        assert all(on_device(x) for x in ours.values())
        assert all(torch.equal(ours[site].cpu(), theirs[site]) for site in theirs)


def test_live_rows_and_their_buffer_lie_on_the_gpu(tiny_gemma2: Gemma2ForCausalLM) -> None:
    there = streams.live(tiny_gemma2.to(DEVICE), device=DEVICE, buffer_device=DEVICE)
    state = there.state_dict()
    rows = there.next(40)
    again = streams.live(tiny_gemma2, device=DEVICE, buffer_device=DEVICE)
    again.load_state_dict(state)

    assert all(on_device(x) for x in rows.values())
    for site, x in again.next(40).items():
        torch.testing.assert_close(x, rows[site])


def test_a_state_that_was_saved_on_the_gpu_comes_back_with_the_same_bits(shards: Path) -> None:
    learner, _ = stepped(shards, ONE, DEVICE)
    state = {name: t.clone().cpu() if isinstance(t, Tensor) else t for name, t in learner.state().items()}

    again, _ = stepped(shards, ONE, DEVICE, steps=1)
    again.load(state)

    for name, t in again.state().items():
        assert torch.equal(t.cpu(), state[name]), name
        assert t.device == learner.state()[name].device, name


@pytest.mark.parametrize("stopped_on", [DEVICE, "cpu"])
def test_a_training_that_was_stopped_anywhere_goes_on_on_the_gpu(stopped_on: str, shards: Path, tmp_path: Path) -> None:
    whole = trained(shards, None, DEVICE)
    with pytest.raises(Crash):
        trained(shards, tmp_path / "run", stopped_on, crash=5)

    resumed = trained(shards, tmp_path / "run", DEVICE)

    assert resumed.device == torch.device("cpu")
    for name, t in streams.tensors(resumed).items():
        assert cosine(t, streams.tensors(whole)[name]) > 0.999, name


# --- evaluation ---------------------------------------------------------------------------------------------


def test_an_evaluation_is_that_of_the_cpu(tiny_gemma2: Gemma2ForCausalLM) -> None:
    stream = streams.live(tiny_gemma2, [streams.IN])
    config = TrainConfig(steps=20, batch_size=64, warmup=3)
    sae = train(stream, [ONE], config, progress=False)["one"]
    ids = torch.randint(3, 4096, (4, 24), generator=torch.Generator().manual_seed(0))
    batches = [(ids, torch.ones_like(ids))]
    here = evaluate(tiny_gemma2, sae, batches, streams.SPECIAL, uniformity_positions=2).scalars()

    there = evaluate(tiny_gemma2.to(DEVICE), sae, batches, streams.SPECIAL, uniformity_positions=2).scalars()

    assert sae.device == torch.device("cpu")
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert there[name] == pytest.approx(value, rel=5e-3, abs=5e-3), name
