"""From activations to features, in PyTorch's operations or whatever does it more quickly where it runs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .custom_ops import fake_csr, traceable
from .screen import decided, screened, screens
from .search import above, gated, largest, marked, not_zero
from .segments import triton_for
from .signs import Signs, signs_for
from .tiles import (
    Most,
    affine,
    affine_tiles,
    by_tokens,
    cast,
    held_together,
    is_one_tile,
    linear,
    ready,
    room_for_tiles,
    slices,
    unadded,
    wide,
)
from .topk_screen import topk_screen_for
from .triplets import Csr, Triplets, by_row, compressed, joined, moved


def encode(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """What `linear` makes of x (n, d_in) where it is above threshold, else 0: (n, d_sae). No gradients."""
    bias = cast(bias, wide(x, W_rows))
    x = ready(x, W_rows)
    if is_one_tile(x, W_rows):
        pre = affine(x, W_rows, bias)
        return gated(pre, threshold, pre)
    acts = bias.new_empty(len(x), len(W_rows))
    for t, f, pre in affine_tiles(x, W_rows, bias):
        gated(pre, threshold[f], acts[t, f])
    return acts


@traceable("(Tensor x, Tensor W_rows, Tensor bias, Tensor threshold) -> (Tensor, Tensor, Tensor)", fake_csr)
def encode_sparse(x: Tensor, W_rows: Tensor, bias: Tensor, threshold: Tensor) -> Csr:
    """CSR of the features with pre > threshold, indices ascending in each row; never holds (n, d_sae).

    pre is what `linear` makes of the same x, bit for bit, but for rounding in float32 where many tokens are screened:
    on GPUs, and on CPUs with instructions for bfloat16. nan is above no threshold.
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
        return decided(_in_tiles(x, W_rows, bias, threshold, screened), threshold)
    if is_one_tile(x, W_rows):
        return _in_tile(x, W_rows, bias, threshold, multiply)()
    signs = signs_for(x, W_rows, bias, threshold) if multiply is None else None
    most = None if signs is None else signs.most
    search = partial(_in_tile, multiply=multiply, room=room_for_tiles(x, W_rows, bias, most), signs=signs)
    return _in_tiles(x, W_rows, bias, threshold, search, most)


def _in_tiles(
    x: Tensor,
    W_rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    search: Callable[..., Callable[[], Triplets]],
    most: Most | None = None,
) -> Triplets:
    """What a search gives that is begun in one tile, with at most so much, after the other."""
    found, ahead = [], not is_one_tile(x, W_rows)

    def begun(part: Tensor, f: slice) -> Callable[[], Triplets]:
        return search(part, W_rows[f], bias[f], threshold[f], ahead=ahead)

    for t, of_tokens in by_tokens(x, W_rows, begun, most):
        parts = [moved(listed(), 0, f.start) for _, f, listed in of_tokens]
        found.append(moved(by_row(parts, t.stop - t.start, bias), t.start, 0))
    return joined(found, bias)


@traceable("(Tensor x, Tensor W_rows, Tensor bias, int k) -> (Tensor, Tensor, Tensor)", fake_csr)
def encode_topk(x: Tensor, W_rows: Tensor, bias: Tensor, k: int) -> Csr:
    """CSR of the k largest positive pre-activations of each row, indices ascending."""
    return compressed(find_largest(x, W_rows, bias, k), len(x))


def find_largest(
    x: Tensor, W_rows: Tensor, bias: Tensor, k: int, *, multiply: torch.dtype | None = None
) -> Triplets:
    """(rows, columns, values) of those, by row, then by column; holds TOPK_SIZE pre-activations, or those of one token;
    where they are screened, HELD products. multiply: as `find_above` has it."""
    bias = cast(bias, wide(x, W_rows))
    x = ready(x, W_rows)
    screen = topk_screen_for(x, W_rows, bias, k) if multiply is None else None
    if screen is None:
        return _largest_of_all(x, W_rows, bias, k, multiply)
    found = []
    for t in slices(len(x), screen.tokens):
        part = screen.largest(x[t])
        found.append(moved(_largest_of_all(x[t], W_rows, bias, k) if part is None else part, t.start, 0))
    return joined(found, bias)


def _largest_of_all(
    x: Tensor, W_rows: Tensor, bias: Tensor, k: int, multiply: torch.dtype | None = None
) -> Triplets:
    """The same of all pre-activations of some tokens after the other."""
    found = []
    for t in held_together(x, len(W_rows)):
        pre = linear(x[t], W_rows, bias) if multiply is None else affine(x[t], W_rows, bias, multiply)
        found.append(moved(largest(pre, k), t.start, 0))
    return joined(found, bias)


def nonzero_csr(acts: Tensor) -> Csr:
    """CSR of the non-zero entries of acts (n, d_sae)."""
    return compressed(marked(acts, not_zero(acts)), len(acts))


def _in_tile(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    threshold: Tensor,
    multiply: torch.dtype | None = None,
    room: Tensor | None = None,
    ahead: bool = False,
    signs: Signs | None = None,
) -> Callable[[], Triplets]:
    """What gives find_above for tokens and features that are taken together. What a GPU can do before one waits for it,
    it does from here on; ahead: and more will be given to it before one does."""
    if (triton := triton_for(x, rows)) is not None:
        pre, rest = unadded(x, rows, bias, multiply)
        listed: Callable[[], Triplets] = triton.Above(pre, threshold, rest, ahead=ahead).listed
        return listed

    def searched() -> Triplets:
        found = None if signs is None else signs.candidates(x, rows, bias, threshold)
        return above(affine(x, rows, bias, multiply, room), threshold) if found is None else decided(found, threshold)

    return searched
