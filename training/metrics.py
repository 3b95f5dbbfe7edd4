"""How good an SAE is: sparsity, reconstruction, and what the model loses when it lives on the reconstruction.

Protocol of arXiv 2407.14435 and Gemma Scope 1 (3.3); special tokens, padding and attention sinks are never
replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_hooks.check import Statistics
from sae_hooks.sae import SAE
from sae_hooks.sites import read, resolve, write

from .harvest import ordinary

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured. Losses are in nats per token.

    l0: mean number of features active on a token. fvu: mean squared error over the mean squared distance to
    the mean activation, a ratio of dataset means. dead: share of features that fired on none of the tokens.
    """

    tokens: int
    l0: float
    fvu: float
    dead: float
    loss_clean: float
    loss_spliced: float
    loss_zero: float

    @property
    def delta_loss(self) -> float:
        """Nats per token that splicing costs: the paper's first measure."""
        return self.loss_spliced - self.loss_clean

    @property
    def loss_recovered(self) -> float:
        """1 where splicing costs nothing, 0 where it costs what zeros cost (arXiv 2404.16014, 2.3)."""
        return (self.loss_zero - self.loss_spliced) / (self.loss_zero - self.loss_clean)


@torch.inference_mode()
def evaluate(model: nn.Module, sae: SAE, batches: Iterable[tuple[Tensor, Tensor]],
             special_ids: Sequence[int] = ()) -> Evaluation:
    """Measure sae at its site in model over batches of (input_ids, attention_mask), each (batch, length).

    Three forward passes a batch: clean, spliced, zero-ablated. Losses are means over the predictions made
    from ordinary positions, the only ones that are replaced. The model is left as it was. Needs
    metadata["typical_norm"].
    """
    assert sae.site is not None
    stats = Statistics()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for ids, mask in batches:
        splice = _Splice(sae, stats, ids, mask, special_ids)
        losses = [token_losses(model, sae.site, ids, mask, change) for change in (None, splice, splice.zero)]
        counted = splice.where[:, :-1] & mask[:, 1:].bool()
        sums += torch.stack([loss[counted].double().sum() for loss in losses])
        count += int(counted.sum())
    clean, spliced, zero = (sums / count).tolist()
    return Evaluation(tokens=stats.n, l0=stats.l0, fvu=stats.fvu, dead=stats.dead, loss_clean=clean,
                      loss_spliced=spliced, loss_zero=zero)


class _Splice:
    """Replaces one batch's ordinary positions by their reconstruction, counted in stats, then by zeros."""

    where: Tensor

    def __init__(self, sae: SAE, stats: Statistics, ids: Tensor, mask: Tensor,
                 special_ids: Sequence[int]) -> None:
        self.sae, self.stats, self.ids, self.mask, self.special_ids = sae, stats, ids, mask, special_ids

    def __call__(self, x: Tensor) -> Tensor:
        typical = float(self.sae.metadata["typical_norm"])
        self.where = ordinary(x, self.ids, self.mask, self.special_ids, typical)
        rows = x[self.where].float()
        return replaced(x, self.where, self.stats.update(self.sae, rows, rows))

    def zero(self, x: Tensor) -> Tensor:
        return replaced(x, self.where, torch.zeros(()))


def replaced(x: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """A copy of x (batch, length, d) with rows (n, d) at the n positions of the mask where (batch,
    length).
    """
    out = x.clone()
    out[where] = rows.to(x.dtype)
    return out


def token_losses(model: nn.Module, site: str, ids: Tensor, mask: Tensor,
                 change: Change | None = None) -> Tensor:
    """Cross-entropy (batch, length - 1), in nats, of each next token; see `with_change`."""
    logits = with_change(model, site, ids, mask, change)
    targets = ids[:, 1:]
    flat = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)


def with_change(model: nn.Module, site: str, ids: Tensor, mask: Tensor, change: Change | None) -> Tensor:
    """Logits (batch, length, vocabulary) with change, if any, acting on what an `.output` site gives."""
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return write(output, change(read(output, site)), site) if change else None

    handle = resolve(model, site).module.register_forward_hook(hook)
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    return logits
