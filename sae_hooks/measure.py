"""What an SAE is worth, counted: reconstruction over tokens, and the model's loss with x_hat in place of x.

`model.saes.check` and `sae_hooks.training.evaluate` both measure here, so their numbers are of the same positions.
Protocol of arXiv 2407.14435 and Gemma Scope 1 (2408.05147, 3.3): special tokens, padding and attention sinks are never
replaced, and only predictions from the other, ordinary, positions count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels
from .errors import SaeAttachError
from .replay import Replay
from .runtime import Request, Runtime, Slot, SpliceRequest, WatchRequest
from .sae import SAE
from .tokens import Pass


class Statistics:
    """Running sums over tokens, in float64: reconstruction error, variance, length and direction, firings."""

    def __init__(self) -> None:
        self.n = 0
        self._sums = torch.zeros(5, dtype=torch.float64, device="cpu")  # error, target^2, x_hat^2, x_hat target, cosine
        self._total = torch.zeros(1, dtype=torch.float64, device="cpu")
        self.fired = torch.zeros(1, dtype=torch.int64, device="cpu")

    def update(self, sae: SAE, x: Tensor, target: Tensor) -> Tensor:
        """Take in x (n, d_in) and what should be reconstructed, (n, d_out), all on the SAE's device; encodes once.

        Returns the reconstruction, in float32 or wider.
        """
        indptr, indices, values = sae.encode_sparse(x)
        x_hat = kernels.decode_sparse(indptr, indices, values, sae.W_dec, sae.b_dec) + sae.skip(x)
        built, wide = x_hat.double(), target.double()
        cosine = F.cosine_similarity(built, wide, dim=-1)
        terms = [(built - wide).square(), wide.square(), built.square(), built * wide, cosine]
        self.n += len(x)
        self._sums = self._sums + torch.stack([term.sum() for term in terms]).cpu()
        self._total = self._total + wide.sum(0).cpu()
        self.fired = self.fired + torch.bincount(indices, minlength=sae.d_sae).cpu()
        return x_hat

    @property
    def frequencies(self) -> Tensor:
        """Share of the tokens on which each feature fired, (d_sae) in float64 on the CPU; nan without tokens."""
        return self.fired.double() / self.n

    @property
    def l0(self) -> float:
        """Active features a token, on average; nan without tokens."""
        return ratio(float(self.fired.sum()), self.n)

    @property
    def dead(self) -> float:
        """Share of features that fired on no token; nan without tokens."""
        return float((self.fired == 0).double().mean()) if self.n else float("nan")

    @property
    def fvu(self) -> float:
        """Mean squared error over mean squared distance from the mean; nan without tokens, or where all are equal."""
        variance = float(self._sums[1] - self._total.square().sum() / max(self.n, 1))
        return ratio(float(self._sums[0]), max(variance, 0.0))

    @property
    def gamma(self) -> float:
        """Relative reconstruction bias E|x_hat|^2 / E[x_hat . x], arXiv 2404.16014 eq. 9-10; below 1, x_hat is too
        short. nan without tokens, or where x_hat is 0."""
        return ratio(float(self._sums[2]), float(self._sums[3]))

    @property
    def cosine(self) -> float:
        """Cosine of x_hat and what should be reconstructed, averaged over tokens; nan without tokens."""
        return ratio(float(self._sums[4]), self.n)


def ratio(above: float, below: float) -> float:
    """above / below, or nan where below is 0: nothing was measured."""
    return above / below if below else float("nan")


@dataclass(frozen=True, eq=False)
class Trial:
    """What every measurement is made on: the model with what is open on it, token ids and mask (batch, tokens)."""

    model: nn.Module
    runtime: Runtime
    ids: Tensor
    mask: Tensor

    def logits(self, *requests: Request) -> Tensor:
        """Logits (batch, tokens, vocabulary) of a forward pass with these requests open. Raises SaeAttachError where
        the model gives others, or none."""
        no_cache = {"use_cache": False} if hasattr(self.model, "generate") else {}
        logits = None
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            with _open(self.runtime, list(requests)):
                output = self.model(input_ids=self.ids, attention_mask=self.mask, **no_cache)
            logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != self.ids.shape \
                or int(self.ids.max()) >= logits.shape[-1]:
            raise SaeAttachError(
                "losses are those of a causal language model, which gives logits (batch, tokens, vocabulary); attach "
                f"to one, not to {type(self.model).__name__}"
            )
        return logits

    def ordinary(self) -> Tensor:
        """Boolean (batch, tokens): neither padding nor a special token; sinks are told at a site only."""
        special = torch.tensor(sorted(self.runtime.special_ids), dtype=self.ids.dtype, device=self.ids.device)
        return self.mask.to(self.ids.device).bool() & ~torch.isin(self.ids, special)

    def counted(self, ordinary: Tensor) -> Tensor:
        """Boolean (batch, tokens - 1): the predictions from ordinary positions (batch, tokens) of what is no
        padding."""
        return ordinary[:, :-1] & self.mask[:, 1:].to(ordinary.device).bool()

    def loss(self, logits: Tensor, counted: Tensor) -> float:
        """Sum of the next-token cross-entropies at counted (batch, tokens - 1), in nats."""
        ids, counted = self.ids.to(logits.device), counted.to(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for row in range(len(ids)):  # a batch of Gemma's logits in float32 would be gigabytes
            chosen = logits[row, :-1][counted[row]].to(wide)
            total += F.cross_entropy(chosen, ids[row, 1:][counted[row]], reduction="none").double().sum()
        return float(total)


class Measurement:
    """What is measured of one slot, over any number of trials.

    statistics: of the ordinary positions. predictions: how many count in the losses. losses: sums of nats, clean,
    spliced and zero-ablated.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot, self.statistics, self.predictions = slot, Statistics(), 0
        self.losses = [0.0, 0.0, 0.0]

    @property
    def loss_clean(self) -> float:
        """Nats a prediction of the model as it is; nan without predictions, as the others."""
        return ratio(self.losses[0], self.predictions)

    @property
    def loss_spliced(self) -> float:
        """Nats a prediction with x_hat in place of x."""
        return ratio(self.losses[1], self.predictions)

    @property
    def loss_zero(self) -> float:
        """Nats a prediction with zeros in place of x."""
        return ratio(self.losses[2], self.predictions)

    def add(self, predictions: int, *losses: float) -> None:
        """Count one trial's predictions and its three sums of losses."""
        self.predictions += predictions
        self.losses = [total + loss for total, loss in zip(self.losses, losses, strict=True)]


