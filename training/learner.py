"""One SAE in training: its tensors, its optimiser, its counts, and a step of it.

Input has mean squared norm 1; what comes out works on raw activations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sae_hooks.errors import DataError, TrainingError
from sae_hooks.kernels import remove_along
from sae_hooks.sae import SAE

from .codes import Held
from .harvest import SiteInfo
from .objectives import Batch, JumpReLU, Loss, Objective
from .objectives.base import like
from .parallel import ALONE, REPLICATED, USUAL, Parallel, feature_first
from .row_adam import RowAdam, suits
from .settings import expect, settle

BLOCK = 2**17  # numbers of a matrix that a CPU's cache holds from one pass to the next
REMEMBER = 0.99  # of the gradients' usual length, a step
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """An SAE to be trained: where it reads, how large it is, what it minimises, and how.

    site_out: what a transcoder predicts; skip: with an affine skip. learning_rate: Adam's peak. betas: the paper's,
    without momentum. log_threshold: Adam moves the threshold's logarithm, as in the paper, which takes tens of
    thousands of steps; else the threshold itself, held at >= 0. centre: b_dec starts at the mean activation (the paper:
    at 0). dead_after: tokens without firing after which a feature counts as dead in reports. bf16: multiply by the
    matrices in bfloat16 (autocast), for devices that are quicker so; weights, thresholds and comparisons stay float32.
    clip: a tensor's gradient that is longer than so many times its usual length is shortened to that (the paper:
    never). One token of nine times the usual norm made W_enc's eighty times as long; Adam's next steps ruined the SAE.
    Raises TrainingError for numbers that cannot be.
    """

    name: str
    site: str
    d_sae: int
    objective: Objective = field(default_factory=lambda: JumpReLU(l0=60))
    site_out: str | None = None
    skip: bool = False
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.999)
    adam_eps: float = 1e-8
    log_threshold: bool = False
    centre: bool = True
    dead_after: int = 1_000_000
    bf16: bool = False
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self)
        expect(self, above_0=("d_sae", "clip"), from_0=("learning_rate", "adam_eps", "dead_after"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"{self.name}: expected two betas of 0 or more and below 1, got {self.betas}")
        self.objective.check(self.d_sae)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and in what steps. batch_size: tokens a step. warmup: steps in which the learning rate rises from a
    tenth, along a cosine; decay: share of the steps, at the end, in which it falls linearly to 0. report_every,
    checkpoint_every: steps. Raises TrainingError for numbers that cannot be."""

    steps: int
    batch_size: int = 4096
    warmup: int = 1000
    decay: float = 0.0
    report_every: int = 100
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        settle(self)
        for name in ("steps", "batch_size", "report_every", "checkpoint_every"):
            if (value := getattr(self, name)) < 1:
                raise TrainingError(f"TrainConfig: expected {name} of 1 or more, got {value}")
        expect(self, from_0=("warmup",))
        if not 0 <= self.decay <= 1:
            raise TrainingError(f"TrainConfig: expected decay from 0 to 1, got {self.decay}")


def fresh_sae(d_in: int, d_sae: int, d_out: int, gate: Mapping[str, Any], *, tied: bool, skip: bool, seed: int) -> SAE:
    """An SAE at the start, Gemma Scope 1, 3.2: decoder rows He-uniform, then of unit norm; the encoder is the decoder's
    transpose if tied (transcoders: unit columns of their own); biases and skip zero."""
    g = torch.Generator().manual_seed(seed)
    W_dec = _unit_rows(d_sae, d_out, g)
    W_enc = W_dec.T.clone() if tied else _unit_rows(d_sae, d_in, g).T
    return SAE(W_enc, W_dec.new_zeros(d_sae), W_dec, W_dec.new_zeros(d_out), **gate,
               W_skip=W_dec.new_zeros(d_in, d_out) if skip else None)


