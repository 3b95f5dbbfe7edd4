"""An edit of few tokens in one Triton kernel, without gradients: of a decoding step, in place of eight or nine
operations."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_sums import FUSION, cdiv, even, on, power_of_2

WRITTEN = 512  # columns that a program writes; each computes all activations for itself
FEATURES, READ = 8, 512  # features, and columns of what they read, that it takes at a time


def edit_few(
    x: Tensor,
    W_enc: Tensor | None,
    b_enc: Tensor,
    threshold: Tensor | None,
    W_dec: Tensor,
    gain: Tensor,
    shift: Tensor,
    only_if_active: bool,
    old: Tensor,
    chosen: Tensor | None,
) -> Tensor:
    """old (..., d_out) plus (gain * acts + shift) @ W_dec (k, d_out), in old's dtype: where chosen (...), boolean, is
    True, or everywhere. acts: what of x (..., d_in) times W_enc (k, d_in), plus b_enc (k), exceeds threshold (k), as
    many rows as old has; gain and shift (k); only_if_active: nothing for features that are not. Without W_enc nothing
    is read: gain is 0. W_dec and all of k numbers are float32, or all float64."""
    k, d_out = W_dec.shape
    x, n = even(x.reshape(-1, x.shape[-1])), old.numel() // max(d_out, 1)
    out = torch.empty_like(old, memory_format=torch.contiguous_format)
    if out.numel():
        block, features, read = (min(power_of_2(size), most) for size, most in (
            (d_out, WRITTEN), (k, FEATURES), (max(x.shape[1], 1), READ)))
        W_enc, W_dec, old = None if W_enc is None else even(W_enc), even(W_dec), old.contiguous()
        vectors = (None if t is None else t.contiguous() for t in (b_enc, threshold, gain, shift, chosen))
        with on(old):
            _edit[(n, cdiv(d_out, block))](
                x, W_enc, W_dec, *vectors, old, out, x.shape[1], d_out, k, x.stride(0),
                0 if W_enc is None else W_enc.stride(0), W_dec.stride(0), ONLY_IF_ACTIVE=only_if_active, K=features,
                READ=read, BLOCK=block, num_warps=4, **FUSION)
    return out


@triton.jit(do_not_specialize=["k"])
def _edit(
    x, W_enc, W_dec, b_enc, threshold, gain, shift, chosen, old, out, d_in, d_out, k, x_stride, enc_stride, dec_stride,
    ONLY_IF_ACTIVE: tl.constexpr, K: tl.constexpr, READ: tl.constexpr, BLOCK: tl.constexpr
):
    """A part of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < d_out
    new = tl.load(old + row * d_out + columns, mask=within, other=0.0)
    here = True if chosen is None else tl.load(chosen + row) != 0
    if here:
        DTYPE: tl.constexpr = W_dec.dtype.element_ty
        total = tl.zeros((BLOCK,), DTYPE)
        for first in range(0, k, K):
            features = first + tl.arange(0, K)
            inside = features < k
            change = tl.load(shift + features, mask=inside, other=0.0)
            if W_enc is not None:
                pre = tl.zeros((K, READ), DTYPE)
                for begin in range(0, d_in, READ):
                    at = begin + tl.arange(0, READ)
                    rows = tl.load(W_enc + features[:, None].to(tl.int64) * enc_stride + at[None, :],
                                   mask=inside[:, None] & (at < d_in)[None, :], other=0.0)
                    pre += rows * tl.load(x + row * x_stride + at, mask=at < d_in, other=0.0).to(DTYPE)[None, :]
                acts = tl.sum(pre, 1) + tl.load(b_enc + features, mask=inside, other=0.0)
                acts *= (acts > tl.load(threshold + features, mask=inside, other=0.0)).to(DTYPE)
                change += tl.load(gain + features, mask=inside, other=0.0) * acts
                if ONLY_IF_ACTIVE:
                    change *= (acts > 0).to(DTYPE)
            rows = tl.load(W_dec + features[:, None].to(tl.int64) * dec_stride + columns[None, :],
                           mask=inside[:, None] & within[None, :], other=0.0)
            total += tl.sum(change[:, None] * rows, 0)
        new = (new.to(DTYPE) + total).to(new.dtype)
    tl.store(out + row * d_out + columns, new, mask=within)
