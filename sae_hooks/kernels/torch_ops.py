"""SAE arithmetic in PyTorch operations, for any device."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from .custom_ops import fake_csr, fake_decoded, fake_decoded_csr, fake_reconstruction, traceable
from .screen import candidates, decided, screens
from .search import Triplets, above, by_numpy, count, exceeding, gated, keep_largest, largest, marked, on_cpu
from .segments import stable_order, triton_for, weighted_sums
from .tiles import (
    affine,
    affine_tiles,
    cast,
    feature_tiles,
    has_all_features,
    is_one_tile,
    linear,
    multiplies_halves,
    product_of_halves,
    product_of_parts,
    ready,
    room_for_tiles,
    slices,
    token_tiles,
    wide,
)

Csr = tuple[Tensor, Tensor, Tensor]
T = TypeVar("T")
TOPK_SIZE, GPU_TOPK_SIZE = 2**22, 2**28  # pre-activations of tokens that TopK takes together: 16 MB and 1 GB
CROWDED, GPU_CROWDED = 0.12, 0.02  # share of features active from which the dense product is the quicker decoder
SMALL = 2**23  # products of one decoding up to which the dense one is on CPUs, whatever is active ...
LEAST = 8  # ... where fewer tokens count as so many: then it is a matter of reading W_dec
GPU_FEW, GPU_FEW_SIZE = 64, 2**23  # tokens, and their features, for which a GPU is not asked what is active


def encode(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """What `linear` makes of x (n, d_in) where it is above threshold, else 0: (n, d_sae). No gradients."""
    bias = cast(bias, wide(x, W_rows))
    x = ready(x, W_rows)
    if is_one_tile(x, W_rows):
        pre = affine(x, W_rows, bias)
        return gated(pre, exceeding(pre, threshold))
    acts = bias.new_empty(len(x), len(W_rows))
    for t, f, pre in affine_tiles(x, W_rows, bias):
        gated(pre, exceeding(pre, threshold[f]), acts[t, f])
    return acts


@traceable("(Tensor x, Tensor W_rows, Tensor bias, Tensor threshold) -> (Tensor, Tensor, Tensor)", fake_csr)
def encode_sparse(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor) -> Csr:
    """CSR of the features with pre > threshold, indices ascending in each row; never holds (n, d_sae).

    pre is what `linear` makes of the same x, bit for bit; on GPUs, where many tokens are screened, but for rounding in
    float32. nan is above no threshold.
    """
    return compressed(find_above(x, W_rows, bias, threshold), len(x))


def find_above(
    x: Tensor,
    W_rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    *,
    multiply: torch.dtype | None = None,
) -> Triplets:
    """(rows, columns, values) of the features with pre > threshold (d_sae), by row, then by column.

    Products are made in the dtype `multiply`, where one is given, but added to and compared in float32 or wider.
    """
    bias = cast(bias, wide(x, W_rows))
    x = ready(x, W_rows)
    if multiply is None and screens(x, W_rows):
        return decided(_in_tiles(x, W_rows, bias, threshold, candidates), threshold)
    if is_one_tile(x, W_rows):
        return _in_tile(x, W_rows, bias, threshold, multiply)()
    room = room_for_tiles(x, W_rows, bias)
    return _in_tiles(x, W_rows, bias, threshold, partial(_in_tile, multiply=multiply, room=room))


def _in_tiles(
    x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor, search: Callable[..., Callable[[], Triplets]]
) -> Triplets:
    """What a search gives that is begun in one tile after the other."""
    found, ahead = [], not is_one_tile(x, W_rows)

    def begun(t: slice, f: slice) -> Callable[[], Triplets]:
        return search(x[t], W_rows[f], bias[f], threshold[f], ahead=ahead)

    for t, of_tokens in _by_tokens(x, W_rows, begun):
        parts = [_moved(listed(), 0, f.start) for _, f, listed in of_tokens]
        found.append(_moved(_by_row(parts, t.stop - t.start, bias), t.start, 0))
    return _joined(found, bias)


@traceable("(Tensor x, Tensor W_rows, Tensor bias, int k) -> (Tensor, Tensor, Tensor)", fake_csr)
def encode_topk(x: Tensor, W_rows: Tensor, bias: Tensor, k: int) -> Csr:
    """CSR of the k largest positive pre-activations of each row, indices ascending; holds TOPK_SIZE pre-activations, or
    those of one token."""
    found = []
    for t in _held(x, len(W_rows)):
        found.append(_moved(largest(linear(x[t], W_rows, bias), k), t.start, 0))
    return compressed(_joined(found, x.to(wide(x, W_rows))), len(x))


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
    if is_little(x, W_dec):
        if (triton := triton_for(x, W_rows, W_dec)) is not None:
            decoded: Tensor = triton.reconstruct_few(*_unadded(x, W_rows, bias), threshold, W_dec, b_dec)
            return decoded
        pre = linear(x, W_rows, bias)
        return _dense(b_dec, pre * (pre > threshold), W_dec)
    if has_all_features(x, W_rows) and not screens(x, W_rows) and triton_for(x, W_rows, W_dec) is not None:
        tiles_of_tokens = (_decoded_ahead(x[t], W_rows, bias, threshold, W_dec, b_dec) for t in token_tiles(x, W_rows))
        decoded_parts = [checked() for checked in _one_ahead(tiles_of_tokens)]
        return decoded_parts[0] if len(decoded_parts) == 1 else torch.cat(decoded_parts)
    if is_one_tile(x, W_rows):
        found, nothing = _sparse_or_dense(x, W_rows, bias, threshold), _nothing(x, dtype)
        part = found()
        if isinstance(part, Tensor):
            return _dense(b_dec, part, W_dec)
        return weighted_sums(*compressed(part, len(x)), W_dec, b_dec, nothing)
    return _reconstruct_in_tiles(x, W_rows, bias, threshold, W_dec, b_dec)


def _reconstruct_in_tiles(
    x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """`reconstruct` of some tokens and features after the other."""
    out, room = b_dec + _nothing(x, b_dec.dtype), room_for_tiles(x, W_rows, bias)

    def begun(t: slice, f: slice) -> Callable[[], Triplets | Tensor]:
        return _sparse_or_dense(x[t], W_rows[f], bias[f], threshold[f], room, ahead=True)

    for t, of_tokens in _by_tokens(x, W_rows, begun):
        sparse = []
        for _, f, found in of_tokens:
            part = found()
            if isinstance(part, Tensor):
                out[t] = _dense(out[t], part, W_dec[f])
            else:
                sparse.append(_moved(part, 0, f.start))
        if sparse:
            out[t] += _sums(_by_row(sparse, t.stop - t.start, bias), t.stop - t.start, W_dec)
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
    parts = [_sums_of_largest(linear(x[t], W_rows, bias), k, W_dec) for t in _held(x, len(W_rows))]
    dtype = wide(x, W_rows)
    sums = torch.cat(parts) if parts else x.new_zeros(0, W_dec.shape[1], dtype=dtype)
    return sums.add_(b_dec).add_(_nothing(x, dtype))


@traceable("(Tensor acts, Tensor W_dec, Tensor b_dec) -> Tensor", fake_decoded)
def decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x_hat (n, d_out), float32 or wider, of acts (n, d_sae): by the rows of the active features, or by a dense product
    where that is the quicker way. No gradients."""
    dtype = wide(acts, W_dec)
    if is_little(acts, W_dec):
        return _dense(cast(b_dec, dtype), cast(acts, dtype), W_dec)
    out = cast(b_dec, dtype).repeat(len(acts), 1)
    for t in _held(acts, len(W_dec)):
        part = cast(acts[t], dtype)
        active = part != 0
        if count(active) > _most(part, part.numel()):
            out[t] = _dense(out[t], part, W_dec)
        else:
            out[t] += _sums(marked(part, active), len(part), W_dec)
    return out


