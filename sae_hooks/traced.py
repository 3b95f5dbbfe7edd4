"""A site in a graph of torch.compile: an operator that the compiler cannot look into. It runs the site's hook whenever
the graph runs.

To break the graph at a site is to break the loop over the layers, and that the compiler does not compile: each layer
gets a graph of its own, until there are too many, and the other layers none.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .kernels import OUTSIDE_CUDA_GRAPHS

_hooks: WeakValueDictionary[str, Any] = WeakValueDictionary()  # by name, which graphs keep: strings are constants there
_numbers = count()


def enter(hook: Any) -> str:
    """A name for a hook with a method `applied(x)`, by which it is found while it lives."""
    name = str(next(_numbers))
    _hooks[name] = hook
    return name


def _at_site(x: Tensor, name: str) -> Tensor:
    """x (..., d) with what is open at a site done to it. The graph reuses the memory of x, and of what comes out, when
    it needs them no longer; who watches may, and gets a copy."""
    own, hook = x.clone(memory_format=torch.contiguous_format), _hooks.get(name)
    new = own if hook is None else hook.applied(own)
    return own.clone() if new is own else new.contiguous()


at_site = torch.library.custom_op(
    "sae_hooks::at_site", _at_site, mutates_args=(), schema="(Tensor x, str name) -> Tensor", tags=OUTSIDE_CUDA_GRAPHS)
at_site.register_fake(lambda x, name: x.new_empty(x.shape))
