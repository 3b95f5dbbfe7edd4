"""The measures, against sums written out by hand and cases whose answer is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core.reference import FullEdit, array, encode, ordinary, reconstruct, sample
from torch import Tensor
from transformers import Gemma2ForCausalLM, LlamaForCausalLM

from sae_hooks import attach_saes, detach_saes
from sae_hooks.errors import DataError, SaeAttachError, SaeMismatchError, SiteError
from sae_hooks.measure import Statistics
from sae_hooks.sae import SAE
from sae_hooks.training import evaluate
from sae_hooks.training.metrics import Evaluation, evaluate_all

from .conftest import BOS, SINK

SITE = "model.layers.1.output"
IDS = torch.tensor([[BOS, 9, SINK, 10, 11], [12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ORDINARY = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
TEXTS = ["And the king said unto the people, Behold, I have set before you this day the way.",
         "Take two pounds of flour and a pint of milk, and boil the butter in it.",
         "def read(path):\n    with open(path) as file:\n        return file.read()"]
LAYER = "model.layers.1"
PLACES = {"residual stream": (f"{LAYER}.output", f"{LAYER}.output"),
          "attention": (f"{LAYER}.self_attn.o_proj.input", f"{LAYER}.self_attn.o_proj.input"),
          "mlp": (f"{LAYER}.post_feedforward_layernorm.output", f"{LAYER}.post_feedforward_layernorm.output"),
          "transcoder": (f"{LAYER}.pre_feedforward_layernorm.output", f"{LAYER}.post_feedforward_layernorm.output")}


@pytest.fixture
def batch(tiny_tokenizer: Any) -> tuple[Tensor, Tensor]:
    made = tiny_tokenizer(TEXTS, return_tensors="pt", padding=True)
    return made["input_ids"], made["attention_mask"]


def identity_sae(scale: float = 1.0, site: str = SITE, site_out: str | None = None, **metadata: float) -> SAE:
    """Features +x and -x: reconstructs scale * x."""
    eye = torch.eye(16)
    return SAE(torch.cat([eye, -eye], 1), torch.zeros(32), scale * torch.cat([eye, -eye]), torch.zeros(16),
               threshold=torch.zeros(32), site=site, site_out=site_out, metadata={"typical_norm": 4.0, **metadata})


def numbers(result: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in result.scalars().items() if value is not None}


def measured(model: Any, sae: SAE, **options: Any) -> Evaluation:
    return evaluate(model, sae, [(IDS, MASK)], special_ids=[0, BOS], **options)


def by_hand(model: Any, sae: SAE, ids: Tensor, mask: Tensor) -> dict[str, float]:
    """All measures by plain hooks and dense float64 sums, without sae_hooks' own."""
    chosen = ordinary(ids, mask, (0, 1, 2))
    x, target = (array(sample(model, site, ids, attention_mask=mask).float()[chosen])
                 for site in (sae.site, sae.site_out))
    x_hat, acts = reconstruct(sae, x), encode(sae, x)
    dots, lengths = (x_hat * target).sum(1), np.linalg.norm(x_hat, axis=1) * np.linalg.norm(target, axis=1)
    often = (acts > 0).mean(0)
    losses = [loss_with(model, sae, how, ids, mask, chosen) for how in ("clean", "spliced", "zero")]
    return {"tokens": len(x), "predictions": int((chosen[:, :-1] & mask[:, 1:].bool()).sum()),
            "l0": (acts > 0).sum(1).mean(), "gamma": (x_hat ** 2).sum() / dots.sum(), "cosine": (dots / lengths).mean(),
            "fvu": ((x_hat - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum(),
            "dead": (often == 0).mean(), "over_1_percent": (often > 0.01).mean(),
            "over_10_percent": (often > 0.1).mean(),
            "loss_clean": losses[0], "loss_spliced": losses[1], "loss_zero": losses[2],
            "delta_loss": losses[1] - losses[0], "loss_recovered": (losses[2] - losses[1]) / (losses[2] - losses[0])}


def loss_with(model: Any, sae: SAE, how: str, ids: Tensor, mask: Tensor, chosen: Tensor) -> float:
    """Loss with the reconstruction, or zeros, at the chosen positions, over the predictions made from them."""
    zeros = copy.deepcopy(sae)
    for name, tensor in zeros.named_parameters():
        tensor.data.zero_() if name in ("W_dec", "b_dec", "W_skip") else None
    choose = {"clean": lambda i, m: torch.zeros_like(chosen)}.get(how, lambda i, m: chosen)
    with torch.no_grad(), FullEdit(model, zeros if how == "zero" else sae, lambda acts: acts, read=str(sae.site),
                                   write=sae.site_out, choose=choose, keep_error=False):
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
    kept = chosen[:, :-1] & mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][kept], ids[:, 1:][kept]).item()


