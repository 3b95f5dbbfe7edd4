"""The arithmetic of an SAE on plain tensors: one place that decides which implementation runs.

Shapes: x (n, d_in), W_rows (d_sae, d_in) feature-major, W_dec (d_sae, d_out), CSR = (indptr (n + 1), indices, values).
"""

from .torch_ops import Csr, decode_sparse, encode_sparse, encode_topk, linear, nonzero_csr

__all__ = ["Csr", "decode_sparse", "encode_sparse", "encode_topk", "linear", "nonzero_csr"]
