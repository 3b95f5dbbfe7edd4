"""Who multiplies on a CPU, where PyTorch's own product, which is MKL's, is not the quickest way."""

import math
from typing import Any

import torch
from torch import Tensor

from .tracing import is_bare, is_untraced, wants_gradient


def _is_zen_5() -> bool:
    """Whether this CPU is AMD's Zen 5, or a later one."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in str(told.get("cpu_name")) and bool(told.get("avx_vnni"))


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # there MKL is slower than it might be
ZEN_5 = AVX512 and _is_zen_5()  # and here it leaves half of the width of vector units unused
LARGE = 2**22 if ZEN_5 else 2**21  # numbers that no longer fit the caches: for few tokens it matters who reads them
FEW = 128  # tokens, up to which MKL is quicker with sides swapped (twice at 4 tokens) ...
THIN = range(8 if AVX512 else 5, 65)  # ... but for these, oneDNN is quicker still (twice at 16 tokens), ...
THIN_WIDENED = range(16, 65 if AVX512 else 16)  # ... also of rows that were just widened, ...
THINNER = range(3 if ZEN_5 else 4, 8 if AVX512 else 4)  # ... and for these if sides stay as they are, ...
FEWEST = range(1, 3 if ZEN_5 else 5 if AVX512 else 4)  # ... and for these MKL from several places in the rows, ...
FEWEST_OF = 2**13 if ZEN_5 else 2**12 if AVX512 else math.inf  # ... where the tokens have fewer numbers
PLACES = 4  # a core reads half as quickly again as from one place
MUCH = 2**22 if ZEN_5 else 2**27 if AVX512 else math.inf  # multiplications from which oneDNN is the quicker one ...
MUCH_OF_TWO = 2**27 if AVX512 else math.inf  # ... of one or two tokens, in all other cases ...
MUCH_DECODED = 2**22 if ZEN_5 else math.inf  # ... and, of three tokens or more, for the other matrix
MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # most builds for CPUs do


def affine_otherwise(x: Tensor, rows: Tensor, bias: Tensor, widened: bool = False) -> Tensor | None:
    """x (n, d_in) @ rows.T + bias, of one dtype, on a CPU, where a plain product is not the quickest way; else None.
    widened: rows were just now."""
    n, large = x.shape[0], is_large(rows)
    if not x.is_cpu or not (large or widened or is_much(x, rows)):
        return None
    x = x.contiguous()  # what lies otherwise takes products up to hundreds of times as long
    if is_untraced(x, rows, bias):  # gradients of the first would be as large as rows, the others have none
        if large and n in FEWEST and x.numel() < FEWEST_OF and len(rows) % PLACES == 0 and MKL:
            return affine_from_places(x, rows, bias)
        if has_onednn(x) and rows.is_contiguous():
            if n in (THIN if large else THIN_WIDENED if widened else ()):
                return by_onednn(rows, x, None).add_(bias[:, None]).T.contiguous()
            if (large and n in THINNER) or is_much(x, rows):
                return by_onednn(x, rows, bias.contiguous())
    if 1 < n <= FEW and rows.numel() >= 2 * LARGE:
        return torch.addmm(bias[:, None], rows, x.T).T.contiguous()
    return None


def addmm(added: Tensor, acts: Tensor, W_dec: Tensor) -> Tensor:
    """torch.addmm: added, (n, d_out) or (d_out), + acts (n, d_sae) @ W_dec (d_sae, d_out); on any device."""
    much = acts.is_cpu and is_much_decoded(acts, W_dec)
    if much and has_onednn(acts) and W_dec.is_contiguous() and is_untraced(acts, W_dec, added):
        return by_onednn(acts.contiguous(), W_dec.T, None).add_(added)
    return torch.addmm(added, acts, W_dec)


def followed_otherwise(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (n, k) @ W (k, m) + bias (m), of one dtype, which autograd follows, on a CPU where a plain product is not the
    quickest way; else None."""
    given = (x, W) if bias is None else (x, W, bias)
    if not wants_gradient(*given) or torch.compiler.is_compiling() or not is_bare(*given):
        return None
    if x.ndim != 2 or not x.is_cpu or not is_much_decoded(x, W) or not has_onednn(x) or _in_one_piece(W) is not W:
        return None
    out: Tensor = _Product.apply(x.contiguous(), W, bias)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """(x, W, bias) -> x @ W + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        return by_onednn(x, W.T, None if bias is None else bias.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, W), (x_too, W_too, bias_too) = ctx.saved_tensors, ctx.needs_input_grad
        return mm(grad, W.T) if x_too else None, mm(x.T, grad) if W_too else None, grad.sum(0) if bias_too else None


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) @ b (k, m), of one dtype: a backward pass' product, plainly where somebody follows that."""
    if torch.is_grad_enabled() or not is_bare(a, b) or not a.is_cpu or not is_much_decoded(a, b) or not has_onednn(a):
        return a @ b
    a, b = _in_one_piece(a), _in_one_piece(b)
    if a.is_contiguous() or a.numel() <= b.numel():  # what is copied is the smaller one
        return by_onednn(a.contiguous(), b.T, None)
    return by_onednn(b.T.contiguous(), a, None).T


def _in_one_piece(matrix: Tensor) -> Tensor:
    """A matrix, if it or its transposition is contiguous, or a copy of it."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def is_large(weights: Tensor) -> bool:
    """Whether a CPU's caches do not hold them."""
    return weights.numel() >= LARGE


def is_much(x: Tensor, rows: Tensor) -> bool:
    """Whether x (n, d_in) @ rows.T is so much that oneDNN is the quicker one on a CPU."""
    n = x.shape[0]
    return n * rows.numel() >= (MUCH if n > 2 else MUCH_OF_TWO)


def is_much_decoded(acts: Tensor, W_dec: Tensor) -> bool:
    """Whether acts (n, ...) @ W_dec is."""
    n = acts.shape[0]
    return n > 2 and n * W_dec.numel() >= MUCH_DECODED


def has_onednn(x: Tensor) -> bool:
    """Whether `by_onednn` may have matrices of this dtype."""
    return HAS_ONEDNN and bool(torch.backends.mkldnn.enabled) and x.dtype == torch.float32


def by_onednn(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x @ rows.T + bias, each in one piece, but that rows.T may be; of a bias that is not it would read the wrong
    numbers."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, rows, bias, "none", [], "")
    return product


def affine_from_places(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """affine as products of x (n, d_in) with PLACES rows each, which lie as far from each other as they can."""
    apart = rows.view(PLACES, -1, rows.shape[1]).permute(1, 2, 0)  # (m / PLACES, d_in, PLACES)
    biases = bias.view(PLACES, -1, 1).permute(1, 2, 0)
    pre = torch.baddbmm(biases, x.expand(len(apart), *x.shape), apart)  # (m / PLACES, n, PLACES)
    return pre.permute(1, 2, 0).reshape(len(x), len(rows))