# --- numbers whose answer is known -------------------------------------------------------------------

def test_a_perfect_sae_costs_nothing(model_with_a_sink_token: LlamaForCausalLM) -> None:
    result = measured(model_with_a_sink_token, identity_sae())

    assert result.tokens == 6
    assert result.l0 == pytest.approx(16)
    assert result.dead <= 2 / 32  # of 6 tokens, a sign may be missing in a direction or two
    assert result.fvu == pytest.approx(0, abs=1e-9)
    assert result.gamma == pytest.approx(1, abs=1e-9)
    assert result.cosine == pytest.approx(1, abs=1e-9)
    assert result.delta_loss == pytest.approx(0, abs=1e-5)
    assert result.loss_recovered == pytest.approx(1, abs=1e-3)


def test_an_sae_that_gives_zeros_recovers_nothing(model_with_a_sink_token: LlamaForCausalLM) -> None:
    result = measured(model_with_a_sink_token, identity_sae(0.0))

    assert result.loss_spliced == pytest.approx(result.loss_zero)
    assert result.loss_recovered == pytest.approx(0)
    assert np.isnan(result.gamma)


def test_gamma_is_the_factor_by_which_reconstructions_are_short(model_with_a_sink_token: LlamaForCausalLM) -> None:
    assert measured(model_with_a_sink_token, identity_sae(0.8)).gamma == pytest.approx(0.8)


def test_shares_count_features_over_a_frequency_not_at_it(model_with_a_sink_token: LlamaForCausalLM) -> None:
    # given: features that fire on exactly 1, 2, 10 and 11 of 100 tokens
    ids = torch.randint(8, 40, (2, 50), generator=torch.Generator().manual_seed(0))
    values = sample(model_with_a_sink_token, SITE, ids)[..., 0].flatten().sort(descending=True).values
    threshold = torch.stack([(values[n - 1] + values[n]) / 2 for n in (1, 2, 10, 11)])
    sae = SAE(torch.eye(16)[:, :1].repeat(1, 4), torch.zeros(4), torch.ones(4, 16), torch.zeros(16),
              threshold=threshold, site=SITE)

    result = evaluate(model_with_a_sink_token, sae, [(ids, torch.ones_like(ids))])

    assert result.frequencies.tolist() == [0.01, 0.02, 0.1, 0.11]
    assert (result.over_1_percent, result.over_10_percent, result.dead) == (0.75, 0.25, 0)


@pytest.mark.parametrize("gate", ["jumprelu", "topk"])
@pytest.mark.parametrize("where", PLACES)
def test_every_number_at_every_kind_of_site_is_what_the_definitions_say(
        tiny_gemma2: Gemma2ForCausalLM, random_sae: Callable[..., SAE], batch: tuple[Tensor, Tensor], where: str,
        gate: str) -> None:
    read, write = PLACES[where]
    x = sample(tiny_gemma2, read, batch[0], attention_mask=batch[1])
    sae = random_sae(192, 300, read, like=x, k=12 if gate == "topk" else None, site_out=write,
                     skip=where == "transcoder")

    result = evaluate(tiny_gemma2, sae, [batch])

    expected = by_hand(tiny_gemma2, sae, *batch)
    assert numbers(result) == {name: pytest.approx(value, rel=2e-4) for name, value in expected.items()}
    assert 0 < result.dead < 1
    assert result.loss_spliced != result.loss_zero


