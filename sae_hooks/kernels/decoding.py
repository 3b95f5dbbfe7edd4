"""From activations or features to reconstructions: by the rows of what is active, or by a dense product."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .cpu_products import addmm, is_much_decoded
from .custom_ops import fake_decoded, fake_decoded_csr, fake_reconstruction, traceable
from .encoding import find_largest
from .screen import Candidates, decided, screens
from .search import above, count, exceeding, gated, keep_largest, marked, mask_, not_zero, on_cpu
from .segments import triton_for, weighted_sums
from .signs import Signs, signs_for
from .tiles import (
    GPU_SIZE,
    affine,
    by_tokens,
    cast,
    half_product,
    has_all_features,
    held_together,
    is_one_tile,
    linear,
    multiplies_halves,
    one_ahead,
    product_of_parts,
    ready,
    room_for_tiles,
    token_tiles,
    unadded,
    wide,
)
from .tracing import autocasts, is_bare
from .triplets import Csr, Triplets, by_row, compressed, moved

CROWDED, GPU_CROWDED = 0.12, 0.04  # share of features active from which the dense product is the quicker decoder
SMALL = 2**23  # products of one decoding up to which the dense one is on CPUs, whatever is active ...
LEAST = 8  # ... where fewer tokens count as so many: then it is a matter of reading W_dec
GPU_FEW, GPU_FEW_SIZE = 64, 2**23  # tokens, and pre-activations, up to which a GPU lists what is active uncounted
GPU_SMALL = 2**33  # products of one decoding up to which it counts nothing, either, since the dense one is quicker


@traceable(
    "(Tensor x, Tensor W_rows, Tensor bias, Tensor threshold, Tensor W_dec, Tensor b_dec) -> Tensor",
    fake_reconstruction,
)
def reconstruct(
    x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """x_hat (n, d_out), float32 or wider, of x (n, d_in): encoded and decoded, never holding (n, d_sae).

    Each tile of pre-activations is decoded by the rows of its active features, or by a dense product where so many are
    active, or so little is to be done, that this is the quicker way. Tokens that are not finite stay so.
    """
    dtype = wide(x, W_rows)
    x, bias, b_dec = ready(x, W_rows), cast(bias, dtype), cast(b_dec, dtype)
    if (triton := triton_for(x, W_rows, W_dec)) is not None and has_all_features(x, W_rows):
        if is_few(x, W_dec):
            few: Tensor = triton.reconstruct_few(*unadded(x, W_rows, bias), threshold, W_dec, b_dec)
            return few
        if is_little(x, W_dec) and is_one_tile(x, W_rows):
            return _decoded_whole(*unadded(x, W_rows, bias), threshold, W_dec, b_dec)
        if not screens(x, W_rows):
            begun = (_decoded_ahead(x[t], W_rows, bias, threshold, W_dec, b_dec) for t in token_tiles(x, W_rows))
            parts = [decoded() for decoded in one_ahead(begun)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
    if triton is None and is_little(x, W_dec):
        return _dense(b_dec, _gated(linear(x, W_rows, bias), None, threshold), W_dec)
    if is_one_tile(x, W_rows):
        found = _sparse_or_dense(x, W_rows, bias, threshold)
        nothing = None if x.is_cpu else nothing_or_nan(x, dtype)  # a GPU does that before one waits for it
        part = found()
        if isinstance(part, Tensor):
            return _dense(b_dec, part, W_dec)
        nothing = nothing_or_nan(x, dtype) if nothing is None else nothing
        return weighted_sums(*compressed(part, len(x)), W_dec, b_dec, nothing)
    return _reconstruct_in_tiles(x, W_rows, bias, threshold, W_dec, b_dec)


def splice_few(
    x: Tensor,
    W_rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    old: Tensor,
    chosen: Tensor | None,
) -> Tensor | None:
    """old (..., d_out) with `reconstruct` of x (..., d_in) in its place, in old's dtype: where chosen (...), boolean,
    is True, or everywhere. None where that is not done at once, as it is on GPUs for few tokens, without gradients, or
    old has not as many rows of d_out."""
    if (triton := triton_for(x, W_rows, bias, threshold, W_dec, b_dec, old)) is None:
        return None
    rows = x.reshape(-1, W_rows.shape[1])
    if not is_few(rows, W_dec) or not is_bare(x) or old.numel() != len(rows) * W_dec.shape[1]:
        return None
    dtype = wide(rows, W_rows)
    pre, rest = unadded(ready(rows, W_rows), W_rows, cast(bias, dtype))
    spliced: Tensor = triton.reconstruct_few(pre, rest, threshold, W_dec, cast(b_dec, dtype), old, chosen)
    return spliced


def _reconstruct_in_tiles(
    x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """`reconstruct` of some tokens and features after the other."""
    out, signs = b_dec + nothing_or_nan(x, b_dec.dtype), signs_for(x, W_rows, bias, threshold)
    room = room_for_tiles(x, W_rows, bias)

    def begun(part: Tensor, f: slice) -> Callable[[], Triplets | Tensor]:
        return _sparse_or_dense(part, W_rows[f], bias[f], threshold[f], room, signs, ahead=True)

    for t, of_tokens in by_tokens(x, W_rows, begun):
        sparse = []
        for _, f, found in of_tokens:
            part = found()
            if isinstance(part, Tensor):
                out[t] = _dense(out[t], part, W_dec[f])
            else:
                sparse.append(moved(part, 0, f.start))
        if sparse:
            out[t] += _sums(by_row(sparse, t.stop - t.start, bias), t.stop - t.start, W_dec)
    return out


@traceable(
    "(Tensor x, Tensor W_rows, Tensor bias, int k, Tensor W_dec, Tensor b_dec) -> Tensor", fake_reconstruction
)
def reconstruct_topk(x: Tensor, W_rows: Tensor, bias: Tensor, k: int, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """The same, of the k largest positive pre-activations of each row; holds no more of them than `encode_topk`. No GPU
    waits: how many are active is known."""
    if x.is_cpu and is_little(x, W_dec):
        acts = keep_largest(linear(x, W_rows, bias), k)
        return _dense(cast(b_dec, acts.dtype), acts, W_dec)
    dtype = wide(x, W_rows)
    if x.is_cpu:
        found = compressed(find_largest(x, W_rows, bias, k), len(x))
        return weighted_sums(*found, W_dec, cast(b_dec, dtype), nothing_or_nan(x, dtype))
    parts = [_sums_of_largest(linear(x[t], W_rows, bias), k, W_dec) for t in held_together(x, len(W_rows))]
    sums = torch.cat(parts) if parts else x.new_zeros(0, W_dec.shape[1], dtype=dtype)
    return sums.add_(b_dec).add_(nothing_or_nan(x, dtype))


@traceable("(Tensor acts, Tensor W_dec, Tensor b_dec) -> Tensor", fake_decoded)
def decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x_hat (n, d_out), float32 or wider, of acts (n, d_sae): by the rows of the active features, or by a dense product
    where that is the quicker way. No gradients."""
    dtype = wide(acts, W_dec)
    if is_little(acts, W_dec):
        return _dense(cast(b_dec, dtype), cast(acts, dtype), W_dec)
    out = cast(b_dec, dtype).repeat(len(acts), 1)
    for t in held_together(acts, len(W_dec)):
        part = cast(acts[t], dtype)
        active = not_zero(part)
        if count(active) > _most(part, part.numel()):
            out[t] = _dense(out[t], part, W_dec)
        else:
            out[t] += _sums(marked(part, active), len(part), W_dec)
    return out


