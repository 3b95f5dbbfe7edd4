"""Who else must know what is done with a tensor: autograd, torch.func, torch.compile, torch.autocast."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def autocasts(t: Tensor) -> bool:
    """Whether torch.autocast is on for t's device."""
    return torch.is_autocast_enabled("cpu" if t.is_cpu else t.device.type)  # to ask a tensor for its device takes long


def is_bare(*tensors: Tensor) -> bool:
    """Whether each is numbers in memory and no more: has no tangent (forward-mode derivatives), nor stands for other
    tensors (torch.func.vmap). Only such may be written into memory that is there, or given to numpy."""
    try:
        for t in tensors:
            t.data_ptr()
    except RuntimeError:
        return False
    return all(unpack_dual(t).tangent is None for t in tensors)  # type: ignore[no-untyped-call]


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is to give one of these a gradient."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_untraced(x: Tensor, W_rows: Tensor, bias: Tensor) -> bool:
    """Whether neither autograd nor torch.compile nor torch.func must know what is done with these."""
    if torch.compiler.is_compiling():
        return False
    return not wants_gradient(x, W_rows, bias) and is_bare(x, W_rows, bias)
