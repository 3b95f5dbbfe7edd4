"""The SAELens dialect: every architecture against its equations; old configs; what is refused; what is written."""

import numpy as np
import pytest
import torch
from formats.equations import (
    D_IN,
    D_OUT,
    D_SAE,
    as_tensors,
    assert_agrees,
    decode,
    gated,
    inputs,
    jumprelu,
    standard,
    topk,
    weights,
)

from sae_hooks.errors import SaeFormatError, SaeMismatchError, SaeWarning
from sae_hooks.formats import saelens
from sae_hooks.formats.entry import Entry
from sae_hooks.formats.hook_names import to_lens

ENTRY = Entry(dialect="saelens", weights="sae_weights.safetensors", config="cfg.json")
SITE = "model.layers.3.output"


def config(architecture, *, d_out=D_IN, metadata=None, **more):
    cfg = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "device": "cpu", "apply_b_dec_to_input": False,
           "normalize_activations": "none", "reshape_activations": "none", "architecture": architecture, **more}
    facts = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", "hf_hook_name": SITE}
    if "transcoder" in architecture:
        cfg["d_out"] = d_out
        facts["hf_hook_name_out"] = "model.layers.3.mlp.output"
    return cfg | {"metadata": facts | (metadata or {})}


def build(w, cfg):
    return saelens.build(ENTRY, as_tensors(w), cfg)


PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.mark.parametrize("subtract", [False, True], ids=["", "b_dec subtracted from the input"])
def test_a_standard_sae_is_a_relu_on_one_linear_map(subtract):
    w, x = weights(*PLAIN), inputs()
    sae = build(w, config("standard", apply_b_dec_to_input=subtract))
    acts = standard(w, x - w["b_dec"] * subtract)
    assert_agrees(sae, x, acts, decode(w, acts))


@pytest.mark.parametrize("subtract", [False, True], ids=["", "b_dec subtracted from the input"])
def test_a_jumprelu_sae_keeps_what_is_above_its_threshold(subtract):
    w, x = weights(*PLAIN, "threshold"), inputs()
    sae = build(w, config("jumprelu", apply_b_dec_to_input=subtract))
    acts = jumprelu(w, x - w["b_dec"] * subtract)
    assert 0 < np.count_nonzero(acts) < 0.9 * np.count_nonzero(standard(w, x - w["b_dec"] * subtract))
    assert_agrees(sae, x, acts, decode(w, acts))


def test_an_old_log_threshold_is_exponentiated():
    w, x = weights(*PLAIN, "threshold"), inputs()
    acts = jumprelu(w, x)
    w["log_threshold"] = np.log(w.pop("threshold"))
    assert_agrees(build(w, config("jumprelu")), x, acts, decode(w, acts))


@pytest.mark.parametrize("subtract", [False, True], ids=["", "b_dec subtracted from the input"])
def test_a_gated_sae_becomes_a_threshold(subtract):
    w, x = weights("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"), inputs()
    sae = build(w, config("gated", apply_b_dec_to_input=subtract))
    centred = x - w["b_dec"] * subtract
    acts = gated(w, centred)
    magnitude_only = relu_count(centred @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])
    assert 0 < np.count_nonzero(acts) < magnitude_only  # the gate takes something away
    assert_agrees(sae, x, acts, decode(w, acts))


def relu_count(pre):
    return np.count_nonzero(pre > 0)


@pytest.mark.parametrize("subtract", [False, True], ids=["", "b_dec subtracted from the input"])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "rescaled by decoder norms"])
def test_a_topk_sae_keeps_the_k_largest(subtract, rescale):
    w, x = weights(*PLAIN), inputs()
    w["W_dec"] *= np.linspace(0.3, 3, D_SAE)[:, None]
    sae = build(w, config("topk", k=4, apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale))
    norms = np.linalg.norm(w["W_dec"], axis=1) if rescale else np.ones(D_SAE)
    scaled = w | {"W_enc": w["W_enc"] * norms, "b_enc": w["b_enc"] * norms, "W_dec": w["W_dec"] / norms[:, None]}
    acts = topk(scaled, x - w["b_dec"] * subtract, 4)
    assert np.count_nonzero(acts, axis=1).max() == 4
    assert_agrees(sae, x, acts, decode(scaled, acts))


