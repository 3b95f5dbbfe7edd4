"""The features of a batch in training, in two forms with one interface, so that each objective is written once.

`DenseCode` holds every pre-activation, (batch, d_sae), in plain autograd: the reference, and the quicker form while
many features are active. `SparseCode` holds only the pairs (token, feature) that can have a value or a gradient: one
dense product finds them, and all that follows, forward and backward, costs what they cost. Loss and gradients are the
same to rounding; x gets no gradient.

Under torch.autocast the products with the matrices are made in bfloat16. Biases, thresholds, comparisons and sums stay
as they are: a rounding error at the threshold would be an error of the threshold's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_hooks.kernels import (
    Triplets,
    dots,
    find_above,
    find_largest,
    stable_order,
    starts_of,
    triton_for,
    weighted_sums,
)
from sae_hooks.kernels import product as unrounded_product

PROBE, PROBED = 16, 1024  # tokens and features that tell which form is the quicker one
DENSE_FROM = 0.2  # share of pairs from which the dense form is the quicker one, on CPUs ...
GPU_DENSE_FROM, BF16_DENSE_FROM = 0.03, 0.009  # ... on GPUs, whose products are quicker: the first by arithmetic only

Form = Literal["auto", "dense", "sparse"]


@dataclass(frozen=True)
class DenseCode:
    """pre (batch, d_sae), of every feature."""

    pre: Tensor

    def of(self, per_feature: Tensor) -> Tensor:
        """Spread one number a feature (d_sae) so that it stands beside `pre`."""
        return per_feature.expand_as(self.pre)

    def decode(self, acts: Tensor, W_dec: Tensor) -> Tensor:
        """Sum of acts times decoder rows, (batch, d_out), for acts that stand beside `pre`."""
        return product(acts, W_dec)

    def per_token(self, values: Tensor) -> Tensor:
        """Sum over each token's features, (batch)."""
        return values.sum(-1)

    def per_feature(self, values: Tensor) -> Tensor:
        """Sum over each feature's tokens, (d_sae)."""
        return values.sum(0)

    def first(self, n: int) -> Tensor:
        """1 beside the first n features, else 0."""
        return (torch.arange(self.pre.shape[-1], device=self.pre.device) < n).to(self.pre.dtype).expand_as(self.pre)


class Factor(NamedTuple):
    """A gradient (d_sae, d) as what `kernels.weighted_sums` makes it of."""

    starts: Tensor
    ids: Tensor
    weights: Tensor
    table: Tensor


Factors = dict[str, list[Factor]]


@dataclass(frozen=True)
class Pairs:
    """Some (token, feature) pairs of a batch, by token; rows_start (batch + 1) delimits the tokens. pre (n): detached
    pre-activations. factors: Encoder's. narrow: the dtype, if not their own, that tokens' rows are read in for
    gradients."""

    rows_start: Tensor
    rows: Tensor
    features: Tensor
    pre: Tensor
    d_sae: int
    factors: Factors | None
    narrow: torch.dtype | None

    @property
    def batch(self) -> int:
        """Number of tokens."""
        return len(self.rows_start) - 1

    def table(self, x: Tensor) -> Tensor:
        """Tokens' rows x (batch, d) as gradients read them."""
        return x.contiguous() if self.narrow is None else x.to(self.narrow)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(order, rows, features, starts): the order that sorts by feature, both in it, where each feature starts.
        Sorted, each row of a weight's gradient is written once."""
        order = stable_order(self.features, self.d_sae)
        rows, features = self.rows.index_select(0, order), self.features.index_select(0, order)
        return order, rows, features, starts_of(features, self.d_sae)


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


@dataclass
class Held:
    """The share of the pairs that the last search held: from one step of a training to the next it changes little."""

    share: float = 1.0


@dataclass(frozen=True)
class Encoder:
    """pre = (x - centre) @ W_enc + b_enc: W_enc (d_in, d_sae), b_enc (d_sae), centre (d_in) or None. factors: where the
    gradients of W_enc and, of the code that comes out, of W_dec go in the sparse form, in place of the tensors' own.
    held: one for all steps of a training, each of which searches once."""

    W_enc: Tensor
    b_enc: Tensor
    centre: Tensor | None = None
    factors: Factors | None = None
    held: Held | None = None

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def bias(self) -> Tensor:
        """The bias for x itself."""
        if self.centre is None:
            return self.b_enc
        with torch.autocast(self.b_enc.device.type, enabled=False):
            return self.b_enc - self.centre @ self.W_enc


def encode(x: Tensor, encoder: Encoder, floor: Tensor, form: Form = "auto") -> Code:
    """The features of x (batch, d_in) whose pre-activation exceeds floor (d_sae), or all of them (DenseCode).

    "auto" takes the dense form where more of the pairs than `dense_from` says would be held.
    """
    if form == "sparse" or (form == "auto" and _is_sparse(x, encoder, floor)):
        found = above(x, encoder, floor)
        if encoder.held is not None:
            encoder.held.share = len(found[0]) / (len(x) * encoder.d_sae)
        return encode_found(x, encoder, found)
    return DenseCode(product(x, encoder.W_enc, encoder.bias()))