def _unit_rows(n: int, width: int, g: torch.Generator) -> Tensor:
    bound = (6 / width) ** 0.5
    rows = torch.empty(n, width, dtype=torch.float32).uniform_(-bound, bound, generator=g)
    rows /= rows.norm(dim=1, keepdim=True)
    return rows


class Learner:
    """A trainee on its way. `sae` has requires_grad on what is trained; `extra` are the objective's own tensors."""

    def __init__(self, trainee: Trainee, sites: Mapping[str, SiteInfo], device: torch.device | str = "cpu",
                 parallel: Parallel = ALONE) -> None:
        self.trainee, self.objective, self.parallel = trainee, trainee.objective, parallel
        parallel.check_features(trainee.name, trainee.d_sae, self.objective.shardable)
        self.source, self.target = trainee.site, trainee.site_out or trainee.site
        missing = [site for site in (self.source, self.target) if site not in sites]
        if missing:
            raise TrainingError(f"{trainee.name}: no activations of {missing[0]}; there are {', '.join(sites)}")
        self.infos = sites[self.source], sites[self.target]
        crosses = self.source != self.target
        if crosses and self.objective.pre_bias:
            raise TrainingError(f"{trainee.name}: pre_bias takes b_dec, which is of {self.target}, off the activations "
                                f"of {self.source}; train a transcoder with pre_bias=False")
        sae = fresh_sae(self.infos[0].d_in, trainee.d_sae, self.infos[1].d_in, self.objective.gate(trainee.d_sae),
                        tied=not crosses, skip=trainee.skip, seed=trainee.seed)
        self.sae = like(sae, **{name: parallel.local(name, t) for name, t in tensors(sae).items()}).to(device)
        self.extra = {name: t.to(device) for name, t in self.objective.extra(self.sae).items()}
        self.idle, self.held = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device), Held()
        self.trained = self._trained()
        self.usual = torch.zeros(len(self._leaves()), dtype=torch.float64, device=device)  # lengths of the gradients
        self.rows = self._row_adam()
        self.moved = {name: feature_first(name, leaf.detach()) for name, leaf in self.trained.items()
                      if name not in self._by_rows}  # as they lie in memory: else fused Adam copies W_enc's gradient
        self.optimizer = torch.optim.Adam(self.moved.values(), lr=trainee.learning_rate, betas=trainee.betas,
                                          eps=trainee.adam_eps, fused=True)

    def _trained(self) -> dict[str, Tensor]:
        """{name: leaf} of what Adam moves."""
        names = [*self.objective.trained, *(["W_skip"] if self.sae.W_skip is not None else [])]
        leaves: dict[str, Tensor] = {name: getattr(self.sae, name).requires_grad_() for name in names}
        leaves |= {name: t for name, t in self.extra.items() if t.requires_grad}
        if self.trainee.log_threshold and "threshold" in leaves:
            del leaves["threshold"]
            assert self.sae.threshold is not None
            leaves["log_threshold"] = self.sae.threshold.detach().log().requires_grad_()
        return leaves

    def _row_adam(self) -> RowAdam | None:
        """What moves the matrices in place of torch's Adam, in half the memory, where that is exact."""
        whole = self.parallel.batches == 1 and self.trainee.clip is None  # nobody asks for their gradients
        if self.trainee.betas[0] != 0 or not whole or not suits(self.sae.device):
            return None
        return RowAdam({"W_enc": self.sae.W_enc.detach().T, "W_dec": self.sae.W_dec.detach()}, self.trainee.betas[1],
                       self.trainee.adam_eps)

    @property
    def _by_rows(self) -> Collection[str]:
        """Names of the tensors that `rows` moves."""
        return self.rows.weights if self.rows else ()

    @torch.no_grad()
    def start(self, rows: Mapping[str, Tensor]) -> None:
        """Before the first step, by its batch: b_dec to the target's mean, which the encoder takes off again; whatever
        the objective wants."""
        rows = {site: self.parallel.whole_batch(x) for site, x in rows.items()}
        sae, extra = self._whole()
        if self.trainee.centre:
            sae.b_dec.copy_(rows[self.target].mean(0))
            if not self.objective.pre_bias:
                sae.b_enc.copy_(-rows[self.source].mean(0) @ sae.W_enc)
            if "b_mag" in extra:
                extra["b_mag"].copy_(sae.b_enc)
        self.objective.start(sae, rows[self.source])
        for name, t in tensors(self.sae).items():
            t.copy_(self.parallel.local(name, getattr(sae, name)))
        for name, t in self.extra.items():
            t.copy_(self.parallel.local(name, extra[name]))
        if "log_threshold" in self.trained:
            assert self.sae.threshold is not None
            if not bool((self.sae.threshold > 0).all()):
                raise TrainingError(f"{self.trainee.name}: a threshold of 0 has no logarithm; give the objective a "
                                    f"threshold above 0 or an l0 well below {self.sae.d_sae}, or no log_threshold")
            self.trained["log_threshold"].copy_(self.sae.threshold.log())

    def _whole(self) -> tuple[SAE, dict[str, Tensor]]:
        """(SAE, extra tensors) with the features of all processes; in the learner's own memory if it has them all."""
        whole = self.parallel.whole
        sae = like(self.sae, **{name: whole(name, t) for name, t in tensors(self.sae).items()})
        return sae, {name: whole(name, t) for name, t in self.extra.items()}

    def update(self, rows: Mapping[str, Tensor], step: int, rate: float) -> Loss:
        """One step of Adam on rows {site: (batch, d)}, at `rate` times the learning rate. Raises, with nothing changed
        and in all processes the same, DataError where activations are not finite, TrainingError where the loss is
        not."""
        batch = Batch(x=rows[self.source], target=rows[self.target], step=step, idle=self.idle,
                      over_shards=self.parallel.over_shards, over_batches=self.parallel.over_batches,
                      of_batches=self.parallel.of_batches, share=self.parallel.batch_share,
                      first_feature=self.parallel.shard * self.sae.d_sae, factors={} if self.rows else None,
                      held=self.held)
        with torch.autocast(self.sae.device.type, torch.bfloat16, enabled=self.trainee.bf16):
            loss = self._agreed(self.objective(self.sae, batch, self.extra))
        if not math.isfinite(float(loss.total.detach())):
            raise self._complaint(loss, rows, step)
        for leaf in self._leaves().values():
            leaf.grad = None
        loss.total.backward()  # type: ignore[no-untyped-call]
        self.parallel.reduce_gradients({name: t for name, t in self._leaves().items() if name not in self._by_rows})
        self._clip()
        self._move(self.trainee.learning_rate * rate, batch)
        self.extra.update(loss.state)
        self.idle += len(batch.x) * self.parallel.batches
        self.idle[loss.fired > 0] = 0
        return loss

    def _agreed(self, loss: Loss) -> Loss:
        """The loss of the whole batch, that is, with the numbers of all processes; backward goes from this one's."""
        if self.parallel.mesh is None:
            return loss
        total, error, l0 = self.parallel.mean(torch.stack([loss.total.detach(), loss.reconstruction, loss.l0]))
        return replace(loss, total=loss.total + (total - loss.total.detach()), reconstruction=error, l0=l0,
                       fired=self.parallel.sum_over_batches(loss.fired))

    def _leaves(self) -> dict[str, Tensor]:
        """{name: leaf} of what backward gives a gradient to."""
        threshold = self.sae.threshold
        return {name: t for name, t in self.trained.items() if name != "log_threshold"} | (
            {"threshold": threshold} if "log_threshold" in self.trained and threshold is not None else {})

    def _complaint(self, loss: Loss, rows: Mapping[str, Tensor], step: int) -> TrainingError | DataError:
        """Why the loss is not finite, and which process read what made it so: the same in all."""
        for site in (self.source, self.target):
            mine = rows[site][self.parallel.shard::self.parallel.shards]  # of the rows here, those that were read here
            bad = self.parallel.told(int((~mine.isfinite()).any(1).sum()))
            if any(bad):
                readers = [i for i, n in enumerate(bad) if n]
                where = f", read by process {', '.join(map(str, readers))} of {len(bad)}," if len(bad) > 1 else ""
                return DataError(f"{sum(bad)} of {len(mine) * len(bad)} activations of {site} at step {step}{where} "
                                 "are not finite; harvest them again, with the model in bfloat16 or float32")
        return TrainingError(f"{self.trainee.name}: the loss is {float(loss.total.detach())} at step {step} "
                             f"(reconstruction {float(loss.reconstruction):.3g}, L0 {float(loss.l0):.3g}); lower the "
                             f"learning rate ({self.trainee.learning_rate:g})")

    @torch.no_grad()
    def _clip(self) -> None:
        """Keep count of each gradient's usual length, and shorten those that are much longer."""
        if self.trainee.clip is None:
            return
        gradients = {name: t.grad for name, t in self._leaves().items() if t.grad is not None}
        squares = torch.stack([grad.square().sum().double() for grad in gradients.values()])
        split = torch.tensor([name not in REPLICATED for name in gradients], device=squares.device)
        lengths = (self.parallel.over_shards(squares * split) + squares * ~split).sqrt()
        first = self.usual == 0
        kept = torch.where(first, lengths, torch.minimum(lengths, self.trainee.clip * self.usual))
        for grad, factor in zip(gradients.values(), kept / lengths.clamp(min=1e-30), strict=True):
            grad *= factor
        self.usual += first.double().clamp(min=1 - REMEMBER) * (kept - self.usual)

    @torch.no_grad()
    def _move(self, rate: float, batch: Batch) -> None:
        """The step itself, by the gradients."""
        sae, unit, self.optimizer.param_groups[0]["lr"] = self.sae, self.objective.unit_decoder, rate
        if "log_threshold" in self.trained:
            assert sae.threshold is not None
            assert sae.threshold.grad is not None
            self.trained["log_threshold"].grad = sae.threshold.grad * sae.threshold
            sae.threshold.grad = None
        if self.rows:
            self.rows.step(batch.factors or {}, {name: self._gradient(name) for name in self.rows.weights}, rate,
                           ["W_dec"] if unit else [])
        elif unit:
            project_decoder_gradient(sae)
        for name, moved in self.moved.items():
            moved.grad = self._gradient(name)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if unit and not self.rows:
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if sae.threshold is not None:
            if "log_threshold" in self.trained:
                sae.threshold.copy_(self.trained["log_threshold"].exp())
            sae.threshold.clamp_(min=0.0)

    def _gradient(self, name: str) -> Tensor | None:
        """A leaf's gradient as it lies in memory, if it has one."""
        grad = self.trained[name].grad
        return None if grad is None else feature_first(name, grad)

    def dead(self) -> float:
        """Share of features that fired on none of the last `dead_after` tokens: 0 until so many were read."""
        dead = self.parallel.over_shards((self.idle > self.trainee.dead_after).double().sum())
        return float(dead / self.trainee.d_sae)

    @torch.no_grad()
    def finished(self) -> SAE:
        """The plain SAE for raw activations, on the CPU; the learner is left as it is. TrainingError if it diverged."""
        self._check_finite()
        sae = self.objective.finish(*self._whole())
        sae = fold_scale(sae, self.infos[0].rms_norm, self.infos[1].rms_norm).cpu()
        copied = {name: t.clone() for name, t in tensors(sae).items()}
        metadata = {"typical_norm": self.infos[0].typical_norm}
        return like(sae, **copied, site=self.source, site_out=self.target, metadata=metadata)

    def state(self) -> dict[str, Tensor | int | float | str | bool | None]:
        """Everything that the next update depends on, as tensors by name. TrainingError if it diverged."""
        self._check_finite()
        found: dict[str, Any] = dict(tensors(self.sae))
        found |= {f"extra.{name}": t.detach() for name, t in self.extra.items()} | {"idle": self.idle}
        found[USUAL] = self.usual
        if "log_threshold" in self.trained:
            found["log_threshold"] = self.trained["log_threshold"].detach()
        for name, moved in self.moved.items():
            found |= {f"adam.{name}.{key}": feature_first(name, t)
                      for key, t in self.optimizer.state.get(moved, {}).items()}
        if self.rows and self.rows.steps:
            for name, square in self.rows.moments().items():
                found |= {f"adam.{name}.step": torch.tensor(float(self.rows.steps), dtype=torch.float32),
                          f"adam.{name}.exp_avg_sq": feature_first(name, square)}
        return found

    def _check_finite(self) -> None:
        bad = [name for name, t in self.trained.items() if self.parallel.any(not has_finite_sum(t))]
        if bad:
            raise TrainingError(f"{self.trainee.name}: {', '.join(bad)} became infinite or not a number; lower the "
                                f"learning rate ({self.trainee.learning_rate:g})")

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `state` gave, bit for bit."""
        for name in TENSORS:
            if (t := getattr(self.sae, name)) is not None:
                t.copy_(state[name])
        for name, t in self.extra.items():
            t.copy_(state[f"extra.{name}"])
        self.idle.copy_(state["idle"])
        self.usual.copy_(state[USUAL])
        for name, leaf in self.trained.items():
            if name == "log_threshold":
                leaf.copy_(state[name])
            if f"adam.{name}.step" in state and name in self.moved:
                moved = self.moved[name]
                self.optimizer.state[moved] = {"step": state[f"adam.{name}.step"].to(leaf.device)} | {
                    key: torch.zeros_like(moved).copy_(feature_first(
                        name, state.get(f"adam.{name}.{key}", torch.zeros(())))) for key in ("exp_avg", "exp_avg_sq")}
        if self.rows and "adam.W_enc.step" in state:
            moments = {name: feature_first(name, state[f"adam.{name}.exp_avg_sq"]) for name in self.rows.weights}
            self.rows.load(moments, int(state["adam.W_enc.step"]))


def has_finite_sum(t: Tensor) -> bool:
    """Whether all of t is finite, asked without a copy of it, for which the largest SAEs leave no room."""
    return math.isfinite(float(t.detach().sum(dtype=torch.float64)))


def tensors(sae: SAE) -> dict[str, Tensor]:
    """{name: tensor} of those that the SAE has, without a copy."""
    return {name: t.detach() for name in TENSORS if (t := getattr(sae, name)) is not None}


def project_decoder_gradient(sae: SAE) -> None:
    """Take from each decoder row's gradient the part along the row, before Adam sees it (Gemma Scope 1, 3.2)."""
    W_dec, grad = sae.W_dec, sae.W_dec.grad
    assert grad is not None
    size = max(BLOCK // sae.d_out, 1) if grad.device.type == "cpu" else sae.d_sae
    for part, rows in zip(torch.split(grad, size), torch.split(W_dec, size), strict=True):
        remove_along(part, rows)


def fold_scale(sae: SAE, scale: float, scale_out: float | None = None) -> SAE:
    """The SAE for raw activations scale * x, given the one for x. Gemma Scope 1, appendix A.

    A transcoder's output grows by scale_out. Features and thresholds come out in the output's units, decoder rows as
    they were.
    """
    out = scale if scale_out is None else scale_out
    changed = {"b_enc": sae.b_enc * out, "b_dec": sae.b_dec * out}
    if out != scale:
        changed["W_enc"] = sae.W_enc * (out / scale)
    if sae.threshold is not None:
        changed["threshold"] = sae.threshold * out
    if sae.W_skip is not None:
        changed["W_skip"] = sae.W_skip * (out / scale)
    return like(sae, **changed)
