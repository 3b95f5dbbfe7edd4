"""Functions whose sizes or ways depend on the data as PyTorch operators, so that a compiled model can contain them.

torch.compile calls such a function whole, knowing from its fake kernel what comes out. It has no gradients; where some
are asked for, SAE takes plain operations instead. Eager code runs the function itself, at no cost.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .tiles import wide

P = ParamSpec("P")
R = TypeVar("R")
# torch.compile's CUDA graphs must leave such operators out: they wait for the number of active features, or run hooks.
OUTSIDE_CUDA_GRAPHS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def traceable(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the operator sae_hooks::NAME to torch.compile; fake tells shapes and types of what it gives."""
    def register(function: Callable[P, R]) -> Callable[P, R]:
        def whole(*args: Any) -> Any:
            found: Any = function(*args)  # type: ignore[call-arg]
            return tuple(map(_own, found)) if isinstance(found, tuple) else _own(found)

        operator = torch.library.custom_op(f"sae_hooks::{function.__name__}", whole, mutates_args=(), schema=signature,
                                           tags=OUTSIDE_CUDA_GRAPHS)
        operator.register_fake(fake)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                found: R = operator(*args, **kwargs)
                return found
            return function(*args, **kwargs)

        return call

    return register


def _own(t: Tensor) -> Tensor:
    """t as the first in its memory, where compiled code expects it."""
    return t.clone() if t.storage_offset() else t


def fake_csr(x: Tensor, W_rows: Tensor, *gate: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What encoding gives: as many features as it may be."""
    active = torch.library.get_ctx().new_dynamic_size()
    indptr = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return indptr, x.new_empty(active, dtype=torch.int64), x.new_empty(active, dtype=wide(x, W_rows))


def fake_decoded(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """What decoding acts (n, d_sae) gives."""
    return acts.new_empty(acts.shape[0], W_dec.shape[1], dtype=wide(acts, W_dec))


def fake_decoded_csr(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """What decoding CSR features gives."""
    return values.new_empty(indptr.shape[0] - 1, W_dec.shape[1], dtype=wide(values, W_dec))


def fake_reconstruction(x: Tensor, W_rows: Tensor, bias: Tensor, gate: Tensor | int, W_dec: Tensor,
                        b_dec: Tensor) -> Tensor:
    """What x (n, d_in) becomes."""
    return x.new_empty(x.shape[0], W_dec.shape[1], dtype=wide(x, W_rows))
