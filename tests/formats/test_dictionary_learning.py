"""dictionary_learning: every class against its equation in float64, what folders and configs tell, what is refused."""

import numpy as np
import pytest
import torch
from formats.equations import (
    D_IN,
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
from sae_hooks.formats import dictionary_learning
from sae_hooks.formats.selection import choose, may_match, placed, wanted

PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
FOLDER = "resid_post_layer_3/trainer_0"
K = 4


def config(dict_class, *, io="out", buffer=True, **more):
    """What `trainSAE` writes; more=None leaves a key of the trainer out."""
    trainer = {"trainer_class": "Trainer", "dict_class": dict_class, "lr": 3e-4, "activation_dim": D_IN,
               "dict_size": D_SAE, "device": "cuda:0", "layer": 3, "lm_name": "google/gemma-2-2b",
               "submodule_name": "resid_post_layer_3", **more}
    return {"trainer": {key: value for key, value in trainer.items() if value is not None},
            **({"buffer": {"d_submodule": D_IN, "io": io, "ctx_len": 128}} if buffer else {})}


def one(path=f"{FOLDER}/ae.pt", repo="me/saes"):
    [entry] = dictionary_learning.entries({path: 9, path.replace("ae.pt", "config.json"): 9}, repo)
    return entry


def told(path=f"{FOLDER}/ae.pt", dict_class="AutoEncoder", **more):
    return dictionary_learning.refine(one(path), config(dict_class, **more))


def linear(w, **biases):
    """The tensors as torch's linear layers keep them: transposed."""
    found = {"encoder.weight": w["W_enc"].T.copy(), "decoder.weight": w["W_dec"].T.copy()}
    if "b_enc" in w:
        found["encoder.bias"] = w["b_enc"]
    return found | {theirs: w[ours] for theirs, ours in biases.items()}


def build(found, dict_class, entry=None, **more):
    tensors = {name: value if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())
               for name, value in found.items()}
    return dictionary_learning.build(entry or one(), tensors, config(dict_class, **more))


def numbers(k=K, threshold=None):
    """The buffers of the TopK family, float32 and int32 as they are written."""
    found = {"k": torch.tensor(k, dtype=torch.int32)}
    return found | ({} if threshold is None else {"threshold": torch.tensor(threshold)})


# --- the equations --------------------------------------------------------------------------------


def test_an_autoencoder_is_centred_and_its_activations_are_those_of_unit_decoder_columns():
    w, x = weights(*PLAIN), inputs()
    sae = build(linear(w, bias="b_dec"), "AutoEncoder")
    norms = np.linalg.norm(w["W_dec"], axis=1)
    acts = standard(w, x - w["b_dec"]) * norms
    assert norms.max() > 1.5
    assert_agrees(sae, x, acts, decode(w, acts / norms))


def test_an_autoencoder_of_unit_columns_is_left_as_it_is():
    w, x = weights(*PLAIN), inputs()
    w["W_dec"] /= np.linalg.norm(w["W_dec"], axis=1, keepdims=True)
    sae = build(linear(w, bias="b_dec"), "AutoEncoder")
    assert torch.equal(sae.W_dec, torch.from_numpy(w["W_dec"]))
    acts = standard(w, x - w["b_dec"])
    assert_agrees(sae, x, acts, decode(w, acts))


def test_a_new_autoencoder_is_not_centred_nor_its_decoder_normalised():
    w, x = weights(*PLAIN), inputs()
    sae = build(linear(w, **{"decoder.bias": "b_dec"}), "AutoEncoderNew")
    acts = standard(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))


def test_a_gated_autoencoder_is_centred_on_both_paths():
    w, x = weights("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"), inputs()
    sae = build(linear(w, decoder_bias="b_dec", gate_bias="b_gate", mag_bias="b_mag", r_mag="r_mag"),
                "GatedAutoEncoder", submodule_name=None)
    acts = gated(w, x - w["b_dec"])
    magnitude = standard({"W_enc": w["W_enc"] * np.exp(w["r_mag"]), "b_enc": w["b_mag"]}, x - w["b_dec"])
    assert 0 < np.count_nonzero(acts) < np.count_nonzero(magnitude)  # the gate takes something away
    assert_agrees(sae, x, acts, decode(w, acts))


@pytest.mark.parametrize("threshold", [None, -1.0, 1.5], ids=["no threshold", "unset", "a threshold"])
def test_topk_keeps_the_k_largest_whatever_threshold_stands_beside_it(threshold):
    w, x = weights(*PLAIN), inputs()
    sae = build(linear(w, b_dec="b_dec") | numbers(threshold=threshold), "AutoEncoderTopK", k=K)
    acts = topk(w, x - w["b_dec"], K)
    assert np.count_nonzero(acts, axis=1).max() == K
    assert_agrees(sae, x, acts, decode(w, acts))


