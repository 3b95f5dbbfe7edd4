"""Where passes of a model begin and end: hooks at its door and at those of the models inside it, and before `generate`.

They tell the hooks at the sites (hooks.py) which tokens a pass computes, and what of them is prompt and padding. While
nothing is open they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import sites, traced
from .errors import SaeAttachError
from .generation import GUIDED, Generation, is_assistant
from .runtime import Runtime
from .tokens import PACKED, ids_of
from .traced import untraced


class PassHook:
    """Hooks of the model (and of the model inside it): note the tokens of a pass, and its end, while a request is
    open. names: what the model's arguments are called, by position; door: the module's id; outer: those of the modules
    around it that have such hooks, too; alike: whether all of them read the same tokens."""

    def __init__(
        self, runtime: Runtime, names: Sequence[str] = (), door: int = 0, outer: Iterable[int] = (), alike: bool = True
    ) -> None:
        self.runtime, self.names, self.door, self.outer, self.alike = runtime, names, door, frozenset(outer), alike
        self.name = traced.enter(self)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Note the pass; changes nothing. Of a model inside the one that a graph is made of: (args, kwargs) with a copy
        of its ids or embeddings, from the operator that notes it."""
        if not self.runtime.active:
            return None
        if torch.compiler.is_compiling() and not torch.is_grad_enabled() and traced.is_within(self.name):
            named = self._named(args, kwargs)
            ids = ids_of(args, named)
            x = named.get("inputs_embeds") if ids is None else ids
            place = next((place for place, value in (*enumerate(args), *kwargs.items()) if value is x), None)
            if x is not None and place is not None:
                return sites.replace_input(args, kwargs, place, traced.at_door(x, self.name))
        self._before(module, args, kwargs)
        return None

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also where the module raised: its pass has ended. A graph does not look here."""
        if self.runtime.active and not torch.compiler.is_compiling():
            self.runtime.end(self.door)

    def is_within(self) -> bool:
        """Whether a pass has begun at an outer door, and now comes here with the same tokens."""
        now = self.runtime.begun()
        return now is not None and self.alike and now.reaches(self.door, self.outer)

    def entered(self, x: Tensor, copy: Tensor) -> None:
        """Note, where a graph runs, that the pass goes on with x at this door, whose module reads a copy of it. Raises
        SaeAttachError where it does not. What is open in other contexts alone needs no note."""
        now = self.runtime.begun()
        if not self.runtime.requests():
            return
        if now is None or not now.reaches(self.door, self.outer) or not now.gives(x):
            raise SaeAttachError("a compiled graph runs a model inside the model twice in a pass, or on other tokens; "
                                 "run it uncompiled while an edit, splice or capture is open")
        now.owners.add(self.door)
        if not x.is_floating_point():
            now.given = copy

    @untraced
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.runtime.begin(module, self.outer, args, self._named(args, kwargs))

    def _named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs

    def __deepcopy__(self, memo: dict[int, Any]) -> PassHook:
        return _inert_pass()

    def __reduce__(self) -> Any:
        return _inert_pass, ()


class GenerateHook:
    """Stands before model.generate: tells the hooks what is prompt and what is padding. Copies are the plain method."""

    name = "generate"

    def __init__(self, runtime: Runtime, model: nn.Module, plain: Callable[..., Any]) -> None:
        self.runtime, self.model, self.plain = runtime, model, plain
        self.__doc__, self.__name__, self.__wrapped__ = plain.__doc__, self.name, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        local, before = self.runtime.local, getattr(self.runtime.local, "generation", None)
        generation = Generation.of(self.model, args, kwargs)
        if generation is not None and before is not None and is_assistant(args, kwargs):
            generation.guess_for(before)
        if generation is not None and self.runtime.active:
            generation.opening = self.runtime.openings
        if generation is not None and generation.guided and self.runtime.requests():
            raise SaeAttachError(GUIDED)
        local.generation, local.current = generation, None
        try:
            result = self.plain(*args, **kwargs)
        finally:
            local.generation, local.current = before, None
        text = getattr(result, "sequences", result)
        if generation is not None and isinstance(text, Tensor):
            generation.finish(text)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.model))
        return getattr(type(self.model), self.name).__get__(copied)

    def __reduce__(self) -> Any:
        return getattr, (self.model, self.name)


class PackedHook(GenerateHook):
    """Stands before model.generate_batch and refuses while anything is open here: its own thread would merely log
    that, and not see what is open in this context alone."""

    name = "generate_batch"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.runtime.requests():
            raise SaeAttachError(PACKED)
        return self.plain(*args, **kwargs)


def _inert_pass() -> PassHook:
    return PassHook(Runtime(frozenset()))
