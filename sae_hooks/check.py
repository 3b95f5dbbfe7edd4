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
from .runtime import SINK_MULTIPLE, Request, Runtime, Slot, SpliceRequest
from .sae import SAE

POOR = 0.5  # FVU: a trained SAE on its own site explains more than half of the variance


@dataclass(frozen=True)
class Row:
    """What was measured of one SAE. fvu: mean squared error over variance (ratio of means over tokens); l0: active
    features a token; dead: share of features that fired on no token; loss_*: next-token cross-entropy in nats a
    token; verdict in words."""

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
        return (self.loss_zero - self.loss_spliced) / (self.loss_zero - self.loss_clean)


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


class Statistics:
    """Running sums over tokens: reconstruction error, variance, firings."""

    def __init__(self) -> None:
        self.n, self.error, self.square = 0, 0.0, 0.0
        self.sum: Tensor | float = 0.0
        self.fired: Tensor | int = 0

    def update(self, sae: SAE, x: Tensor, target: Tensor) -> Tensor:
        """Take in x (n, d_in) and what should be reconstructed, (n, d_out); returns the reconstruction, float32."""
        _, indices, _ = sae.encode_sparse(x)
        wide = target.double()
        x_hat: Tensor = sae(x.float())
        self.n += len(x)
        self.error += float((x_hat.double() - wide).square().sum())
        self.square += float(wide.square().sum())
        self.sum = self.sum + wide.sum(0)
        self.fired = self.fired + torch.bincount(indices, minlength=sae.d_sae)
        return x_hat

    @property
    def l0(self) -> float:
        """Active features a token, on average; nan without tokens."""
        return float(torch.as_tensor(self.fired).sum()) / self.n if self.n else float("nan")

    @property
    def dead(self) -> float:
        """Share of features that fired on no token; nan without tokens."""
        return float((torch.as_tensor(self.fired) == 0).double().mean()) if self.n else float("nan")

    @property
    def fvu(self) -> float:
        """Mean squared error over mean squared distance from the mean; nan without tokens."""
        if not self.n or not isinstance(self.sum, Tensor):
            return float("nan")
        variance = self.square - float(self.sum.square().sum()) / self.n
        return self.error / variance if variance > 0 else float("nan")


@torch.no_grad()
def check(model: nn.Module, runtime: Runtime, slots: Sequence[Slot], inputs: Any) -> Report:
    """Measure each slot alone on `inputs` (see `Saes.check`). Raises EditError while anything else is open on the
    model."""
    if runtime.requests():
        raise EditError("close the open edits, splices and captures first: check measures the model as it is")
    trial = Trial(model, runtime, *_inputs(inputs))
    statistics = {slot: Statistics() for slot in slots}
    clean = trial.loss(*[_watch(slot, s) for slot, s in statistics.items()])
    return Report(_row(trial, slot, s, clean) for slot, s in statistics.items())


@dataclass(frozen=True, eq=False)
class Trial:
    """What every measurement is made on: the model with what is open on it, token ids and mask (batch, tokens)."""

    model: nn.Module
    runtime: Runtime
    ids: Tensor
    mask: Tensor

    def loss(self, *requests: Request) -> float:
        """Next-token cross-entropy of a forward pass with these requests open, nats a token."""
        with _open(self.runtime, list(requests)):
            logits = self.model(input_ids=self.ids, attention_mask=self.mask).logits
        return cross_entropy(logits, self.ids, self.mask)

    def ordinary(self) -> Tensor:
        """Boolean (batch, tokens): neither padding nor a special token."""
        special = torch.tensor(sorted(self.runtime.special_ids), dtype=self.ids.dtype, device=self.ids.device)
        return self.mask.to(self.ids.device).bool() & ~torch.isin(self.ids, special)


def cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Mean next-token cross-entropy, nats a token, over tokens (batch, tokens) that the mask keeps."""
    kept = mask[:, 1:].bool() & mask[:, :-1].bool()
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device), reduction="none"
    )
    return float(total[kept.flatten().to(total.device)].mean())


def _row(trial: Trial, slot: Slot, s: Statistics, clean: float) -> Row:
    spliced, zero = trial.loss(SpliceRequest(slot)), trial.loss(SpliceRequest(slot, rebuild=_zeros))
    verdict = _verdict(trial, slot, s)
    return Row(slot.name, s.fvu, s.l0, s.dead, s.n, clean, spliced, zero, verdict)


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
            trial.loss()
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
        place = sites.find_input(args, kwargs, side)
        seen.append(args[place] if isinstance(place, int) else kwargs[place])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(sites.read(output, side))

    handle = (
        module.register_forward_hook(after)
        if side == "output"
        else (module.register_forward_pre_hook(before, with_kwargs=True))
    )
    try:
        yield
    finally:
        handle.remove()


def _watch(slot: Slot, s: Statistics) -> Request:
    """A request that feeds `s` and writes what stood there."""

    def rebuild(sae: SAE, x: Tensor, target: Tensor) -> Tensor:
        s.update(sae, x, target)
        return target

    return SpliceRequest(slot, rebuild=rebuild)


def _zeros(sae: SAE, x: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(target)


@contextmanager
def _open(runtime: Runtime, requests: list[Request]) -> Any:
    runtime.open(requests, "context")
    try:
        yield
    finally:
        runtime.close(requests)


def _inputs(inputs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(inputs, Mapping) or hasattr(inputs, "keys"):
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    else:
        ids, mask = inputs, None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        raise EditError("check takes token ids (batch, tokens), at least two tokens, or a mapping with input_ids")
    return ids, torch.ones_like(ids) if mask is None else mask