def test_sums_are_of_the_whole_dataset_whatever_the_batches(sae64: SAE) -> None:
    x, target = (5 + torch.randn(100, 6, dtype=torch.float64) for _ in range(2))
    stats = Statistics()

    built = torch.cat([stats.update(sae64, x[part], target[part]) for part in (slice(0, 7), slice(7, 100))])

    x_hat, acts = reconstruct(sae64, array(x)), encode(sae64, array(x))
    error = ((array(target) - x_hat) ** 2).sum()
    assert np.allclose(array(built), x_hat, rtol=1e-12)
    assert stats.fvu == pytest.approx(error / ((array(target) - array(target).mean(0)) ** 2).sum(), rel=1e-12)
    assert stats.gamma == pytest.approx((x_hat ** 2).sum() / (x_hat * array(target)).sum(), rel=1e-12)
    assert stats.frequencies.tolist() == pytest.approx((acts > 0).mean(0).tolist())
    assert stats.l0 == pytest.approx((acts > 0).sum(1).mean())


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x = 1e4 + torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    sae = SAE(torch.zeros(4, 2), torch.zeros(2), torch.zeros(2, 4), x.double().mean(0).float(),
              threshold=torch.ones(2))
    stats = Statistics()

    stats.update(sae, x, x)

    assert stats.fvu == pytest.approx(1, abs=1e-5)


def test_each_activation_is_encoded_once(model_with_a_sink_token: LlamaForCausalLM, monkeypatch: Any) -> None:
    encoded = []
    real = SAE.encode_sparse
    monkeypatch.setattr(SAE, "encode_sparse", lambda sae, x: (encoded.append(len(x)), real(sae, x))[1])
    for other in ("encode", "pre_activations", "forward"):
        monkeypatch.setattr(SAE, other, lambda *_: pytest.fail("encoded once more"))

    measured(model_with_a_sink_token, identity_sae())

    assert encoded == [6]


# --- positions -----------------------------------------------------------------------------------------

def test_special_tokens_padding_and_sinks_are_never_replaced(model_with_a_sink_token: LlamaForCausalLM) -> None:
    seen: list[Tensor] = []
    model_with_a_sink_token.model.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))

    measured(model_with_a_sink_token, identity_sae(0.5))

    changed = [(x != seen[0]).any(-1) for x in seen]
    assert [bool(where.any()) for where in changed] == [False, False, True, True]  # clean, proof; zeros, spliced
    assert all(torch.equal(where, ORDINARY) for where in changed[2:])


def test_losses_are_means_over_predictions_from_ordinary_positions(model_with_a_sink_token: LlamaForCausalLM) -> None:
    result = measured(model_with_a_sink_token, identity_sae())

    logits = model_with_a_sink_token(input_ids=IDS, attention_mask=MASK).logits
    counted = [(0, 1), (0, 3), (1, 0), (1, 1)]
    each = [float(-F.log_softmax(logits[r, i], -1)[IDS[r, i + 1]]) for r, i in counted]
    assert result.predictions == 4
    assert result.loss_clean == pytest.approx(sum(each) / 4, rel=1e-5)


def test_specials_of_the_models_configs_count_as_given(model_with_a_sink_token: LlamaForCausalLM) -> None:
    given = measured(model_with_a_sink_token, identity_sae())

    assert evaluate(model_with_a_sink_token, identity_sae(), [(IDS, MASK)]) == given
    assert evaluate(model_with_a_sink_token, identity_sae(), [(IDS, MASK)], special_ids=[9]).tokens == 5


