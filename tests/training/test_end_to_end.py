"""The fine-tuning on the model's predictions."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from sae_hooks.sae import SAE
from sae_hooks.training.end_to_end import EndToEndConfig, divergence, end_to_end_loss, finetune

from .conftest import BOS, SINK

IDS = torch.tensor([[BOS, 9, SINK, 10, 11], [12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
CONFIG = EndToEndConfig(sparsity=0.001, scale=4.0, learning_rate=3e-3)


@pytest.fixture
def poor_sae() -> SAE:
    """Reconstructs with noise on every feature."""
    g = torch.Generator().manual_seed(0)
    dec = torch.nn.functional.normalize(torch.randn(64, 16, generator=g), dim=1)
    return SAE(dec.T.clone(), torch.zeros(64), dec, torch.zeros(16), threshold=torch.full((64,), 0.1),
               site="model.layers.1.output", metadata={"typical_norm": 4.0})


def test_divergence_is_that_of_the_definition() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)

    p, q = a.softmax(-1), b.softmax(-1)
    torch.testing.assert_close(divergence(a, b), (p * (p / q).log()).sum(-1).mean())
    assert divergence(a, a) == 0


def test_both_terms_weigh_alike_whatever_their_units(
        model_with_a_sink_token: LlamaForCausalLM, poor_sae: SAE) -> None:
    loss = end_to_end_loss(model_with_a_sink_token, poor_sae, IDS, MASK, [0, BOS], CONFIG)

    assert loss.kl > 0
    torch.testing.assert_close(loss.total, loss.reconstruction + 0.001 * loss.l0)


def test_the_predictions_come_nearer(model_with_a_sink_token: LlamaForCausalLM, poor_sae: SAE) -> None:
    seen: list[float] = []

    finetune(model_with_a_sink_token, poor_sae, [(IDS, MASK)] * 40, [0, BOS], CONFIG,
             lambda step, loss: seen.append(float(loss.kl)))

    assert seen[-1] < 0.5 * seen[0]
    torch.testing.assert_close(poor_sae.W_dec.norm(dim=1), torch.ones(64))
    assert not model_with_a_sink_token.model.layers[1]._forward_hooks
