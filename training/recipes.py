"""Recipes: every number that decides a training but the model, the text and the site.

`paper` has those of the paper and of Gemma Scope, for large SAEs and billions of tokens; `quick` converges in minutes.
Change one with `dataclasses.replace(quick, d_sae=4096)`, or on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

from sae_hooks.errors import TrainingError

from .learner import TrainConfig, Trainee
from .objectives import OBJECTIVES, JumpReLU, Objective, TanhJumpReLU, TopK
from .settings import expect, settle, typed

TARGET_SPARSITY = 2.0  # of the quadratic penalty: an offset of 1 % of l0=60 where a feature buys an error of 0.0006
Numbers = TypeVar("Numbers", "Recipe", Objective)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an SAE is trained. What is not said here is as in `Trainee`, `TrainConfig` and `Objective`.

    d_sae: features. tokens: activations that are read, whether or not of text that was read before. context: tokens of
    a window, at most (the model may take fewer). buffer_tokens: what a live stream shuffles among. ramp: share of the
    steps in which the penalty rises, if the objective says no number of steps. Raises TrainingError for numbers that
    cannot be.
    """

    d_sae: int
    tokens: int
    objective: Objective
    learning_rate: float
    betas: tuple[float, float]
    adam_eps: float = 1e-8
    log_threshold: bool = False
    centre: bool = True
    bf16: bool = False
    clip: float | None = None
    batch_size: int
    warmup: int
    decay: float = 0.0
    ramp: float = 0.0
    context: int
    buffer_tokens: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        settle(self)
        expect(self, above_0=("d_sae", "tokens", "batch_size", "context", "buffer_tokens", "checkpoint_every"),
               from_0=("warmup",))

    @property
    def steps(self) -> int:
        """Whole batches in `tokens`."""
        return self.tokens // self.batch_size

    def trainee(self, name: str, site: str, site_out: str | None = None, *, skip: bool = False,
                seed: int = 0) -> Trainee:
        """An SAE to be trained so. A transcoder (site_out is another site) gets no pre-encoder bias, which would be of
        the wrong site (Gemma Scope 1, appendix B)."""
        crosses = site_out not in (None, site)
        warmup = self.objective.warmup or round(self.ramp * self.steps)
        objective = replace(self.objective, warmup=warmup, pre_bias=self.objective.pre_bias and not crosses)
        return Trainee(name=name, site=site, site_out=site_out, d_sae=self.d_sae, objective=objective, skip=skip,
                       learning_rate=self.learning_rate, betas=self.betas, adam_eps=self.adam_eps,
                       log_threshold=self.log_threshold, centre=self.centre, bf16=self.bf16, clip=self.clip,
                       dead_after=self.silence(Trainee.dead_after), seed=seed)

    def silence(self, tokens: int) -> int:
        """After how many tokens without firing a feature is dead: so many, or fewer in a training that would end
        before any feature had been silent for so long."""
        return min(tokens, self.tokens // 20)

    def check(self) -> None:
        """Raise TrainingError where no SAE can be trained so, as with a k above d_sae."""
        self.config()
        self.trainee("the recipe", "any site")

    def config(self) -> TrainConfig:
        """How long and in what steps. Raises TrainingError if the tokens do not make one step."""
        if self.steps < 1:
            raise TrainingError(f"{self.tokens:,} tokens are not one batch of {self.batch_size:,}; give more tokens, "
                                "or a smaller batch_size")
        return TrainConfig(steps=self.steps, batch_size=self.batch_size, warmup=self.warmup, decay=self.decay,
                           checkpoint_every=self.checkpoint_every)


paper = Recipe(  # arXiv 2407.14435; Gemma Scope 1 (2408.05147), 3.1 and 3.2; context: of its evaluations, 3.3
    d_sae=131_072, tokens=8_000_000_000,
    objective=JumpReLU(sparsity=6e-4, warmup=10_000, bandwidth=0.001, threshold=0.001, pre_bias=True),
    learning_rate=7e-5, betas=(0.0, 0.999), log_threshold=True, centre=False, batch_size=4096, warmup=1000,
    context=1024, buffer_tokens=1_000_000, checkpoint_every=20_000)
quick = Recipe(  # benchmarks/results/pareto-*.md has what was tried; short trainings take higher learning rates
    d_sae=8192, tokens=4_000_000, objective=JumpReLU(l0=60, sparsity=TARGET_SPARSITY, bandwidth=0.03, threshold=None),
    learning_rate=1e-3, betas=(0.9, 0.999), clip=3.0, batch_size=1024, warmup=100, decay=0.5, ramp=0.3,
    context=256, buffer_tokens=100_000, checkpoint_every=1000)
RECIPES: Mapping[str, Recipe] = {"quick": quick, "paper": paper}


def variants(recipe: Recipe, kind: str = "jumprelu", l0: Sequence[float] = (),
             sparsity: Sequence[float] = ()) -> dict[str, Recipe]:
    """The recipe with an objective of OBJECTIVES, once for each sparsity: {"l0_30": ..., "l0_60": ...}.

    l0: targets of jumprelu, or the k of topk and batchtopk. sparsity: coefficients; next to l0 at most one, the
    target's. Neither: the recipe's own, which is jumprelu's. Raises TrainingError for what the objective cannot take.
    """
    if kind not in OBJECTIVES:
        raise TrainingError(f"there is no objective {kind!r}; there are {', '.join(OBJECTIVES)}")
    if l0 and (len(sparsity) > 1 or not all(0 < value < float("inf") for value in l0)):
        raise TrainingError(f"give L0 above 0, and next to them at most one sparsity; got l0 {list(l0)} and sparsity "
                            f"{list(sparsity)}")
    if kind == "jumprelu":
        made = _jumprelus(recipe, l0, sparsity)
    elif issubclass(OBJECTIVES[kind], TopK):
        made = _topks(recipe, kind, l0, sparsity)
    else:
        made = _penalised(recipe, kind, l0, sparsity)
    given = l0 or sparsity
    if given and len(made) < len(given):
        raise TrainingError(f"give each L0 or sparsity once: of {', '.join(f'{value:g}' for value in given)} "
                            f"{len(given)} SAEs cannot have names of their own")
    return {name: replace(recipe, objective=objective) for name, objective in made.items()}


def changed(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with settings as a command line has them: {"decay": "0.2", "objective.bandwidth": "0.05"}.

    Raises TrainingError for an unknown name or a value of another type.
    """
    inner = {name.removeprefix("objective."): text for name, text in settings.items() if name.startswith("objective.")}
    outer = {name: text for name, text in settings.items() if not name.startswith("objective.")}
    return replace(_set(recipe, outer, "objective"), objective=_set(recipe.objective, inner))


def _jumprelus(recipe: Recipe, l0: Sequence[float], sparsity: Sequence[float]) -> dict[str, Objective]:
    own = recipe.objective
    if not isinstance(own, JumpReLU):
        raise TrainingError(f"the recipe's objective is {type(own).__name__}; give one with JumpReLU")
    if l0:
        coefficient = sparsity[0] if sparsity else TARGET_SPARSITY
        return {f"l0_{value:g}": replace(own, l0=value, sparsity=coefficient) for value in l0}
    if sparsity:
        return {f"sparsity_{value:g}": replace(own, l0=None, sparsity=value) for value in sparsity}
    return {f"l0_{own.l0:g}" if own.l0 else f"sparsity_{own.sparsity:g}": own}


def _topks(recipe: Recipe, kind: str, l0: Sequence[float], sparsity: Sequence[float]) -> dict[str, Objective]:
    if not l0 or sparsity or any(value != int(value) for value in l0):
        raise TrainingError(f"{kind} takes l0, as whole numbers (its k), and no sparsity; got l0 {list(l0)} and "
                            f"sparsity {list(sparsity)}")
    dead_after = recipe.silence(TopK.dead_after)
    return {f"k_{int(value)}": _with(recipe, kind, k=int(value), dead_after=dead_after) for value in l0}


def _penalised(recipe: Recipe, kind: str, l0: Sequence[float], sparsity: Sequence[float]) -> dict[str, Objective]:
    if not sparsity or l0:
        raise TrainingError(f"{kind} has no target: give sparsity, the coefficient of its penalty, instead of l0")
    warmup = recipe.steps if issubclass(OBJECTIVES[kind], TanhJumpReLU) else recipe.objective.warmup
    return {f"sparsity_{value:g}": _with(recipe, kind, sparsity=value, warmup=warmup) for value in sparsity}


def _with(recipe: Recipe, kind: str, **numbers: Any) -> Objective:
    return OBJECTIVES[kind](pre_bias=recipe.objective.pre_bias, **numbers)


def _set(found: Numbers, settings: Mapping[str, str], but: str = "") -> Numbers:
    hints = get_type_hints(type(found))
    names = [field.name for field in fields(found) if field.name != but]
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise TrainingError(f"{type(found).__name__} has no {', '.join(unknown)}; it has {', '.join(names)}")
    return replace(found, **{name: _read(name, text, hints[name]) for name, text in settings.items()})


def _read(name: str, text: str, hint: Any) -> Any:
    """The value that text means for a field of this type."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return typed(name, value, hint)