@pytest.mark.parametrize("source", ["config", "file"])
def test_k_is_told_by_the_config_or_the_file(source):
    w = weights(*PLAIN)
    found = linear(w, b_dec="b_dec") | (numbers() if source == "file" else {})
    assert build(found, "AutoEncoderTopK", k=K if source == "config" else None).k == K


def matryoshka(w):
    return w | {"group_sizes": torch.tensor([10, D_SAE - 10])}


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_batch_topk_compares_every_feature_with_its_one_threshold(dict_class):
    w, x = weights(*PLAIN), inputs()
    found = linear(w, b_dec="b_dec") if dict_class == "BatchTopKSAE" else matryoshka(w)
    sae = build(found | numbers(threshold=0.75), dict_class, k=K)
    acts = jumprelu(w | {"threshold": np.full(D_SAE, 0.75)}, x - w["b_dec"])
    assert 0 < np.count_nonzero(acts) < 0.9 * np.count_nonzero(standard(w, x - w["b_dec"]))
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.k is None


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("threshold", [None, -1.0], ids=["none", "unset"])
def test_batch_topk_whose_threshold_was_never_set_keeps_the_k_largest_and_says_so(dict_class, threshold):
    w, x = weights(*PLAIN), inputs()
    found = linear(w, b_dec="b_dec") if dict_class == "BatchTopKSAE" else matryoshka(w)
    with pytest.warns(SaeWarning, match=rf"threshold of this {dict_class} was never set.*the 4 largest features"):
        sae = build(found | numbers(threshold=threshold), dict_class, k=K)
    acts = topk(w, x - w["b_dec"], K)
    assert_agrees(sae, x, acts, decode(w, acts))


