"""Does this SAE belong to this model, at this place? Measured on the user's own inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import sites
from .errors import EditError, SiteError
from .forward import eval_mode
from .measure import Measurement, Statistics, Trial, grouped, measure, ratio
from .runtime import SINK_MULTIPLE, Runtime, Slot

POOR = 0.5  # FVU: a trained SAE on its own site explains more than half of the variance


@dataclass(frozen=True)
class Row:
    """What was measured of one SAE. fvu: mean squared error over variance (ratio of means over tokens); l0: active
    features a token; dead: share of features that fired on no token; loss_*: next-token cross-entropy in nats a
    prediction; verdict in words. Special tokens, padding and attention sinks are neither replaced nor counted, and
    no loss is counted of what is predicted from them."""

    name: str
    fvu: float
    l0: float
    dead: float
    tokens: int
    loss_clean: float
    loss_spliced: float
    loss_zero: float
    verdict: str

    @property
    def loss_recovered(self) -> float:
        """(zero - spliced) / (zero - clean), arXiv 2404.16014 section 2.3; 1 is perfect."""
        return ratio(self.loss_zero - self.loss_spliced, self.loss_zero - self.loss_clean)


class Report(tuple[Row, ...]):
    """The rows of a check; prints as a table."""

    def __str__(self) -> str:
        head = f"{'SAE':44} {'FVU':>6} {'L0':>7} {'dead':>5}  {'clean':>6} {'spliced':>7} {'zero':>6}  recovered"
        lines = [
            f"{r.name:44} {r.fvu:6.3f} {r.l0:7.1f} {r.dead:5.0%}  {r.loss_clean:6.3f} {r.loss_spliced:7.3f} "
            f"{r.loss_zero:6.3f}  {r.loss_recovered:9.3f}  {r.verdict}"
            for r in self
        ]
        return "\n".join([head, *lines])

    __repr__ = __str__


@torch.no_grad()
def check(model: nn.Module, runtime: Runtime, slots: Sequence[Slot], inputs: Any) -> Report:
    """Measure each slot alone on `inputs` in eval mode (see `Saes.check`). Raises EditError while anything else is open
    on the model, SaeAttachError if that is no causal language model."""
    if runtime.requests():
        raise EditError("close the open edits, splices and captures first: check measures the model as it is")
    trial = Trial(model, runtime, *_inputs(inputs))
    measurements = [Measurement(slot) for slot in slots]
    with eval_mode(model):  # dropout would spoil the numbers, and draw from the random state
        measure(trial, grouped(measurements))
        return Report(_row(trial, m) for m in measurements)


def _row(trial: Trial, m: Measurement) -> Row:
    s = m.statistics
    return Row(
        m.slot.name, s.fvu, s.l0, s.dead, s.n, m.loss_clean, m.loss_spliced, m.loss_zero, _verdict(trial, m.slot, s)
    )


def _verdict(trial: Trial, slot: Slot, s: Statistics) -> str:
    if not s.n:
        return "no ordinary token in these inputs: nothing was measured"
    if s.fvu <= POOR:
        return "fits"
    better = _neighbours(trial, slot)
    nearest = min(better, key=lambda name: better[name], default=None)
    if nearest is not None and better[nearest] < min(POOR, s.fvu):
        return f"wrong layer? It explains {nearest} better (FVU {better[nearest]:.2f})"
    expected = slot.sae.metadata.get("model_name")
    return "does not explain this site: wrong model, site or token format?" + (
        f" It was trained on {expected}" if expected else ""
    )


def _neighbours(trial: Trial, slot: Slot) -> dict[str, float]:
    """FVU of the SAE at the same place one layer before and after, over ordinary tokens."""
    number = re.search(r"\.(\d+)(?=\.|$)", slot.read.path)
    if number is None or slot.crosses:
        return {}
    found: dict[str, float] = {}
    for other in (int(number[1]) - 1, int(number[1]) + 1):
        path = f"{slot.read.path[: number.start()]}.{other}{slot.read.path[number.end() :]}.{slot.read.side}"
        try:
            module = sites.resolve(trial.model, path).module
        except SiteError:
            continue
        seen: list[Tensor] = []
        with _tap(module, slot.read.side, seen):
            trial.logits()
        s = Statistics()
        x = seen[0].reshape(*trial.ids.shape, -1)[trial.ordinary().to(seen[0].device)]
        norm = x.float().norm(dim=-1)
        ordinary = norm <= SINK_MULTIPLE * norm.median()
        s.update(slot.on(x.device), x[ordinary], x[ordinary])
        found[path] = s.fvu
    return found


@contextmanager
def _tap(module: nn.Module, side: str, seen: list[Tensor]) -> Any:
    """Note the hidden states at a place where nothing is attached."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(sites.input_at(args, kwargs, sites.find_input(args, kwargs, side)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(sites.read(output, side))

    register: Any = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
    with register(after if side == "output" else before, with_kwargs=True):
        yield


def _inputs(inputs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(inputs, Mapping) or hasattr(inputs, "keys"):
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    else:
        ids, mask = inputs, None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        raise EditError("check takes token ids (batch, tokens), at least two tokens, or a mapping with input_ids")
    return ids, torch.ones_like(ids) if mask is None else mask