@pytest.mark.parametrize("gate", ["transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize("d_out", [D_OUT, D_IN], ids=["other width", "same width"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_a_transcoder_writes_what_it_predicts_and_its_skip_multiplies_from_the_left(gate, d_out, skip):
    names = (*PLAIN, *(["threshold"] if "jumprelu" in gate else []), *(["W_skip"] if skip else []))
    w, x = weights(*names, d_out=d_out), inputs()
    sae = build(w, config(gate.replace("transcoder", "skip_transcoder") if skip else gate, d_out=d_out))
    acts = jumprelu(w, x) if "jumprelu" in gate else standard(w, x)
    x_hat = decode(w, acts) + ((w["W_skip"] @ x.T).T if skip else 0)  # SAELens: W_skip (d_out, d_in), W_skip x
    assert_agrees(sae, x, acts, x_hat)
    assert (sae.site, sae.site_out) == (SITE, "model.layers.3.mlp.output")


def test_scaling_factors_of_fine_tuned_saes_scale_the_decoder_only():
    w, x = weights(*PLAIN), inputs()
    scale = np.linspace(0.5, 2, D_SAE)
    sae = build(w | {"scaling_factor": scale}, config("standard", finetuning_scaling_factor=True))
    acts = standard(w, x)
    assert_agrees(sae, x, acts, decode(w, acts * scale))


def test_scaling_factors_of_ones_do_nothing_and_others_need_the_config_to_say_so():
    w = weights(*PLAIN)
    build(w | {"scaling_factor": np.ones(D_SAE)}, config("standard"))
    with pytest.raises(SaeFormatError, match="finetuning_scaling_factor is not true"):
        build(w | {"scaling_factor": np.full(D_SAE, 2.0)}, config("standard"))


OLD = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3,
       "model_name": "gpt2-small", "dtype": "torch.float32", "hook_point_head_index": None}


def test_an_old_flat_config_subtracts_b_dec_and_reads_its_old_keys():
    w, x = weights(*PLAIN), inputs()
    sae = build(w, OLD)
    acts = standard(w, x - w["b_dec"])
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.site == "transformer.h.3.input"
    assert sae.metadata["model_name"] == "gpt2-small"


def test_an_old_flat_config_of_a_topk_sae_names_it_as_an_activation_function():
    w, x = weights(*PLAIN), inputs()
    sae = build(w, OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}})
    acts = topk(w, x - w["b_dec"], 3)
    assert_agrees(sae, x, acts, decode(w, acts))


@pytest.mark.parametrize(("flaw", "tells"), [
    ({"architecture": "temporal"}, "architecture is 'temporal'; sae_hooks reads standard"),
    ({"normalize_activations": "layer_norm"}, "'layer_norm', which cannot be folded into the weights: it normalises"),
    ({"normalize_activations": "constant_norm_rescale"}, "it rescales each token"),
    ({"normalize_activations": "expected_average_only_in"}, "its factor is not in the file"),
    ({"normalize_activations": "new_idea"}, "'new_idea', which cannot be folded"),
    ({"hook_head_index": 2}, "hook_head_index is 2"),
    ({"d_in": True}, "d_in must be a whole number from 1 to 65536, got True"),
    ({"d_sae": 40.0}, "d_sae must be a whole number"),
    ({"d_sae": 2**25}, "d_sae must be a whole number"),
    ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input must be true or false, got 1"),
    ({"architecture": 3}, "architecture must be a string, got 3"),
    ({"metadata": []}, "metadata must be an object"),
    ({"metadata": {"sae_lens_version": "6", "l0": "many"}}, "l0 must be a number, got 'many'"),
    ({"metadata": {"typical_norm": [1]}}, "typical_norm must be a number, got [1]"),
    ({"metadata": {"typical_norm": -5}}, "typical_norm must be a norm above 0, got -5.0"),
    ({"architecture": "topk"}, "but k is missing"),
    ({"architecture": "topk", "k": True}, "k must be a whole number"),
    ({"architecture": "topk", "k": 41}, "k must be between 1 and 40"),
    ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "which a transcoder cannot have"),
], ids=lambda value: str(value)[:50])
def test_a_config_that_cannot_be_right_is_refused_by_key(flaw, tells):
    with pytest.raises((SaeFormatError, SaeMismatchError)) as caught:
        build(weights(*PLAIN), config("standard") | flaw)
    assert tells in str(caught.value)


def test_an_old_config_with_another_activation_function_is_refused():
    with pytest.raises(SaeFormatError, match="activation_fn is 'tanh-relu'; sae_hooks reads relu and topk"):
        build(weights(*PLAIN), OLD | {"activation_fn_str": "tanh-relu"})