def decoded_at_once(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor | None:
    """What `decode` makes of acts (n, d_sae), (n, d_out), where that is little, as `at_once` has it; else None."""
    if torch.compiler.is_compiling() or not decodes_at_once(acts, W_dec, b_dec) or autocasts(acts):
        return None
    return torch.addmm(b_dec, cast(acts, torch.float32), W_dec)


def decodes_at_once(x: Tensor, W_dec: Tensor, b_dec: Tensor) -> bool:
    """Whether decoding the tokens of x (n, ...) is, but for torch.compile and torch.autocast, by one plain product."""
    much = x.is_cpu and is_much_decoded(x, W_dec)
    return W_dec.dtype is b_dec.dtype is torch.float32 and is_little(x, W_dec) and not much


@traceable(
    "(Tensor indptr, Tensor indices, Tensor values, Tensor W_dec, Tensor b_dec) -> Tensor", fake_decoded_csr
)
def decode_sparse(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction (n, d_out) from CSR features: sum of value times decoder row, plus b_dec; float32 or wider."""
    return weighted_sums(indptr, indices, values, W_dec, cast(b_dec, wide(values, W_dec)))


def _decoded_ahead(
    x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Callable[[], Tensor]:
    """What gives `reconstruct` of tokens that are taken together with all features. Before a GPU is asked how many are
    active, it lists as many as are quickly decoded by their rows, and decodes them if those were all."""
    pre, rest = unadded(x, rows, bias)
    triton = triton_for(pre)
    assert triton is not None
    found, most = triton.Above(pre, threshold, rest, ahead=True), max(_most(pre, pre.numel()), 0)
    listed: Csr = found.at_most(most)
    out = weighted_sums(*listed, W_dec, b_dec, nothing_or_nan(x, b_dec.dtype))
    return lambda: out if found.total() <= most else _decoded_whole(pre, rest, threshold, W_dec, b_dec)


def _decoded_whole(pre: Tensor, rest: Tensor | None, threshold: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """b_dec (d_out) plus all activations, of what `unadded` gave, times W_dec: (n, d_out); pre's memory is used up."""
    triton = triton_for(pre, W_dec)
    if triton is None or W_dec.dtype != torch.bfloat16 or not multiplies_halves(pre, W_dec):
        return _dense(b_dec, _gated(pre, rest, threshold), W_dec)
    parts = half_product(triton.gated_parts(pre, rest, threshold), W_dec.T)
    return parts.view(3, len(pre), -1).sum(0).add_(b_dec)


def _gated(pre: Tensor, rest: Tensor | None, threshold: Tensor) -> Tensor:
    """All activations, in pre's memory, of what `unadded` gave."""
    acts = pre if rest is None else pre.add_(rest)
    return gated(acts, threshold, acts)


def _sparse_or_dense(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    room: Tensor | None = None,
    signs: Signs | None = None,
    ahead: bool = False,
) -> Callable[[], Triplets | Tensor]:
    """What gives what is active among tokens and features that are taken together, and perhaps more with activations of
    0; all activations, where that is much: in room, if there is one. ahead: see `_in_tile`."""
    if screens(x, rows):
        screened = Candidates(x, rows, bias, threshold, ahead)

        def screened_or_dense() -> Triplets | Tensor:
            if screened.total() > _most(bias, len(x) * len(rows)):
                return _gated(affine(x, rows, bias, room=room), None, threshold)
            tokens, features, values = screened.exact()
            return tokens, features, torch.where(values > threshold.index_select(0, features), values, 0)

        return screened_or_dense
    if (triton := triton_for(x, rows)) is None:
        return partial(_marked_or_dense, x, rows, bias, threshold, room, signs)
    pre, rest = unadded(x, rows, bias)
    found = triton.Above(pre, threshold, rest, ahead=ahead)

    def listed_or_dense() -> Triplets | Tensor:
        if found.total() <= _most(pre, pre.numel()):
            listed: Triplets = found.listed()
            return listed
        return _gated(pre, rest, threshold)

    return listed_or_dense


def _marked_or_dense(
    x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, room: Tensor | None, signs: Signs | None
) -> Triplets | Tensor:
    """The same at once, in PyTorch's operations."""
    if signs is not None and (found := signs.candidates(x, rows, bias, threshold)) is not None:
        return decided(found, threshold)
    pre = affine(x, rows, bias, room=room)
    marks = exceeding(pre, threshold)
    return mask_(pre, marks) if count(marks) > _most(pre, pre.numel()) else above(pre, threshold, marks)


def nothing_or_nan(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1): 0 for the tokens of x (n, d_in) that are finite, nan for the others, which a search would hide."""
    return x.sum(1, keepdim=True, dtype=dtype).mul_(0)


def is_little(x: Tensor, W_dec: Tensor) -> bool:
    """Whether decoding the tokens of x (n, ...) is too little for counting first what is active. No GPU waits then."""
    n, size = x.shape[0], W_dec.numel()
    if x.is_cpu:
        return max(n, LEAST) * size < SMALL
    return is_few(x, W_dec) or (n * size <= GPU_SMALL and n * W_dec.shape[0] <= GPU_SIZE)


def is_few(x: Tensor, W_dec: Tensor) -> bool:
    """Whether the tokens of x (n, ...) are so few that a GPU lists what is active where none of it is counted."""
    n = x.shape[0]
    return n <= GPU_FEW and n * W_dec.shape[0] <= GPU_FEW_SIZE


def _most(where: Tensor, of: int) -> int:
    """How many may be active before a dense product decodes them more quickly."""
    return int((CROWDED if on_cpu(where) else GPU_CROWDED) * of)


def _dense(out: Tensor, acts: Tensor, W_dec: Tensor) -> Tensor:
    """out + acts @ W_dec, whatever torch.autocast says."""
    if autocasts(acts):
        with torch.autocast(acts.device.type, enabled=False):
            return _dense(out, acts, W_dec)
    if W_dec.dtype == torch.bfloat16 and acts.dtype == torch.float32 and multiplies_halves(acts, W_dec):
        return out + product_of_parts(acts, W_dec)
    return addmm(out, acts, cast(W_dec, acts.dtype))


def _sums(found: Triplets, n: int, W_dec: Tensor) -> Tensor:
    """What n rows with these entries are decoded to, without b_dec."""
    return weighted_sums(*compressed(found, n), W_dec)


def _sums_of_largest(pre: Tensor, k: int, W_dec: Tensor) -> Tensor:
    """What the k largest positive entries of each row of pre are decoded to, without b_dec; in no order."""
    values, columns = pre.topk(k, dim=-1, sorted=False)
    starts = torch.arange(len(pre) + 1, device=pre.device) * k  # known before any is found: no GPU waits
    return weighted_sums(starts, columns.reshape(-1), values.clamp(min=0).reshape(-1), W_dec)