def test_jumprelu_is_not_centred():
    w, x = weights(*PLAIN, "threshold"), inputs()
    sae = build(w, "JumpReluAutoEncoder", target_l0=30)
    acts = jumprelu(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.metadata == {"model_name": "google/gemma-2-2b", "l0": 30.0}


def test_square_matrices_are_turned_as_torch_keeps_them():
    w, x = weights(*PLAIN, d_sae=D_IN), inputs()
    sae = build(linear(w, **{"decoder.bias": "b_dec"}), "AutoEncoderNew", dict_size=D_IN)
    acts = standard(w, x)
    assert_agrees(sae, x, acts, decode(w, acts))


# --- what folders and configs tell ----------------------------------------------------------------


@pytest.mark.parametrize("path", [
    f"{FOLDER}/ae.pt", f"gemma-2-2b_topk_width-2pow14_date-1109/{FOLDER}/ae.pt", f"._saes_batch_top_k/{FOLDER}/ae.pt",
    "model_layer_9/resid_post_layer_3/trainer_12/ae.pt"])
def test_a_folder_tells_layer_and_kind_and_no_site(path):
    entry = one(path)
    assert (entry.layer, entry.kind, entry.site) == (3, "resid_post", None)
    assert entry.config == path.replace("ae.pt", "config.json")


@pytest.mark.parametrize("repo", ["me/saes/resid_post_layer_3/trainer_0", "/data/resid_post_layer_3/trainer_0"])
def test_a_folder_that_is_named_as_the_source_tells_it_too(repo):
    entry = one("ae.pt", repo)
    assert (entry.layer, entry.kind) == (3, "resid_post")


def test_other_names_tell_the_layer_alone():
    assert [(e.layer, e.kind) for e in map(one, ("mlp_out_layer_3/ae.pt", "attn_layer_5/trainer_0/ae.pt"))] == [
        (3, None), (5, None)]
    assert (one("run/trainer_0/ae.pt").layer, one("ae.pt").layer) == (None, None)


def test_weights_without_a_config_are_none_of_this_format():
    assert dictionary_learning.entries({"a/ae.pt": 9, "config.json": 9}, "me/saes") == []


def test_checkpoints_of_a_training_are_offered_only_where_nothing_is_finished():
    ends = ("resid_post_layer_3/trainer_0", "resid_post_layer_3_checkpoints/trainer_0_step_976")
    files = {f"{end}/{name}": 9 for end in ends for name in ("ae.pt", "config.json")}
    assert [e.weights for e in dictionary_learning.entries(files, "me/saes")] == [f"{ends[0]}/ae.pt"]
    alone = {path: size for path, size in files.items() if "checkpoints" in path}
    [entry] = dictionary_learning.entries(alone, "me/saes")
    assert (entry.layer, entry.kind) == (3, "resid_post")


@pytest.mark.parametrize(("model", "site"), [
    ("google/gemma-2-2b", "model.layers.3.output"), ("EleutherAI/pythia-70m-deduped", "gpt_neox.layers.3.output"),
    ("openai/gpt-oss-20b", "model.layers.3.output"), (None, "model.layers.3.output")])
@pytest.mark.parametrize("buffer", [True, False])
def test_resid_post_is_the_output_of_a_layer_wherever_the_model_keeps_it(model, site, buffer):
    entry = told(lm_name=model, buffer=buffer)
    assert (entry.site, entry.site_out, entry.kind, entry.layer) == (site, site, "resid_post", 3)
    assert (entry.d_in, entry.width, entry.model_name, entry.hook) == (D_IN, D_SAE, model, None)


def test_where_the_config_names_no_submodule_the_folder_does():
    assert told(submodule_name=None).site == "model.layers.3.output"
    assert told("run/trainer_0/ae.pt", submodule_name=None).site is None


@pytest.mark.parametrize(("name", "io", "site", "kind"), [
    ("model.layers.3.mlp", "out", "model.layers.3.mlp.output", "mlp_out"),
    ("gpt_neox.layers.3", "in", "gpt_neox.layers.3.input", None)])
def test_a_module_path_is_the_side_that_the_buffer_took(name, io, site, kind):
    entry = told("run/ae.pt", submodule_name=name, io=io)
    assert (entry.site, entry.kind, entry.layer) == (site, kind, 3)


@pytest.mark.parametrize(("path", "name", "io"), [
    ("run/ae.pt", "mlp_layer_3", "out"), ("run/ae.pt", "attention_layer_3", "out"), ("run/ae.pt", "my own", "out"),
    ("run/ae.pt", "resid_post_layer_3", "in"), ("run/ae.pt", "model.layers.3.mlp", None)])
def test_what_does_not_tell_the_site_is_left_to_the_caller_to_name(path, name, io):
    entry = told(path, submodule_name=name, io=io)
    assert (entry.site, entry.hook, entry.kind, entry.layer) == (None, name, None, 3)
    with pytest.raises(SaeFormatError, match=f"calls the site '{name}'.*give site= as a module path"):
        choose([entry], wanted(3, None, None, None), "here", [entry])
    want = wanted(None, "model.layers.3.mlp.output", None, None)
    [chosen] = choose([placed(entry, want)], want, "here", [entry])
    w = weights(*PLAIN)
    sae = build(linear(w, bias="b_dec"), "AutoEncoder", chosen, submodule_name=name, io=io)
    assert sae.site == sae.site_out == "model.layers.3.mlp.output"
    assert not may_match(entry, wanted(None, "model.layers.2.mlp.output", None, None))


@pytest.mark.parametrize(("path", "more"), [
    ("run/ae.pt", {"submodule_name": "mlp_layer_3"}), (f"{FOLDER}/ae.pt", {"submodule_name": "my own"}),
    (f"{FOLDER}/ae.pt", {"io": "in"})], ids=["another name", "a name of its own", "the other side"])
def test_a_site_by_its_kind_is_not_taken_for_what_the_config_calls_otherwise(path, more):
    entry = told(path, **more)
    assert placed(entry, wanted(3, "resid_post", None, None)) == entry


def test_a_site_that_the_caller_gives_as_a_path_is_his_word():
    entry = placed(told("run/ae.pt", submodule_name="mlp_layer_3"), wanted(None, "model.layers.3.output", None, None))
    sae = build(linear(weights(*PLAIN), bias="b_dec"), "AutoEncoder", entry, submodule_name="mlp_layer_3")
    assert sae.site == "model.layers.3.output"


@pytest.mark.parametrize(("dict_class", "more", "l0"), [
    ("AutoEncoderTopK", {"k": 20}, 20), ("BatchTopKSAE", {"k": 40}, 40), ("MatryoshkaBatchTopKSAE", {"k": 80}, 80),
    ("JumpReluAutoEncoder", {"target_l0": 20.0}, 20), ("AutoEncoder", {}, None), ("GatedAutoEncoder", {}, None)])
def test_l0_is_k_or_what_was_aimed_at(dict_class, more, l0):
    assert told(dict_class=dict_class, **more).l0 == l0


def sweep():
    """A site with k from 20 to 640 at two widths, as published."""
    return [dictionary_learning.refine(
        one(f"resid_post_layer_3/trainer_{n}/ae.pt"),
        config("BatchTopKSAE", k=20 * 2 ** (n % 6), dict_size=2**14 if n < 6 else 2**12)) for n in range(12)]


@pytest.mark.parametrize(("asked", "trainer"), [
    ({}, 8), ({"l0": 20}, 6), ({"l0": 600}, 11), ({"width": "16k"}, 2), ({"width": 2**14, "l0": 170}, 3)])
def test_width_and_l0_choose_among_the_trainers_of_a_site(asked, trainer):
    want = wanted(3, None, asked.get("width"), asked.get("l0"))
    [chosen] = choose(sweep(), want, "here", sweep())
    assert chosen.weights == f"resid_post_layer_3/trainer_{trainer}/ae.pt"


def test_an_l0_that_no_config_tells_chooses_none_of_several():
    several = [told(f"resid_post_layer_3/trainer_{n}/ae.pt") for n in range(2)]
    with pytest.raises(FileNotFoundError, match=r"no L0 of them is known; name the folder of one"):
        choose(several, wanted(3, None, None, 50), "here", several)


def test_without_a_site_the_residual_stream_is_meant_where_folders_tell_it():
    resid, mlp = one(), one("mlp_layer_3/ae.pt")
    assert dictionary_learning.default([mlp, resid]) == [resid]
    assert dictionary_learning.default([mlp]) == [mlp]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"layer": 4}, {"submodule_name": "resid_post_layer_4"},
                                  {"submodule_name": "mlp_layer_3"}, {"submodule_name": "model.layers.4"}], ids=str)
