"""How speed_gpu.py times, its random SAEs, and its parts `step` and `splice`. Not run by itself."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from speed_gpu_dense import RATE, SPARSITY, Dense, dense_ways
from torch import Tensor

from sae_hooks import SAE
from sae_hooks.training import JumpReLU, Learner, SiteInfo, Trainee

T = TypeVar("T")
SITE = "model.layers.20.output"
LONG_ENOUGH, MOST_REPEATS = 0.05, 200  # seconds of a measurement, about; calls in it
SAMPLE = 2**28  # pre-activations that tell where thresholds belong
SKEW, MOST_OFTEN = -0.8, 0.25  # features fire as often as their rank to this power, none more often
STEP_SHAPES = ((3584, 16384), (3584, 131072), (3584, 1048576))
SPLICE_SHAPES, SPLICE_TOKENS = ((3584, 16384), (3584, 131072)), (1, 4, 64, 4096)
TOGETHER = 2**30  # numbers in W_enc, from which the ways of a shape are timed one after another: no two fit
STEP_HEAD = (f"{'d_in':>5}{'d_sae':>9}{'batch':>7}{'L0':>6}{'pairs':>7}  {'way':14}{'ms':>10}{'dense/it':>10}"
             f"{'product':>9}{'peak GB':>9}")
SPLICE_HEAD = (f"{'d_in':>5}{'d_sae':>8}{'tokens':>7} {'weights':9}{'sae(x) ms':>11}{'bf16/it':>9}{'f32/it':>9}"
               f"{'peak GB':>9}{'encode ms':>11}{'bf16/it':>9}{'f32/it':>9}")


@dataclass(frozen=True)
class Bench:
    """What the parts are told. say: prints a line, and records it."""

    device: torch.device
    smoke: bool
    rounds: int
    sae_dtype: torch.dtype
    bandwidth: float
    say: Callable[[str], None]
    l0: int = 60  # features active on a token


@dataclass
class Case:
    """Something to be timed: call, inside of a context that is opened and closed off the clock."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    warm_ups: int = 2
    repeats: int = 1
    peak: int = 0
    times: list[float] = field(default_factory=list)


Builds = Mapping[str, Callable[[], Case]]


@dataclass(frozen=True)
class Timing:
    """Seconds of a call in each round; peak: bytes on the GPU above what lay there before the case was built."""

    times: tuple[float, ...]
    peak: int

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.times)


class Failed(str):
    """Why there is no result."""


Result = Timing | Failed


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(function: Callable[[], T]) -> T | Failed:
    """What a function gives, or why it gave nothing; then with its memory freed."""
    try:
        return function()
    except Exception as error:
        told = str(error)
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
            words in told for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))
        if not full:
            traceback.print_exc()
        first = (told.strip().splitlines() or [""])[0]
        reason = Failed("out of memory" if full else f"failed: {type(error).__name__}: {first:.150}")
    free()  # not before the error is gone, whose frames hold tensors
    return reason


