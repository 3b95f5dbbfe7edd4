"""The sparsify dialect: its equations, what it refuses, what the names of its folders tell."""

import contextlib

import numpy as np
import pytest
import torch
from formats.equations import D_IN, D_OUT, D_SAE, as_tensors, assert_agrees, inputs, weights
from formats.sparsify_files import AUGUST_2024, CONFIG, PLAIN, K, computed, named, write

from sae_hooks.errors import SaeFormatError, SaeMismatchError, UnsafeFileError
from sae_hooks.formats import sparsify
from sae_hooks.formats.entry import Entry
from sae_hooks.hub import find_saes, load_sae


def build(w, config=CONFIG, hook="layers.3.mlp"):
    entry = Entry(dialect="sparsify", weights="sae.safetensors", hook=hook)
    return sparsify.build(entry, as_tensors(named(w)), config)


# --- equations ------------------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("more", [{}, {"multi_topk": True}, {"transcode": None, "activation": None}], ids=str)
def test_an_sae_subtracts_b_dec_first_however_its_decoder_was_trained(normalize, more):
    w, x = weights(*PLAIN), inputs()
    sae = build(w, CONFIG | {"normalize_decoder": normalize} | more)
    acts, x_hat = computed(w, x, subtract=True)
    assert not np.allclose(acts, computed(w, x, subtract=False)[0])
    assert_agrees(sae, x, acts, x_hat)
    assert (sae.site, sae.site_out, sae.k) == ("layers.3.mlp.output", "layers.3.mlp.output", K)


def test_fewer_than_k_features_fire_where_fewer_are_positive():
    w, x = weights(*PLAIN), inputs()
    w["b_enc"] -= 4
    acts, x_hat = computed(w, x, subtract=True)
    assert np.count_nonzero(acts, axis=1).min() < K
    assert_agrees(build(w), x, acts, x_hat)


