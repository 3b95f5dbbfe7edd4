"""The features of a batch in training, in two forms with one interface, so that each objective is written once.

`DenseCode` holds every pre-activation, (batch, d_sae), in plain autograd: the reference, and the quicker form while
many features are active. `SparseCode` holds only the pairs (token, feature) that can have a value or a gradient: one
dense product finds them, and all that follows, forward and backward, costs what they cost. Loss and gradients are the
same to rounding; x gets no gradient.

Under torch.autocast the products with the matrices are made in bfloat16. Biases, thresholds, comparisons and sums stay
as they are: a rounding error at the threshold would be an error of the threshold's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_hooks.kernels import GPU_TOKENS, dots, find_above, starts_of, weighted_sums

CHUNK = 256  # tokens, on a CPU: the (CHUNK, d_sae) pre-activations stay in the cache's reach
GPU_CHUNK = GPU_TOKENS  # a GPU reads W_enc anew for every chunk, which takes as long as the product of 256 tokens
DENSE_FROM = 0.12  # share of pairs from which the dense form is the quicker one, on CPUs

Form = Literal["auto", "dense", "sparse"]
Select = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DenseCode:
    """pre (batch, d_sae), of every feature."""

    pre: Tensor

    def of(self, per_feature: Tensor) -> Tensor:
        """Spread one number a feature (d_sae) so that it stands beside `pre`."""
        return per_feature.expand_as(self.pre)

    def decode(self, acts: Tensor, W_dec: Tensor) -> Tensor:
        """Sum of acts times decoder rows, (batch, d_out), for acts that stand beside `pre`."""
        return (acts @ W_dec).to(acts.dtype)

    def per_token(self, values: Tensor) -> Tensor:
        """Sum over each token's features, (batch)."""
        return values.sum(-1)

    def per_feature(self, values: Tensor) -> Tensor:
        """Sum over each feature's tokens, (d_sae)."""
        return values.sum(0)

    def first(self, n: int) -> Tensor:
        """1 beside the first n features, else 0."""
        return (torch.arange(self.pre.shape[-1], device=self.pre.device) < n).to(self.pre.dtype).expand_as(self.pre)


@dataclass(frozen=True)
class Pairs:
    """Some (token, feature) pairs of a batch, by token; rows_start (batch + 1) delimits the tokens. pre (n): detached
    pre-activations."""

    rows_start: Tensor
    rows: Tensor
    features: Tensor
    pre: Tensor
    d_sae: int

    @property
    def batch(self) -> int:
        """Number of tokens."""
        return len(self.rows_start) - 1

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order, rows, starts): the order that sorts by feature, the tokens in it, where each feature starts. Sorted,
        each row of a weight's gradient is written once."""
        order = torch.sort(self.features, stable=True).indices
        return order, self.rows[order], starts_of(self.features, self.d_sae)


@dataclass(frozen=True)
class SparseCode:
    """The pre-activations of `pairs`, (n). The methods are those of DenseCode."""

    pre: Tensor
    pairs: Pairs

    def of(self, per_feature: Tensor) -> Tensor:
        """Spread one number a feature (d_sae) so that it stands beside `pre`."""
        return per_feature.index_select(0, self.pairs.features)

    def decode(self, acts: Tensor, W_dec: Tensor) -> Tensor:
        """Sum of acts times decoder rows, (batch, d_out), for acts that stand beside `pre`."""
        out: Tensor = _Decode.apply(acts, W_dec, self.pairs)  # type: ignore[no-untyped-call]
        return out

    def per_token(self, values: Tensor) -> Tensor:
        """Sum over each token's features, (batch)."""
        return values.new_zeros(self.pairs.batch).index_add(0, self.pairs.rows, values)

    def per_feature(self, values: Tensor) -> Tensor:
        """Sum over each feature's tokens, (d_sae)."""
        return values.new_zeros(self.pairs.d_sae).index_add(0, self.pairs.features, values)

    def first(self, n: int) -> Tensor:
        """1 beside the first n features, else 0."""
        return (self.pairs.features < n).to(self.pre.dtype)