def clock(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of a call, the mean of some: between CUDA events, or by the wall clock where there is no CUDA."""
    cuda, before = device.type == "cuda", time.perf_counter()
    if cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
    for _ in range(repeats):
        call()
    if not cuda:
        return (time.perf_counter() - before) / repeats
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def started(build: Callable[[], Case], device: torch.device) -> Case:
    """A case that was built and warmed up, with its peak of memory and a number of repeats."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    case = build()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with case.context():
        for _ in range(case.warm_ups):
            once = clock(case.call, 1, device)
    case.peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    case.repeats = min(max(round(LONG_ENOUGH / max(once, 1e-9)), 1), 2 if not cuda else MOST_REPEATS)
    return case


def measure(builds: Builds, bench: Bench, together: bool = True) -> dict[str, Result]:
    """Medians of interleaved rounds, by case; with together=False one case after another, each alone in memory."""
    free()
    if not together:
        return {name: measure({name: build}, bench)[name] for name, build in builds.items()}
    cases = {name: attempt(partial(started, build, bench.device)) for name, build in builds.items()}
    for _ in range(bench.rounds):
        for name in builds:
            if not isinstance(case := cases[name], Failed):
                failed = attempt(partial(timed, case, bench.device))
                cases[name] = failed or case
    return {name: case if isinstance(case, Failed) else Timing(tuple(case.times), case.peak)
            for name, case in cases.items()}


def timed(case: Case, device: torch.device) -> None:
    """One more of its times."""
    with case.context():
        case.times.append(clock(case.call, case.repeats, device))


def ratio(one: Result, other: Result) -> float:
    """How many times as long as the other one takes; nan without both."""
    return one.seconds / other.seconds if isinstance(one, Timing) and isinstance(other, Timing) else float("nan")


def verdict(met: bool) -> str:
    """How a target fared."""
    return "met" if met else "MISSED"


def random_sae(d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> SAE:
    """Unit-norm rows in random directions, the same in encoder and decoder but not in one memory; thresholds 0."""
    rows = torch.empty(d_sae, d_in, dtype=dtype, device=device)
    for part in rows.split(2**14):
        part.copy_(F.normalize(torch.randn(part.shape, device=device), dim=1))
    zeros = torch.zeros(d_sae, device=device)
    return SAE(rows.clone().T, zeros, rows, torch.zeros(d_in, device=device), threshold=zeros.clone())


@torch.no_grad()
def set_thresholds(sae: SAE, x: Tensor, l0: float) -> None:
    """Biases that take off the mean of x (n, d_in), and thresholds with which l0 features are active on a token of it.

    Some features fire more often than others (SKEW). A feature's threshold is the normal quantile of its own share,
    in units of its own measured spread, times one number for all, found by bisection on what is measured.
    """
    n = min(len(x), max(SAMPLE // sae.d_sae, 16))
    x = x[::max(len(x) // n, 1)][:n].float()
    sae.b_enc.zero_()
    sae.b_dec.copy_(x.mean(0))
    pre = sae.pre_activations(x[::2])
    sae.b_enc.copy_(-pre.mean(0))
    spread, pre = pre.std(0), sae.pre_activations(x[1::2])  # not of the same tokens
    share = torch.arange(1, sae.d_sae + 1, device=x.device, dtype=torch.float64) ** SKEW
    share = (share * l0 / share.sum()).clamp(max=MOST_OFTEN)[torch.randperm(sae.d_sae, device=x.device)]
    unit = (torch.special.ndtri(1 - share) * spread).float()
    low, high = 0.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        found = float((pre > unit * middle).sum()) / len(pre)
        low, high = (middle, high) if found > l0 else (low, middle)
    assert sae.threshold is not None
    sae.threshold.copy_(unit * high)


@torch.no_grad()
def active(sae: SAE, x: Tensor, below: float = 0.0) -> float:
    """Features of a token of x whose pre-activation is above the threshold less `below`, on average."""
    assert sae.threshold is not None
    n = min(len(x), max(SAMPLE // sae.d_sae, 1))
    return float((sae.pre_activations(x[:n].float()) > sae.threshold - below).sum()) / n


def new_learner(x: Tensor, d_sae: int, bench: Bench) -> Learner:
    """The library's own way, for activations like x."""
    objective = JumpReLU(sparsity=SPARSITY, bandwidth=bench.bandwidth, threshold=0.05)
    trainee = Trainee(name="ours", site=SITE, d_sae=d_sae, objective=objective, betas=(0.0, 0.999), bf16=True)
    info = SiteInfo(d_in=x.shape[1], rms_norm=1.0, typical_norm=1.0)
    learner = Learner(trainee, {SITE: info}, bench.device)
    learner.start({SITE: x})
    set_thresholds(learner.sae, x, bench.l0)
    return learner


def step_ways(d_in: int, d_sae: int, batch: int, bench: Bench, facts: dict[str, float]) -> Builds:
    """What is compared; facts: gets L0 and pairs once ours is built."""
    batches = [torch.randn(batch, d_in, device=bench.device) / d_in**0.5 for _ in range(4)]
    turn, number = itertools.cycle(batches), itertools.count()

    def ours() -> Case:
        learner = new_learner(batches[0], d_sae, bench)
        facts["l0"] = active(learner.sae, batches[1])
        facts["pairs"] = active(learner.sae, batches[1], bench.bandwidth / 2)
        free()
        return Case(lambda: learner.update({SITE: next(turn)}, next(number), RATE))

    def dense() -> Case:
        sae = random_sae(d_in, d_sae, torch.float32, bench.device)
        set_thresholds(sae, batches[0], bench.l0)
        way = Dense(sae, bench.bandwidth)
        return Case(lambda: way.step(next(turn)))

    return {"ours": ours, "dense autograd": dense,
            "product": lambda: product(batch, d_in, d_sae, torch.bfloat16, bench.device)}


def product(n: int, d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The encoder's product by itself."""
    x, rows = (torch.empty(size, d_in, dtype=dtype, device=device).normal_() for size in (n, d_sae))
    return Case(lambda: x @ rows.T)


def step(bench: Bench) -> None:
    """The part `step`: a line for each shape and way."""
    bench.say(STEP_HEAD)
    shapes, batch = (((32, 128), (32, 256), (32, 512)), 64) if bench.smoke else (STEP_SHAPES, 4096)
    for d_in, d_sae in shapes:
        torch.manual_seed(0)
        facts = dict.fromkeys(("l0", "pairs"), float("nan"))
        found = measure(step_ways(d_in, d_sae, batch, bench, facts), bench, together=d_in * d_sae < TOGETHER)
        for way, result in found.items():
            line = f"{d_in:5}{d_sae:9}{batch:7}{facts['l0']:6.1f}{facts['pairs']:7.1f}  {way:14}"
            if isinstance(result, Failed):
                bench.say(f"{line}  {result}")
                continue
            faster = ratio(found["dense autograd"], result)
            target = (f"   target 2.2: {verdict(faster >= 2.2)}, with row-sparse Adam 3.5: {verdict(faster >= 3.5)}"
                      if way == "ours" and d_sae == shapes[1][1] else "")
            bench.say(f"{line}{1e3 * result.seconds:10.3f}{faster:10.2f}{ratio(found['product'], result):9.2f}"
                      f"{result.peak / 1e9:9.2f}{target}")


def splice_rows(saes: Mapping[str, SAE], x: Tensor, bench: Bench, asked: bool) -> None:
    """Time all ways for the tokens x, and say a line for each dtype of ours. asked: whether the target is of them."""
    builds: dict[str, Callable[[], Case]] = {}
    for name, sae in saes.items():
        splice, encode = dense_ways(sae, x)
        ways = {"sae": lambda sae=sae: sae(x, torch.float32), "encode": lambda sae=sae: sae.encode_sparse(x),
                "dense sae": splice, "dense encode": encode}
        builds |= {f"{way} {name}": lambda call=call: Case(call) for way, call in ways.items()}  # type: ignore[misc]
    found = measure(builds, bench)

    def cells(way: str, name: str) -> str:
        ours = found[f"{way} {name}"]
        dense = [f"{ratio(found[f'dense {way} {other}'], ours):9.2f}" for other in saes]
        peak = "" if way == "encode" else f"{ours.peak / 1e9:9.3f}" if isinstance(ours, Timing) else f"{'-':>9}"
        return (f"{1e3 * ours.seconds:11.3f}" if isinstance(ours, Timing) else f"  {ours}") + "".join(dense) + peak

    for name, sae in saes.items():
        faster = ratio(found[f"dense sae {name}"], found[f"sae {name}"])
        notes = [f"   target 1.8 of {name}: {verdict(faster >= 1.8)}"] if asked else []
        notes += [f"; {way}: {why}" for way, why in found.items() if isinstance(why, Failed) and "dense" in way]
        bench.say(f"{sae.d_in:5}{sae.d_sae:8}{len(x):7} {name:9}{cells('sae', name)}{cells('encode', name)}"
                  + "".join(notes))


def by_dtype(d_in: int, d_sae: int, n: int, bench: Bench) -> tuple[dict[str, SAE], Tensor]:
    """One SAE by dtype of its weights, and activations for it (n, d_in) in bfloat16."""
    x = torch.randn(n, d_in, device=bench.device).bfloat16()
    narrow = random_sae(d_in, d_sae, torch.bfloat16, bench.device)
    set_thresholds(narrow, x, bench.l0)
    wide = SAE(narrow.W_enc.float(), narrow.b_enc, narrow.W_dec.float(), narrow.b_dec, threshold=narrow.threshold)
    return {"bfloat16": narrow, "float32": wide}, x


def splice_shape(d_in: int, d_sae: int, tokens: Sequence[int], bench: Bench) -> None:
    """The lines of a shape."""
    torch.manual_seed(0)
    saes, x = by_dtype(d_in, d_sae, tokens[-1], bench)
    for n in tokens:
        splice_rows(saes, x[:n], bench, n == tokens[-1])


@torch.no_grad()
def splice(bench: Bench) -> None:
    """The part `splice`: two lines for each shape and number of tokens."""
    bench.say(SPLICE_HEAD)
    shapes, tokens = (((32, 128), (32, 256)), (1, 4, 16, 64)) if bench.smoke else (SPLICE_SHAPES, SPLICE_TOKENS)
    for d_in, d_sae in shapes:
        failed = attempt(partial(splice_shape, d_in, d_sae, tokens, bench))
        if isinstance(failed, Failed):
            bench.say(f"{d_in:5}{d_sae:8} {failed}")
