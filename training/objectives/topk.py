"""TopK and BatchTopK SAEs with AuxK, the auxiliary loss that brings dead features back.

TopK: arXiv 2406.04093; BatchTopK: arXiv 2412.06410.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_hooks.errors import TrainingError
from sae_hooks.kernels import Triplets, keep_largest, largest
from sae_hooks.sae import SAE

from ..codes import Encoder, SparseCode, above, encode_found, largest_of_each, product
from ..settings import expect
from .base import Batch, Extra, Loss, Objective, firings, like, reconstruct, spread, squared_error

ASKED = 16  # one token in so many tells BatchTopK's guess ...
SPREAD = 2.5  # ... by what is exceeded more often than it should be: by so many times what is left to chance

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
        encoder = self.encoder(sae, batch)
        return encode_found(batch.x, encoder, largest_of_each(batch.x, encoder, self.k))

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
        encoder = self.encoder(sae, batch)
        return encode_found(batch.x, encoder, largest_of_batch(batch, encoder, self.k))

    def finish(self, sae: SAE, extra: Extra) -> SAE:
        """Put the one threshold into the SAE."""
        threshold = torch.full_like(sae.b_enc, float(extra["least"]))
        return super().finish(like(sae, threshold=threshold), extra)


@torch.no_grad()
def largest_of_batch(batch: Batch, encoder: Encoder, k: int) -> Triplets:
    """(rows, columns, pre-activations) of the k * batch largest positive ones, where processes share the tokens of all
    their rows together. Never holds (batch, d_sae): it looks above a guess only, and lower where that was too high."""
    guess = batch.of_batches(likely_exceeded(batch.x, encoder, k)).mean()
    most = k * len(batch.x)
    for floor in (guess, guess / 2, guess * 0):
        found = above(batch.x, encoder, floor.expand(encoder.d_sae))
        counts = batch.of_batches(guess.new_tensor(len(found[0]), dtype=torch.int64))
        if int(counts.sum()) >= most * len(counts) or not floor:
            break
    return largest_of_all(found, most, batch)


def likely_exceeded(x: Tensor, encoder: Encoder, k: int) -> Tensor:
    """A number >= 0 (a scalar tensor) that more than k * batch pre-activations of x (batch, d_in) likely exceed, but
    not many more, as some of the tokens tell."""
    pre = product(x[::ASKED], encoder.W_enc, encoder.bias())
    count = min(int(k * len(pre) * (1 + SPREAD / len(pre) ** 0.5)), pre.numel())
    exceeding = largest(pre.view(1, -1), count)[2]
    return exceeding.min() if len(exceeding) == count else pre.new_zeros(())


def largest_of_all(found: Triplets, n: int, batch: Batch) -> Triplets:
    """The n * processes largest of what all processes that share the tokens have found: this one's part of them."""
    rows, columns, values = found
    i, processes = batch.share
    _, at, values = largest(values[None], n * processes)
    if processes > 1:
        told = values.new_zeros(n * processes)
        told[:len(values)] = values
        _, chosen, _ = largest(batch.of_batches(told).view(1, -1), n * processes)
        _, mine, values = largest(values[None], int((chosen // (n * processes) == i).sum()))
        at = at[mine]
    return rows[at], columns[at], values