def dense_from(device: str, bf16: bool) -> float:
    """The share of pairs from which the dense form is the quicker one."""
    return DENSE_FROM if device == "cpu" else BF16_DENSE_FROM if bf16 else GPU_DENSE_FROM


def encode_found(x: Tensor, encoder: Encoder, found: Triplets) -> SparseCode:
    """The features of x (batch, d_in) that were found: (rows, columns, pre-activations), by row and then by column."""
    rows, features, pre = found
    narrow = None if triton_for(x) is None else _multiplied_in(x)  # PyTorch's own operations sum halves more slowly
    pairs = Pairs(starts_of(rows, len(x)), rows.int(), features.int(), pre, encoder.d_sae, encoder.factors, narrow)
    pre = _Pre.apply(x, encoder.W_enc, encoder.b_enc, encoder.centre, pairs)  # type: ignore[no-untyped-call]
    return SparseCode(pre, pairs)


@torch.no_grad()
def above(x: Tensor, encoder: Encoder, floor: Tensor, which: slice = slice(None)) -> Triplets:
    """(rows, columns, pre-activations) of what exceeds floor (d_sae), of all features or of some."""
    rows, bias = encoder.W_enc.t()[which], encoder.bias()[which]
    return find_above(x, rows, bias, floor[which], multiply=_multiplied_in(x))


@torch.no_grad()
def largest_of_each(x: Tensor, encoder: Encoder, k: int) -> Triplets:
    """The same of the k largest positive pre-activations of each token."""
    return find_largest(x, encoder.W_enc.t(), encoder.bias(), k, multiply=_multiplied_in(x))


def _is_sparse(x: Tensor, encoder: Encoder, floor: Tensor) -> bool:
    """Whether few pairs are held, as some of the tokens and of the features, from all over, tell: a search in vain
    costs as much as half of a dense step. GPUs, which would be waited for, are not asked where the last search held few
    enough; on CPUs the answer, and so every bit, depends on this step alone."""
    most = dense_from(x.device.type, _multiplied_in(x) is not None)
    if encoder.held is not None and encoder.held.share <= most / 2 and x.device.type != "cpu":
        return True
    some, which = x[::max(len(x) // PROBE, 1)], slice(None, None, max(encoder.d_sae // PROBED, 1))
    return len(above(some, encoder, floor, which)[0]) <= most * len(some) * len(floor[which])


def _multiplied_in(x: Tensor) -> torch.dtype | None:
    """The dtype of products where it is not x's own: autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, k) @ W (k, m) + bias (m): multiplied in bfloat16 under autocast, but added to and compared in x's own
    precision."""
    if not torch.is_autocast_enabled(x.device.type):
        return unrounded_product(x, W, bias)
    rounded = (x @ W).to(x.dtype)
    return rounded if bias is None else rounded + bias


class _Pre(torch.autograd.Function):
    """pairs.pre as a function of W_enc, b_enc and the centre."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, centre: Tensor | None, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x, W_enc, centre)
        ctx.pairs = pairs
        return pairs.pre.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor, Tensor | None, None]:
        (x, W_enc, centre), pairs = ctx.saved_tensors, ctx.pairs
        to_bias = grad.new_zeros(pairs.d_sae).index_add_(0, pairs.features, grad)
        to_centre = None if centre is None else -(W_enc @ to_bias)
        to_enc = _to_rows("W_enc", pairs, grad, pairs.table(x if centre is None else x - centre))
        return None, None if to_enc is None else to_enc.t(), to_bias, to_centre, None


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
        grad, to_acts = pairs.table(grad), None
        if ctx.needs_input_grad[0]:  # by feature: the rows that lie apart are grad's, which a cache holds sooner
            order, rows, features, starts = pairs.by_feature
            to_acts = torch.empty_like(acts).scatter_(0, order, dots(starts, features, rows, W_dec, grad))
        return to_acts, _to_rows("W_dec", pairs, acts, grad) if ctx.needs_input_grad[1] else None, None


def _to_rows(name: str, pairs: Pairs, weights: Tensor, table: Tensor) -> Tensor | None:
    """The gradient (d_sae, d) whose row i is the sum of the weight times the token's row of table (batch, d) over the
    pairs of feature i; None, and its factors where they go, if somebody wants those."""
    order, rows, _, starts = pairs.by_feature
    factor = Factor(starts, rows, weights.index_select(0, order), table)
    if pairs.factors is None:
        return weighted_sums(*factor)
    pairs.factors.setdefault(name, []).append(factor)
    return None