def test_an_old_config_that_normalises_is_refused():
    with pytest.raises(SaeFormatError, match="expected_average_only_in"):
        build(weights(*PLAIN), OLD | {"normalize_activations": True})


def test_every_missing_tensor_and_what_there_is_are_named():
    with pytest.raises(SaeFormatError, match=r"no W_dec; no threshold \(tensors: W_enc \(6, 40\)"):
        build({k: v for k, v in weights(*PLAIN).items() if k != "W_dec"}, config("jumprelu"))
    with pytest.raises(SaeFormatError, match=r"no W_enc; .*\(tensors: none\)"):
        build({}, config("standard"))


def test_every_tensor_of_a_wrong_shape_is_named_at_once():
    w = weights(*PLAIN)
    w["b_dec"], w["b_enc"] = w["b_dec"][:-1], w["b_enc"][:-2]
    with pytest.raises(SaeMismatchError) as caught:
        build(w, config("standard"))
    assert "b_dec is (5,), expected (6,)" in str(caught.value)
    assert "b_enc is (38,), expected (40,)" in str(caught.value)


def test_a_config_of_another_width_is_a_mismatch():
    with pytest.raises(SaeMismatchError, match=r"W_enc is \(6, 40\), expected \(7, 40\)"):
        build(weights(*PLAIN), config("standard") | {"d_in": 7})


def test_plain_transposes_are_turned():
    w, x = weights(*PLAIN), inputs()
    turned = w | {"W_enc": w["W_enc"].T.copy(), "W_dec": w["W_dec"].T.copy()}
    acts = standard(w, x)
    assert_agrees(build(turned, config("standard")), x, acts, decode(w, acts))


def test_tensors_of_another_architecture_are_refused():
    with pytest.raises(SaeFormatError, match="standard has no tensors threshold"):
        build(weights(*PLAIN, "threshold"), config("standard"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64], ids=str)
def test_quantised_weights_are_refused_by_name(dtype):
    tensors = as_tensors(weights(*PLAIN))
    tensors["W_dec"] = tensors["W_dec"].to(dtype)
    with pytest.raises(SaeFormatError, match=f"W_dec is {str(dtype).removeprefix('torch.')}; an SAE has float16"):
        saelens.build(ENTRY, tensors, config("standard"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matrices_keep_their_dtype_and_decide_in_float32(dtype):
    sae = saelens.build(ENTRY, as_tensors(weights(*PLAIN, "threshold"), dtype), config("jumprelu"))
    assert sae.W_enc.dtype == sae.W_dec.dtype == dtype
    assert sae.threshold.dtype == sae.b_enc.dtype == torch.float32


def test_negative_thresholds_warn_and_act_as_zero():
    w, x = weights(*PLAIN, "threshold"), inputs()
    w["threshold"][:7] *= -1
    with pytest.warns(SaeWarning, match="7 of 40 thresholds are negative and act as 0"):
        sae = build(w, config("jumprelu"))
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))


def test_a_nan_threshold_is_not_taken_for_a_gate():
    w = weights(*PLAIN, "threshold")
    w["threshold"][5] = np.nan
    with pytest.raises(SaeMismatchError, match="feature 5 has nan"):
        build(w, config("jumprelu"))


def test_a_model_with_centred_weights_is_warned_about():
    with pytest.warns(SaeWarning, match="center_writing_weights"):
        build(weights(*PLAIN), config("standard", metadata={"model_from_pretrained_kwargs":
                                                            {"center_writing_weights": True}}))


