"""What is minimised: frozen objectives, called with (sae, batch, extra) for a Loss."""

from .base import Batch, Extra, Loss, Objective
from .gated import Gated
from .jumprelu import JumpReLU
from .relu import ReLU
from .tanh import TanhJumpReLU
from .topk import BatchTopK, TopK

OBJECTIVES: dict[str, type[Objective]] = {
    "jumprelu": JumpReLU, "tanh": TanhJumpReLU, "gated": Gated, "topk": TopK, "batchtopk": BatchTopK, "relu": ReLU}

__all__ = ["OBJECTIVES", "Batch", "BatchTopK", "Extra", "Gated", "JumpReLU", "Loss", "Objective", "ReLU",
           "TanhJumpReLU", "TopK"]
