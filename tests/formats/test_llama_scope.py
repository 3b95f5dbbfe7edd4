"""Llama Scope (OpenMOSS): both layouts against the authors' arithmetic, and what is refused."""

import numpy as np
import pytest
import torch
from formats.equations import D_IN, D_SAE, assert_agrees, inputs, largest, openmoss, openmoss_2024, weights
from formats.openmoss import CONFIG, HYPERPARAMS, READ, WRITTEN, bare, drawn, first, later, linear, raw

from sae_hooks.errors import SaeFormatError, SaeMismatchError
from sae_hooks.formats import llama_scope

# --- the equations ----------------------------------------------------------------------------------

@pytest.mark.parametrize("weighed", [True, False], ids=["weighed", ""])
@pytest.mark.parametrize("gate", ["jumprelu", "topk", "topk as jumprelu", "relu"])
def test_an_sae_of_2024_computes_what_its_authors_loader_does(gate, weighed):
    w, x = drawn(threshold=False), raw()
    threshold = HYPERPARAMS["jump_relu_threshold"] * ("jumprelu" in gate)
    config = HYPERPARAMS | {"act_fn": gate.split()[0], "sparsity_include_decoder_norm": weighed,
                            "jump_relu_threshold": threshold}
    sae = llama_scope.build(first(), linear(w), config)
    keep = largest(5) if gate == "topk" else lambda pre: pre > threshold
    acts, x_hat = openmoss_2024(w, x, keep, READ, WRITTEN, weighed)
    assert 0.03 < np.mean(acts > 0) < (0.45 if threshold else 0.6)
    assert_agrees(sae, x, acts, x_hat)
    assert (sae.k, sae.metadata.get("l0")) == ((5, 5.0) if gate == "topk" else (None, None))


@pytest.mark.parametrize("layout", ["linear", "bare"])
@pytest.mark.parametrize("weighed", [True, False], ids=["weighed", ""])
@pytest.mark.parametrize("gate", ["jumprelu", "topk", "relu"])
def test_a_later_one_computes_what_its_authors_do_on_normalised_activations(gate, weighed, layout):
    w, x = drawn(threshold=gate == "jumprelu"), raw()
    config = CONFIG | {"act_fn": gate, "sparsity_include_decoder_norm": weighed}
    tensors = bare(w) if layout == "bare" else linear(w) | {k: v for k, v in bare(w).items() if "norm" in k}
    sae = llama_scope.build(later(), tensors, config)
    keep = {"topk": largest(5), "jumprelu": lambda pre: pre > w["threshold"], "relu": lambda pre: pre > 0}[gate]
    acts, x_hat = openmoss(w, x, keep, READ, WRITTEN, weighed)
    # what TopK compares are features times the norms of their rows, and our gates compare features themselves
    scale = np.linalg.norm(w["W_dec"], axis=1) if gate == "topk" and weighed else 1
    assert_agrees(sae, x, acts * scale, x_hat)
    assert (sae.site, sae.site_out) == ("model.layers.3.post_attention_layernorm.normalized",
                                        "model.layers.3.mlp.output")


def test_keys_that_are_missing_or_spelled_otherwise_mean_what_they_do_to_the_authors_loader():
    w, x = drawn(), raw()
    config = {key: value for key, value in CONFIG.items() if key not in ("sparsity_include_decoder_norm", "sae_type")}
    acts, x_hat = openmoss(w, x, lambda pre: pre > w["threshold"], READ, WRITTEN)
    assert_agrees(llama_scope.build(later(), bare(w), config | {"act_fn": "JumpReLU"}), x, acts, x_hat)
    w = drawn(threshold=False)  # the one threshold of 2024 means nothing later
    assert llama_scope.build(later(), bare(w), CONFIG | {"act_fn": "topk", "jump_relu_threshold": 1.5}).k == 5


@pytest.mark.parametrize("build", ["2024", "later"])
def test_weights_that_have_the_scale_already_are_not_scaled_again(build):
    w, x = drawn(threshold=build == "later"), inputs()
    one = np.sqrt(D_IN)  # the norm to which activations are scaled: nothing is left to do
    if build == "2024":
        config = HYPERPARAMS | {"norm_activation": "inference", "dataset_average_activation_norm": None}
        sae = llama_scope.build(first(), linear(w), config)
        acts, x_hat = openmoss_2024(w, x, lambda pre: pre > 1.5, one, one)
    else:
        sae = llama_scope.build(later(), bare(w), CONFIG | {"norm_activation": "inference"})
        acts, x_hat = openmoss(w, x, lambda pre: pre > w["threshold"], one, one)
    assert_agrees(sae, x, acts, x_hat)
    assert "typical_norm" not in sae.metadata


