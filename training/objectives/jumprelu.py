"""JumpReLU with an L0 penalty: mean_b(||x - x_hat||^2 + sparsity * ||f||_0), arXiv 2407.14435 eq. 9."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae_hooks.errors import TrainingError
from sae_hooks.sae import SAE

from ..codes import Code, encode, product
from ..schedules import linear_warmup
from ..settings import expect
from ..ste import Kernel, jump_and_step, support
from .base import Batch, Extra, Loss, Objective, firings, nested_error

START_L0 = 64.0
START = 2.0
SAMPLE = 512  # tokens that tell where the thresholds start


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Objective):
    """The paper's objective, or, with `l0`, one that steers towards so many active features a token.

    bandwidth: width of the kernel, and threshold: where every threshold starts, both in the units of normalised
    pre-activations; None: where START times l0 features (START_L0 if l0 is None) are active on a token of the first
    batch, from which a short training gets much further than from almost 0. kernel: see `ste`. prefixes: numbers of
    features that shall reconstruct by themselves, too (Matryoshka).

    With l0 the penalty is quadratic, in one of the published forms:
    "batch": sparsity * (L0 / l0 - 1)^2 for the batch's mean L0 (arXiv 2407.14435, appendix; ICLR version, App. F);
    "token": sparsity * (2 / l0) * mean_b (L0_b - l0)^2 (Gemma Scope 2, eq. 5), which makes tokens alike in L0,
    and so is the worse one where their number of features truly differs.
    sparsity 0 is then 2 in the first and 0.05 in the second. Their balance with the reconstruction leaves an offset of
    about price * l0 / (2 * sparsity) of l0 in the first and price / (4 * sparsity) in the second, where price is the
    error that a feature buys at that L0.
    """

    bandwidth: float = 0.03
    threshold: float | None = None
    kernel: Kernel = "rectangle"
    l0: float | None = None
    form: Literal["batch", "token"] = "batch"
    prefixes: tuple[int, ...] = ()

    trained: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, above_0=("bandwidth", "l0"), from_0=("threshold",))
        if list(self.prefixes) != sorted({m for m in self.prefixes if m >= 0}):
            raise TrainingError(f"prefixes must ascend from 0 or more, got {self.prefixes}")

    def check(self, d_sae: int) -> None:
        """Raise TrainingError where l0, or a prefix, is not below d_sae."""
        for name, value in (("an l0", self.l0), *(("a prefix", m) for m in self.prefixes)):
            if value is not None and value >= d_sae:
                raise TrainingError(f"{name} of {value:g} is not below the {d_sae} features of the SAE")

    def gate(self, d_sae: int) -> dict[str, Tensor | int]:
        """A threshold a feature."""
        return {"threshold": torch.full((d_sae,), self.threshold or 0.0, dtype=torch.float32)}

    def start(self, sae: SAE, x: Tensor) -> None:
        """Set the thresholds by the first batch, if none was given."""
        if self.threshold is None:
            l0 = self.l0 * START if self.l0 else START_L0
            threshold_of(sae).fill_(threshold_for(sae, x, self.encoder(sae).bias(), l0))

    def __call__(self, sae: SAE, batch: Batch, extra: Extra) -> Loss:
        """The loss on a batch."""
        threshold = threshold_of(sae)
        floor = threshold.detach() - support(self.kernel) * self.bandwidth
        code = encode(batch.x, self.encoder(sae, batch), floor, batch.form)
        acts, active = jump_and_step(code.pre, code.of(threshold), self.bandwidth, self.kernel)
        minimised, error = nested_error(sae, code, acts, batch, self.prefixes)
        coefficient = self.coefficient(batch.step)
        penalty = self.penalty(code, active, batch)
        l0, fired = firings(code, active.detach(), batch)
        return Loss(total=minimised + coefficient * penalty, reconstruction=error.detach(), l0=l0, fired=fired,
                    coefficient=coefficient)

    def coefficient(self, step: int) -> float:
        """The sparsity coefficient in force."""
        default = {"batch": 2.0, "token": 0.05}[self.form] if self.l0 is not None else 0.0
        return (self.sparsity or default) * linear_warmup(step, self.warmup)

    def penalty(self, code: Code, active: Tensor, batch: Batch) -> Tensor:
        """What the coefficient multiplies, of the active features beside code.pre."""
        l0 = batch.over_shards(code.per_token(active))
        if self.l0 is None:
            return l0.mean()
        if self.form == "token":
            return 2 / self.l0 * (l0 - self.l0).square().mean()
        return (batch.over_batches(l0.mean()) / self.l0 - 1).square()


def threshold_for(sae: SAE, x: Tensor, bias: Tensor, l0: float) -> float:
    """The one threshold, >= 0, above which l0 features are active on a token, averaged over x (batch, d_in)."""
    pre = product(x[:SAMPLE], sae.W_enc, bias).relu().flatten()
    active = min(len(pre) - 1, round(l0 * min(len(x), SAMPLE)))
    return float(pre.kthvalue(len(pre) - active).values)


def threshold_of(sae: SAE) -> Tensor:
    """The SAE's threshold (d_sae); TypeError for a TopK SAE, which has none to train."""
    if sae.threshold is None:
        raise TypeError("this objective trains a threshold; the SAE has a TopK gate")
    return sae.threshold
