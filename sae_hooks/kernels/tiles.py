"""Pre-activations, a tile at a time: how large tiles are, and the one product that all of the library decides by.

Products accumulate in float32 (float64 if both sides are) whatever the weights are stored in: half-precision rows are
widened some at a time, because a rounding error at the threshold is an error of the threshold's size, and because
half-precision matrix products are 5 to 14 times slower than float32 on CPUs without such instructions. GPUs multiply
halves by halves as they are, which is exact, and sum in float32. torch.autocast changes nothing.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_products import affine_otherwise, followed_otherwise, is_large, is_much
from .tracing import autocasts, is_untraced, wants_gradient

T = TypeVar("T")


CPU_TOKENS, CPU_SIZE = 1024, 2**19  # 2 MB in float32: a product is compared while it is in the cache
GPU_TOKENS, GPU_SIZE = 4096, 2**26  # a tile costs a few launches and a wait, and float32 weights a rounded copy
GPU_LEAST = 512  # tokens from which it takes a GPU no longer to read rows of half precision than to multiply by them
CPU_WIDENED, GPU_WIDENED = 2**20, 2**27  # numbers of half-precision rows that are widened together: 4 and 512 MB
AT_ONCE, GPU_AT_ONCE = 2**14, 2**15  # pre-activations so few that to look for the best way is not worth it
GPU_LARGE = 2**26  # numbers in W_enc that a GPU reads for longer than it takes to look for the best way
TOPK_SIZE, GPU_TOPK_SIZE = 2**22, 2**28  # pre-activations of tokens that TopK takes together: 16 MB and 1 GB
HALVES, HALVES_ON = (torch.bfloat16, torch.float16), ("cuda",)  # dtypes, and kinds of device that multiply them as such


class Most(NamedTuple):
    """What is taken together, at most: tokens, and pairs (token, feature)."""

    tokens: int
    pairs: int


def wide(x: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where both sides are."""
    both = x.dtype == weights.dtype == torch.float64
    return torch.float64 if both else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes several microseconds also where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def slices(length: int, most: int) -> Iterator[slice]:
    """As few slices as cover range(length) with at most `most` each, of about one size: no thin rest."""
    count = -(-length // most)
    return (slice(length * i // count, length * (i + 1) // count) for i in range(count))


def token_tiles(x: Tensor, rows: Tensor, most: Most | None = None) -> Iterator[slice]:
    """The tokens of x (n, d_in) that are taken together; most: at most so many, if not as usual."""
    return slices(len(x), _most_tokens(x, rows) if most is None else most.tokens)


def _most_tokens(x: Tensor, rows: Tensor) -> int:
    """How many are, at most: on GPUs rather all features (rows) of fewer, unless rows are to be rounded each time."""
    if x.is_cpu:
        return CPU_TOKENS
    return min(max(GPU_SIZE // max(len(rows), 1), GPU_LEAST), GPU_TOKENS) if rows.dtype in HALVES else GPU_TOKENS


def feature_tiles(x: Tensor, d_sae: int, most: Most | None = None) -> Iterator[slice]:
    """The features that are taken together for a tile of tokens x (n, d_in); most: as `token_tiles` has it."""
    pairs = (CPU_SIZE if x.is_cpu else GPU_SIZE) if most is None else most.pairs
    return slices(d_sae, pairs // max(len(x), 1))


def has_all_features(x: Tensor, rows: Tensor) -> bool:
    """Whether all features (rows), if any, are taken together for a tile of the tokens of x (n, d_in), if any."""
    n, m = x.shape[0], rows.shape[0]
    return 0 < min(n, _most_tokens(x, rows)) * m <= (CPU_SIZE if x.is_cpu else GPU_SIZE)


def is_one_tile(x: Tensor, rows: Tensor) -> bool:
    """Whether all tokens of x (n, d_in) and all features (rows) are."""
    return x.shape[0] <= _most_tokens(x, rows) and has_all_features(x, rows)


def by_tokens(
    x: Tensor, W_rows: Tensor, begun: Callable[[Tensor, slice], T], most: Most | None = None
) -> Iterator[tuple[slice, Iterator[tuple[slice, slice, T]]]]:
    """(tokens, tiles of theirs), each tile (tokens, features, what begun(x[tokens], features) gave), where x[tokens]
    is the same tensor for all of them. most: as `token_tiles` has it."""
    parts = ((t, x[t]) for t in token_tiles(x, W_rows, most))
    tiles = ((t, f, begun(part, f)) for t, part in parts for f in feature_tiles(part, len(W_rows), most))
    return groupby(one_ahead(tiles), lambda tile: tile[0])


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, each after the next one was made: while one waits for a GPU's answer, it has that to do."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def held_together(x: Tensor, d_sae: int) -> Iterator[slice]:
    """The tokens of x (n, ...) of which all d_sae features are held together."""
    return slices(len(x), max((TOPK_SIZE if x.is_cpu else GPU_TOPK_SIZE) // d_sae, 1))


def room_for_tiles(x: Tensor, W_rows: Tensor, bias: Tensor, most: Most | None = None) -> Tensor | None:
    """Memory for one tile after the other on a CPU: fresh memory costs there as much as the search for what is above.
    None where somebody must know of each tile. most: as `token_tiles` has it."""
    size = CPU_SIZE if most is None else most.pairs
    return bias.new_empty(size) if x.is_cpu and is_untraced(x, W_rows, bias) else None


def at_once(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor | None:
    """What `linear` makes of x (n, d_in) and W_enc (d_in, d_sae), bit for bit, where that is so little that to choose
    how to compute it takes as long as to compute it: (n, d_sae) by one plain product, which autograd and torch.func
    follow. Else None."""
    if torch.compiler.is_compiling() or W_enc.dtype is not torch.float32 or bias.dtype is not torch.float32:
        return None
    entries = x.shape[0] * W_enc.shape[1]
    if x.is_cpu:
        if entries > AT_ONCE or is_large(W_enc) or is_much(x, W_enc):
            return None
    elif entries > GPU_AT_ONCE or W_enc.numel() >= GPU_LARGE:
        return None
    if autocasts(x):
        return None
    return torch.addmm(bias, cast(x, torch.float32), W_enc)


def affine(
    x: Tensor, rows: Tensor, bias: Tensor, multiply: torch.dtype | None = None, room: Tensor | None = None
) -> Tensor:
    """x @ rows.T + bias (n, features) in bias' dtype, float32 or float64, contiguous.

    x is of that dtype, too, or as `ready` made it, rows of any. multiply: a half dtype that both are rounded to first.
    room: where the result may lie, until the next one does.
    """
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return affine(x, rows, bias, multiply, room)
    if (product := product_of_halves(x, rows, bias, multiply)) is not None:
        return product + bias
    if rows.dtype != x.dtype:
        if len(rows) > widened_at_once(x) and is_untraced(x, rows, bias):
            return affine_widened(x, rows, bias, room)
        rows = rows.to(x.dtype)
    if (product := affine_otherwise(x, rows, bias)) is not None:
        return product
    if room is not None:
        return torch.addmm(bias, x, rows.T, out=within(room, len(x), len(rows)))
    return F.linear(x, rows, bias)


def product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k) @ W (k, m) + bias (m), of one dtype, which autograd follows; with a bias, x is (n, k)."""
    if (followed := followed_otherwise(x, W, bias)) is not None:
        return followed
    return x @ W if bias is None else affine(x, W.T, bias)


def product_of_halves(
    x: Tensor, rows: Tensor, bias: Tensor, multiply: torch.dtype | None = None
) -> Tensor | None:
    """x @ rows.T (n, features) in float32, what `affine` adds the bias to, where it multiplies in half precision; else
    None."""
    if multiply is not None or x.dtype != bias.dtype:
        multiply = multiply or x.dtype
        return half_product(cast(x, multiply), cast(rows, multiply))
    if rows.dtype == torch.bfloat16 and x.dtype == torch.float32 and multiplies_halves(x, rows):
        return product_of_parts(x, rows.T)
    return None


def unadded(
    x: Tensor, rows: Tensor, bias: Tensor, multiply: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """`affine` (n, features) for those who add the bias where they read: without it, and the bias, or with it, and
    None."""
    product = product_of_halves(x, rows, bias, multiply)
    return (affine(x, rows, bias), None) if product is None else (product, bias)


def within(room: Tensor, n: int, m: int) -> Tensor:
    """(n, m) at the beginning of room."""
    return room[:n * m].view(n, m)


def widened_at_once(x: Tensor) -> int:
    """How many rows of half precision are, for x (n, d_in)."""
    return max((CPU_WIDENED if x.is_cpu else GPU_WIDENED) // x.shape[1], 1)


def affine_widened(x: Tensor, rows: Tensor, bias: Tensor, room: Tensor | None) -> Tensor:
    """affine of rows of another dtype than x, some of which are widened at a time, into the same memory."""
    n, (m, d_in) = len(x), rows.shape
    out = x.new_empty(n, m) if room is None else within(room, n, m)
    most = widened_at_once(x)
    wide_rows = x.new_empty(most, d_in)
    for f in slices(m, most):
        part = wide_rows[:f.stop - f.start].copy_(rows[f])
        if (product := affine_otherwise(x, part, bias[f], widened=True)) is not None:
            out[:, f] = product
        else:
            torch.addmm(bias[f], x, part.T, out=out[:, f])
    return out


def multiplies_halves(*tensors: Tensor) -> bool:
    """Whether `half_product` may take these: on a GPU, and where no gradients are wanted, which it doesn't give."""
    return tensors[0].device.type in HALVES_ON and not wants_gradient(*tensors)


def half_product(x: Tensor, rows: Tensor) -> Tensor:
    """x @ rows.T in float32 of matrices of one half dtype. Each product of two such numbers is exact in float32."""
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return half_product(x, rows)
    if x.device.type == "cpu":
        return F.linear(x.float(), rows.float())
    return torch.mm(x, rows.T, out_dtype=torch.float32)


def product_of_parts(x: Tensor, W: Tensor) -> Tensor:
    """x @ W (n, d) of x (n, m) in float32 and W (m, d) in bfloat16, which is read as it is, not widened: x is the sum
    of three matrices in bfloat16, which has 8 of float32's 24 bits."""
    parts, rest = [], x
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    return half_product(torch.cat(parts), W.T).view(3, len(x), W.shape[1]).sum(0)


def ready(x: Tensor, W_rows: Tensor) -> Tensor:
    """x in the dtype to compute in, or as it is, where it and the weights are of one half dtype and `half_product` is
    the quicker one, on GPUs."""
    if x.dtype in HALVES and x.dtype == W_rows.dtype and multiplies_halves(x, W_rows):
        return x
    return cast(x, wide(x, W_rows))


def linear(x: Tensor, W_rows: Tensor, bias: Tensor) -> Tensor:
    """Pre-activations (n, d_sae) of x (n, d_in): x @ W_rows.T + bias, in float32 or wider.

    Made of the very products that encode_sparse compares, so that both find the same features.
    """
    bias = cast(bias, wide(x, W_rows))
    x = ready(x, W_rows)
    if is_one_tile(x, W_rows):
        return affine(x, W_rows, bias)
    pre = x.new_empty(len(x), len(W_rows), dtype=bias.dtype)
    for t, f, part in affine_tiles(x, W_rows, bias):
        pre[t, f] = part
    return pre


def affine_tiles(x: Tensor, W_rows: Tensor, bias: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(tokens, features, their pre-activations) of x (n, d_in), `ready`: each until the next one."""
    room = room_for_tiles(x, W_rows, bias)
    for t in token_tiles(x, W_rows):
        for f in feature_tiles(x[t], len(W_rows)):
            yield t, f, affine(x[t], W_rows[f], bias[f], room=room)