@dataclass(eq=False)
class Group:
    """Measurements that replace the same positions of the same place, and so share all that no SAE has a part in.

    ordinary: those positions (batch, tokens) of the last trial. replay: of the layers below.
    """

    members: list[Measurement]
    replay: Replay
    ordinary: Tensor | None = None

    @property
    def slot(self) -> Slot:
        """Any of them, for what is the same with all."""
        return self.members[0].slot


def grouped(measurements: Sequence[Measurement], model: nn.Module | None = None) -> list[Group]:
    """Put together what belongs together; with a model, the layers below a site run once a trial instead of each
    time."""
    groups: dict[tuple[str, str, float | None], Group] = {}
    for m in measurements:
        key = (m.slot.read.key, m.slot.write.key, m.slot.typical_norm)
        if key not in groups:
            groups[key] = Group([], Replay() if model is None else Replay.below(model, m.slot.read))
        groups[key].members.append(m)
    return list(groups.values())


def measure(trial: Trial, groups: Sequence[Group]) -> None:
    """Take a trial into the measurements: a clean pass for all, one with zeros for each group, a spliced one for each
    of its members. Raises SaeAttachError if the model never came by a site, or did so twice."""
    with ExitStack() as stack:
        for group in groups:
            group.ordinary = None
            stack.enter_context(group.replay.record())
        logits = trial.logits(*map(_note, groups))
    clean = [trial.loss(logits, _counted(trial, group)) for group in groups]
    for group in groups:
        group.replay.prove(trial.logits, logits)
    del logits
    for group, loss in zip(groups, clean, strict=True):
        with group.replay.play():
            _measure_site(trial, group, loss)


def _counted(trial: Trial, group: Group) -> Tensor:
    if group.ordinary is None:
        raise SaeAttachError(f"the forward pass does not come by {group.slot.read}: nothing can be measured there")
    return trial.counted(group.ordinary.reshape(trial.ids.shape))


def _measure_site(trial: Trial, group: Group, clean: float) -> None:
    counted = _counted(trial, group)
    predictions = int(counted.sum())
    zero = trial.loss(trial.logits(SpliceRequest(group.slot, rebuild=_zeros)), counted)
    for m in group.members:
        logits = trial.logits(SpliceRequest(m.slot, rebuild=m.statistics.update))
        m.add(predictions, clean, trial.loss(logits, counted), zero)


def _note(group: Group) -> WatchRequest:
    """A request that notes the group's ordinary positions. Raises SaeAttachError where a pass comes by again."""

    def sink(x: Tensor, chosen: Tensor, now: Pass) -> None:
        if group.ordinary is not None:
            raise SaeAttachError(f"a forward pass runs {group.slot.read} more than once; which run is to be measured "
                                 "cannot be told. Capture it: a capture has the last one")
        group.ordinary = chosen

    return WatchRequest(group.slot, sink=sink)


def _zeros(sae: SAE, x: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(target)


@contextmanager
def _open(runtime: Runtime, requests: list[Request]) -> Iterator[None]:
    runtime.open(requests, "context")
    try:
        yield
    finally:
        runtime.close(requests)
