"""SAE arithmetic in PyTorch operations, for any device.

Products accumulate in float32 (float64 if both sides are) whatever the weights are stored in: half-precision rows are
widened a tile at a time, because a rounding error at the threshold is an error of the threshold's size, and because
half-precision matrix products are 5 to 14 times slower than float32 on CPUs without such instructions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Csr = tuple[Tensor, Tensor, Tensor]
FEATURES_PER_TILE = 4096
TOKENS_PER_TILE = 1024  # a tile of pre-activations is at most 16 MB in float32


def linear(x: Tensor, W_rows: Tensor, bias: Tensor) -> Tensor:
    """Pre-activations (n, d_sae) of x (n, d_in): x @ W_rows.T + bias, in float32 or wider."""
    dtype = wide(x, W_rows)
    if W_rows.dtype == dtype:
        return F.linear(x.to(dtype), W_rows, bias.to(dtype))
    tiles = [F.linear(x.to(dtype), W_rows[f].to(dtype), bias[f].to(dtype)) for f in tile(len(W_rows))]
    return torch.cat(tiles, dim=-1)


def encode_sparse(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor) -> Csr:
    """CSR of the features with pre > threshold, indices ascending in each row; never holds (n, d_sae)."""
    parts = [
        _encode_tile(x, t, W_rows, bias, threshold, f) for t in tile(len(x), TOKENS_PER_TILE) for f in tile(len(W_rows))
    ]
    rows, columns, values = _joined(parts, x)
    order = torch.argsort(rows, stable=True)
    return row_pointers(rows, len(x)), columns[order], values[order]


def encode_topk(x: Tensor, W_rows: Tensor, bias: Tensor, k: int) -> Csr:
    """CSR of the k largest positive pre-activations of each row, indices ascending; holds (TOKENS_PER_TILE, d_sae)."""
    rows, columns, values = _joined([_topk_tile(x, t, W_rows, bias, k) for t in tile(len(x), TOKENS_PER_TILE)], x)
    return row_pointers(rows, len(x)), columns, values


def nonzero_csr(acts: Tensor) -> Csr:
    """CSR of the non-zero entries of acts (n, d_sae)."""
    rows, columns = acts.nonzero(as_tuple=True)
    return row_pointers(rows, len(acts)), columns, acts[rows, columns]


def decode_sparse(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction (n, d_out) from CSR features: sum of value times decoder row, plus b_dec; float32 or wider."""
    dtype = wide(values, W_dec)
    if indices.numel() == 0:
        return b_dec.to(dtype).expand(len(indptr) - 1, -1).clone()
    if W_dec.dtype != dtype:  # widen only the rows that fire
        used, indices = torch.unique(indices, return_inverse=True)
        W_dec = W_dec[used].to(dtype)
    x_hat = F.embedding_bag(
        indices, W_dec, indptr, mode="sum", per_sample_weights=values.to(dtype), include_last_offset=True
    )
    return x_hat + b_dec.to(dtype)


def wide(x: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where both sides are."""
    both = x.dtype == weights.dtype == torch.float64
    return torch.float64 if both else torch.float32


def tile(length: int, size: int = FEATURES_PER_TILE) -> Iterator[slice]:
    """Slices that cover range(length)."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def row_pointers(rows: Tensor, n: int) -> Tensor:
    """CSR row pointers (n + 1) of sorted or unsorted row numbers."""
    counts = torch.bincount(rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _encode_tile(x: Tensor, t: slice, W_rows: Tensor, bias: Tensor, threshold: Tensor, f: slice) -> Csr:
    pre = linear(x[t], W_rows[f], bias[f])
    rows, columns = (pre > threshold[f]).nonzero(as_tuple=True)
    return rows + t.start, columns + f.start, pre[rows, columns]


def _topk_tile(x: Tensor, t: slice, W_rows: Tensor, bias: Tensor, k: int) -> Csr:
    values, columns = linear(x[t], W_rows, bias).relu().topk(k, dim=-1)
    columns, order = columns.sort(dim=-1)
    values = values.gather(-1, order)
    rows, place = (values > 0).nonzero(as_tuple=True)
    return rows + t.start, columns[rows, place], values[rows, place]


def _joined(parts: list[Csr], x: Tensor) -> Csr:
    """(rows, columns, values) of all tiles, one after the other."""
    return tuple(torch.cat(part) for part in zip(*parts, strict=True)) if parts else _nothing(x)  # type: ignore[return-value]


def _nothing(x: Tensor) -> Csr:
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return none, none, torch.zeros(0, device=x.device)
