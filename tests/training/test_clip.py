"""Gradients that are much longer than usual are shortened; no others are touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae_hooks.training import JumpReLU, SiteInfo, TopK, Trainee
from sae_hooks.training.learner import Learner

SITES = {"s": SiteInfo(d_in=24, rms_norm=1.0, typical_norm=1.0)}
PLAIN = Trainee(name="t", site="s", d_sae=64, objective=JumpReLU(l0=6), learning_rate=1e-3, betas=(0.9, 0.999))
STEPS = 60


def batches(outlier: int | None = None):
    """Batches of rows of norm about 1; one row of batch `outlier` is nine times as long."""
    rows = torch.randn(STEPS, 128, 24, generator=torch.Generator().manual_seed(1)) / 24 ** 0.5
    if outlier is not None:
        rows[outlier, 0] *= 9 / rows[outlier, 0].norm()
    return [{"s": x} for x in rows]


def lengths(learner, found):
    """(length of W_enc's gradient as Adam sees it, what was usual before), a step each."""
    seen, usual = [], []
    move = learner._move
    learner._move = lambda *args: (seen.append(float(learner.sae.W_enc.grad.norm())), move(*args))
    learner.start(found[0])
    for step, rows in enumerate(found):
        usual.append(float(learner.usual[0]))
        learner.update(rows, step, 1.0)
    return torch.tensor(seen), torch.tensor(usual)


def test_a_token_of_nine_times_the_usual_norm_cannot_make_a_gradient_longer_than_the_limit():
    (free, _), (held, usual) = (lengths(Learner(replace(PLAIN, clip=clip), SITES), batches(outlier=50))
                                for clip in (None, 1.5))
    assert free[50] > 2 * usual[50], "no outlier"
    assert float(held[50]) == pytest.approx(1.5 * float(usual[50]), rel=1e-5)


@pytest.mark.parametrize("objective", [JumpReLU(l0=6), TopK(k=6)], ids=["jumprelu", "topk"])
def test_gradients_of_usual_length_are_not_touched(objective):
    learners = [Learner(replace(PLAIN, objective=objective, clip=clip), SITES) for clip in (None, 30.0)]
    for learner in learners:
        lengths(learner, batches())
    assert all(torch.equal(a, b) for a, b in zip(*(learner.sae.parameters() for learner in learners), strict=True))


def test_the_usual_lengths_are_part_of_the_state():
    trainee, found = replace(PLAIN, clip=1.0), batches(outlier=30)
    through, resumed = Learner(trainee, SITES), Learner(trainee, SITES)
    lengths(through, found[:29])
    resumed.load({name: t.clone() for name, t in through.state().items()})
    for learner in (through, resumed):
        for step, rows in enumerate(found[29:], 29):
            learner.update(rows, step, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(through.sae.parameters(), resumed.sae.parameters(), strict=True))
