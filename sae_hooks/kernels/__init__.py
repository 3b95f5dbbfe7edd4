"""The arithmetic of an SAE on plain tensors: one place that decides which implementation runs.

Shapes: x (n, d_in), W_rows (d_sae, d_in) feature-major, W_dec (d_sae, d_out), CSR = (indptr (n + 1), indices, values).
"""

from .custom_ops import OUTSIDE_CUDA_GRAPHS
from .decoding import (
    decode,
    decode_sparse,
    decoded_at_once,
    decodes_at_once,
    is_little,
    reconstruct,
    reconstruct_topk,
    splice_few,
)
from .encoding import encode, encode_sparse, encode_topk, find_above, find_largest, nonzero_csr
from .gradients import encode_with_gradient, pre_activations, reconstruct_with_gradient
from .search import above, gated, keep_largest, largest, topk_gate
from .segments import (
    adam_rows,
    dots,
    longest_first,
    remove_along,
    stable_order,
    starts_of,
    triton_for,
    weighted_sums,
)
from .tiles import affine, at_once, cast, held_together, linear, product, slices, wide
from .tracing import autocasts, is_bare, wants_gradient
from .triplets import Csr, Triplets, compressed

__all__ = [
    "OUTSIDE_CUDA_GRAPHS",
    "Csr",
    "Triplets",
    "above",
    "adam_rows",
    "affine",
    "at_once",
    "autocasts",
    "cast",
    "compressed",
    "decode",
    "decode_sparse",
    "decoded_at_once",
    "decodes_at_once",
    "dots",
    "encode",
    "encode_sparse",
    "encode_topk",
    "encode_with_gradient",
    "find_above",
    "find_largest",
    "gated",
    "held_together",
    "is_bare",
    "is_little",
    "keep_largest",
    "largest",
    "linear",
    "longest_first",
    "nonzero_csr",
    "pre_activations",
    "product",
    "reconstruct",
    "reconstruct_topk",
    "reconstruct_with_gradient",
    "remove_along",
    "slices",
    "splice_few",
    "stable_order",
    "starts_of",
    "topk_gate",
    "triton_for",
    "wants_gradient",
    "weighted_sums",
    "wide",
]
