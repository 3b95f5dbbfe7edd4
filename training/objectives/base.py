"""What an objective is, what it is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_hooks.sae import SAE

from ..codes import Code, Encoder, Factors, Form, Held
from ..schedules import linear_warmup
from ..settings import expect, settle

Extra = Mapping[str, Tensor]
Sum = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """What a sum or a mean over processes is where there is one."""
    return value


def in_one_row(value: Tensor) -> Tensor:
    """What tensors of processes, one beside the other, are where there is one."""
    return value[None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an objective sees at one step.

    x (batch, d_in) and target (batch, d_out), each of mean squared norm 1; target is x but for transcoders. idle
    (d_sae): tokens since each feature last fired. over_shards sums a tensor over the processes that share the features,
    over_batches averages one over those that share the tokens; both hand gradients through unchanged. of_batches lays
    those of the latter beside each other, (processes, ...), without gradients; share (i, n): this is the i-th of them.
    first_feature: the number, among all, of the first feature here. factors: where the sparse form's gradients of W_enc
    and W_dec go, if not to the tensors, and held: see codes.Encoder.
    """

    x: Tensor
    target: Tensor
    step: int
    idle: Tensor
    form: Form = "auto"
    over_shards: Sum = alone
    over_batches: Sum = alone
    of_batches: Sum = in_one_row
    share: tuple[int, int] = (0, 1)
    first_feature: int = 0
    factors: Factors | None = None
    held: Held | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """total: scalar to go backward from. reconstruction: mean squared L2 error, l0: mean features active on a token,
    fired (d_sae): tokens on which each was, all three detached. coefficient: of the sparsity, now in force.
    state: new values of those of the objective's extra tensors that are not trained.
    """

    total: Tensor
    reconstruction: Tensor
    l0: Tensor
    fired: Tensor
    coefficient: float
    state: Extra = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised. A frozen set of numbers; nothing is changed by a call but gradients, later.

    sparsity: coefficient of the penalty, in units of squared error at mean squared norm 1. warmup: steps over which it
    rises linearly from 0 (Gemma Scope 1, 3.2: 10,000). pre_bias: the encoder sees x - b_dec, as Gemma Scope's did in
    training; folded into b_enc at the end. SAEs only: a transcoder's b_dec is of another site. Raises TrainingError for
    numbers that cannot be.
    """

    sparsity: float = 0.0
    warmup: int = 0
    pre_bias: bool = False

    trained: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")  # of the SAE's own tensors
    unit_decoder: ClassVar[bool] = True  # rows are held at norm 1, their gradients projected
    shardable: ClassVar[bool] = True  # whether features may be split over processes

    def __post_init__(self) -> None:
        settle(self)
        expect(self, from_0=("sparsity", "warmup"))

    def check(self, d_sae: int) -> None:
        """Raise TrainingError for numbers that cannot be where there are d_sae features."""

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        raise NotImplementedError

    def gate(self, d_sae: int) -> dict[str, Tensor | int]:
        """The gate that the SAE has in training, as SAE's keyword argument: no threshold, if not said otherwise."""
        return {"threshold": torch.zeros(d_sae, dtype=torch.float32)}

    def extra(self, sae: SAE) -> dict[str, Tensor]:
        """Further tensors at the start; those that require grad are trained."""
        return {}

    def start(self, sae: SAE, x: Tensor) -> None:
        """Change the SAE in training before the first step, by the first batch x (batch, d_in)."""

    def finish(self, sae: SAE, extra: Extra) -> SAE:
        """The plain inference SAE with the activations and reconstructions of the one in training."""
        plain = without_pre_bias(sae, self.pre_bias)
        return plain if self.unit_decoder else unit_rows(plain)

    def coefficient(self, step: int) -> float:
        """The sparsity coefficient in force."""
        return self.sparsity * linear_warmup(step, self.warmup)

    def encoder(self, sae: SAE, batch: Batch | None = None) -> Encoder:
        """What makes pre-activations of x; with pre_bias, of x - b_dec."""
        factors, held = (batch.factors, batch.held) if batch else (None, None)
        return Encoder(sae.W_enc, sae.b_enc, sae.b_dec if self.pre_bias else None, factors, held)


def reconstruct(sae: SAE, code: Code, acts: Tensor, batch: Batch, *, frozen: bool = False) -> Tensor:
    """x_hat (batch, d_out) of acts that stand beside code.pre, with the skip if there is one. frozen: without gradients
    to decoder, b_dec and skip.

    Of processes that share the features the first adds b_dec and skip, so that their gradients are in every process a
    part of a sum, as those through pre_bias are.
    """
    x_hat = code.decode(acts, sae.W_dec.detach() if frozen else sae.W_dec)
    if batch.first_feature == 0:
        offset = sae.b_dec if sae.W_skip is None else sae.b_dec + batch.x @ sae.W_skip  # in bfloat16 where others are
        x_hat = x_hat + (offset.detach() if frozen else offset)
    return batch.over_shards(x_hat)


def squared_error(x_hat: Tensor, target: Tensor) -> Tensor:
    """Squared L2 distance, summed over the width and averaged over the batch."""
    return F.mse_loss(x_hat, target, reduction="sum") / len(target)


def spread(x: Tensor, average: Sum = alone) -> Tensor:
    """Mean squared distance of the rows of x from their mean; with over_batches, of the rows of all processes."""
    return average((x - average(x.mean(0))).square().sum(-1).mean())


def nested_error(sae: SAE, code: Code, acts: Tensor, batch: Batch, prefixes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(what to minimise, the whole SAE's own squared error): the mean error of the reconstructions by the first m
    features, for each m of prefixes and for all of them. Matryoshka SAEs, arXiv 2503.17547."""
    whole = squared_error(reconstruct(sae, code, acts, batch), batch.target)
    parts = [squared_error(reconstruct(sae, code, acts * code.first(m - batch.first_feature), batch), batch.target)
             for m in prefixes]
    return torch.stack([*parts, whole]).mean() if parts else whole, whole


def firings(code: Code, active: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(mean features active on a token, tokens on which each feature is active), for a mask beside code.pre."""
    fired = code.per_feature(active.to(torch.float32))
    return batch.over_shards(fired.sum()) / len(batch.x), fired


def without_pre_bias(sae: SAE, pre_bias: bool) -> SAE:
    """The SAE that sees x itself."""
    return like(sae, b_enc=sae.b_enc - sae.b_dec @ sae.W_enc) if pre_bias else sae


def unit_rows(sae: SAE) -> SAE:
    """The same function with decoder rows of norm 1: the norms go to the encoder and the threshold."""
    norms = sae.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    changed = {"W_enc": sae.W_enc * norms, "b_enc": sae.b_enc * norms, "W_dec": sae.W_dec / norms[:, None]}
    if sae.threshold is not None:
        changed["threshold"] = sae.threshold * norms
    return like(sae, **changed)


def like(sae: SAE, **changed: Any) -> SAE:
    """The same SAE with some of what SAE() takes in place of its own."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "k", "W_skip", "site", "site_out", "metadata")
    return SAE(**{name: getattr(sae, name) for name in names} | changed)
