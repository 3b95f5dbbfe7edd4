"""What loading takes: at most the weights and one matrix more, whatever a format has to be folded into it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

D, F = 256, 16_384
PLACE = "blocks.1.hook_resid_post"
TRAINER = {"activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "meta-llama/Tiny",
           "submodule_name": "resid_post_layer_1"}
SCOPE = {"sae_type": "sae", "hook_point_in": PLACE, "hook_point_out": PLACE, "d_model": D, "d_sae": F,
         "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
LOADING = """
import json, sys, warnings
from pathlib import Path
from sae_hooks.hub import load_sae

def resident(what):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(what)).split()[1])

peaks = []
for folder in (sys.argv[1], *sys.argv[1:]):  # the first once more, for what its first run alone takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    sae = load_sae(folder, allow_pickle=True)
    peaks.append((resident("VmHWM") - before) / sum(p.nbytes for p in sae.parameters()))
    del sae
print(json.dumps(peaks[1:]))
"""


def linear(dtype=torch.float32, **biases):
    """The tensors as torch's linear layers keep them, with biases of a width each."""
    found = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F), "decoder.weight": torch.randn(D, F)}
    found |= {name.replace("_", "."): torch.randn(width) for name, width in biases.items()}
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def dictionary_learning(folder, tensors, dict_class):
    folder.mkdir()
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": TRAINER | {"dict_class": dict_class}}))


def gated(folder):
    biases = {"decoder_bias": D, "gate_bias": F, "mag_bias": F, "r_mag": F}
    tensors = {name: tensor for name, tensor in linear().items() if name.endswith("weight")}
    dictionary_learning(folder, tensors | {name: torch.randn(n) for name, n in biases.items()}, "GatedAutoEncoder")


def llama_scope_2024(folder):
    (folder / "checkpoints").mkdir(parents=True)
    save_file(linear(decoder_bias=D), folder / "checkpoints/final.safetensors")
    norms = {"dataset_average_activation_norm": {"in": 9.0, "out": 9.0}, "jump_relu_threshold": 0.5}
    (folder / "hyperparams.json").write_text(json.dumps(SCOPE | norms | {"act_fn": "jumprelu"}))


def llama_scope(folder, dtype=torch.float32):
    folder.mkdir()
    norm = {f"dataset_average_activation_norm.{PLACE}": torch.tensor(9.0)}
    save_file(linear(dtype, decoder_bias=D) | norm, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(SCOPE | {"act_fn": "topk", "top_k": 9}))


def saelens(folder):
    folder.mkdir()
    save_file({"W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "W_dec": torch.randn(F, D),
               "b_dec": torch.randn(D)}, folder / "sae_weights.safetensors")
    config = {"architecture": "topk", "k": 9, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True,
              "d_in": D, "d_sae": F, "metadata": {"hook_name": PLACE}}
    (folder / "cfg.json").write_text(json.dumps(config))


FORMATS = {
    "dictionary_learning's AutoEncoder": lambda f: dictionary_learning(f, linear(bias=D), "AutoEncoder"),
    "in float16": lambda f: dictionary_learning(f, linear(torch.float16, bias=D), "AutoEncoder"),
    "its GatedAutoEncoder": gated,
    "Llama Scope of 2024": llama_scope_2024,
    "Llama Scope since": llama_scope,
    "in bfloat16": lambda f: llama_scope(f, torch.bfloat16),
    "SAELens' TopK by decoder norms": saelens,
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_loading_takes_one_matrix_beside_the_weights(tmp_path):
    for name, write in FORMATS.items():
        write(tmp_path / name)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed goes back at once
    done = subprocess.run([sys.executable, "-c", LOADING, *(tmp_path / name for name in FORMATS)], env=environment,
                          capture_output=True, text=True, check=True)
    peaks = dict(zip(FORMATS, json.loads(done.stdout), strict=True))
    assert {name: round(peak, 2) for name, peak in peaks.items() if peak > 1.6} == {}