def decoded_at_once(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor | None:
    """What `decode` makes of acts (n, d_sae), (n, d_out), where that is little, as `at_once` has it; else None."""
    if torch.compiler.is_compiling() or W_dec.dtype is not torch.float32 or b_dec.dtype is not torch.float32:
        return None
    if not is_little(acts, W_dec) or torch.is_autocast_enabled(acts.device.type):
        return None
    return torch.addmm(b_dec, cast(acts, torch.float32), W_dec)


def nonzero_csr(acts: Tensor) -> Csr:
    """CSR of the non-zero entries of acts (n, d_sae)."""
    return compressed(marked(acts, acts != 0), len(acts))


@traceable(
    "(Tensor indptr, Tensor indices, Tensor values, Tensor W_dec, Tensor b_dec) -> Tensor", fake_decoded_csr
)
def decode_sparse(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction (n, d_out) from CSR features: sum of value times decoder row, plus b_dec; float32 or wider."""
    return weighted_sums(indptr, indices, values, W_dec, cast(b_dec, wide(values, W_dec)))


def _in_tile(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    multiply: torch.dtype | None = None,
    room: Tensor | None = None,
    ahead: bool = False,
) -> Callable[[], Triplets]:
    """What gives find_above for tokens and features that are taken together. What a GPU can do before one waits for it,
    it does from here on; ahead: and more will be given to it before one does."""
    if (triton := triton_for(x, rows)) is not None:
        pre, rest = _unadded(x, rows, bias, multiply)
        listed: Callable[[], Triplets] = triton.Above(pre, threshold, rest, ahead=ahead).listed
        return listed
    return lambda: above(affine(x, rows, bias, multiply, room), threshold)


def _by_tokens(
    x: Tensor, W_rows: Tensor, begun: Callable[[slice, slice], T]
) -> Iterator[tuple[slice, Iterator[tuple[slice, slice, T]]]]:
    """(tokens, tiles of theirs), each tile (tokens, features, what begun(tokens, features) gave)."""
    tiles = ((t, f, begun(t, f)) for t in token_tiles(x, W_rows) for f in feature_tiles(x[t], len(W_rows)))
    return groupby(_one_ahead(tiles), lambda tile: tile[0])


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, each after the next one was made: while one waits for a GPU's answer, it has that to do."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def _unadded(
    x: Tensor, rows: Tensor, bias: Tensor, multiply: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """`affine` (n, features) for those who add the bias where they read: without it, and the bias, or with it, and
    None."""
    product = product_of_halves(x, rows, bias, multiply)
    return (affine(x, rows, bias), None) if product is None else (product, bias)


def _decoded_ahead(
    x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Callable[[], Tensor]:
    """What gives `reconstruct` of tokens that are taken together with all features. A GPU decodes as many entries as
    are quickly decoded by the rows of what is active, before it is asked whether those were all."""
    pre, rest = _unadded(x, rows, bias)
    triton = triton_for(pre)
    assert triton is not None
    found, most = triton.Above(pre, threshold, rest, ahead=True), max(_most(pre, pre.numel()), 0)
    first: Csr = found.first(most)
    out = weighted_sums(*first, W_dec, b_dec, _nothing(x, b_dec.dtype))
    return lambda: out if found.total() <= most else _dense(b_dec, _gated(pre, rest, threshold), W_dec)


def _gated(pre: Tensor, rest: Tensor | None, threshold: Tensor) -> Tensor:
    """All activations, in pre's memory, of what `_unadded` gave."""
    acts = pre if rest is None else pre.add_(rest)
    return gated(acts, exceeding(acts, threshold), acts)


def _sparse_or_dense(
    x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, room: Tensor | None = None, ahead: bool = False
) -> Callable[[], Triplets | Tensor]:
    """What gives what is active among tokens and features that are taken together, and perhaps more with activations of
    0; all activations, where that is much: in room, if there is one. ahead: see `_in_tile`."""
    marked_or_dense = partial(_marked_or_dense, x, rows, bias, threshold, room)
    if screens(x, rows):
        screened = candidates(x, rows, bias, threshold, ahead)

        def screened_or_dense() -> Triplets | Tensor:
            tokens, features, values = screened()
            if len(tokens) > _most(bias, len(x) * len(rows)):
                return marked_or_dense()
            return tokens, features, torch.where(values > threshold.index_select(0, features), values, 0)

        return screened_or_dense
    if (triton := triton_for(x, rows)) is None:
        return marked_or_dense
    pre, rest = _unadded(x, rows, bias)
    found = triton.Above(pre, threshold, rest, ahead=ahead)

    def listed_or_dense() -> Triplets | Tensor:
        if found.total() <= _most(pre, pre.numel()):
            listed: Triplets = found.listed()
            return listed
        return _gated(pre, rest, threshold)

    return listed_or_dense


def _marked_or_dense(
    x: Tensor, rows: Tensor, bias: Tensor, threshold: Tensor, room: Tensor | None
) -> Triplets | Tensor:
    """The same at once, in PyTorch's operations."""
    pre = affine(x, rows, bias, room=room)
    marks = exceeding(pre, threshold)
    return gated(pre, marks, pre) if count(marks) > _most(pre, pre.numel()) else above(pre, threshold, marks)


def _held(x: Tensor, d_sae: int) -> Iterator[slice]:
    """The tokens of x (n, ...) of which all d_sae features are held together."""
    return slices(len(x), max((TOPK_SIZE if x.is_cpu else GPU_TOPK_SIZE) // d_sae, 1))


def _nothing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1): 0 for the tokens of x (n, d_in) that are finite, nan for the others, which a search would hide."""
    return x.sum(1, keepdim=True, dtype=dtype).mul_(0)


def is_little(x: Tensor, W_dec: Tensor) -> bool:
    """Whether decoding the tokens of x (n, ...) is too little for counting first what is active. No GPU waits then."""
    n = x.shape[0]
    if x.is_cpu:
        return max(n, LEAST) * W_dec.numel() < SMALL
    return n <= GPU_FEW and n * W_dec.shape[0] <= GPU_FEW_SIZE


def _most(where: Tensor, of: int) -> int:
    """How many may be active before a dense product decodes them more quickly."""
    return int((CROWDED if on_cpu(where) else GPU_CROWDED) * of)


def _dense(out: Tensor, acts: Tensor, W_dec: Tensor) -> Tensor:
    """out + acts @ W_dec, whatever torch.autocast says."""
    if torch.is_autocast_enabled(acts.device.type):
        with torch.autocast(acts.device.type, enabled=False):
            return _dense(out, acts, W_dec)
    if W_dec.dtype == torch.bfloat16 and acts.dtype == torch.float32 and multiplies_halves(acts, W_dec):
        return out + product_of_parts(acts, W_dec)
    return torch.addmm(out, acts, cast(W_dec, acts.dtype))


def _sums(found: Triplets, n: int, W_dec: Tensor) -> Tensor:
    """What n rows with these entries are decoded to, without b_dec."""
    return weighted_sums(*compressed(found, n), W_dec)


def _sums_of_largest(pre: Tensor, k: int, W_dec: Tensor) -> Tensor:
    """What the k largest positive entries of each row of pre are decoded to, without b_dec."""
    if by_numpy(pre):
        return _sums(largest(pre, k), len(pre), W_dec)
    values, columns = pre.topk(k, dim=-1, sorted=False)
    starts = torch.arange(len(pre) + 1, device=pre.device) * k  # known before any is found: no GPU waits
    return weighted_sums(starts, columns.reshape(-1), values.clamp(min=0).reshape(-1), W_dec)


def _moved(found: Triplets, rows: int, columns: int) -> Triplets:
    """The entries of a tile whose first row and first column are these."""
    return (found[0] + rows if rows else found[0]), (found[1] + columns if columns else found[1]), found[2]


def _by_row(parts: list[Triplets], n: int, like: Tensor) -> Triplets:
    """The entries of tiles of the same n tokens, by row, then by column."""
    rows, columns, values = _joined(parts, like)
    if len(parts) > 1:
        order = stable_order(rows, n)
        rows, columns, values = (part.index_select(0, order) for part in (rows, columns, values))
    return rows, columns, values


def _joined(parts: list[Triplets], like: Tensor) -> Triplets:
    """The entries of all parts, one after the other; where there is none, values like `like`."""
    if not parts:
        none = torch.zeros(0, dtype=torch.int64, device=like.device)
        return none, none, like.new_zeros(0)
    if len(parts) == 1:
        return parts[0]
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows, columns, values


def compressed(found: Triplets, n: int) -> Csr:
    """The CSR of n rows with these entries, which are in order."""
    rows, columns, values = found
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device)), columns, values
