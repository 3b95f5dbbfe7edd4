"""circuit-tracer's per-layer transcoders: what names and configs tell, the equations, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from formats.equations import D_IN, D_OUT, as_tensors, assert_agrees, decode, inputs, relu, weights

from sae_hooks import attach_saes
from sae_hooks.errors import SaeFormatError, SaeMismatchError
from sae_hooks.formats import circuit_tracer
from sae_hooks.formats.entry import Entry

PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
QWEN = {"model_name": "Qwen/Qwen3-4B", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out", "scan": ["qwen3-4b"]}
LLAMA = QWEN | {"model_name": "meta-llama/Llama-3.2-1B", "feature_input_hook": "hook_resid_mid",
                "feature_output_hook": "hook_mlp_out"}
GEMMA = LLAMA | {"model_name": "google/gemma-2-2b", "feature_input_hook": "ln2.hook_normalized"}
ENTRY = Entry(dialect="circuit_tracer", weights="layer_3.safetensors", config="config.yaml", layer=3)
THRESHOLD = "activation_function.threshold"


def stored(w, dtype=torch.float64):
    """The tensors as circuit-tracer stores them: the encoder by features, and its own name for the thresholds."""
    turned = w | {"W_enc": w["W_enc"].T.copy()}
    return as_tensors({THRESHOLD if name == "threshold" else name: array for name, array in turned.items()}, dtype)


def build(w, config=QWEN):
    return circuit_tracer.build(ENTRY, stored(w), config)


def jumprelu(w, x):
    """circuit_tracer/transcoder/activation_functions.py: x (x > threshold), and no ReLU."""
    pre = x @ w["W_enc"] + w["b_enc"]
    return pre * (pre > w["threshold"])


def topk(w, x, k):
    """The same file: the k largest, and no ReLU."""
    pre = x @ w["W_enc"] + w["b_enc"]
    return pre * (pre >= np.sort(pre, axis=1)[:, -k, None])


# --- the equation -----------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [QWEN, QWEN | {"activation": "relu"}])
def test_without_thresholds_it_is_a_relu(config):
    w, x = weights(*PLAIN), inputs()
    acts = relu(x @ w["W_enc"] + w["b_enc"])  # b_dec is of the other site: it is not subtracted
    sae = build(w, config)
    assert_agrees(sae, x, acts, decode(w, acts))
    assert sae.metadata == {"model_name": "Qwen/Qwen3-4B"}


@pytest.mark.parametrize("config", [QWEN, QWEN | {"activation": "jumprelu"}, QWEN | {"activation": "jump_relu"}])
def test_with_thresholds_it_is_a_jumprelu(config):
    w, x = weights(*PLAIN, "threshold"), inputs()
    acts = jumprelu(w, x)
    assert (acts > 0).sum() < (relu(x @ w["W_enc"] + w["b_enc"]) > 0).sum()
    assert_agrees(build(w, config), x, acts, decode(w, acts))


def test_a_topk_keeps_the_k_largest():
    w, x = weights(*PLAIN), inputs()
    acts = topk(w, x, 5)
    assert (acts >= 0).all()  # of 40 the five largest are positive, so that a ReLU does nothing
    assert_agrees(build(w, QWEN | {"activation": "topk", "k": 5}), x, acts, decode(w, acts))


@pytest.mark.parametrize("d_out", [D_IN, D_OUT])
def test_the_skip_is_stored_by_outputs_and_reads_what_the_encoder_reads(d_out):
    w, x = weights(*PLAIN, "W_skip", d_out=d_out), inputs()
    acts = relu(x @ w["W_enc"] + w["b_enc"])
    assert_agrees(build(w, LLAMA), x, acts, decode(w, acts) + x @ w["W_skip"].T)


def test_an_encoder_as_wide_as_its_input_is_still_kept_by_features():
    w, x = weights(*PLAIN, d_sae=D_IN), inputs()
    acts = relu(x @ w["W_enc"] + w["b_enc"])
    assert_agrees(build(w), x, acts, decode(w, acts))


def test_an_encoder_that_is_plainly_transposed_is_turned():
    w, x = weights(*PLAIN), inputs()
    acts = relu(x @ w["W_enc"] + w["b_enc"])
    assert_agrees(circuit_tracer.build(ENTRY, as_tensors(w), QWEN), x, acts, decode(w, acts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matrices_keep_their_dtype_and_their_memory(dtype):
    tensors = stored(weights(*PLAIN), dtype)
    sae = circuit_tracer.build(ENTRY, tensors, QWEN)
    assert sae.W_enc.dtype == sae.W_dec.dtype == dtype
    assert sae.b_enc.dtype == sae.threshold.dtype == torch.float32
    assert sae.W_enc.data_ptr() == tensors["W_enc"].data_ptr()


# --- sites ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("config", "read", "write"), [
    (QWEN, "mlp.input", "mlp.output"),
    (QWEN | {"feature_output_hook": "hook_mlp_out"}, "mlp.input", "mlp.output"),
    (LLAMA, "post_attention_layernorm.input", "mlp.output"),
    (LLAMA | {"feature_input_hook": "ln2.hook_normalized"}, "post_attention_layernorm.normalized", "mlp.output"),
    (GEMMA, "pre_feedforward_layernorm.normalized", "post_feedforward_layernorm.output"),
    (GEMMA | {"feature_input_hook": "mlp.hook_in"}, "mlp.input", "post_feedforward_layernorm.output"),
    (GEMMA | {"model_name": "google/gemma-3-4b-it", "feature_input_hook": "mlp.hook_in"},
     "mlp.input", "post_feedforward_layernorm.output"),
])
def test_the_config_tells_where_it_reads_and_writes(config, read, write):
    entry = circuit_tracer.refine(ENTRY, config)
    assert (entry.site, entry.site_out) == (f"model.layers.3.{read}", f"model.layers.3.{write}")
    assert (entry.kind, entry.layer, entry.hook) == ("transcoder", 3, None)
    sae = build(weights(*PLAIN), config)
    assert (sae.site, sae.site_out) == (entry.site, entry.site_out)


def test_one_that_writes_where_it_reads_is_no_transcoder():
    entry = circuit_tracer.refine(ENTRY, QWEN | dict.fromkeys(("feature_input_hook", "feature_output_hook"),
                                                              "hook_resid_post"))
    assert (entry.kind, entry.site, entry.site_out) == ("resid_post", *("model.layers.3.output",) * 2)


def test_a_hook_of_a_model_that_is_not_known_is_kept_and_refused_where_it_writes():
    config = QWEN | {"model_name": "someone/new-model"}
    entry = circuit_tracer.refine(ENTRY, config)
    assert (entry.site, entry.hook, entry.kind) == (None, "blocks.3.mlp.hook_in", "transcoder")
    with pytest.raises(SaeFormatError, match=r"feature_output_hook 'mlp.hook_out' means .* 'someone/new-model'"):
        build(weights(*PLAIN), config)


def watch(module):
    """A list that gets what the module is given and what it returns, each time it runs."""
    seen = []
    module.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    return seen


def returning(model, ids, module, value):
    """Logits where a module returns a value, by a plain hook."""
    handle = module.register_forward_hook(lambda module, args, out: value)
    try:
        return model(ids).logits
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "config", "names", "read", "written"), [
    ("Qwen3", QWEN, PLAIN, "mlp", "mlp"),
    ("Llama", LLAMA, (*PLAIN, "W_skip"), "post_attention_layernorm", "mlp"),
    ("Gemma2", GEMMA, (*PLAIN, "threshold"), "pre_feedforward_layernorm", "post_feedforward_layernorm"),
])
def test_it_is_spliced_and_ablated_where_its_config_says(architecture, config, names, read, written, random_model):
    tensors = stored(weights(*names, d_in=32, d_out=32, d_sae=64), torch.float32)
    sae = circuit_tracer.build(replace(ENTRY, layer=1), tensors, config)
    model, ids = random_model(architecture), torch.tensor([[5, 9, 77, 31, 64]])
    layer = model.model.layers[1]
    given, got = watch(getattr(layer, read)), watch(getattr(layer, written))
    clean = model(ids).logits
    x, out = given[0][0], got[0][1]
    if architecture == "Gemma2":  # ln2.hook_normalized: without the gain, which no module returns
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.pre_feedforward_layernorm.eps)
    acts = sae.encode(x)
    feature = int(acts.sum((0, 1)).argmax())
    spliced = returning(model, ids, getattr(layer, written), sae.decode(acts) + sae.skip(x))
    ablated = returning(model, ids, getattr(layer, written), out - acts[..., [feature]] * sae.W_dec[feature])
    attach_saes(model, sae)
    assert torch.equal(model(ids).logits, clean)
    with model.saes.splice():
        torch.testing.assert_close(model(ids).logits, spliced, rtol=1e-4, atol=1e-4)
    with model.saes.ablate([feature]):
        torch.testing.assert_close(model(ids).logits, ablated, rtol=1e-4, atol=1e-4)
    assert min(float((logits - clean).abs().max()) for logits in (spliced, ablated)) > 0.01


# --- what is refused ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("flaw", "tells"), [
    ({"model_kind": None}, "model_kind is None; in a config.yaml of circuit-tracer it is 'transcoder_set' or"),
    ({"model_kind": "trainer"}, "model_kind is 'trainer'"),
    ({"model_kind": ["transcoder_set"]}, "model_kind must be a string"),
    ({"model_kind": "cross_layer_transcoder"}, "a cross-layer transcoder writes to several layers"),
    ({"model_name": 3}, "model_name must be a string, got 3"),
    ({"feature_input_hook": None}, "feature_input_hook is None and feature_output_hook 'mlp.hook_out'"),
    ({"feature_output_hook": ""}, "feature_output_hook ''"),
    ({"feature_output_hook": "hook_q"}, "feature_output_hook 'hook_q' means cannot be told"),
    ({"activation": "groupmax"}, "activation is 'groupmax'; sae_hooks reads relu, jumprelu and topk"),
    ({"activation": "topk"}, "activation is 'topk', but k is missing; 'topk' needs one"),
    ({"k": 5}, "activation is None, but k is 5"),
    ({"activation": "relu", "k": 5}, "activation is 'relu', but k is 5"),
    ({"activation": "topk", "k": True}, "k must be a whole number"),
    ({"activation": "topk", "k": 41}, "k must be between 1 and 40"),
    ({"activation": "jumprelu"}, "activation is 'jumprelu', but the file has no activation_function.threshold"),
    ({"transcoders": {"0": "x"}}, "transcoders must be a list of addresses"),
    ({"transcoders": [{"layer": 0}]}, "transcoders must be a list of addresses"),
], ids=lambda value: str(value)[:50])
def test_a_config_that_cannot_be_right_is_refused_by_key(flaw, tells):
    with pytest.raises((SaeFormatError, SaeMismatchError)) as caught:
        build(weights(*PLAIN), QWEN | flaw)
    assert tells in str(caught.value)


@pytest.mark.parametrize("activation", [{"activation": "relu"}, {"activation": "topk", "k": 5}], ids=str)
def test_thresholds_that_the_config_gives_no_meaning_are_refused(activation):
    with pytest.raises(SaeFormatError, match="but the file has an activation_function"):
        build(weights(*PLAIN, "threshold"), QWEN | activation)


def test_negative_thresholds_are_refused_as_there_is_no_relu_before_them():
    w = weights(*PLAIN, "threshold")
    w["threshold"][:7] *= -1
    with pytest.raises(SaeFormatError, match="7 of 40 thresholds are negative; circuit-tracer lets negative"):
        build(w)


def test_missing_and_misshapen_tensors_are_all_named():
    w = weights(*PLAIN)
    with pytest.raises(SaeFormatError, match=r"no W_dec; no b_dec \(tensors: "):
        build({name: w[name] for name in ("W_enc", "b_enc")})
    w = weights(*PLAIN, "W_skip", "threshold")
    w["W_dec"], w["W_skip"], w["threshold"] = w["W_dec"][:-1], w["W_skip"][:, :-1], w["threshold"][:-1]
    with pytest.raises(SaeMismatchError) as caught:
        build(w)
    for tells in ("W_dec is (39, 6), expected (40, 6)", "W_skip is (6, 5), expected (6, 6)",
                  f"{THRESHOLD} is (39,), expected (40,)"):
        assert tells in str(caught.value)


def test_without_a_config_nothing_is_built():
    with pytest.raises(SaeFormatError, match=r"config\.yaml is missing; it says where the transcoder reads"):
        circuit_tracer.build(ENTRY, stored(weights(*PLAIN)), None)


ELSEWHERE = [f"hf://google/gemma-scope-2b-pt-transcoders/layer_{n}/width_16k/average_l0_76/params.npz"
             for n in range(26)]


def test_transcoders_that_lie_in_other_repositories_are_refused_by_name():
    for entry in (Entry(dialect="circuit_tracer", weights="config.yaml", config="config.yaml"), ENTRY):
        with pytest.raises(SaeFormatError, match=r"files of google/gemma-scope-2b-pt-transcoders \(.*nothing outside"):
            circuit_tracer.refine(entry, GEMMA | {"transcoders": ELSEWHERE})


def test_a_list_of_the_files_that_are_here_is_no_other_place():
    listed = [f"hf://me/mine/layer_{n}.safetensors" for n in range(5)]
    assert circuit_tracer.refine(ENTRY, QWEN | {"transcoders": listed}).site == "model.layers.3.mlp.input"
    for wrong in (listed[:3], listed[::-1][:4]):  # none for layer 3, and that of layer 1
        with pytest.raises(SaeFormatError, match="its transcoders are files of me/mine"):
            circuit_tracer.refine(ENTRY, QWEN | {"transcoders": wrong})


# --- what names tell ------------------------------------------------------------------------------------

def test_entries_are_layers_beside_a_config():
    files = dict.fromkeys(("config.yaml", "layer_0.safetensors", "layer_11.safetensors", "wandb-config.yaml",
                           "small/config.yaml", "small/layer_2.safetensors", "bare/layer_4.safetensors",
                           "layer_x.safetensors", "layer_5.npz", "features/layer_3.bin", "alone/config.yaml"), 1)
    found = circuit_tracer.entries(files, "me/mine")
    assert [(e.weights, e.config, e.layer, e.site) for e in found] == [
        ("layer_0.safetensors", "config.yaml", 0, None), ("layer_11.safetensors", "config.yaml", 11, None),
        ("small/layer_2.safetensors", "small/config.yaml", 2, None)]


def test_cross_layer_transcoders_are_one_entry_a_folder_and_have_no_config():
    files = {f"{folder}W_{part}_{n}.safetensors": 1 for folder in ("", "big/") for n in range(3)
             for part in ("enc", "dec")} | {"config.yaml": 1, "other/W_enc_0.safetensors": 1}
    found = circuit_tracer.entries(files, "mntss/clt-llama-3.2-1b-524k")
    assert [(e.weights, e.kind, e.config, e.site) for e in found] == [
        ("W_enc_0.safetensors", "clt", None, None), ("big/W_enc_0.safetensors", "clt", None, None)]


@pytest.mark.parametrize("beside", [[], ["README.md"], ["features/layer_0.bin", "features/index.json.gz"]], ids=str)
def test_a_config_without_any_weights_stands_for_what_it_lists(beside):
    [entry] = circuit_tracer.entries(dict.fromkeys(["config.yaml", *beside], 1), "mwhanna/gemma-scope-transcoders")
    assert (entry.weights, entry.config, entry.layer) == ("config.yaml", "config.yaml", None)


@pytest.mark.parametrize("weights_of_others", ["run/sae_weights.safetensors", "ae.pt", "params.npz", "features.bin"])
def test_a_config_in_a_source_of_other_weights_stands_for_nothing(weights_of_others):
    assert circuit_tracer.entries({"config.yaml": 1, "logs/config.yaml": 1, weights_of_others: 1}, "me/mine") == []


def test_names_tell_no_site_and_without_a_selector_all_layers_are_meant():
    assert circuit_tracer.sites("transcoder", 3) is circuit_tracer.sites("resid_post", 3) is None
    assert circuit_tracer.default([ENTRY]) == [ENTRY]
