"""Configs and tensors as OpenMOSS keeps them in both layouts, of tiny SAEs."""

import numpy as np
import torch
from formats.equations import D_IN, D_SAE, inputs, weights

from sae_hooks.formats import llama_scope

BASE = "OpenMOSS-Team/Llama3_1-8B-Base-LXR-8x"
READ, WRITTEN = 10.8125, 3.390625  # average norms; sqrt(6) is 2.4
# of fnlp/Llama3_1-8B-Base-LXR-8x, Llama3_1-8B-Base-L15R-8x/hyperparams.json, but for the sizes and the second norm
HYPERPARAMS = {
    "device": "cuda:0", "dtype": "torch.bfloat16", "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post", "use_decoder_bias": True, "expansion_factor": 8, "d_model": D_IN,
    "apply_decoder_bias_to_pre_encoder": False, "d_sae": D_SAE, "act_fn": "jumprelu", "jump_relu_threshold": 1.5,
    "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": READ, "out": WRITTEN},
    "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": 5}
CONFIG = {
    "sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "use_decoder_bias": True, "top_k": 5,
    "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
    "use_triton_kernel": False, "jumprelu_threshold_window": 2.0, "use_glu_encoder": False,
    "hook_point_in": "blocks.3.ln2.hook_normalized", "hook_point_out": "blocks.3.hook_mlp_out"}
SCOPE_2 = "OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B"


def first(folder="L15R", repo=BASE):
    """The entry of a folder in the layout of 2024; this one's name tells no width, as the tests' are tiny."""
    [entry] = llama_scope.entries({f"{folder}/checkpoints/final.safetensors": 9, f"{folder}/hyperparams.json": 9}, repo)
    return entry


def later(folder="tiny", repo=SCOPE_2):
    [entry] = llama_scope.entries({f"{folder}/sae_weights.safetensors": 9, f"{folder}/config.json": 9}, repo)
    return entry


def drawn(threshold=True):
    """Weights whose decoder rows have norms from 0.5 to 2.5."""
    w = weights("W_enc", "b_enc", "W_dec", "b_dec", *["threshold"] * threshold)
    norms = np.linspace(0.5, 2.5, D_SAE) / np.linalg.norm(w["W_dec"], axis=1)
    return w | {"W_dec": w["W_dec"] * norms[:, None]}


def linear(w, dtype=torch.float64):
    """As torch.nn.Linear keeps them."""
    t = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
         "decoder.bias": w["b_dec"]}
    if "threshold" in w:
        t["log_jumprelu_threshold"] = np.log(w["threshold"])
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype) for name, array in t.items()}


def bare(w, config=CONFIG, norms=(READ, WRITTEN)):
    """As llamascopium keeps them."""
    t = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    if "threshold" in w:
        t["activation_function.log_jumprelu_threshold"] = np.log(w["threshold"])
    of = zip((config["hook_point_in"], config["hook_point_out"]), norms, strict=True)
    t |= {f"dataset_average_activation_norm.{hook}": np.float64(norm) for hook, norm in of}
    return {name: torch.from_numpy(np.array(array)) for name, array in t.items()}


def raw(scale=READ):
    """Activations of about the average norm that is read."""
    return inputs() * scale / np.sqrt(D_IN)
