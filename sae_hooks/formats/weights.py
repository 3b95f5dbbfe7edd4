"""Checks and foldings of raw tensors that the dialects share. Nothing here reads a file.

What is folded into a matrix is folded in place where its dtype allows it: an SAE may fill most of a machine's memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import SaeFormatError, SaeMismatchError, SaeWarning

MOST_NORM = 1e4
AT_ONCE = 1024  # features
ENCODERS = ("W_enc", "w_enc", "W_E", "encoder.weight")
BIASES = ("b_enc", "b_gate", "b_E", "encoder.bias", "gate_bias")  # as long as there are features
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise SaeFormatError naming every tensor that is missing, empty, or not a plain float."""
    wrong = [f"no {name}" for name in names if name not in tensors]
    wrong += [f"{name} is {str(t.dtype).removeprefix('torch.')}; an SAE has float16, bfloat16, float32 or float64"
              for name, t in tensors.items() if t.dtype not in FLOATS]
    wrong += [f"{name} has no values" for name, t in tensors.items() if t.numel() == 0]
    if wrong:
        raise SaeFormatError(f"{'; '.join(wrong)} (tensors: {_shapes(tensors) or 'none'})")


def orient(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The named tensors in their expected shapes; a matrix that is plainly transposed is turned.

    Raises SaeMismatchError naming every tensor that does not fit.
    """
    turned = {name: t.T if t.ndim == 2 and t.shape != shape and t.T.shape == shape else t
              for name, shape in shapes.items() for t in [tensors[name]]}
    wrong = [f"{name} is {tuple(tensors[name].shape)}, expected {shape}" for name, shape in shapes.items()
             if tuple(turned[name].shape) != shape]
    if wrong:
        raise SaeMismatchError("tensors do not fit together: " + "; ".join(wrong))
    return turned


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(d_in, d_sae) by the shapes of a file's tensors, whichever way its encoder is kept; None where they tell none."""
    encoder = next((shapes[name] for name in ENCODERS if name in shapes), ())
    bias = next((shapes[name] for name in BIASES if name in shapes), ())
    if not bias or len(encoder) != 2 or bias[0] not in encoder:
        return None
    return encoder[0] if encoder[1] == bias[0] else encoder[1], bias[0]


def subtract_from_bias(b_enc: Tensor, shift: Tensor, W_enc: Tensor) -> Tensor:
    """Fold `(x - shift) @ W_enc + b_enc` into the bias of `x @ W_enc`: b_enc - shift @ W_enc, summed in float64.

    Some features at a time: all at once would take twice the encoder's memory beside it.
    """
    shifted = b_enc.double()
    for into, some in zip(torch.split(shifted, AT_ONCE), torch.split(W_enc, AT_ONCE, dim=1), strict=True):
        into -= shift.double() @ some.double()
    return shifted.to(torch.promote_types(b_enc.dtype, torch.float32))


def gated_as_threshold(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, b_enc and threshold of the JumpReLU SAE that a gated SAE with its tied encoder is. W_enc is taken over.

    arXiv 2404.16014, section 3.2: the gate x W + b_gate > 0 means that the magnitude exp(r) x W + b_mag is above
    b_mag - exp(r) b_gate.
    """
    rows = to_change(W_enc.T)
    gain = r_mag.double().exp()
    threshold = (b_mag.double() - gain * b_gate.double()).clamp(min=0)
    return rows.mul_(gain.to(rows.dtype)[:, None]).T, b_mag, threshold.to(rows.dtype)


def fold_decoder_norms(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same reconstruction with decoder rows of norm 1, by features that are so much larger; rows of norm 0 never
    fire then. The matrices are taken over."""
    decoder, encoder = to_change(W_dec), to_change(W_enc.T)
    norms = row_norms(decoder, torch.float64).to(decoder.dtype)
    decoder.div_(torch.where(norms > 0, norms, 1.0)[:, None])
    return encoder.mul_(norms[:, None]).T, b_enc * norms, decoder


def to_change(rows: Tensor) -> Tensor:
    """Rows, one a feature, in float32 or wider, to be changed in place: the same memory where they are so already, else
    a contiguous copy."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32), memory_format=torch.contiguous_format)


def row_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The L2 norm of each row, in this dtype; some rows at a time, for torch copies them all to sum in a wider one."""
    norms = torch.empty(len(rows), dtype=dtype, device=rows.device)
    for into, some in zip(torch.split(norms, AT_ONCE), torch.split(rows, AT_ONCE), strict=True):
        into.copy_(torch.linalg.vector_norm(some, dim=1, dtype=dtype))
    return norms


def positive(threshold: Tensor) -> Tensor:
    """The threshold with negative entries raised to 0: relu(pre) * (pre > t) is the same function for every t <= 0."""
    below = int((threshold < 0).sum())
    if below:
        warnings.warn(f"{below} of {threshold.numel()} thresholds are negative and act as 0", SaeWarning, stacklevel=2)
    return threshold.clamp(min=0) if below else threshold


def warn_odd_decoder(W_dec: Tensor) -> None:
    """Warn of decoder rows that are zero (such features write nothing) or so long that they are no direction in use.

    Published SAEs have rows of norm 1, or of some few; 1e4 leaves room for any sane scale of activations.
    """
    norms = row_norms(W_dec, torch.promote_types(W_dec.dtype, torch.float32))
    zero, longest = int((norms == 0).sum()), float(norms.max())
    odd = [f"{zero} of {norms.numel()} decoder rows are zero: these features write nothing"] * bool(zero)
    odd += [f"decoder row {int(norms.argmax())} has norm {longest:g}"] * (longest > MOST_NORM)
    if odd:
        warnings.warn("; ".join(odd), SaeWarning, stacklevel=3)


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:12])
