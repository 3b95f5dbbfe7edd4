"""TopK and BatchTopK SAEs with AuxK, the auxiliary loss that brings dead features back.

TopK: arXiv 2406.04093; BatchTopK: arXiv 2412.06410.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_hooks.errors import TrainingError
from sae_hooks.kernels import Triplets, keep_largest, largest
from sae_hooks.sae import SAE

from ..codes import SparseCode, encode_chosen
from ..settings import expect
from .base import Batch, Extra, Loss, Objective, firings, like, reconstruct, spread, squared_error


@dataclass(frozen=True, kw_only=True)
class TopK(Objective):
    """Keep each token's k largest positive pre-activations; minimise ||x - x_hat||^2 + aux * AuxK.

    A feature that fired on none of the last dead_after tokens is dead; the aux_k largest pre-activations among the
    dead reconstruct what x_hat lacks, and their error, relative to that, is AuxK. The published values are those
    below, and for aux_k a power of two near d_in / 2 (0: no AuxK).
    """

    k: int
    aux: float = 1 / 32
    aux_k: int = 256
    dead_after: int = 10_000_000

    shardable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, above_0=("k",), from_0=("aux", "aux_k", "dead_after"))

    def check(self, d_sae: int) -> None:
        """Raise TrainingError where k is above d_sae."""
        if self.k > d_sae:
            raise TrainingError(f"a k of {self.k} is above the {d_sae} features of the SAE")

    def gate(self, d_sae: int) -> dict[str, Tensor | int]:
        """The k largest."""
        return {"k": self.k}

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        return self.loss(sae, batch, self.code(sae, batch))

    def code(self, sae: SAE, batch: Batch) -> SparseCode:
        """The features that are kept."""
        return encode_chosen(batch.x, self.encoder(sae, batch), lambda pre: largest(pre, self.k))

    def loss(self, sae: SAE, batch: Batch, code: SparseCode, **state: Tensor) -> Loss:
        """The loss of the features that were kept."""
        x_hat = reconstruct(sae, code, code.pre, batch)
        error = squared_error(x_hat, batch.target)
        l0, fired = firings(code, code.pre.detach() > 0, batch)
        return Loss(total=error + self.aux * self.aux_loss(sae, batch, (batch.target - x_hat).detach()),
                    reconstruction=error.detach(), l0=l0, fired=fired, coefficient=0.0, state=state)

    def aux_loss(self, sae: SAE, batch: Batch, lack: Tensor) -> Tensor:
        """How badly the dead features reconstruct `lack` (batch, d_out): their squared error over lack's variance, in
        units of the target's variance."""
        dead = (batch.idle > self.dead_after).nonzero().view(-1)
        k = min(self.aux_k, len(dead))
        if k == 0:
            return lack.new_zeros(())
        pre = F.linear(batch.x, sae.W_enc.t()[dead], self.encoder(sae).bias()[dead]).to(lack.dtype)
        found = keep_largest(pre, k) @ sae.W_dec[dead]
        average = batch.over_batches
        return squared_error(found, lack) * (spread(batch.target, average) / spread(lack, average).clamp(min=1e-12))


@dataclass(frozen=True, kw_only=True)
class BatchTopK(TopK):
    """Keep the k * batch largest positive pre-activations of the whole batch.

    Of processes that share the tokens each tells the others its k * batch largest values, 4 bytes each.

    At inference a feature fires above one threshold for all: the running average, with the weight `forget` on each new
    batch, of the least activation that was kept. What comes out is a JumpReLU SAE.
    """

    forget: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, above_0=("forget",))
        if self.forget > 1:
            raise TrainingError(f"BatchTopK: expected forget of at most 1, got {self.forget}")

    def gate(self, d_sae: int) -> dict[str, Tensor | int]:
        """No threshold in training."""
        return {"threshold": torch.zeros(d_sae, dtype=torch.float32)}

    def extra(self, sae: SAE) -> dict[str, Tensor]:
        """least: the running average; batches: how many it has seen, at most 1 / forget."""
        return {name: torch.zeros((), dtype=torch.float32, device=sae.device) for name in ("least", "batches")}

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        code = self.code(sae, batch)
        seen = (extra["batches"] + 1).clamp(max=1 / self.forget)
        kept = code.pre.detach()
        least = batch.of_batches(kept.min() if kept.numel() else kept.new_tensor(torch.inf)).min()
        least = torch.where(least.isfinite(), least, extra["least"])
        average = extra["least"] + (least - extra["least"]) / seen
        return self.loss(sae, batch, code, least=average, batches=seen)

    def code(self, sae: SAE, batch: Batch) -> SparseCode:
        """The features that are kept."""
        return encode_chosen(batch.x, self.encoder(sae, batch), largest_of_all(self.k, batch), whole=True)

    def finish(self, sae: SAE, extra: Extra) -> SAE:
        """Put the one threshold into the SAE."""
        threshold = torch.full_like(sae.b_enc, float(extra["least"]))
        return super().finish(like(sae, threshold=threshold), extra)


def largest_of_all(k: int, batch: Batch) -> Callable[[Tensor], Triplets]:
    """Choose the k * rows largest positive entries, where processes share the tokens: of all their rows together."""
    def choose(pre: Tensor) -> Triplets:
        i, processes = batch.share
        most = k * len(pre) * processes
        _, at, values = largest(pre.view(1, -1), most)
        if processes > 1:
            told = values.new_zeros(most)
            told[:len(values)] = values
            _, chosen, _ = largest(batch.of_batches(told).view(1, -1), most)
            _, mine, values = largest(values[None], int((chosen // most == i).sum()))
            at = at[mine]
        rows = torch.div(at, pre.shape[1], rounding_mode="floor")
        return rows, at - rows * pre.shape[1], values
    return choose
