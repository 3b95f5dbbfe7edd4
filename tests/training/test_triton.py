"""Training on the Triton kernels: every objective's gradients to 1e-10, as on PyTorch's operations; whole trainings.

In the interpreter. Where there is a GPU, test_gpu.py trains on the kernels themselves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled kernels take no tensors of a CPU", allow_module_level=True)

from sae_hooks.kernels import segments, triton_ops
from sae_hooks.training import learner as learning
from sae_hooks.training import row_adam
from sae_hooks.training.learner import Learner

from . import streams
from .objective_cases import CASES, FLAWS, assert_equal, expected, run, world


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran."""
    ran: list[str] = []

    class Noted:
        def __getattr__(self, name: str) -> object:
            ran.append(name)
            return getattr(triton_ops, name)

    monkeypatch.setattr(segments, "TRITON_ON", ("cpu", "cuda"))
    monkeypatch.setattr(segments, "_triton", Noted)
    return ran


@pytest.mark.parametrize(("name", "flaw"), [
    *((name, None) for name in CASES), *(("jumprelu-l0-batch", flaw) for flaw in FLAWS),
    ("tanh", "everything_fires"), ("batchtopk", "nothing_fires")])
def test_gradients_are_those_written_out_by_hand(name: str, flaw: str | None, kernels: list[str]) -> None:
    objective, at = replace(CASES[name], pre_bias=flaw is None), world(batch=13, flaw=flaw)
    loss, found = run(objective, at, "sparse")
    second = expected(objective, at)
    assert_equal(loss.total.detach(), second.total)
    for key, value in found.items():
        assert_equal(value, second.gradients.get(key, np.zeros(tuple(value.shape))))
    assert {"weighted_sums", "dots"} <= set(kernels)


@pytest.mark.parametrize("rows", [(), ("cpu",)], ids=["torch's Adam", "Adam by rows"])
def test_a_training_is_that_of_pytorch_operations(rows: tuple[str, ...], tmp_path: Path, kernels: list[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    shards, trainee = streams.store(tmp_path / "shards", rows=100), replace(streams.trainees()[0], betas=(0.0, 0.99))
    monkeypatch.setattr(row_adam, "ROWS_ON", rows)
    monkeypatch.setattr(row_adam, "BLOCKS_ON", ())
    ours = stepped(shards, trainee)
    assert ("adam_rows" in kernels) == bool(rows)
    monkeypatch.setattr(segments, "TRITON_ON", ())
    plain = stepped(shards, trainee)
    for name, t in plain.trained.items():
        torch.testing.assert_close(ours.trained[name], t, rtol=1e-4, atol=1e-6, msg=name)


def stepped(shards: Path, trainee: learning.Trainee) -> Learner:
    stream = streams.cached(shards)
    learner = Learner(trainee, stream.sites)
    for step in range(4):
        rows = stream.next(40)
        if step == 0:
            learner.start(rows)
        learner.update(rows, step, 1.0)
    return learner
