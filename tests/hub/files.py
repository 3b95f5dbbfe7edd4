"""Files as the dialects have them, and as nobody should."""

import json
import struct

import numpy as np

D, F = 4, 32


def arrays(d_in=D, d_sae=F, seed=0, d_out=None):
    """Gemma Scope's five arrays, float32, with positive thresholds."""
    draw = np.random.default_rng(seed)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out or d_in), "b_enc": (d_sae,), "b_dec": (d_out or d_in,),
              "threshold": (d_sae,)}
    found = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"threshold": np.abs(found["threshold"])}


def write_npz(path, found=None, **sizes):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(arrays(**sizes) if found is None else found))
    return path


def safetensors_file(header, data=b"", length=None):
    """The bytes of a safetensors file with any header (a dict, or bytes as they are) and any declared length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data
