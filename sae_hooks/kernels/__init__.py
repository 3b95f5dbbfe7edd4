"""The arithmetic of an SAE on plain tensors: one place that decides which implementation runs.

Shapes: x (n, d_in), W_rows (d_sae, d_in) feature-major, W_dec (d_sae, d_out), CSR = (indptr (n + 1), indices, values).
"""

from .tiles import GPU_TOKENS, linear
from .torch_ops import Csr, decode_sparse, encode_sparse, encode_topk, find_above, nonzero_csr

__all__ = [
    "GPU_TOKENS",
    "Csr",
    "decode_sparse",
    "encode_sparse",
    "encode_topk",
    "find_above",
    "linear",
    "nonzero_csr",
]
