"""Adam without momentum, straight from the factors of the matrices' gradients, which are never made.

Gemma Scope and the paper take beta1 = 0. Then neither gradients nor first moments of (d_sae, d) need exist: 8 bytes a
weight in memory in place of 16. On GPUs only the rows of features with a gradient are written, which is exact: where
the gradient is 0, Adam leaves the weight and lets its second moment decay, which is made up for when the feature next
has one. On CPUs that would be quicker only if a tenth of the features or fewer were active in a batch. There torch's
fused Adam moves all rows, a block at a time, and each block's gradient is used up while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from sae_hooks.kernels import adam_rows, longest_first, remove_along, slices, weighted_sums

from .codes import Factor, Factors

ROWS_ON, BLOCKS_ON = ("cuda",), ("cpu",)  # kinds of device where single rows are moved, and blocks of all rows
BLOCK = 2**19  # numbers: 2 MB


def suits(device: torch.device) -> bool:
    """Whether a training on this device takes RowAdam."""
    return device.type in (*ROWS_ON, *BLOCKS_ON)


class RowAdam:
    """The second moments of some weights, {name: weight (d_sae, d), contiguous}, and what moves both, in place."""

    def __init__(self, weights: Mapping[str, Tensor], beta2: float, eps: float) -> None:
        self.weights, self.beta2, self.eps, self.steps = dict(weights), beta2, eps, 0
        self.square = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.last = {name: w.new_zeros(len(w), dtype=torch.int32) for name, w in self.weights.items()}
        self._order: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # of a step's segments

    @torch.no_grad()
    def step(self, factors: Factors, dense: Mapping[str, Tensor | None], rate: float, unit: Sequence[str] = ()) -> None:
        """One step by the gradients: of each weight the sum of its factors and of its dense one (d_sae, d), if there is
        one. unit: names of those whose rows keep norm 1, the gradient's part along the row taken off."""
        self.steps += 1
        self._order = None
        for name, weight in self.weights.items():
            move = self._blocks if weight.device.type in BLOCKS_ON else self._rows
            move(name, factors.get(name, []), dense.get(name), rate, name in unit)

    def _rows(self, name: str, factors: Sequence[Factor], dense: Tensor | None, rate: float, unit: bool) -> None:
        """Move the rows that have a gradient."""
        factor = _joined(factors, dense)
        if factor is None:
            return
        if self._order is None or self._order[0] is not factor.starts:  # both matrices' rows are those of one batch
            self._order = factor.starts, longest_first(factor.starts)
        adam_rows(self.weights[name], self.square[name], self.last[name], self._order[1], *factor, step=self.steps,
                  rate=rate, beta2=self.beta2, eps=self.eps, unit=unit)

    def _blocks(self, name: str, factors: Sequence[Factor], dense: Tensor | None, rate: float, unit: bool) -> None:
        """Move all rows, block by block."""
        weight, square = self.weights[name], self.square[name]
        size = max(BLOCK // weight.shape[1], 1)
        first_moment = torch.zeros_like(weight[:size])  # what Adam leaves there is the block's gradient
        for block in slices(len(weight), size):
            w = weight[block]
            grad = _total([_of(block, factor) for factor in factors], None if dense is None else dense[block])
            if grad is None:
                grad = torch.zeros_like(w)
            if unit:
                remove_along(grad, w)
            step = torch.tensor(self.steps - 1.0, dtype=torch.float32)  # counted up there
            adam([w], [grad], [first_moment[:len(w)]], [square[block]], [], [step],
                 fused=True, amsgrad=False, beta1=0.0, beta2=self.beta2, lr=rate, weight_decay=0.0, eps=self.eps,
                 maximize=False)
            if unit:
                w /= w.norm(dim=1, keepdim=True)
        self.last[name].fill_(self.steps)

    @torch.no_grad()
    def moments(self) -> dict[str, Tensor]:
        """{name: second moment} as torch.optim.Adam would have it now: decayed to this step."""
        for name, square in self.square.items():
            idle = self.steps - self.last[name]
            square *= torch.pow(torch.tensor(self.beta2, dtype=square.dtype, device=square.device), idle)[:, None]
            self.last[name].fill_(self.steps)
        return self.square

    @torch.no_grad()
    def load(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Go on after so many steps from such second moments."""
        self.steps = steps
        for name, square in self.square.items():
            square.copy_(moments[name])
            self.last[name].fill_(steps)


def _joined(factors: Sequence[Factor], dense: Tensor | None) -> Factor | None:
    """The sum of gradients as one factor."""
    if dense is None and len(factors) == 1:
        return factors[0]
    if (total := _total(factors, dense)) is None:
        return None
    each = torch.arange(len(total) + 1, dtype=torch.int32, device=total.device)
    return Factor(each, each[:-1], torch.ones_like(total[:, 0]), total)


def _total(factors: Sequence[Factor], dense: Tensor | None) -> Tensor | None:
    """The sum of gradients (n, d), if there are any."""
    parts = [weighted_sums(*factor) for factor in factors] + ([] if dense is None else [dense])
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] if parts else None


def _of(rows: slice, factor: Factor) -> Factor:
    """The factor of some rows of a gradient."""
    starts = factor.starts[rows.start:rows.stop + 1]
    first, last = int(starts[0]), int(starts[-1])
    return Factor(starts - first, factor.ids[first:last], factor.weights[first:last], factor.table)
