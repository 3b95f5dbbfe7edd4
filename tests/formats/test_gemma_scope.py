"""Gemma Scope (Gemma 2) and Gemma Scope 2 (Gemma 3): what names tell, what sizes prove, and the equations."""

import numpy as np
import pytest
import torch
from formats.equations import as_tensors, assert_agrees, decode, inputs, jumprelu, weights

from sae_hooks.errors import SaeFormatError, SaeMismatchError
from sae_hooks.formats import gemma_scope, gemma_scope_2
from sae_hooks.formats.entry import d_in_from_size, width_from_label

ALL = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
RES = "google/gemma-scope-2b-pt-res"


def one(repo, path="layer_20/width_16k/average_l0_71/params.npz", size=0):
    [entry] = gemma_scope.entries({path: size}, repo)
    return entry


# --- Gemma Scope ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("repo", "kind", "read", "write", "model"), [
    ("google/gemma-scope-2b-pt-res", "resid_post", "output", "output", "google/gemma-2-2b"),
    ("google/gemma-scope-9b-it-res", "resid_post", "output", "output", "google/gemma-2-9b-it"),
    ("google/gemma-scope-27b-pt-res", "resid_post", "output", "output", "google/gemma-2-27b"),
    ("google/gemma-scope-9b-pt-mlp", "mlp_out", "post_feedforward_layernorm.output",
     "post_feedforward_layernorm.output", "google/gemma-2-9b"),
    ("google/gemma-scope-9b-pt-att", "attn_out", "self_attn.o_proj.input", "self_attn.o_proj.input",
     "google/gemma-2-9b"),
    ("google/gemma-scope-2b-pt-transcoders", "transcoder", "pre_feedforward_layernorm.normalized",
     "post_feedforward_layernorm.output", "google/gemma-2-2b"),
])
def test_the_repository_name_tells_site_and_model(repo, kind, read, write, model):
    entry = one(repo)
    assert (entry.kind, entry.layer, entry.width, entry.l0) == (kind, 20, 16384, 71.0)
    assert (entry.site, entry.site_out) == (f"model.layers.20.{read}", f"model.layers.20.{write}")
    assert entry.model_name == model


@pytest.mark.parametrize("repo", [
    "/data/gemma-scope-2b-pt-res", "C:/x/gemma-scope-2b-pt-res/snapshots/1234",
    "/home/me/.cache/huggingface/hub/models--google--gemma-scope-2b-pt-res/snapshots/abc",
    "/data/gemma-scope-2b-pt-res/layer_20/width_16k"])
def test_a_local_path_tells_it_too(repo):
    path = "layer_20/width_16k/average_l0_71/params.npz" if "layer_20" not in repo else "average_l0_71/params.npz"
    entry = one(repo, path)
    assert (entry.site, entry.width, entry.l0) == ("model.layers.20.output", 16384, 71.0)


def test_an_unknown_repository_tells_layer_and_width_but_no_site():
    entry = one("me/my-saes")
    assert (entry.site, entry.kind, entry.layer, entry.width) == (None, None, 20, 16384)


def test_gemma_scope_2_is_not_taken_for_gemma_scope_of_a_2b_model():
    assert one("google/gemma-scope-2-1b-pt").site is None


def test_the_embedding_has_a_site_and_no_layer():
    entry = one(RES, "embedding/width_4k/average_l0_21/params.npz")
    assert (entry.kind, entry.layer, entry.site, entry.width) == ("embedding", None, "model.embed_tokens.output", 4096)


@pytest.mark.parametrize(("label", "width"), [
    ("4k", 2**12), ("16k", 2**14), ("32k", 2**15), ("65k", 2**16), ("131k", 2**17), ("262k", 2**18), ("524k", 2**19),
    ("1m", 2**20), ("1000", 1000)])
def test_width_labels_are_powers_of_two(label, width):
    assert width_from_label(label) == width


@pytest.mark.parametrize(("d_in", "width"), [(2304, 16384), (3584, 131072), (2048, 16384), (4608, 2**20), (768, 4096)])
@pytest.mark.parametrize("affine", [False, True])
def test_d_in_is_proved_by_size_and_width(d_in, width, affine):
    floats = 2 * d_in * width + 2 * width + d_in + (d_in * d_in if affine else 0)
    for overhead in (0, 400, 1500):
        assert d_in_from_size(4 * floats + overhead, width, affine=affine) == d_in