# --- sites ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("metadata", "site"), [
    ({"hf_hook_name": "model.layers.7.output", "hook_name": "blocks.9.hook_mlp_in"}, "model.layers.7.output"),
    ({"hf_hook_name": "model.layers.7"}, "model.layers.7.output"),
    ({"hook_name": "blocks.7.hook_resid_post"}, "model.layers.7.output"),
    ({"hook_name": "blocks.7.hook_resid_pre", "model_name": "gpt2-small"}, "transformer.h.7.input"),
    ({"hook_name": "blocks.7.hook_mlp_out", "model_name": "gemma-2-2b"},
     "model.layers.7.post_feedforward_layernorm.output"),
    ({"hook_name": "blocks.7.hook_mlp_out", "model_name": "meta-llama/Llama-3.1-8B"}, "model.layers.7.mlp.output"),
    ({"hook_name": "blocks.7.attn.hook_z", "model_name": "google/gemma-2-9b"}, "model.layers.7.self_attn.o_proj.input"),
    ({"hook_name": "blocks.7.ln2.hook_normalized", "model_name": "gemma-2-2b"},
     "model.layers.7.pre_feedforward_layernorm.normalized"),
    ({"hook_name": "blocks.7.attn.hook_z", "model_name": "pythia-70m"}, "gpt_neox.layers.7.attention.dense.input"),
    ({"hook_name": "model.layers.7.mlp"}, "model.layers.7.mlp.output"),
    ({"hook_name": "hook_embed", "model_name": "gemma-2-2b"}, "model.embed_tokens.output"),
    ({"hook_name": "blocks.7.hook_attn_out", "model_name": "google/gemma-2b-it"},  # a Gemma 1
     "model.layers.7.self_attn.o_proj.output"),
    ({"hook_name": "blocks.7.hook_attn_out", "model_name": "google/gemma-1.1-7b-it"},
     "model.layers.7.self_attn.o_proj.output"),
    *[({"hook_name": "blocks.7.hook_attn_out", "model_name": name}, "model.layers.7.post_attention_layernorm.output")
      for name in ("gemma-2-2b", "google/gemma-3-4b-it", "gemma2", "tiny-gemma2", "models/gemma-3")],
    *[({"hook_name": "blocks.7.hook_mlp_out", "model_name": name}, None)
      for name in ("google/medgemma-4b-it", "gemma-3n-E4B", "gemma", "google/shieldgemma-2b", "gemma-2bit")],
    ({"hook_name": "blocks.7.hook_mlp_out"}, None),  # depends on the model, which is not named
    ({"hook_name": "blocks.7.hook_mlp_in", "model_name": "gemma-2-2b"}, None),
    ({"hook_name": "blocks.7.hook_mlp_out", "model_name": "someone/new-model"}, None),
    ({"hf_hook_name": "model.__class__.output"}, None),
    ({"hf_hook_name": "../../etc/passwd.output"}, None),
    ({}, None),
], ids=str)
def test_the_site_is_told_where_it_is_certain(metadata, site):
    cfg = config("standard") | {"metadata": {"sae_lens_version": "6.0.0"} | metadata}
    assert saelens.refine(ENTRY, cfg).site == site


@pytest.mark.parametrize(("metadata", "told"), [
    ({"hook_name": "blocks.7.hook_mlp_out"}, ("blocks.7.hook_mlp_out", "mlp_out", 7)),
    ({"hook_name": "blocks.7.attn.hook_z"}, ("blocks.7.attn.hook_z", "attn_out", 7)),
    ({"hook_name": "blocks.7.hook_mlp_in"}, ("blocks.7.hook_mlp_in", None, 7)),
    ({"hook_name": "blocks.7.hook_resid_post"}, (None, "resid_post", 7)),
    ({"hf_hook_name": "model.__class__.output"}, ("model.__class__.output", None, None)),
    ({}, (None, None, 5)),
], ids=str)
def test_a_hook_that_tells_no_site_is_kept_with_its_layer_and_kind(metadata, told):
    cfg = config("standard") | {"metadata": {"sae_lens_version": "6.0.0"} | metadata}
    entry = saelens.refine(Entry(dialect="saelens", weights="layers.5/w", layer=5), cfg)
    assert (entry.hook, entry.kind, entry.layer) == told


def test_a_transcoder_that_does_not_say_where_it_writes_is_refused():
    cfg = config("transcoder")
    del cfg["metadata"]["hf_hook_name_out"]
    with pytest.raises(SaeFormatError, match="does not tell which site it writes"):
        build(weights(*PLAIN), cfg)


def test_a_folder_renamed_to_another_site_is_refused():
    entry = Entry(dialect="saelens", weights="", site="model.layers.5.output")
    with pytest.raises(SaeFormatError, match=r"means model\.layers\.5\..*cfg.json says model\.layers\.3\."):
        saelens.refine(entry, config("standard"))


def test_entries_are_folders_with_both_files_and_sites_come_from_their_names():
    files = {"cfg.json": 1, "sae_weights.safetensors": 1, "model.layers.4.mlp.output/cfg.json": 1,
             "model.layers.4.mlp.output/sae_weights.safetensors": 1, "half/sae_weights.safetensors": 1,
             "blocks.8.hook_resid_pre/cfg.json": 1, "blocks.8.hook_resid_pre/sae_weights.safetensors": 1}
    found = {entry.weights: (entry.site, entry.kind, entry.layer) for entry in saelens.entries(files, "o/r")}
    assert found == {
        "sae_weights.safetensors": (None, None, None),
        "model.layers.4.mlp.output/sae_weights.safetensors": ("model.layers.4.mlp.output", "mlp_out", 4),
        "blocks.8.hook_resid_pre/sae_weights.safetensors": (None, None, 8)}


