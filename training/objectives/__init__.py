"""What is minimised: pure functions (sae, x, step) -> Loss."""
from .base import Loss, Objective
from .jumprelu import JumpReLUObjective, dense_loss, sparse_loss, threshold_of

__all__ = ["JumpReLUObjective", "Loss", "Objective", "dense_loss", "sparse_loss", "threshold_of"]
