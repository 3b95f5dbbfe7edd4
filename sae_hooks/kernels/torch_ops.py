"""SAE arithmetic in PyTorch operations, for any device; on CPUs numpy finds what is above a threshold."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .tiles import affine, feature_tiles, linear, slices, token_tiles, wide

Csr = tuple[Tensor, Tensor, Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
TOPK_SIZE = 2**22  # pre-activations of the tokens that TopK takes together: 16 MB in float32


def encode_sparse(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor) -> Csr:
    """CSR of the features with pre > threshold, indices ascending in each row; never holds (n, d_sae).

    pre is what `linear` makes of the same x, bit for bit. nan is above no threshold.
    """
    found = find_above(x, W_rows, bias, threshold)
    assert found is not None
    return _compressed(found, len(x))


def find_above(
    x: Tensor,
    W_rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    *,
    most: float = 1.0,
    multiply: torch.dtype | None = None,
) -> Triplets | None:
    """(rows, columns, values) of the features with pre > threshold (d_sae), by row, then by column.

    None as soon as a tile of tokens has more than the share `most` of its features above. Products are made in the
    dtype `multiply`, where one is given, but added to and compared in float32 or wider.
    """
    dtype = wide(x, W_rows)
    x, bias = x.to(dtype), bias.to(dtype)
    found = []
    for t in token_tiles(x):
        rows, columns, values = _above(x[t], W_rows, bias, threshold, multiply)
        if len(rows) > most * (t.stop - t.start) * len(W_rows):
            return None
        found.append((rows + t.start if t.start else rows, columns, values))
    return _joined(found, x)


def encode_topk(x: Tensor, W_rows: Tensor, bias: Tensor, k: int) -> Csr:
    """CSR of the k largest positive pre-activations of each row, indices ascending; holds TOPK_SIZE pre-activations, or
    those of one token."""
    found = []
    for t in slices(len(x), max(TOPK_SIZE // len(W_rows), 1)):
        rows, columns, values = _largest(x[t], W_rows, bias, k)
        found.append((rows + t.start, columns, values))
    return _compressed(_joined(found, x.to(wide(x, W_rows))), len(x))


def nonzero_csr(acts: Tensor) -> Csr:
    """CSR of the non-zero entries of acts (n, d_sae)."""
    rows, columns = acts.nonzero(as_tuple=True)
    return _compressed((rows, columns, acts[rows, columns]), len(acts))


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


def _above(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor, multiply: torch.dtype | None) -> Triplets:
    """find_above for one tile of tokens."""
    found = [
        _in_tile(affine(x, W_rows[f], bias[f], multiply), threshold[f], f.start) for f in feature_tiles(x, len(W_rows))
    ]
    rows, columns, values = _joined(found, x)
    if len(found) > 1:
        rows, order = torch.sort(rows, stable=True)  # half a percent of the products' time
        columns, values = columns[order], values[order]
    return rows, columns, values


def _in_tile(pre: Tensor, threshold: Tensor, first: int) -> Triplets:
    """find_above in pre-activations whose first feature is `first`."""
    if pre.device.type != "cpu":
        rows, columns = (pre > threshold).nonzero(as_tuple=True)
        return rows, columns + first, pre[rows, columns]
    at = np.flatnonzero(pre.detach().numpy() > threshold.detach().numpy())  # torch's nonzero takes several times longer
    places = [torch.from_numpy(part) for part in np.divmod(at, pre.shape[1])]
    values = pre.view(-1).take(torch.from_numpy(at))
    return places[0], places[1] + first if first else places[1], values


def _largest(x: Tensor, W_rows: Tensor, bias: Tensor, k: int) -> Triplets:
    """The k largest positive pre-activations of each row, by row, then by column."""
    values, columns = linear(x, W_rows, bias).relu().topk(k, dim=-1, sorted=False)
    columns, order = columns.sort(dim=-1)
    values = values.gather(-1, order)
    rows, places = (values > 0).nonzero(as_tuple=True)
    return rows, columns[rows, places], values[rows, places]


def _joined(parts: list[Triplets], like: Tensor) -> Triplets:
    """The entries of all parts, one after the other; where there is none, values like `like`."""
    if not parts:
        none = torch.zeros(0, dtype=torch.int64, device=like.device)
        return none, none, like.new_zeros(0)
    if len(parts) == 1:
        return parts[0]
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows, columns, values


def _compressed(found: Triplets, n: int) -> Csr:
    """The CSR of n rows with these entries, which are in order."""
    rows, columns, values = found
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device)), columns, values