@pytest.mark.parametrize("size", [0, 5, 4 * (2 * 2304 * 16384 + 2 * 16384 + 2304) // 2, 302_130_176 + 30_000])
def test_a_size_that_no_d_in_explains_proves_nothing(size):
    assert d_in_from_size(size, 16384) is None


@pytest.mark.parametrize(("d_in", "width"), [(2304, 16384), (64, 2048)])
def test_a_file_of_float64_proves_nothing(d_in, width):
    assert d_in_from_size(8 * (2 * d_in * width + 2 * width + d_in) + 1500, width) is None


@pytest.mark.parametrize("label", ["3k", "24k", "3m"])
def test_a_label_near_no_power_of_two_tells_no_width(label):
    with pytest.raises(ValueError, match="near no power of two; give the number"):
        width_from_label(label)
    assert one(RES, f"layer_20/width_{label}/average_l0_71/params.npz").width is None


def test_a_small_width_leaves_d_in_open():
    assert d_in_from_size(4 * (2 * 16 * 64 + 2 * 64 + 16), 64) is None


def test_gemma_scope_agrees_with_its_equation():
    w, x = weights(*ALL), inputs()
    sae = gemma_scope.build(one(RES), as_tensors(w), None)
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.site == sae.site_out == "model.layers.20.output"
    assert sae.metadata == {"model_name": "google/gemma-2-2b", "l0": 71.0}


def test_a_transcoder_reads_the_normalised_input_and_writes_the_output():
    w, x = weights(*ALL), inputs()
    sae = gemma_scope.build(one("google/gemma-scope-2b-pt-transcoders"), as_tensors(w), None)
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.site == "model.layers.20.pre_feedforward_layernorm.normalized"
    assert sae.site_out == "model.layers.20.post_feedforward_layernorm.output"


def test_the_embedding_sae_is_rescaled_to_what_embed_tokens_gives():
    w, rows = weights(*ALL), inputs()
    entry = one(RES, "embedding/width_4k/average_l0_21/params.npz")
    sae = gemma_scope.build(entry, as_tensors(w), None)
    acts, scale = jumprelu(w, rows), np.sqrt(rows.shape[1])  # trained on bare rows
    assert_agrees(sae, rows * scale, acts, decode(w, acts) * scale)


def test_lower_case_names_and_a_scaling_factor_of_ones_are_read():
    w, x = weights(*ALL), inputs()
    lower = {"w" + name[1:] if name.startswith("W") else name: value for name, value in w.items()}
    sae = gemma_scope.build(one(RES), as_tensors(lower | {"scaling_factor": np.ones(40)}), None)
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))
    with pytest.raises(SaeFormatError, match="scaling_factor is not all ones"):
        gemma_scope.build(one(RES), as_tensors(w | {"scaling_factor": np.full(40, 2.0)}), None)


def test_missing_and_misshapen_tensors_are_all_named():
    w = weights(*ALL)
    with pytest.raises(SaeFormatError, match="no W_dec; no threshold"):
        gemma_scope.build(one(RES), as_tensors({k: w[k] for k in ("W_enc", "b_enc", "b_dec")}), None)
    w["threshold"], w["W_dec"] = w["threshold"][:-1], w["W_dec"][:-1]
    with pytest.raises(SaeMismatchError, match=r"W_dec is \(39, 6\), expected \(40, 6\); threshold is \(39,\)"):
        gemma_scope.build(one(RES), as_tensors(w), None)


def test_a_transposed_encoder_is_turned():
    w, x = weights(*ALL), inputs()
    acts = jumprelu(w, x)
    sae = gemma_scope.build(one(RES), as_tensors(w | {"W_enc": w["W_enc"].T.copy()}), None)
    assert_agrees(sae, x, acts, decode(w, acts))


def test_without_a_selector_the_embedding_is_left_out_unless_it_is_all_there_is():
    layer, embedding = one(RES), one(RES, "embedding/width_4k/average_l0_21/params.npz")
    assert gemma_scope.default([layer, embedding]) == [layer]
    assert gemma_scope.default([embedding]) == [embedding]


# --- Gemma Scope 2 --------------------------------------------------------------------------------

TWO = "google/gemma-scope-2-4b-it"


def two(folder, repo=TWO, size=0):
    [entry] = gemma_scope_2.entries({f"{folder}/params.safetensors": size, f"{folder}/config.json": 300,
                                     f"{folder}/examples.safetensors": 9}, repo)
    return entry


@pytest.mark.parametrize(("folder", "kind", "read", "write"), [
    ("resid_post/layer_9_width_16k_l0_medium", "resid_post", "output", "output"),
    ("resid_post_all/layer_9_width_262k_l0_small", "resid_post", "output", "output"),
    ("attn_out/layer_9_width_65k_l0_big", "attn_out", "self_attn.o_proj.input", "self_attn.o_proj.input"),
    ("mlp_out_all/layer_9_width_16k_l0_big", "mlp_out", "post_feedforward_layernorm.output",
     "post_feedforward_layernorm.output"),
    ("transcoder/layer_9_width_1m_l0_small_affine", "transcoder", "pre_feedforward_layernorm.output",
     "post_feedforward_layernorm.output"),
    ("transcoder_all/layer_9_width_16k_l0_big", "transcoder", "pre_feedforward_layernorm.output",
     "post_feedforward_layernorm.output"),
    ("resid_post/layer_9_width_16k_l0_medium_seed_1", "resid_post", "output", "output"),
])
def test_a_folder_of_gemma_scope_2_tells_kind_layer_and_sites(folder, kind, read, write):
    entry = two(folder)
    assert (entry.kind, entry.layer, entry.model_name) == (kind, 9, "google/gemma-3-4b-it")
    assert (entry.site, entry.site_out) == (f"model.layers.9.{read}", f"model.layers.9.{write}")
    assert entry.weights == f"{folder}/params.safetensors"
    assert entry.config == f"{folder}/config.json"


