"""What an objective is, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sae_hooks.sae import SAE


@dataclass(frozen=True)
class Loss:
    """total: scalar to go backward from. reconstruction: mean squared L2 error, l0: mean features active,
    both detached scalars over the batch; sparsity: the coefficient in force.
    """
    total: Tensor
    reconstruction: Tensor
    l0: Tensor
    sparsity: float


class Objective(Protocol):
    """(sae, x, step) -> Loss. x (batch, d_in) has mean squared norm 1; nothing is changed but gradients,
    later.
    """

    def __call__(self, sae: SAE, x: Tensor, step: int) -> Loss: ...