@pytest.mark.parametrize("d_out", [D_IN, D_OUT], ids=["same width", "other width"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_a_transcoder_subtracts_nothing_reads_its_module_s_input_and_writes_its_output(d_out, skip):
    w, x = weights(*PLAIN, *(["W_skip"] if skip else []), d_out=d_out), inputs()
    sae = build(w, CONFIG | {"transcode": True, "skip_connection": skip})
    assert_agrees(sae, x, *computed(w, x, subtract=False))
    assert (sae.site, sae.site_out) == ("layers.3.mlp.input", "layers.3.mlp.output")


def test_a_skip_transcoder_of_before_transcode_was_a_key_has_b_dec_subtracted():
    w, x = weights(*PLAIN, "W_skip"), inputs()
    config = {k: v for k, v in CONFIG.items() if k not in ("transcode", "activation")} | {"skip_connection": True}
    sae = build(w, config)
    assert_agrees(sae, x, *computed(w, x, subtract=True))
    assert (sae.site, sae.site_out) == ("layers.3.mlp.input", "layers.3.mlp.output")


@pytest.mark.parametrize("config", [
    CONFIG | {"num_latents": 0, "expansion_factor": 7}, AUGUST_2024 | {"expansion_factor": 7},
    AUGUST_2024 | {"num_latents": 42}, {"k": K}, {"k": K, "expansion_factor": 9}], ids=str)
def test_no_number_of_latents_means_the_expansion_factor_times_the_width(config):
    w, x = weights(*PLAIN, d_sae=42), inputs()
    assert_agrees(build(w, config), x, *computed(w, x, subtract=True))
    told = sparsify.refine(Entry(dialect="sparsify", weights="", hook="layers.3"), config)
    assert (told.width, told.d_in, told.l0) == ((42, D_IN, K) if "d_in" in config else (None, None, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("more", [{}, {"transcode": True}], ids=str)
def test_half_precision_files_keep_their_matrices_and_decide_in_float32(dtype, more, tmp_path):
    w, x = weights(*PLAIN), inputs()
    folder = write(tmp_path / "layers.3", w, CONFIG | more, dtype)
    sae = load_sae(folder)
    assert (sae.W_enc.dtype, sae.W_dec.dtype, sae.b_enc.dtype) == (dtype, dtype, torch.float32)
    rounded = {name: array.to(dtype).double().numpy() for name, array in as_tensors(w).items()}
    assert_agrees(sae.double(), x, *computed(rounded, x, subtract=not more), rel=1e-5)


# --- refusals -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flaw", "tells"), [
    ({"activation": "groupmax"}, "'groupmax', which cannot be expressed: the largest feature of each of k groups"),
    ({"activation": "batchtopk"}, "activation is 'batchtopk'; sae_hooks reads topk"),
    ({"activation": 1}, "activation must be a string, got 1"),
    ({"signed": True}, "signed is True, which cannot be expressed: the k features of largest magnitude"),
    ({"normalize_io": True}, "normalize_io is True, which cannot be expressed"),
    ({"n_targets": 3}, "n_targets is 3, which cannot be expressed: it writes several layers"),
    ({"coalesce_topk": "concat"}, "coalesce_topk is 'concat', which cannot be expressed"),
    ({"k": None}, "k is missing"), ({"k": True}, "k must be a whole number"), ({"k": 0}, "k must be a whole number"),
    ({"k": D_SAE + 1}, "k must be between 1 and 40, got 41"),
    ({"num_latents": False}, "num_latents must be a whole number"),
    ({"num_latents": 0.0}, "num_latents must be a whole number"),
    ({"num_latents": -1}, "num_latents must be a whole number"), ({"transcode": 1}, "transcode must be true or false"),
    ({"num_latents": 0, "expansion_factor": "8"}, "expansion_factor must be a whole number"),
    ({"num_latents": 0}, "encoder.weight is (40, 6), expected (192, 6)"),
    ({"d_in": 7}, "encoder.weight is (40, 6), expected (40, 7)"),
    ({"skip_connection": True}, "cfg.json says skip_connection: true, the file has no W_skip"),
], ids=str)
def test_a_config_that_cannot_be_right_is_refused_by_key(flaw, tells):
    with pytest.raises((SaeFormatError, SaeMismatchError)) as caught:
        build(weights(*PLAIN), CONFIG | flaw)
    assert tells in str(caught.value)


@pytest.mark.parametrize("key", [*CONFIG, *sparsify.REFUSED])
def test_no_value_of_a_key_does_worse_than_being_refused(key):
    entry = Entry(dialect="sparsify", weights="", hook="layers.3")
    for value in ([], {}, [1], {"a": 1}, "", "x", -1, 0, 0.5, 10**19, True, None):
        with contextlib.suppress(SaeFormatError):
            told = sparsify.refine(entry, CONFIG | {key: value})
            assert told.width is None or type(told.width) is int


def test_keys_of_a_branch_that_say_nothing_are_no_hindrance():
    off = {"signed": False, "normalize_io": False, "n_targets": 0, "n_sources": 0, "coalesce_topk": "none",
           "post_encoder_scale": False, "train_post_encoder": True}
    assert build(weights(*PLAIN), CONFIG | off).k == K


def test_every_missing_tensor_and_what_there_is_are_named():
    tensors = {k: v for k, v in as_tensors(named(weights(*PLAIN))).items() if k != "W_dec"}
    with pytest.raises(SaeFormatError, match=r"no W_dec \(tensors: b_dec \(6,\), encoder.weight \(40, 6\)"):
        sparsify.build(Entry(dialect="sparsify", weights=""), tensors, CONFIG)
    with pytest.raises(SaeFormatError, match=r"cfg\.json is missing"):
        sparsify.build(Entry(dialect="sparsify", weights=""), tensors, None)


def test_every_tensor_of_a_wrong_shape_is_named_at_once():
    w = weights(*PLAIN, "W_skip")
    w |= {"b_dec": w["b_dec"][:-1], "b_enc": w["b_enc"][:-2], "W_skip": w["W_skip"][:, :-1]}
    with pytest.raises(SaeMismatchError) as caught:
        build(w, CONFIG | {"skip_connection": True})
    for told in ("encoder.bias is (38,), expected (40,)", "b_dec is (5,), expected (6,)",
                 "W_skip is (6, 5), expected (6, 6)"):
        assert told in str(caught.value)


def test_a_skip_that_the_config_does_not_know_of_is_refused():
    with pytest.raises(SaeFormatError, match="says skip_connection: false, the file has a W_skip"):
        build(weights(*PLAIN, "W_skip"), CONFIG | {"transcode": True})


@pytest.mark.parametrize("name", ["post_encs.0", "W_decs.0", "threshold"])
def test_a_tensor_that_the_format_does_not_know_is_refused(name, tmp_path):
    folder = write(tmp_path / "layers.3", weights(*PLAIN) | {name: np.ones(3)})
    with pytest.raises(UnsafeFileError, match=f"does not know: '{name}'"):
        load_sae(folder)


def test_weights_of_another_width_than_the_config_says_are_told_from_the_header(tmp_path):
    with pytest.raises(SaeFormatError, match="config says 192 features, its header 40"):
        find_saes(write(tmp_path / "layers.3", config=CONFIG | {"num_latents": 0}))


# --- names -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("repo", "path", "site", "kind", "layer"), [
    ("EleutherAI/sae-llama-3-8b-32x", "layers.10", "layers.10.output", "resid_post", 10),
    ("EleutherAI/sae-llama-3.1-8b-64x", "layers.23.mlp", "layers.23.mlp.output", "mlp_out", 23),
    ("EleutherAI/sae-pythia-70m-32k", "layers.0.attention", "layers.0.attention.output", None, 0),
    ("EleutherAI/sae_overlap", "k32-sae-4k/layers.6", "layers.6.output", "resid_post", 6),
    ("someone/pythia", "gpt_neox.layers.9", "gpt_neox.layers.9.output", "resid_post", 9),
    ("someone/gpt2", "h.0.attn", "h.0.attn.output", None, 0),
    ("someone/many", "run/layers.3/seed0", "layers.3.output", "resid_post", 3),
    ("someone/best", "run/best/layers.3.mlp/layers.3.mlp", "layers.3.mlp.output", "mlp_out", 3),
    ("someone/one/layers.7", "", "layers.7.output", "resid_post", 7),
    ("someone/one/layers.7/seed12", "", "layers.7.output", "resid_post", 7),
    ("EleutherAI/sae-llama-3-8b-32x", "layer_3", None, None, None),  # its first commits; a layer of which list?
    ("enjalot/sae-nomic-text-v1.5", "128_32", None, None, None),
    ("someone/lens", "blocks.3.hook_mlp_out", None, None, None),
    ("someone/sites", "model.layers.3.output", None, None, None),
    ("someone/seeds", "seed0", None, None, None),
    ("someone/runs", "v1.2", None, None, None),
    ("someone/whole-v1.2", "", None, None, None),
])
def test_the_folder_s_name_tells_module_and_layer(repo, path, site, kind, layer):
    files = {f"{path}/{name}".lstrip("/"): 1 for name in ("cfg.json", "sae.safetensors")}
    others = dict.fromkeys(("config.json", "layers.1/cfg.json", "layers.2/sae.safetensors"), 1)
    [entry] = sparsify.entries(files | others, repo)
    assert (entry.layer, entry.site) == (layer, None)  # whether it transcodes is not told yet
    told = sparsify.refine(entry, CONFIG)
    assert (told.site, told.site_out, told.kind, told.layer) == (site, site, kind, layer)
    assert site is None or told.hook is None
