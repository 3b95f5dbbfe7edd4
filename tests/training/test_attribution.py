"""Uniformity of attribution, against each active feature scaled a little by itself, in a double precision model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.reference import array, encode, sample, tap
from torch import Tensor
from transformers import Gemma2ForCausalLM

from sae_hooks.sae import SAE
from sae_hooks.training import evaluate
from sae_hooks.training.attribution import Uniformity, importance_uniformity

LAYER = "model.layers.1"
RESIDUAL = (f"{LAYER}.output", f"{LAYER}.output")
TRANSCODER = (f"{LAYER}.pre_feedforward_layernorm.output", f"{LAYER}.post_feedforward_layernorm.output")
TEXTS = ["And the king said unto the people, Behold, I have set before you this day the way.",
         "Take two pounds of flour, and boil it."]
STEP = 0.01  # of a feature's own activation; the model's norms are in float32 all the same


@pytest.fixture
def model(tiny_gemma2: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    return tiny_gemma2.double()


@pytest.fixture
def texts(tiny_tokenizer: Any) -> list[Tensor]:
    """Two texts as batches of their own: in double precision padding gives nan in this model."""
    return [tiny_tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]


def batches(texts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(ids, torch.ones_like(ids)) for ids in texts]


def centred_logits(model: Any, site: str, ids: Tensor, at: int, deltas: Tensor) -> Tensor:
    """The correct next token's logit less the mean one at position `at` of ids (length), for each change (n, d) of
    what stands at the site there."""
    handle = tap(model, site, lambda x: torch.cat([x[:, :at], x[:, at:at + 1] + deltas[:, None], x[:, at + 1:]], 1))
    with torch.no_grad():
        logits = model(input_ids=ids.expand(len(deltas), -1)).logits[:, at]
    handle.remove()
    found: Tensor = logits[:, ids[at + 1]] - logits.mean(1)
    return found


def brute_force(model: Any, sae: SAE, ids: Tensor, at: int) -> float:
    """r of one token: each feature's importance is the slope of the logit as it alone is scaled."""
    x = sample(model, str(sae.site), ids[None])[0, at]
    acts = torch.from_numpy(encode(sae, array(x)))
    active = acts.nonzero().flatten()
    parts = STEP * acts[active, None] * sae.W_dec[active].double()
    up, down = (centred_logits(model, str(sae.site_out), ids, at, sign * parts) for sign in (1, -1))
    p = (up - down).abs() / (up - down).abs().sum()
    return float((-(p * p.log()).sum()).exp() / len(active))


@pytest.mark.parametrize(("places", "k"), [(RESIDUAL, 12), (RESIDUAL, None), (TRANSCODER, 12)],
                         ids=["topk", "jumprelu", "transcoder"])
def test_it_is_what_scaling_each_feature_by_itself_gives(
        model: Gemma2ForCausalLM, random_sae: Callable[..., SAE], texts: list[Tensor],
        places: tuple[str, str], k: int | None) -> None:
    x = torch.cat([sample(model, places[0], ids)[0] for ids in texts])
    sae = random_sae(192, 300, places[0], like=x, k=k, site_out=places[1], skip=places is TRANSCODER)

    result = evaluate(model, sae, batches(texts), uniformity_positions=3)

    each = []
    for ids in texts:
        last = ids.shape[1] - 2  # the first token is <bos>, the last one predicts nothing that is there
        each += [brute_force(model, sae, ids[0], at) for at in (1, 1 + round((last - 1) / 2), last)]
    assert result.uniformity == pytest.approx(sum(each) / 6, rel=1e-4)
    assert 0.1 < min(each) < max(each) < 0.95


def test_as_many_positions_as_there_are_when_fewer_than_asked_for(
        model: Gemma2ForCausalLM, random_sae: Callable[..., SAE], texts: list[Tensor]) -> None:
    short = texts[0][:, -5:]
    sae = random_sae(192, 300, like=sample(model, RESIDUAL[0], short), k=12)

    result = evaluate(model, sae, [(short, torch.ones_like(short))], uniformity_positions=100)

    each = [brute_force(model, sae, short[0], at) for at in range(4)]
    assert result.uniformity == pytest.approx(sum(each) / 4, rel=1e-4)


def test_it_is_not_measured_unless_asked_for(model: Gemma2ForCausalLM, random_sae: Callable[..., SAE],
                                             texts: list[Tensor]) -> None:
    assert evaluate(model, random_sae(192, 300, norm=29), batches(texts)).uniformity is None


def test_it_lies_between_one_feature_counting_and_all_alike() -> None:
    """Four features that read and write the axes, so y is x times the gradient."""
    sae = SAE(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), threshold=torch.zeros(4))
    x = torch.tensor([[1.0, 2, 4, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    gradient = torch.tensor([[4.0, -2, 1, 9], [1e9, 1, 1, 1], [0, 3, 3, 3], [1, 1, 1, 1], [0, 0, 0, 0]])

    found = importance_uniformity(sae, x, gradient)

    assert found[:3].tolist() == pytest.approx([1, 1 / 4, 1])  # the third: of one feature with a part, that one
    assert found[3:].isnan().all()
    mean = Uniformity()
    mean.update(sae, x, gradient)
    assert (mean.tokens, mean.mean) == (3, pytest.approx(2.25 / 3))
    assert math.isnan(Uniformity().mean)


def test_parameters_that_learn_get_no_gradient_and_grad_mode_stays(
        model: Gemma2ForCausalLM, random_sae: Callable[..., SAE], texts: list[Tensor]) -> None:
    model.requires_grad_(True)

    evaluate(model, random_sae(192, 300, norm=29), batches(texts), uniformity_positions=2)

    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
