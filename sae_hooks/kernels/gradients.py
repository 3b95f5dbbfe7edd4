"""Gradients through an SAE of what it reads, at the cost of the features that are active.

JumpReLU and TopK pass a gradient on through the active features alone, by a linear map. So it is kept which they are,
and the backward pass is dots with their decoder rows and sums of their encoder rows, in place of two products of all
features. Each of these is the other's gradient, which gives derivatives of any order. Weights get no gradients here: an
SAE that is being trained takes plain operations, or those of sae_hooks.training.
"""

from typing import Any

import torch
from torch import Tensor

from .cpu_products import mm
from .decoding import CROWDED, GPU_CROWDED, LEAST, nothing_or_nan
from .encoding import find_above, find_largest
from .segments import dots, starts_of, weighted_sums
from .signs import share_above
from .tiles import cast, is_one_tile, linear, ready, wide
from .tracing import is_bare, wants_gradient
from .triplets import Csr

FOLLOWED_ON = ("cpu", "cuda")  # kinds of device whose operations are known to do this
SMALL, GPU_SMALL = 2**24, 2**30  # multiplications of one product up to which plain operations are quicker
PROBED = 8, 128  # tokens and features that tell how many are active


def pre_activations(x: Tensor, W_rows: Tensor, bias: Tensor) -> Tensor:
    """What `linear` makes of x (n, d_in), bit for bit: (n, d_sae), which autograd follows as one operation. Else it
    would make gradients of full size for each tile, and keep rows of half precision widened."""
    is_one = is_one_tile(x, W_rows) and x.dtype == W_rows.dtype
    if is_one or torch.compiler.is_compiling() or not wants_gradient(x, W_rows, bias) or not is_bare(x, W_rows, bias):
        return linear(x, W_rows, bias)
    pre: Tensor = _Linear.apply(x, W_rows, bias)  # type: ignore[no-untyped-call]
    return pre


def encode_with_gradient(x: Tensor, W_rows: Tensor, bias: Tensor, gate: Tensor | int) -> Csr | None:
    """`encode_sparse` of x (n, d_in), where gate is the threshold (d_sae), or `encode_topk`, where it is k; autograd
    follows the values. None where it is not x alone that wants a gradient, or plain operations are quicker: for small
    products, and where many features are active."""
    if not _is_followed(x, W_rows, bias) or _plain_is_quicker(x, W_rows, bias, gate):
        return None
    values, starts, _, features = _Active.apply(x, W_rows, bias, gate)  # type: ignore[no-untyped-call]
    return starts.long(), features.long(), values


def reconstruct_with_gradient(
    x: Tensor, W_rows: Tensor, bias: Tensor, gate: Tensor | int, W_dec: Tensor, b_dec: Tensor
) -> Tensor | None:
    """`reconstruct` of x (n, d_in), or `reconstruct_topk`, likewise: (n, d_out), or None."""
    if not _is_followed(x, W_rows, bias, W_dec, b_dec) or _plain_is_quicker(x, W_rows, bias, gate):
        return None
    dtype = wide(x, W_rows)
    active = _Active.apply(x, W_rows, bias, gate)  # type: ignore[no-untyped-call]
    added = cast(b_dec, dtype), nothing_or_nan(x.detach(), dtype)
    x_hat: Tensor = _Sums.apply(*active, W_dec, *added)  # type: ignore[no-untyped-call]
    return x_hat


def _is_followed(x: Tensor, *weights: Tensor) -> bool:
    """Whether autograd is to give a gradient to x, and to none of the weights, and nobody else must know of it."""
    if torch.compiler.is_compiling() or not wants_gradient(x) or wants_gradient(*weights):
        return False
    return x.device.type in FOLLOWED_ON and is_bare(x, *weights)


@torch.no_grad()
def _plain_is_quicker(x: Tensor, W_rows: Tensor, bias: Tensor, gate: Tensor | int) -> bool:
    """Whether plain operations are the quicker way: little is to be done, or many features are active, as some tell."""
    small, most = (SMALL, CROWDED) if x.is_cpu else (GPU_SMALL, GPU_CROWDED)
    if max(len(x), LEAST) * W_rows.numel() <= small:
        return True
    if not isinstance(gate, Tensor):
        return gate > most * len(W_rows)
    bias = cast(bias, wide(x, W_rows))
    return share_above(ready(x, W_rows), W_rows, bias, gate, PROBED) > most


class _Linear(torch.autograd.Function):
    """(x, W_rows, bias) -> pre-activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_rows: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if W_rows.requires_grad else None, W_rows if x.requires_grad else None)
        return linear(x, W_rows, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_rows = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            to_x = None if W_rows is None else mm(grad, cast(W_rows, grad.dtype))
            to_rows = None if x is None else mm(grad.T, cast(x, grad.dtype))
        return to_x, to_rows, grad.sum(0) if ctx.needs_input_grad[2] else None


class _Active(torch.autograd.Function):
    """x -> (values of the active features, where the segments of the tokens start, tokens, features)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_rows: Tensor, bias: Tensor, gate: Tensor | int) -> tuple[Tensor, ...]:
        if isinstance(gate, Tensor):
            tokens, features, values = find_above(x, W_rows, bias, gate)
        else:
            tokens, features, values = find_largest(x, W_rows, bias, gate)
        where = starts_of(tokens, len(x)), tokens.int(), features.int()
        ctx.save_for_backward(*where, W_rows)
        return values, *where

    @staticmethod
    def backward(ctx: Any, to_values: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        return _sums(to_values, *ctx.saved_tensors), None, None, None


class _Sums(torch.autograd.Function):
    """values -> `weighted_sums` (n, d)."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, starts: Tensor, rows: Tensor, ids: Tensor, table: Tensor, *added: Tensor
    ) -> Tensor:
        ctx.save_for_backward(starts, rows, ids, table)
        return weighted_sums(starts, ids, values, table, *added)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _dots(grad, *ctx.saved_tensors), *[None] * (len(ctx.needs_input_grad) - 1)


class _Dots(torch.autograd.Function):
    """by_row (n, d) -> `dots`."""

    @staticmethod
    def forward(ctx: Any, by_row: Tensor, starts: Tensor, rows: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(starts, rows, ids, table)
        return dots(starts, rows, ids, by_row, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sums(grad, *ctx.saved_tensors), None, None, None, None


def _sums(values: Tensor, starts: Tensor, rows: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """_Sums; in plain operations for torch.func and for several gradients at once (is_grads_batched)."""
    if is_bare(values):
        summed: Tensor = _Sums.apply(values, starts, rows, ids, table)  # type: ignore[no-untyped-call]
        return summed
    acts = values.new_zeros(len(starts) - 1, len(table)).index_put((rows.long(), ids.long()), values)
    return acts @ cast(table, values.dtype)


def _dots(by_row: Tensor, starts: Tensor, rows: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """_Dots, likewise."""
    if is_bare(by_row):
        products: Tensor = _Dots.apply(by_row, starts, rows, ids, table)  # type: ignore[no-untyped-call]
        return products
    return (by_row @ cast(table, by_row.dtype).T)[rows.long(), ids.long()]