def test_a_folder_and_a_config_of_different_places_are_refused(more):
    with pytest.raises(SaeFormatError, match=r"the folder's name and config\.json mean different places: resid_post"):
        told(**more)


@pytest.mark.parametrize(("change", "tells"), [
    ({"io": "in_and_out"}, "buffer.io is 'in_and_out': a transcoder"),
    ({"dict_class": "CrossCoder"}, "dict_class is 'CrossCoder'; sae_hooks reads AutoEncoder, AutoEncoderNew, Gated"),
    ({"dict_class": "IdentityDict"}, "dict_class is 'IdentityDict'"),
    ({"dict_class": None}, "dict_class is None"),
    ({"layer": -1}, "trainer.layer must be a whole number from 0 on, got -1"),
    ({"layer": True}, "trainer.layer must be a whole number"),
    ({"layer": [3, 4]}, r"trainer.layer must be a whole number from 0 on, got \[3, 4\]"),
    ({"activation_dim": 0}, "activation_dim must be a whole number from 1 to 65536, got 0"),
    ({"dict_size": 2**40}, "dict_size must be a whole number from 1 to 16777216"),
    ({"submodule_name": 5}, "submodule_name must be a string, got 5")], ids=str)
def test_a_config_that_cannot_be_is_refused(change, tells):
    with pytest.raises(SaeFormatError, match=tells):
        told(**{"dict_class": "AutoEncoder", **change})


def test_a_config_of_something_else_is_refused():
    with pytest.raises(SaeFormatError, match=r"no section 'trainer', which a config\.json of dictionary_le"):
        dictionary_learning.refine(one(), {"architectures": ["Gemma2ForCausalLM"]})


@pytest.mark.parametrize(("k", "more"), [(K, {"k": 5}), (0, {"k": None}), (2**25, {"k": None})], ids=str)
def test_a_k_that_cannot_be_is_refused(k, more):
    with pytest.raises(SaeFormatError, match=r"ae.pt and config.json should say one k, got \[4, 5\]|k must be a whole"):
        build(linear(weights(*PLAIN), b_dec="b_dec") | numbers(k), "AutoEncoderTopK", **more)


def test_topk_without_any_k_is_refused():
    with pytest.raises(SaeFormatError, match="should say one k, got none"):
        build(linear(weights(*PLAIN), b_dec="b_dec"), "AutoEncoderTopK")


def test_missing_foreign_and_misshapen_tensors_are_named():
    w = weights(*PLAIN)
    with pytest.raises(SaeFormatError, match=r"no encoder\.bias; no bias \(tensors: encoder"):
        build({k: v for k, v in linear(w).items() if k != "encoder.bias"}, "AutoEncoder")
    with pytest.raises(SaeFormatError, match=r"AutoEncoder has no tensors decoder\.bias, k"):
        build(linear(w, bias="b_dec", **{"decoder.bias": "b_dec"}) | {"k": torch.tensor(3)}, "AutoEncoder")
    with pytest.raises(SaeMismatchError, match=r"W_enc is \(6, 40\), expected \(7, 40\)"):
        build(linear(w, bias="b_dec"), "AutoEncoder", activation_dim=7)
    with pytest.raises(SaeMismatchError, match=r"threshold is \(40,\), expected \(\)"):
        build(linear(w, b_dec="b_dec") | {"threshold": torch.ones(D_SAE)}, "BatchTopKSAE", k=K)


def test_half_precision_is_folded_in_float32():
    w = weights(*PLAIN)
    found = {name: tensor.half() for name, tensor in as_tensors(linear(w, bias="b_dec")).items()}
    sae = dictionary_learning.build(one(), found, config("AutoEncoder"))
    assert (sae.W_enc.dtype, sae.b_enc.dtype, sae.threshold.dtype) == (torch.float32,) * 3