def test_batching_and_padding_make_no_difference(tiny_gemma2: Gemma2ForCausalLM, random_sae: Callable[..., SAE],
                                                 batch: tuple[Tensor, Tensor]) -> None:
    sae = random_sae(192, 300, norm=29)
    single = [(ids[mask.bool()][None], mask[mask.bool()][None]) for ids, mask in zip(*batch, strict=True)]

    together, alone = evaluate(tiny_gemma2, sae, [batch]), evaluate(tiny_gemma2, sae, iter(single))

    assert numbers(alone) == pytest.approx(numbers(together), rel=1e-5, abs=1e-6)
    assert torch.equal(alone.frequencies, together.frequencies)
    assert alone.text == together.text
    assert evaluate(tiny_gemma2, sae, single[:2]).text != alone.text
    halves = [(part, torch.ones_like(part)) for ids, _ in single for part in (ids[:, :4], ids[:, 4:])]
    assert evaluate(tiny_gemma2, sae, halves).text != alone.text


@pytest.mark.parametrize("batches", [
    [], [(torch.tensor([[BOS, 0, 2]]), torch.ones(1, 3))], [(IDS[:, :1], MASK[:, :1])]])
def test_text_without_anything_to_measure_is_an_error(model_with_a_sink_token: LlamaForCausalLM, batches: Any) -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate(model_with_a_sink_token, identity_sae(), batches)


# --- several SAEs ---------------------------------------------------------------------------------------

def test_several_saes_get_what_each_would_get_alone(model_with_a_sink_token: LlamaForCausalLM) -> None:
    saes = {"a": identity_sae(), "b": identity_sae(0.5), "same site, sinks too": identity_sae(0.5, typical_norm=1e9),
            "below": identity_sae(0.7, "model.layers.0.output"), "inside": identity_sae(0.7, f"{LAYER}.mlp.output"),
            "across": identity_sae(0.3, f"{LAYER}.mlp.output", f"{LAYER}.output")}
    batches = [(IDS, MASK), (IDS.flip(0), MASK.flip(0))]

    found = evaluate_all(model_with_a_sink_token, saes, batches)

    assert list(found) == list(saes)
    for name, sae in saes.items():
        assert found[name] == evaluate(model_with_a_sink_token, sae, batches), name
    assert found["same site, sinks too"].tokens == found["a"].tokens + 2
    assert evaluate_all(model_with_a_sink_token, {}, batches) == {}


def test_clean_and_zero_passes_are_shared_and_layers_below_run_once(model_with_a_sink_token: LlamaForCausalLM) -> None:
    below, whole = [], []
    model_with_a_sink_token.model.layers[0].mlp.register_forward_hook(lambda *_: below.append(1))
    model_with_a_sink_token.lm_head.register_forward_hook(lambda *_: whole.append(1))

    evaluate_all(model_with_a_sink_token, {str(i): identity_sae(0.1 * i) for i in range(5)}, 3 * [(IDS, MASK)])

    assert len(below) == 3
    assert len(whole) == 3 * (1 + 1 + 5) + 1  # and once, to prove that the layers below need not run again


# --- models ---------------------------------------------------------------------------------------------

def test_a_bf16_model_is_measured_in_its_own_precision(tiny_gemma2: Gemma2ForCausalLM, random_sae: Callable[..., SAE],
                                                       batch: tuple[Tensor, Tensor]) -> None:
    model, sae = tiny_gemma2.bfloat16(), random_sae(192, 300, norm=29)

    result = evaluate(model, sae, [batch])

    expected = by_hand(model, sae, *batch)
    assert result.l0 == pytest.approx(expected["l0"], rel=1e-3)
    assert result.fvu == pytest.approx(expected["fvu"], rel=1e-3)
    assert result.loss_clean == pytest.approx(expected["loss_clean"], abs=1e-4)
    assert result.loss_spliced == pytest.approx(expected["loss_spliced"], abs=0.02)