Code = DenseCode | SparseCode


def encode(x: Tensor, W_enc: Tensor, bias: Tensor, floor: Tensor, form: Form = "auto") -> Code:
    """The features of x (batch, d_in) whose pre-activation exceeds floor (d_sae), or all of them (DenseCode).

    "auto" takes the dense form where more than DENSE_FROM of the pairs would be held.
    """
    if form != "dense":
        most = DENSE_FROM if form == "auto" else 1.0
        with torch.no_grad():
            found = find_above(x, W_enc.t(), bias, floor, most=most, multiply=_multiplied_in(x))
        if found is not None:
            return _sparse(x, W_enc, bias, _pairs(found, len(x), W_enc.shape[1]))
    return DenseCode(_product(x, W_enc, bias))


def encode_chosen(x: Tensor, W_enc: Tensor, bias: Tensor, choose: Select, *, whole: bool = False) -> SparseCode:
    """The features of x (batch, d_in) that choose(pre (tokens, d_sae)) names by flat ascending indices, some tokens at
    a time, or the whole batch at once."""
    return _sparse(x, W_enc, bias, _chosen(x, W_enc, bias, choose, len(x) if whole else CHUNK))


@torch.no_grad()
def _chosen(x: Tensor, W_enc: Tensor, bias: Tensor, choose: Select, chunk: int) -> Pairs:
    d_sae = W_enc.shape[1]
    found = []
    for start, part in _chunks(x, chunk):
        pre = _product(part, W_enc, bias)
        at = choose(pre)
        rows = torch.div(at, d_sae, rounding_mode="floor")
        found.append((rows + start, at - rows * d_sae, pre.view(-1).take(at)))
    rows, features, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _pairs((rows, features, values), len(x), d_sae)


def _multiplied_in(x: Tensor) -> torch.dtype | None:
    """The dtype of products where it is not x's own: autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _product(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
    """x @ W_enc + bias: multiplied in bfloat16 under autocast, but added to and compared in x's own precision."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, W_enc.t(), bias)
    return F.linear(x, W_enc.t()).to(x.dtype) + bias


def _chunks(x: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    size = size if x.device.type == "cpu" else max(size, GPU_CHUNK)
    return ((start, x[start:start + size]) for start in range(0, len(x), size))


def _sparse(x: Tensor, W_enc: Tensor, bias: Tensor, pairs: Pairs) -> SparseCode:
    return SparseCode(_Pre.apply(x, W_enc, bias, pairs), pairs)  # type: ignore[no-untyped-call]


def _pairs(found: tuple[Tensor, Tensor, Tensor], batch: int, d_sae: int) -> Pairs:
    rows, features, pre = found
    return Pairs(starts_of(rows, batch), rows.int(), features.int(), pre, d_sae)


class _Pre(torch.autograd.Function):
    """pairs.pre as a function of W_enc and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x)
        ctx.pairs = pairs
        return pairs.pre.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        (x,), pairs = ctx.saved_tensors, ctx.pairs
        order, rows, starts = pairs.by_feature
        to_bias = grad.new_zeros(pairs.d_sae).index_add_(0, pairs.features, grad)
        return None, weighted_sums(starts, rows, grad[order], x).t(), to_bias, None


class _Decode(torch.autograd.Function):
    """(acts of the pairs, W_dec) -> (batch, d_out)."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(acts, W_dec)
        ctx.pairs = pairs
        return weighted_sums(pairs.rows_start, pairs.features, acts, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (acts, W_dec), pairs = ctx.saved_tensors, ctx.pairs
        order, rows, starts = pairs.by_feature
        to_acts = dots(pairs.rows_start, pairs.rows, pairs.features, grad, W_dec) if ctx.needs_input_grad[0] else None
        to_dec = weighted_sums(starts, rows, acts[order], grad.contiguous()) if ctx.needs_input_grad[1] else None
        return to_acts, to_dec, None
