"""Running somebody's model only to look at it: where its inputs go, in eval mode, as deep as is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class DeepEnoughError(Exception):
    """Raised inside a forward pass by the last hook that wants anything of it, and caught around the pass."""


def input_device(model: nn.Module, default: torch.device) -> torch.device | str | int:
    """Where accelerate's hook takes the inputs, or where the weights are; those on "meta" are off-loaded."""
    planned: torch.device | str | int | None = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if planned is not None:
        return planned
    return next((p.device for p in model.parameters() if p.device.type != "meta"), default)


def reads_text(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module reads the tokens of input_ids. A decoder beside an encoder does not: some models shift input_ids
    for it, others ask for decoder_input_ids."""
    encoder: Any = getattr(model, "get_encoder", None)
    if encoder is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    return any(part is module for part in encoder().modules())


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models as they were written: a graph would not let a hook end the pass. Costs nothing where no
    compiler was imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and every module afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