def test_the_270m_base_model_has_no_suffix():
    entry = two("resid_post/layer_5_width_16k_l0_big", "google/gemma-scope-2-270m-pt")
    assert entry.model_name == "google/gemma-3-270m"


def test_a_size_proves_d_in_with_and_without_the_affine_skip():
    floats = 2 * 640 * 16384 + 2 * 16384 + 640
    assert two("transcoder/layer_5_width_16k_l0_big", size=4 * floats + 500).d_in == 640
    assert two("transcoder/layer_5_width_16k_l0_big_affine", size=4 * (floats + 640 * 640) + 600).d_in == 640


def test_multi_layer_folders_are_listed_without_a_site_and_refused():
    files = {"crosscoder/layer_5_9_12_15_width_65k_l0_medium/params_layer_0.safetensors": 1,
             "crosscoder/layer_5_9_12_15_width_65k_l0_medium/params_layer_1.safetensors": 1,
             "clt/width_262k_l0_big_affine/params_layer_0.safetensors": 1}
    found = gemma_scope_2.entries(files, "google/gemma-scope-2-1b-pt")
    assert [(e.kind, e.site, e.width) for e in found] == [("crosscoder", None, 2**16), ("clt", None, 2**18)]
    with pytest.raises(SaeFormatError, match="a crosscoder spans several layers"):
        gemma_scope_2.build(found[0], {}, None)


CONFIG = {"hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output", "width": 40,
          "model_name": "gemma-v3-4b-it", "architecture": "jump_relu", "l0": 52, "affine_connection": False,
          "type": "sae"}
TRANSCODER = CONFIG | {"hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output", "type": "transcoder",
                       "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}


def lower(w):
    renamed = {"W_enc": "w_enc", "W_dec": "w_dec"}
    return as_tensors({renamed.get(name, name): value for name, value in w.items()})


def test_gemma_scope_2_agrees_with_its_equation():
    w, x = weights(*ALL), inputs()
    sae = gemma_scope_2.build(two("resid_post/layer_9_width_16k_l0_medium"), lower(w), CONFIG)
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.metadata == {"model_name": "google/gemma-3-4b-it", "l0": 52.0}


@pytest.mark.parametrize("d_out", [5, 6])
def test_an_affine_skip_multiplies_from_the_right(d_out):
    w, x = weights(*ALL, d_out=d_out), inputs()
    skip = np.random.default_rng(3).standard_normal((6, d_out))
    sae = gemma_scope_2.build(two("transcoder/layer_9_width_16k_l0_big_affine"),
                              lower(w) | {"affine_skip_connection": torch.from_numpy(skip)},
                              TRANSCODER | {"affine_connection": True})
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts) + x @ skip)  # GS2: stored (d_in, d_out), used as x @ A


def test_a_config_and_tensors_that_disagree_about_the_skip_are_refused():
    entry = two("transcoder/layer_9_width_16k_l0_big")
    with pytest.raises(SaeFormatError, match="affine_connection: True, the file has none"):
        gemma_scope_2.build(entry, lower(weights(*ALL)), TRANSCODER | {"affine_connection": True})


def test_a_config_of_another_layer_is_refused():
    with pytest.raises(SaeFormatError, match=r"means model\.layers\.8\..*config.json says model\.layers\.9\."):
        gemma_scope_2.build(two("resid_post/layer_8_width_16k_l0_medium"), lower(weights(*ALL)), CONFIG)


def test_a_multimodal_path_in_the_config_is_the_same_layer():
    config = CONFIG | dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.language_model.layers.9.output")
    sae = gemma_scope_2.build(two("resid_post/layer_9_width_16k_l0_medium"), lower(weights(*ALL)), config)
    assert sae.site == "model.layers.9.output"


def test_an_unknown_architecture_is_refused():
    with pytest.raises(SaeFormatError, match="architecture is 'topk', expected 'jump_relu'"):
        gemma_scope_2.build(two("resid_post/layer_9_width_16k_l0_medium"), lower(weights(*ALL)),
                            CONFIG | {"architecture": "topk"})


def test_a_missing_config_is_inferred_from_the_folder():
    sae = gemma_scope_2.build(two("attn_out/layer_9_width_16k_l0_big"), lower(weights(*ALL)), None)
    assert sae.site == "model.layers.9.self_attn.o_proj.input"
