"""On data whose features are known, JumpReLU finds them, and as many of them a token as there are."""

from __future__ import annotations

import pytest
import torch

from sae_hooks.training import JumpReLU, TrainConfig, Trainee, train

from . import streams
from .streams import IN

D_IN, FEATURES, ACTIVE = 64, 128, 5
D_SAE = 192  # half as many again: with none to spare, two true features that share one stay so


def recovered(objective: JumpReLU, steps: int, seed: int) -> tuple[float, float]:
    """(share of the true features that some decoder row is within cosine 0.9 of, L0) on raw activations."""
    dictionary = streams.unit_rows(FEATURES, D_IN, torch.Generator().manual_seed(seed))
    stream = streams.Synthetic(dictionary, ACTIVE, seed)
    trainee = Trainee(name="sae", site=IN, d_sae=D_SAE, objective=objective, learning_rate=0.01, seed=seed)
    config = TrainConfig(steps=steps, batch_size=256, warmup=100, decay=0.5)
    sae = train(stream, [trainee], config, progress=False)["sae"]
    acts = sae.encode(stream.next(10_000)[IN] * stream.sites[IN].rms_norm)
    cosines = (dictionary @ sae.W_dec.T).max(dim=1).values
    return float((cosines > 0.9).double().mean()), float((acts > 0).sum(1).double().mean())


def test_a_sparsity_penalty_recovers_the_dictionary_and_the_true_l0() -> None:
    # a feature of the least weight, 0.5, saves an error of 0.5 ** 2 / E||x||^2 = 0.046: well above the price of 0.02
    objective = JumpReLU(sparsity=0.02, bandwidth=0.1, threshold=0.1, warmup=600)

    found, l0 = recovered(objective, steps=1200, seed=0)

    assert found >= 0.95
    assert abs(l0 - ACTIVE) < 0.1 * ACTIVE


@pytest.mark.slow
def test_a_target_of_the_true_l0_recovers_the_dictionary_and_is_met() -> None:
    objective = JumpReLU(l0=ACTIVE, sparsity=0.5, bandwidth=0.1, warmup=1000)

    found, l0 = recovered(objective, steps=2000, seed=0)

    assert found >= 0.95
    assert abs(l0 - ACTIVE) < 0.1 * ACTIVE
