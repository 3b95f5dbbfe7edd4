"""The harvest: which tokens come, in which order, from which side of a site, and from how deep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from sae_hooks.errors import DataError, SiteError
from sae_hooks.training.harvest import harvest, measure_sites, padded_batches, site_activations
from sae_hooks.training.text import context_windows

from .conftest import BOS, SINK

SITE = "model.layers.1.output"
THREE_SIDES = ["model.layers.2.self_attn.o_proj.input", "model.layers.1.pre_feedforward_layernorm.normalized",
               "model.layers.1.output"]
WINDOWS = [np.array(ids, dtype=np.int32)
           for ids in ([BOS, 9, SINK, 10, 11], [12, 13], [14, 15, 16, BOS], [17, 18, 19])]
ORDINARY = [[9, 10, 11], [14, 15, 16], [17, 18, 19], [12, 13]]  # longest window first


def expected_rows(model: LlamaForCausalLM) -> torch.Tensor:
    """Row by row: each window alone, hidden states by name, unwanted positions picked out by hand."""
    rows = []
    for window, kept in zip((0, 2, 3, 1), ORDINARY, strict=True):
        ids = torch.tensor(WINDOWS[window][None].astype(np.int64))
        hidden = model(ids, output_hidden_states=True).hidden_states[2][0]
        rows += [hidden[i] for i, token in enumerate(ids[0].tolist()) if token in kept]
    return torch.stack(rows)


def test_ordinary_tokens_come_in_order_without_specials_padding_and_sinks(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    model = model_with_a_sink_token
    info = measure_sites(model, [SITE], WINDOWS, [0, BOS])[SITE]

    found = harvest(model, {SITE: info.typical_norm}, WINDOWS, special_ids=[0, BOS])[SITE]

    assert info.d_in == 16
    assert found.shape == (11, 16)
    torch.testing.assert_close(found.float(), expected_rows(model), rtol=1e-2, atol=1e-2)


def test_typical_norm_is_the_median_and_rms_norm_leaves_sinks_out(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    info = measure_sites(model_with_a_sink_token, [SITE], WINDOWS, [0, BOS])[SITE]

    norms = expected_rows(model_with_a_sink_token).norm(dim=1)
    assert norms.min() <= info.typical_norm <= norms.max()
    assert info.rms_norm == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-5)


def test_the_model_runs_only_as_deep_as_the_deepest_site(model_with_a_sink_token: LlamaForCausalLM) -> None:
    model, ran = model_with_a_sink_token, []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
    ids = torch.tensor([[9, 10]])

    found = site_activations(model, ["model.layers.0.output", SITE], ids, torch.ones_like(ids))

    assert list(found) == ["model.layers.0.output", SITE]
    assert ran == [0, 1]
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_several_sites_match_the_hidden_states(model_with_a_sink_token: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9, 10, 11]])
    hidden = model_with_a_sink_token(ids, output_hidden_states=True).hidden_states

    sites = ["model.layers.0.output", SITE]
    found = site_activations(model_with_a_sink_token, sites, ids, torch.ones_like(ids))

    assert torch.equal(found["model.layers.0.output"], hidden[1])
    assert torch.equal(found[SITE], hidden[2])


def test_an_unknown_site_is_named_and_leaves_no_hook(model_with_a_sink_token: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9]])

    with pytest.raises(SiteError, match="layers"):
        site_activations(model_with_a_sink_token, [SITE, "model.layers.9.output"], ids, ids)
    assert not any(layer._forward_hooks for layer in model_with_a_sink_token.model.layers)


def test_windows_hold_one_document_each_and_every_token_of_it() -> None:
    documents = [list(range(0, 10)), list(range(20, 24)), [30]]

    windows = context_windows(documents, 4, seed=0)

    cut = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [20, 21, 22, 23]]
    assert sorted(w.tolist() for w in windows) == cut
    assert [w.tolist() for w in windows] == [w.tolist() for w in context_windows(documents, 4, seed=0)]


def test_batches_keep_to_their_size_and_pad_little() -> None:
    windows = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 8, 8, 2, 8)]

    batches = list(padded_batches(windows, tokens=16))

    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 8), (2, 8), (1, 2)]
    assert [mask.sum(1).tolist() for _, mask in batches] == [[8, 8], [8, 3], [2]]


# --- several sites, several sides -----------------------------------------------------------------


def test_every_side_of_a_site_is_what_the_module_takes_or_gives(tiny_gemma2: Gemma2ForCausalLM) -> None:
    ids = torch.arange(10, 22).reshape(2, 6)
    layer, norm, seen = tiny_gemma2.model.layers[2], tiny_gemma2.model.layers[1].pre_feedforward_layernorm, {}
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.update(into_o_proj=args[0])),
             norm.register_forward_hook(lambda module, args, output: seen.update(normed=output))]
    hidden = tiny_gemma2(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()

    found = site_activations(tiny_gemma2, THREE_SIDES, ids, torch.ones_like(ids))

    assert list(found) == THREE_SIDES
    assert torch.equal(found[THREE_SIDES[0]], seen["into_o_proj"])
    torch.testing.assert_close(found[THREE_SIDES[1]] * (1 + norm.weight), seen["normed"])
    assert torch.equal(found[THREE_SIDES[2]], hidden[2])


def test_a_sink_of_one_site_is_dropped_at_all_sites(model_with_a_sink_token: LlamaForCausalLM) -> None:
    normed = "model.layers.1.post_attention_layernorm.normalized"  # no sinks here: all norms are sqrt(16)

    both = measure_sites(model_with_a_sink_token, [normed, SITE], WINDOWS, [0, BOS])
    alone = harvest(model_with_a_sink_token, {normed: 4.0}, WINDOWS, [0, BOS])
    found = harvest(model_with_a_sink_token, {s: i.typical_norm for s, i in both.items()}, WINDOWS, [0, BOS])

    assert len(alone[normed]) == 12
    assert len(found[normed]) == len(found[SITE]) == 11
    torch.testing.assert_close(found[SITE].float(), expected_rows(model_with_a_sink_token), rtol=1e-2, atol=1e-2)


def test_norms_of_several_sites_come_from_one_pass_over_the_windows(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    passes: list[int] = []
    model_with_a_sink_token.register_forward_pre_hook(lambda module, args: passes.append(1))

    found = measure_sites(model_with_a_sink_token, ["model.layers.0.output", SITE], WINDOWS, [0, BOS])

    assert len(passes) == 1
    assert found[SITE] == measure_sites(model_with_a_sink_token, [SITE], WINDOWS, [0, BOS])[SITE]


def test_an_activation_that_is_changed_in_place_afterwards_is_what_the_module_gave(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9, 10, 11]])
    plain = model_with_a_sink_token(ids, output_hidden_states=True).hidden_states[1].clone()
    second = model_with_a_sink_token.model.layers[1]
    second.register_forward_pre_hook(lambda module, args: (args[0].mul_(2), *args[1:]))

    found = site_activations(model_with_a_sink_token, ["model.layers.0.output", SITE], ids, torch.ones_like(ids))

    assert torch.equal(found["model.layers.0.output"], plain)


def test_a_model_in_train_mode_gives_what_it_gives_at_inference_and_stays_in_it(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    model = model_with_a_sink_token
    model.model.embed_tokens.register_forward_hook(lambda module, args, x: torch.dropout(x, 0.5, module.training))
    info = measure_sites(model, [SITE], WINDOWS, [0, BOS])
    expected = harvest(model, {SITE: 1e9}, WINDOWS, [0, BOS])[SITE]
    model.train()
    model.model.layers[1].eval()

    assert measure_sites(model, [SITE], WINDOWS, [0, BOS]) == info
    assert torch.equal(harvest(model, {SITE: 1e9}, WINDOWS, [0, BOS])[SITE], expected)
    assert {name for name, module in model.named_modules() if not module.training} == {
        name for name, _ in model.named_modules() if name.startswith("model.layers.1")}


# --- what cannot be trained on --------------------------------------------------------------------


def test_a_vocabulary_of_special_tokens_alone_is_refused(model_with_a_sink_token: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match=r"all 14 tokens of 4 windows are special ones \(special_ids has 40\)"):
        measure_sites(model_with_a_sink_token, [SITE], WINDOWS, range(40))


def test_activations_that_are_not_finite_are_refused(model_with_a_sink_token: LlamaForCausalLM) -> None:
    model_with_a_sink_token.model.embed_tokens.weight[11] = float("nan")

    with pytest.raises(DataError, match=f"{SITE} gave activations that are not finite"):
        measure_sites(model_with_a_sink_token, [SITE], WINDOWS, [0, BOS])
    with pytest.raises(DataError, match=f"{SITE} gave activations that are not finite"):
        harvest(model_with_a_sink_token, {SITE: 4.0}, WINDOWS, [0, BOS])


# --- models that lie on several devices, or are compiled ------------------------------------------


def test_a_model_that_accelerate_off_loaded_gives_the_same_and_stays_off_loaded(
        random_model: Any, tmp_path: Path) -> None:
    ids = torch.arange(5, 17).reshape(2, 6)
    expected = site_activations(random_model("Gemma2"), THREE_SIDES, ids, torch.ones_like(ids))
    model = accelerate.disk_offload(random_model("Gemma2"), str(tmp_path), execution_device=torch.device("cpu"))
    before = {name: p.device.type for name, p in model.named_parameters()}

    found = site_activations(model, THREE_SIDES, ids, torch.ones_like(ids))

    assert "meta" in before.values()
    assert all(torch.equal(found[site], expected[site]) for site in THREE_SIDES)
    assert {name: p.device.type for name, p in model.named_parameters()} == before


def test_a_model_spread_over_devices_gives_the_same_rows(random_model: Any, fake_gpus: Any) -> None:
    windows = [np.arange(5, 11, dtype=np.int32), np.arange(20, 24, dtype=np.int32)]
    typical = {site: info.typical_norm
               for site, info in measure_sites(random_model("Gemma2"), THREE_SIDES, windows, [0, 2]).items()}
    expected = harvest(random_model("Gemma2"), typical, windows, [0, 2, 20])
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.rotary_emb", "model.norm"), "fgpu:0")
    places |= {f"model.layers.{i}": f"fgpu:{i}" for i in range(3)}
    model = random_model("Gemma2")
    skipped = model._skip_keys_device_placement
    model = accelerate.dispatch_model(model, places, main_device="fgpu:0", skip_keys=skipped)
    ids = torch.arange(5, 11)[None]
    found = site_activations(model, THREE_SIDES, ids, torch.ones_like(ids))
    where = [str(x.device) for x in found.values()]

    found = harvest(model, typical, windows, [0, 2, 20])

    assert where == ["fgpu:2", "fgpu:1", "fgpu:1"]
    assert all(torch.equal(found[site], expected[site]) for site in THREE_SIDES)


def test_a_compiled_model_gives_the_same_and_stops_as_early(model_with_a_sink_token: LlamaForCausalLM) -> None:
    ids, ran = torch.tensor([[9, 10, 11]]), []
    expected = site_activations(model_with_a_sink_token, [SITE], ids, torch.ones_like(ids))
    model = torch.compile(model_with_a_sink_token, backend="eager")
    model(ids)
    model_with_a_sink_token.model.layers[2].register_forward_pre_hook(lambda module, args: ran.append(2))

    found = site_activations(model, [SITE], ids, torch.ones_like(ids))

    assert torch.equal(found[SITE], expected[SITE])
    assert ran == []


def test_an_expert_that_gets_all_tokens_in_one_row_gives_each_its_own() -> None:
    site, (ids, mask) = "model.layers.1.mlp.shared_expert.output", next(iter(padded_batches(WINDOWS)))
    sizes = {"hidden_size": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=40, num_hidden_layers=2, **heads, **sizes))
    given: list[torch.Tensor] = []
    hook = model.model.layers[1].mlp.shared_expert.register_forward_hook(lambda m, args, out: given.append(out))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    hook.remove()

    found = harvest(model.eval(), {site: 1e9}, WINDOWS, special_ids=[0, BOS])[site]

    assert given[0].shape == (ids.numel(), 16)
    rows = [row for row, token in zip(given[0], ids.flatten(), strict=True) if token not in (0, BOS)]
    torch.testing.assert_close(found, torch.stack(rows).bfloat16())


def test_a_layer_that_gives_several_streams_is_refused_where_a_training_would_mix_them() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(
        vocab_size=40, vocab_size_per_layer_input=40, num_hidden_layers=2, num_kv_shared_layers=0,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0], **sizes)).eval()
    with pytest.raises(SiteError, match=r"gives activations \(4, 4, 5, 16\) for tokens \(4, 5\).*inside the layer"):
        measure_sites(model, ["model.layers.0.output"], WINDOWS, [0, BOS])
    inside = "model.layers.0.mlp.output"
    assert measure_sites(model, [inside], WINDOWS, [0, BOS])[inside].d_in == 16


def test_a_layer_that_runs_again_before_all_sites_were_met_is_refused(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    model = model_with_a_sink_token
    model.model.layers[2] = model.model.layers[1]  # shared, as ALBERT's are
    with pytest.raises(SiteError, match=r"runs model\.layers\.1\.output more than once"):
        measure_sites(model, [SITE, "model.norm.output"], WINDOWS, [0, BOS])


def test_a_decoder_beside_an_encoder_is_refused_and_the_encoder_harvested() -> None:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
                                                    encoder_ffn_dim=16, decoder_ffn_dim=16, **heads)).eval()
    with pytest.raises(SiteError, match=r"input_ids alone.*; model\.decoder\.layers\.0\.output reads a text"):
        measure_sites(model, ["model.decoder.layers.0.output"], WINDOWS, [0, BOS])
    inside = "model.encoder.layers.0.output"
    assert harvest(model, {inside: 1e9}, WINDOWS, special_ids=[0, BOS])[inside].shape == (12, 16)
