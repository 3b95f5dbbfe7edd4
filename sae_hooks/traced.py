"""A site, or the door of a model inside the model, in a graph of torch.compile: an operator that the compiler cannot
look into. It runs the hook whenever the graph runs. Where there can be none, the hook runs between two graphs.

To break the graph at a site is to break the loop over the layers, and that the compiler does not compile: each layer
gets a graph of its own, until there are too many, and the other layers none. To break it at a door has every pass
enter more graphs than one, each with its guards.
"""

import sys
from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .kernels import OUTSIDE_CUDA_GRAPHS

Method = TypeVar("Method", bound=Callable[..., Any])
_hooks: WeakValueDictionary[str, Any] = WeakValueDictionary()  # by name, which graphs keep: strings are constants there
_numbers = count()
_library: Any = torch.library.Library("sae_hooks", "FRAGMENT")  # type: ignore[no-untyped-call]


def untraced(method: Method) -> Method:
    """Run outside of what torch.compile traces: the graph breaks here, but only while something is open.

    Decorating with torch.compiler.disable itself would import the compiler, which takes two seconds.
    """

    untraced_method: Any = None

    @wraps(method)
    def call(*args: Any) -> Any:
        nonlocal untraced_method
        if "torch._dynamo" not in sys.modules:
            return method(*args)
        if untraced_method is None:
            untraced_method = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return untraced_method(*args)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks at before it traces a call
    return cast(Method, call)


def enter(hook: Any) -> str:
    """A name for a hook with a method `applied(x)`, or `is_within()` and `entered(x, copy)`, by which it is found while
    it lives."""
    name = str(next(_numbers))
    _hooks[name] = hook
    return name


def is_within(name: str) -> bool:
    """Whether a door is entered in a pass that has begun at another one. It is asked when a graph is made; what the
    graph begins with is then always in such a pass."""
    return bool((hook := _hooks.get(name)) and hook.is_within())


is_within._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the compiler calls it, and notes what it says


def _at_site(x: Tensor, name: str) -> Tensor:
    """x (..., d) with what is open at a site done to it. The graph reuses the memory of x, and of what comes out, when
    it needs them no longer; who watches may, and gets a copy."""
    own, hook = x.clone(memory_format=torch.contiguous_format), _hooks.get(name)
    new = own if hook is None else hook.applied(own)
    return own.clone() if new is own else new.contiguous()


def _at_door(x: Tensor, name: str) -> Tensor:
    """A copy of what a model inside reads, ids (batch, tokens) or embeddings (batch, tokens, d), once that is noted:
    the graph can do nothing before."""
    copy, hook = x.clone(memory_format=torch.contiguous_format), _hooks.get(name)
    if hook is not None:
        hook.entered(x, copy)
    return copy


def _operator(function: Callable[[Tensor, str], Tensor]) -> Any:
    """A function of a tensor and the name of a hook, which gives a tensor of the same shape, as an operator. Without
    what torch.library.custom_op wraps around it, for gradients, of which graphs with hooks have none: that takes three
    times as long as an operator."""
    name = function.__name__.removeprefix("_")
    while hasattr(torch.ops.sae_hooks, name):  # of this module, imported before: its graphs still call that one
        name += "_"
    _library.define(f"{name}(Tensor x, str name) -> Tensor", tags=OUTSIDE_CUDA_GRAPHS)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sae_hooks::{name}", lambda x, name: x.new_empty(x.shape), lib=_library)
    return getattr(torch.ops.sae_hooks, name).default


at_site, at_door = _operator(_at_site), _operator(_at_door)