@pytest.mark.parametrize(("site", "model", "hook"), [
    ("model.layers.7.output", None, "blocks.7.hook_resid_post"),
    ("model.language_model.layers.7.output", None, "blocks.7.hook_resid_post"),
    ("transformer.h.7.input", "gpt2", "blocks.7.hook_resid_pre"),
    ("model.layers.7.self_attn.o_proj.input", None, "blocks.7.attn.hook_z"),
    ("model.layers.7.post_feedforward_layernorm.output", "google/gemma-2-2b", "blocks.7.hook_mlp_out"),
    ("model.layers.7.mlp.output", "meta-llama/Llama-3.1-8B", "blocks.7.hook_mlp_out"),
    ("model.layers.7.mlp.output", "google/gemma-2-2b", "model.layers.7.mlp.output"),  # hook_mlp_out is the norm there
    ("model.layers.7.mlp.output", None, "model.layers.7.mlp.output"),
    ("", None, ""),
], ids=str)
def test_a_hook_name_is_written_where_it_cannot_mean_another_place(site, model, hook):
    assert to_lens(site, model) == hook


# --- writing --------------------------------------------------------------------------------------

SAES = {
    "jumprelu": (config("jumprelu"), (*PLAIN, "threshold"), D_IN),
    "standard": (config("standard"), PLAIN, D_IN),
    "gated": (config("gated"), ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"), D_IN),
    "topk": (config("topk", k=5), PLAIN, D_IN),
    "jumprelu_transcoder": (config("jumprelu_transcoder", d_out=D_OUT), (*PLAIN, "threshold"), D_OUT),
    "jumprelu_skip_transcoder": (
        config("jumprelu_skip_transcoder", d_out=D_OUT), (*PLAIN, "threshold", "W_skip"), D_OUT),
}
WRITTEN = {"standard": "jumprelu", "gated": "jumprelu"}


@pytest.mark.parametrize("architecture", SAES)
def test_what_is_written_is_read_back_bit_for_bit(architecture):
    cfg, names, d_out = SAES[architecture]
    sae = build(weights(*names, d_out=d_out), cfg | {"metadata": cfg["metadata"] | {"l0": 12.5, "typical_norm": 3.0}})
    tensors, written = saelens.dump(sae)
    assert written["architecture"] == WRITTEN.get(architecture, architecture)
    again = saelens.build(ENTRY, tensors, written)
    assert {name: p.dtype for name, p in again.named_parameters()} == {n: p.dtype for n, p in sae.named_parameters()}
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
    assert (again.site, again.site_out, again.k, again.metadata) == (sae.site, sae.site_out, sae.k, sae.metadata)
    assert again.metadata["typical_norm"] == 3.0


def test_the_config_that_is_written_has_saelens_keys_and_our_facts_under_metadata(random_sae):
    sae = random_sae(8, 16, "model.layers.2.self_attn.o_proj.input")
    sae.metadata["typical_norm"] = 3.5
    tensors, cfg = saelens.dump(sae)
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert all(t.is_contiguous() for t in tensors.values())
    assert tensors["W_enc"].shape == (8, 16)
    assert {k: cfg[k] for k in ("d_in", "d_sae", "architecture", "apply_b_dec_to_input", "reshape_activations")} == {
        "d_in": 8, "d_sae": 16, "architecture": "jumprelu", "apply_b_dec_to_input": False,
        "reshape_activations": "hook_z"}
    assert cfg["metadata"] | {"hook_name": "blocks.2.attn.hook_z", "typical_norm": 3.5} == cfg["metadata"]
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6  # older: SAELens would subtract b_dec


def test_a_topk_transcoder_is_written_with_a_warning_and_read_back():
    sae = build(weights(*PLAIN), config("topk_transcoder", k=3))
    with pytest.warns(SaeWarning, match="SAELens has no topk_transcoder"):
        tensors, cfg = saelens.dump(sae)
    again = saelens.build(ENTRY, tensors, cfg)
    assert again.k == 3
    assert again.site_out == "model.layers.3.mlp.output"