def test_the_average_norm_of_what_is_read_is_the_typical_norm_of_the_site():
    assert llama_scope.build(first(), linear(drawn(False)), HYPERPARAMS).metadata == {
        "model_name": "meta-llama/Llama-3.1-8B", "typical_norm": READ}
    assert llama_scope.build(later(), bare(drawn()), CONFIG).metadata["typical_norm"] == READ


def test_weights_of_bfloat16_are_folded_in_float32():
    w, x = drawn(threshold=False), raw()
    tensors, config = linear(w, torch.bfloat16), HYPERPARAMS | {"jump_relu_threshold": 1.503}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    sae = llama_scope.build(first(), tensors, config)
    assert {sae.W_enc.dtype, sae.W_dec.dtype, sae.b_enc.dtype, sae.threshold.dtype} == {torch.float32}
    same = llama_scope.build(first(), exact, config)
    assert float(sae.threshold[0]) == pytest.approx(1.503, rel=1e-6)
    torch.testing.assert_close(sae.W_enc.double(), same.W_enc, rtol=1e-6, atol=0)
    torch.testing.assert_close(sae(torch.from_numpy(x)), same(torch.from_numpy(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_decoder_without_a_bias_reconstructs_nothing_from_no_features(bias):
    w = drawn()
    w["threshold"] += 1e3
    tensors = bare(w)
    if not bias:
        del tensors["b_D"]
    sae = llama_scope.build(later(), tensors, CONFIG | {"use_decoder_bias": bias})
    expected = torch.from_numpy(w["b_dec"]) * WRITTEN / D_IN**0.5 * bias
    torch.testing.assert_close(sae(torch.from_numpy(raw()))[0], expected)


@pytest.mark.parametrize("gate", ["jumprelu", "topk", "relu", "2024"])
def test_a_feature_without_a_decoder_row_writes_nothing_and_takes_nobodys_place(gate):
    w, x = drawn(threshold=gate == "jumprelu"), raw()
    w["W_enc"][:, 7] *= 100
    w["W_dec"][7] = 0
    if gate == "2024":
        sae = llama_scope.build(first(), linear(w), HYPERPARAMS)
    else:
        sae = llama_scope.build(later(), bare(w), CONFIG | {"act_fn": gate})
    acts = sae.encode(torch.from_numpy(x))
    assert all(bool(p.isfinite().all()) for p in (*sae.parameters(), sae(torch.from_numpy(x))))
    if gate in ("topk", "2024"):
        assert not acts[:, 7].any()
    if gate == "topk":
        assert (acts > 0).sum(1).min() == 5


def test_an_encoder_as_wide_as_the_model_is_not_mistaken_for_its_transpose():
    w, x = weights("W_enc", "b_enc", "W_dec", "b_dec", d_sae=D_IN), raw()
    acts, x_hat = openmoss_2024(w, x, lambda pre: pre > 1.5, READ, WRITTEN)
    assert_agrees(llama_scope.build(first(), linear(w), HYPERPARAMS | {"d_sae": D_IN}), x, acts, x_hat)
    config = CONFIG | {"expansion_factor": 1, "act_fn": "relu"}
    acts, x_hat = openmoss(w, x, lambda pre: pre > 0, READ, WRITTEN)
    assert_agrees(llama_scope.build(later(), bare(w), config), x, acts, x_hat)


# --- what is refused ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("config", "tells"), [
    ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise', which cannot be folded .* each token"),
    ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'.* each batch"),
    ({"norm_activation": None}, "norm_activation is None"),
    ({"act_fn": "tanh"}, "act_fn is 'tanh'; sae_hooks reads jumprelu, topk, relu"),
    ({"act_fn": "batchtopk"}, "act_fn is 'batchtopk', which compares the tokens of a batch"),
    ({"act_fn": None}, "act_fn is None"),
    ({"act_fn": "topk", "top_k": None, "jump_relu_threshold": 0}, "top_k is missing"),
    ({"act_fn": "topk", "top_k": 0, "jump_relu_threshold": 0}, "top_k must be a whole number from 1"),
    ({"use_glu_encoder": True}, "use_glu_encoder is true"),
    ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder is true"),
    ({"hook_point_in": None}, "hook_point_in is missing"),
    ({"hook_point_in": 3}, "hook_point_in must be a string"),
    ({"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
    ({"d_model": 10**9}, "d_model must be a whole number from 1 to 65536"),
    ({"d_sae": None, "expansion_factor": 1e300}, "expansion_factor must make 1 to"),
    ({"d_sae": None, "expansion_factor": 0}, "expansion_factor must make 1 to"),
])
@pytest.mark.parametrize("layout", ["2024", "later"])
def test_a_config_that_cannot_be_followed_is_refused_by_its_key(config, tells, layout):
    entry, known = (first(), HYPERPARAMS) if layout == "2024" else (later(), CONFIG | {"d_sae": D_SAE})
    tensors = linear(drawn(False)) if layout == "2024" else bare(drawn())
    for does in (lambda c: llama_scope.refine(entry, c), lambda c: llama_scope.build(entry, tensors, c)):
        with pytest.raises(SaeFormatError, match=tells):
            does(known | config)


@pytest.mark.parametrize(("config", "tells"), [
    ({"dataset_average_activation_norm": None}, "no dataset_average_activation_norm of 'in'"),
    ({"dataset_average_activation_norm": {"in": READ}}, "no dataset_average_activation_norm of 'out'"),
    ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "of 'in' must be a norm above 0, got 0"),
    ({"dataset_average_activation_norm": {"in": 1, "out": -2}}, "of 'out' must be a norm above 0, got -2"),
    ({"dataset_average_activation_norm": {"in": True, "out": 1}}, "in must be a number, got True"),
    ({"dataset_average_activation_norm": 3}, "dataset_average_activation_norm must be an object"),
    ({"jump_relu_threshold": None}, "jump_relu_threshold must be a number from 0 to 1e.38, got None"),
    ({"jump_relu_threshold": -0.5}, "jump_relu_threshold must be a number from 0 to 1e.38, got -0.5"),
    ({"jump_relu_threshold": 1e39}, "jump_relu_threshold must be a number from 0 to 1e.38, got 1e.39"),
])
def test_thresholds_and_norms_of_2024_are_checked(config, tells):
    with pytest.raises(SaeFormatError, match=tells):
        llama_scope.build(first(), linear(drawn(False)), HYPERPARAMS | config)


@pytest.mark.parametrize(("norm", "tells"), [
    (None, r"no dataset_average_activation_norm of 'blocks\.3\.hook_mlp_out'"), (torch.tensor(0.0), "above 0, got 0"),
    (torch.tensor(-1.0), "above 0, got -1"), (torch.ones(2), "above 0, got nan")])
def test_norms_in_the_weight_file_are_checked(norm, tells):
    tensors = bare(drawn()) | {"dataset_average_activation_norm.blocks.3.hook_mlp_out": norm}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(SaeFormatError, match=tells):
        llama_scope.build(later(), tensors, CONFIG)


def test_missing_misshapen_and_unknown_tensors_are_all_named():
    tensors = linear(drawn(False))
    with pytest.raises(SaeFormatError, match=r"no encoder\.bias; no decoder\.bias"):
        llama_scope.build(first(), {k: v for k, v in tensors.items() if "bias" not in k}, HYPERPARAMS)
    with pytest.raises(SaeMismatchError, match=r"encoder\.bias is \(39,\), expected \(40,\); decoder\.weight is \(6"):
        llama_scope.build(first(), tensors | {"encoder.bias": tensors["encoder.bias"][:-1],
                                              "decoder.weight": tensors["decoder.weight"][:, :-1]}, HYPERPARAMS)
    with pytest.raises(SaeFormatError, match="act_fn 'jumprelu' has no tensors log_jumprelu_threshold beside encoder"):
        llama_scope.build(first(), linear(drawn()), HYPERPARAMS)
    with pytest.raises(SaeFormatError, match=r"no activation_function\.log_jumprelu_threshold"):
        llama_scope.build(later(), bare(drawn(False)), CONFIG)
    with pytest.raises(SaeFormatError, match=r"has no tensors encoder\.weight beside W_E"):
        llama_scope.build(later(), bare(drawn()) | {"encoder.weight": torch.ones(2)}, CONFIG)
    with pytest.raises(SaeFormatError, match=r"W_E is int64"):
        llama_scope.build(later(), bare(drawn()) | {"W_E": torch.ones(D_IN, D_SAE, dtype=torch.int64)}, CONFIG)
    with pytest.raises(SaeFormatError, match="its config is missing"):
        llama_scope.build(first(), tensors, None)


def test_a_transcoder_whose_second_site_is_unknown_is_refused():
    config = CONFIG | {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_special"}
    with pytest.raises(SaeFormatError, match=r"reads model\.layers\.3\.output, but its config .*'blocks\.3\.hook_s"):
        llama_scope.build(later(), bare(drawn(), config), config)
