"""The measures, against sums written out by hand and cases whose answer is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from sae_hooks.check import Statistics
from sae_hooks.sae import SAE
from sae_hooks.training import evaluate, top_contexts
from sae_hooks.training.metrics import token_losses

from .conftest import BOS, SINK

SITE = "model.layers.1.output"
IDS = torch.tensor([[BOS, 9, SINK, 10, 11], [12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def identity_sae(scale: float = 1.0) -> SAE:
    """Features +x and -x: reconstructs scale * x."""
    eye = torch.eye(16)
    return SAE(torch.cat([eye, -eye], 1), torch.zeros(32), scale * torch.cat([eye, -eye]), torch.zeros(16),
               threshold=torch.zeros(32), site=SITE, metadata={"typical_norm": 4.0})


def changed_positions(model: LlamaForCausalLM, sae: SAE) -> Tensor:
    """Positions at which the last layer's input differs between a clean and a spliced run of evaluate."""
    seen: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    evaluate(model, sae, [(IDS, MASK)], special_ids=[0, BOS])
    handle.remove()
    return (seen[0] != seen[1]).any(-1)


def test_a_perfect_sae_costs_nothing(model_with_a_sink_token: LlamaForCausalLM) -> None:
    result = evaluate(model_with_a_sink_token, identity_sae(), [(IDS, MASK)], special_ids=[0, BOS])

    assert result.tokens == 6
    assert result.l0 == pytest.approx(16)
    assert result.dead <= 2 / 32  # of 6 tokens, a sign may be missing in a direction or two
    assert result.fvu == pytest.approx(0, abs=1e-9)
    assert result.delta_loss == pytest.approx(0, abs=1e-5)
    assert result.loss_recovered == pytest.approx(1, abs=1e-3)


def test_an_sae_that_gives_zeros_recovers_nothing(model_with_a_sink_token: LlamaForCausalLM) -> None:
    result = evaluate(model_with_a_sink_token, identity_sae(0.0), [(IDS, MASK)], special_ids=[0, BOS])

    assert result.loss_spliced == pytest.approx(result.loss_zero)
    assert result.loss_recovered == pytest.approx(0)


def test_special_tokens_padding_and_sinks_are_never_replaced(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    changed = changed_positions(model_with_a_sink_token, identity_sae(0.5))

    assert changed.tolist() == [[False, True, False, True, True], [True, True, True, False, False]]


def test_losses_are_means_over_predictions_from_ordinary_positions(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    result = evaluate(model_with_a_sink_token, identity_sae(), [(IDS, MASK)], special_ids=[0, BOS])

    logits = model_with_a_sink_token(input_ids=IDS, attention_mask=MASK).logits
    counted = [(0, 1), (0, 3), (1, 0), (1, 1)]
    by_hand = [float(-F.log_softmax(logits[r, i], -1)[IDS[r, i + 1]]) for r, i in counted]
    assert result.loss_clean == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_the_model_is_left_as_it_was(model_with_a_sink_token: LlamaForCausalLM) -> None:
    before = token_losses(model_with_a_sink_token, SITE, IDS, MASK)

    evaluate(model_with_a_sink_token, identity_sae(0.5), [(IDS, MASK)])

    assert torch.equal(before, token_losses(model_with_a_sink_token, SITE, IDS, MASK))
    assert not model_with_a_sink_token.model.layers[1]._forward_hooks


def test_fvu_is_the_ratio_of_dataset_means_whatever_the_batches() -> None:
    x = 5 + torch.randn(100, 4)
    threshold = torch.tensor([0.0, 5.0, float(x[:, 2].max())])  # the first always fires, the last never
    sae = SAE(torch.eye(4)[:, :3], torch.zeros(3), torch.eye(4)[:3], 5 * torch.eye(4)[3], threshold=threshold)
    stats = Statistics()

    for part in (slice(0, 7), slice(7, 100)):
        stats.update(sae, x[part], x[part])

    by_hand = (x - sae(x)).square().sum(1).mean() / (x - x.mean(0)).square().sum(1).mean()
    assert stats.fvu == pytest.approx(float(by_hand), rel=1e-4)
    assert stats.l0 == pytest.approx(1 + float((x[:, 1] > 5).float().mean()))
    assert stats.dead == pytest.approx(1 / 3)


def test_top_contexts_hold_the_strongest_ordinary_tokens(model_with_a_sink_token: LlamaForCausalLM) -> None:
    found = top_contexts(model_with_a_sink_token, identity_sae(), [(IDS, MASK)], special_ids=[0, BOS], keep=1)

    hidden = model_with_a_sink_token(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[2]
    ordinary = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    strongest = hidden[ordinary][:, 0].max()
    context = found.top(0)[0]
    assert context.activation == pytest.approx(float(strongest), rel=1e-4)
    assert context.token == int(IDS[ordinary][hidden[ordinary][:, 0].argmax()])
    assert found.tokens == 6
    assert 0 < found.frequency(0) < 1