def test_a_model_on_several_devices_is_measured_as_in_one_piece(random_model: Any, random_sae: Callable[..., SAE],
                                                                fake_gpus: Any, tmp_path: Any) -> None:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    saes = {"a": random_sae(32, 64, like=sample(random_model("Gemma2"), SITE, ids)),
            "b": random_sae(32, 64, f"{LAYER}.mlp.input", site_out=f"{LAYER}.mlp.output", norm=6)}
    want = evaluate_all(random_model("Gemma2"), saes, [(ids, torch.ones_like(ids))])
    model = random_model("Gemma2")
    places = {"model.embed_tokens": "fgpu:0", "lm_head": "fgpu:0", "model.rotary_emb": "fgpu:0",
              "model.norm": "fgpu:0", "model.layers.0": "fgpu:0", "model.layers.1": "fgpu:1",
              "model.layers.2": "disk"}
    model = accelerate.dispatch_model(model, places, offload_dir=str(tmp_path), main_device="fgpu:0",
                                      skip_keys=model._skip_keys_device_placement)
    found = evaluate_all(model, saes, [(ids, torch.ones_like(ids))])
    for name in saes:
        assert numbers(found[name]) == pytest.approx(numbers(want[name]), rel=1e-4), name


def state(model: Any) -> list[Any]:
    """What must be as it was: hooks, forwards, modes, gradients and what the model has been given."""
    return [[(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()), m.__dict__.get("forward"),
              m.training) for m in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()], sorted(model.__dict__), torch.is_grad_enabled()]


@pytest.mark.parametrize("fault", [None, "a batch", "the model", "the width of an SAE", "the site of an SAE"])
def test_the_model_is_left_as_it_was_also_after_an_error(model_with_a_sink_token: LlamaForCausalLM,
                                                         fault: str | None) -> None:
    model = model_with_a_sink_token
    model.model.layers[0].train()
    if fault == "the model":
        model.model.layers[2].register_forward_hook(lambda m, args, x: 1 / 0 if not x.abs().max() else None)
        model.model.layers[2].mlp.register_forward_hook(lambda m, args, x: 1 / 0 if len(seen.append(1) or seen) > 2
                                                        else None)
    seen: list[int] = []
    before, random = state(model), torch.random.get_rng_state()
    logits = model.eval()(IDS).logits
    model.model.layers[0].train()
    seen.clear()
    bad = {"the width of an SAE": SAE(torch.ones(8, 2), torch.ones(2), torch.ones(2, 8), torch.ones(8), k=1, site=SITE),
           "the site of an SAE": identity_sae(site="model.layers.7.output")}.get(str(fault), identity_sae(0.5))
    batches = [(IDS, MASK), None if fault == "a batch" else (IDS, MASK)]

    if fault is None:
        evaluate_all(model, {"good": identity_sae(), "other": bad}, batches, uniformity_positions=2)
    else:
        with pytest.raises((TypeError, ZeroDivisionError, SaeMismatchError, SiteError)):
            evaluate_all(model, {"good": identity_sae(), "bad": bad}, batches, uniformity_positions=2)

    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    seen.clear()
    assert torch.equal(model.eval()(IDS).logits, logits)


def test_a_model_in_training_mode_is_measured_without_dropout(random_model: Any) -> None:
    model = random_model("Llama", attention_dropout=0.5).train()
    sae = SAE(torch.eye(32), torch.zeros(32), torch.eye(32), torch.zeros(32), threshold=torch.zeros(32), site=SITE)
    ids = torch.arange(3, 23).view(2, 10)

    first = evaluate(model, sae, [(ids, torch.ones_like(ids))])

    assert first == evaluate(model, sae, [(ids, torch.ones_like(ids))])
    assert all(module.training for module in model.modules())


def test_a_model_that_carries_saes_already_is_refused_and_keeps_them(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    attach_saes(model_with_a_sink_token, identity_sae())

    with pytest.raises(SaeAttachError, match="detach_saes"):
        measured(model_with_a_sink_token, identity_sae())

    assert list(model_with_a_sink_token.saes) == [SITE]
    detach_saes(model_with_a_sink_token)
    measured(model_with_a_sink_token, identity_sae())


def test_an_sae_keeps_its_place_and_gradients(model_with_a_sink_token: LlamaForCausalLM) -> None:
    sae = identity_sae().requires_grad_(True)

    with torch.inference_mode():
        result = measured(model_with_a_sink_token, sae, uniformity_positions=2)

    assert 0 < (result.uniformity or 0) <= 1
    assert all(p.requires_grad and p.grad is None for p in sae.parameters())
