"""Where features fire most: the text around their strongest activations, for labelling them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_hooks.sae import SAE

from .harvest import ordinary, site_activations


@dataclass(frozen=True, order=True)
class Context:
    """One token on which a feature fired: its activation (in the site's own units) and the ids around it."""

    activation: float
    before: tuple[int, ...]
    token: int
    after: tuple[int, ...]


class TopContexts:
    """The strongest `keep` contexts of each feature, at most one a text, and how often each feature fired."""

    def __init__(self, d_sae: int, keep: int = 10, around: int = 12) -> None:
        self.heaps: list[list[Context]] = [[] for _ in range(d_sae)]
        self.fired = torch.zeros(d_sae, dtype=torch.long)
        self.keep, self.around, self.tokens = keep, around, 0

    def top(self, feature: int) -> list[Context]:
        """The feature's contexts, strongest first."""
        return sorted(self.heaps[feature], reverse=True)

    def frequency(self, feature: int) -> float:
        """Share of the tokens on which the feature fired."""
        return float(self.fired[feature]) / max(1, self.tokens)

    def maximum(self, feature: int) -> float:
        """The feature's strongest activation, 0.0 if it never fired."""
        return max((c.activation for c in self.heaps[feature]), default=0.0)

    def add(self, acts: Tensor, where: Tensor, ids: Sequence[int]) -> None:
        """Count in one text's activations (length, d_sae) and ids (length), where the mask (length) says."""
        acts = acts * where[:, None]
        self.fired += (acts > 0).sum(0)
        self.tokens += int(where.sum())
        best, at = acts.max(0)
        for feature in best.nonzero().flatten().tolist():
            self._offer(feature, float(best[feature]), int(at[feature]), ids)

    def _offer(self, feature: int, activation: float, i: int, ids: Sequence[int]) -> None:
        heap = self.heaps[feature]
        if len(heap) == self.keep and activation <= heap[0].activation:
            return
        before, after = ids[max(0, i - self.around):i], ids[i + 1:i + 1 + self.around]
        heapq.heappush(heap, Context(activation, tuple(before), ids[i], tuple(after)))
        if len(heap) > self.keep:
            heapq.heappop(heap)


@torch.inference_mode()
def top_contexts(model: torch.nn.Module, sae: SAE, batches: Iterable[tuple[Tensor, Tensor]],
                 special_ids: Sequence[int] = (), keep: int = 10) -> TopContexts:
    """Collect the strongest contexts of every feature over batches of (input_ids, attention_mask), each
    (batch, length). Runs the model only as deep as the SAE's site."""
    found, site = TopContexts(sae.d_sae, keep), sae.site or ""
    typical = float(sae.metadata["typical_norm"])
    for ids, mask in batches:
        x = site_activations(model, [site], ids, mask)[site]
        where = ordinary(x, ids, mask, special_ids, typical)
        for row in range(len(ids)):
            length = int(mask[row].sum())
            found.add(sae.encode(x[row, :length].float()), where[row, :length], ids[row, :length].tolist())
    return found
