"""Folders as sparsify's save_to_disk leaves them, and what its SAEs compute, in float64 numpy."""

import json

import numpy as np
import torch
from formats.equations import D_IN, D_SAE, as_tensors, decode, topk, weights
from safetensors.torch import save_file

K = 4
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
CONFIG = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K,
          "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN}
AUGUST_2024 = {"expansion_factor": 32, "normalize_decoder": True, "k": K, "signed": False, "d_in": D_IN}
SKIP = {"transcode": True, "skip_connection": True}


def named(w):
    """Arrays of the usual names and shapes as the file has them."""
    turned = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    return {k: np.ascontiguousarray(v) for k, v in (w | turned).items() if k not in ("W_enc", "b_enc")}


def write(folder, w=None, config=CONFIG, dtype=torch.float32):
    """A folder as save_to_disk leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = as_tensors(named(weights(*PLAIN) if w is None else w), dtype)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def computed(w, x, *, subtract, k=K):
    """sparsify's sparse_coder.py: (acts, x_hat). The skip multiplies from the left."""
    acts = topk(w, x - w["b_dec"] if subtract else x, k)
    return acts, decode(w, acts) + (x @ w["W_skip"].T if "W_skip" in w else 0)
