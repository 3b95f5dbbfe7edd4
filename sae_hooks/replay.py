"""The layers below a site, run in one forward pass and played back in the next ones of the same inputs.

What is measured at a site leaves them alone, so they would compute the same again: half of the work at mid-depth.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import sites
from .errors import SiteError


class Replay:
    """Plays back the output of the last of some leading decoder layers, in place of running any of them.

    Nothing is guessed about an architecture: `prove` compares a played pass with a whole one, bit by bit, and nothing
    is played unless they were equal. Only the thread that plays is played to.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self._layers, self._output, self._proven = list(layers), None, False

    @classmethod
    def below(cls, model: nn.Module, site: sites.Site) -> Replay:
        """For the decoder layers that a site's values do not change; one that plays nothing where they cannot be
        told, or where the model is compiled."""
        try:
            path = sites.layers_path(model)
        except SiteError:
            return cls()
        found = re.match(rf"{re.escape(path)}\.(\d+)(\.|$)", site.path)
        compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
        if compiled or found is None:
            return cls()
        whole = not found[2] and site.side == "output"
        layers = model.get_submodule(path)
        return cls([layers.get_submodule(str(i)) for i in range(int(found[1]) + whole)])

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what the layers give in the pass inside this block."""
        if not self._layers:
            yield
            return
        original = self._layers[-1].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._output = original(*args, **kwargs)
            return self._output

        with _in_place_of_forward(self._layers[-1], forward):
            yield

    def prove(self, run: Callable[[], Tensor], logits: Tensor) -> None:
        """Once, after the first record: play to `run`, and never again if it fails or gives other logits than
        these."""
        if self._layers and not self._proven:
            self._proven = True
            try:
                with self.play():
                    same = torch.equal(run(), logits)
            except Exception:  # whatever a layer misses that a lower one should have left for it
                same = False
            if not same:
                self._layers, self._output = [], None

    @contextmanager
    def play(self) -> Iterator[None]:
        """Passes inside this block skip the layers; they must be of the inputs of the pass that was recorded."""
        with ExitStack() as stack:
            for layer in self._layers if self._proven else []:
                stack.enter_context(_in_place_of_forward(layer, self._played(layer.forward)))
            yield

    def _played(self, original: Callable[..., Any]) -> Callable[..., Any]:
        here = threading.get_ident()

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._output if threading.get_ident() == here else original(*args, **kwargs)

        return forward


@contextmanager
def _in_place_of_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module computes this instead, but its hooks stay; accelerate keeps its own forward in the same place."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
