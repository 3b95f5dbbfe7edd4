"""The paper's headline on real language models: fidelity against sparsity for JumpReLU, Gated, TopK, BatchTopK and ReLU
SAEs, trained on the same activations for the same tokens with the same tuning budget (arXiv 2407.14435, section 5).

    python benchmarks/pareto.py tiny-gemma2 --text train.jsonl.xz --held-out held-out.jsonl --cache FOLDER
    python benchmarks/pareto.py smollm2-135m --text ... --held-out ... --cache FOLDER [--part 1/2]

Each line of the texts is {"text": ...}. What is in the cache is not made again, so the command goes on where it was cut
off; `--part i/n` does every n-th run only, for several processes (harvest first: `--only harvest`). It ends with
results/pareto-MODEL.{json,md,png,svg}.

Tuning: at each sparsity, each method is trained with equally many learning rates and the tuning seeds, in full; what is
reported has the rate with the least mean FVU on activations that no run is trained on. JumpReLU's bandwidth follows its
rate: beside a large rate a small one leaves many features dead. Methods whose L0 is not given but follows from a
coefficient are compared at the same L0 by interpolation.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_hooks import SAE, load_sae
from sae_hooks.check import Statistics
from sae_hooks.documents import prefix_ids
from sae_hooks.training import (
    BatchTopK,
    CachedStream,
    Gated,
    JumpReLU,
    Objective,
    ReLU,
    TopK,
    TrainConfig,
    Trainee,
    train,
)
from sae_hooks.training.harvest import padded_batches
from sae_hooks.training.metrics import evaluate_all
from sae_hooks.training.plots import pareto_plot
from sae_hooks.training.report import make_report, read_report, write_report
from sae_hooks.training.shards import Shards, harvest_infos, write_shards
from sae_hooks.training.text import context_windows, documents

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WINDOW, WINDOWS_PER_SHARD = 256, 128
TUNING_TOKENS = 65_536  # at the end of the cache, trained on by no run


@dataclass(frozen=True)
class Setup:
    """One model's experiment: where, how large, how long.

    sweep: of each method, its sparsities: features a token, or coefficients that lead there, the sparsest first. rates:
    the learning rates that are tried, with tuning_seeds of the seeds. bandwidth: JumpReLU's, times its learning rate.
    """

    site: str
    d_sae: int
    tokens: int
    steps: int
    batch_size: int
    seeds: int
    tuning_seeds: int
    held_out_windows: int
    bandwidth: float
    sweep: dict[str, tuple[float, ...]]
    rates: dict[str, tuple[float, ...]]


SETUPS = {
    "tiny-gemma2": Setup(
        site="model.layers.2.output", d_sae=1024, tokens=2_400_000, steps=1200, batch_size=1024, seeds=3,
        tuning_seeds=2, held_out_windows=256, bandwidth=5.0, sweep={
            "JumpReLU": (5, 10, 20, 40, 80), "TopK": (5, 10, 20, 40, 80), "BatchTopK": (5, 10, 20, 40, 80),
            "Gated": (0.34, 0.22, 0.15, 0.106, 0.067), "ReLU": (0.25, 0.14, 0.09, 0.059, 0.037)},
        rates={"JumpReLU": (5e-3, 1e-2, 2e-2, 4e-2), "TopK": (5e-3, 1e-2, 2e-2, 4e-2),
               "BatchTopK": (5e-3, 1e-2, 2e-2, 4e-2), "Gated": (1e-2, 2e-2, 4e-2, 8e-2),
               "ReLU": (1e-2, 2e-2, 4e-2, 8e-2)}),
    "smollm2-135m": Setup(
        site="model.layers.15.output", d_sae=2304, tokens=1_100_000, steps=1000, batch_size=1024, seeds=1,
        tuning_seeds=1, held_out_windows=64, bandwidth=5.0, sweep={
            "JumpReLU": (10, 30, 80), "TopK": (10, 30, 80), "BatchTopK": (10, 30, 80),
            "Gated": (0.147, 0.082, 0.047), "ReLU": (0.122, 0.06, 0.034)},
        rates={"JumpReLU": (3e-3, 6e-3, 1.2e-2), "TopK": (3e-3, 6e-3, 1.2e-2), "BatchTopK": (3e-3, 6e-3, 1.2e-2),
               "Gated": (6e-3, 1.2e-2, 2.4e-2), "ReLU": (6e-3, 1.2e-2, 2.4e-2)}),
}


# --- methods ----------------------------------------------------------------------------------------

FOLLOWS = ("Gated", "ReLU")  # methods whose L0 follows from a coefficient
WARMUP = 1 / 3  # of the steps; after 100 of 1,200 some seeds of JumpReLU lost a tenth of their features at L0 80
CLIP = 3.0  # SmolLM2 has tokens whose gradient is eighty times as long as others'


def objective(method: str, sparsity: float, rate: float, setup: Setup) -> Objective:
    """A method at a sparsity: features a token, or the coefficient of its penalty."""
    if method == "JumpReLU":
        return JumpReLU(l0=sparsity, bandwidth=setup.bandwidth * rate, warmup=round(0.3 * setup.steps))
    if method in ("TopK", "BatchTopK"):
        kind = TopK if method == "TopK" else BatchTopK
        return kind(k=int(sparsity), aux_k=128, dead_after=200_000)
    kind = Gated if method == "Gated" else ReLU
    return kind(sparsity=sparsity, warmup=round(0.1 * setup.steps))


@dataclass(frozen=True)
class Run:
    """One SAE of the experiment."""

    method: str
    sparsity: float
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.sparsity:g}-seed{self.seed}-lr{self.rate:g}"


def trained(run: Run, setup: Setup, cache: Path) -> SAE:
    """The run's SAE, from the cache or by training."""
    folder = cache / "runs" / run.name
    if not (folder / "cfg.json").exists():
        stream = CachedStream(cache / "acts", [setup.site], seed=run.seed, epochs=None, max_tokens=setup.tokens)
        trainee = Trainee(name=run.name, site=setup.site, d_sae=setup.d_sae, seed=run.seed, learning_rate=run.rate,
                          betas=(0.9, 0.999), clip=CLIP, objective=objective(run.method, run.sparsity, run.rate, setup))
        config = TrainConfig(steps=setup.steps, batch_size=setup.batch_size, warmup=round(WARMUP * setup.steps),
                             decay=0.5)
        train(stream, [trainee], config, progress=sys.stderr.isatty())[run.name].save_pretrained(folder)
        print(f"trained {run.name}", flush=True)
    return load_sae(folder)


# --- tuning -----------------------------------------------------------------------------------------

def tuning_runs(method: str, setup: Setup) -> list[Run]:
    """With each tuning seed, each sparsity with each learning rate."""
    return [Run(method, sparsity, seed, rate) for seed in range(setup.tuning_seeds) for rate in setup.rates[method]
            for sparsity in setup.sweep[method]]


def tuned(method: str, setup: Setup, cache: Path) -> list[dict[float, float]]:
    """For each sparsity, FVU by learning rate, the mean over the tuning seeds; for methods whose L0 follows, at the L0
    that the sparsity stands for."""
    x = tuning_rows(setup, cache)
    found = {run: measured(trained(run, setup, cache), x) for run in tuning_runs(method, setup)}
    curves = {rate: [mean_point([point for run, point in found.items() if (run.rate, run.sparsity) == (rate, sparsity)])
                     for sparsity in setup.sweep[method]] for rate in setup.rates[method]}
    return [{rate: at_l0(curve, goal) if method in FOLLOWS else curve[i][1] for rate, curve in curves.items()}
            for i, goal in enumerate(setup.sweep["JumpReLU"])]


def tuning_rows(setup: Setup, cache: Path) -> Tensor:
    """Activations that no run is trained on."""
    parts = Shards(cache / "acts" / setup.site).parts
    rows = torch.cat(parts[-8:])[-TUNING_TOKENS:].float()
    assert sum(map(len, parts)) >= setup.tokens + len(rows), "harvest more: the tuning rows must not be trained on"
    return rows


def measured(sae: SAE, x: Tensor) -> tuple[float, float]:
    """(L0, FVU) on rows of activations."""
    statistics = Statistics()
    with torch.no_grad():
        for part in x.split(4096):
            statistics.update(sae, part, part)
    return statistics.l0, statistics.fvu


def mean_point(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The mean (L0, FVU)."""
    l0, fvu = (sum(values) / len(points) for values in zip(*points, strict=True))
    return l0, fvu


def at_l0(curve: list[tuple[float, float]], l0: float) -> float:
    """The value at an L0 of a curve of (L0, value), on straight lines in log-log; the outer ones go on beyond it."""
    points = sorted(curve)
    above = next((i for i, (x, _) in enumerate(points) if x >= l0), len(points) - 1)
    first = max(0, above - 1)
    (a, x), (b, y) = ((math.log(l0), math.log(value)) for l0, value in points[first:first + 2])
    return math.exp(x + (y - x) * (math.log(l0) - a) / (b - a))


# --- the experiment ---------------------------------------------------------------------------------

def arguments() -> argparse.Namespace:
    """What the user asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=SETUPS)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--held-out", type=Path, required=True, help="texts never trained on")
    p.add_argument("--cache", type=Path, required=True, help="for activations (at most 3 GB) and SAEs")
    p.add_argument("--part", default="0/1", metavar="I/N", help="do every N-th run only, from the I-th on")
    p.add_argument("--only", choices=("harvest", "tune", "train"), help="stop after this stage")
    return p.parse_args()


def main() -> None:
    """Harvest, tune, train, evaluate, report."""
    args = arguments()
    setup, cache = SETUPS[args.model], args.cache / args.model
    model, tokenizer = language_model(args.model)
    harvest(args, setup, cache, model, tokenizer)
    if args.only == "harvest":
        return
    mine = part(args)
    for run in mine([run for method in setup.sweep for run in tuning_runs(method, setup)]):
        trained(run, setup, cache)
    if args.only == "tune":
        return
    tuning = {method: tuned(method, setup, cache) for method in setup.sweep}
    runs = [Run(method, sparsity, seed, min(tried, key=lambda rate: tried[rate]))
            for seed in range(setup.seeds) for method, sweep in setup.sweep.items()
            for sparsity, tried in zip(sweep, tuning[method], strict=True)]
    saes = {run.name: (run, trained(run, setup, cache)) for run in mine(runs)}
    if args.only == "train" or len(saes) < len(runs):
        return
    stem = RESULTS / f"pareto-{args.model}"
    if not stem.with_suffix(".json").exists() or not same_runs(stem.with_suffix(".json"), saes):
        evaluate(args, setup, model, tokenizer, saes, stem)
    draw(args.model, setup, tuning, stem)


def part(args: argparse.Namespace) -> Any:
    """What picks this process's runs out of all."""
    i, n = map(int, args.part.split("/"))
    return lambda runs: runs[i::n]


def language_model(name: str) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    if name == "tiny-gemma2":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = ROOT / "tests" / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import load_smollm2

    return load_smollm2(torch.float32)  # many CPUs multiply slowly in half precision


def windows_of(path: Path, tokenizer: Any) -> list[Any]:
    """The file's windows, shuffled."""
    ids = tokenizer(list(documents(path)), add_special_tokens=False, verbose=False)["input_ids"]
    return context_windows(ids, WINDOW, 0, prefix_ids(tokenizer))


def harvest(args: argparse.Namespace, setup: Setup, cache: Path, model: Any, tokenizer: Any) -> None:
    """Fill cache/acts with setup.tokens tokens, and those that tune."""
    begun = any((cache / "acts" / setup.site).glob("shard-*.safetensors"))
    done = sum(map(len, Shards(cache / "acts" / setup.site).parts)) if begun else 0
    wanted = setup.tokens + TUNING_TOKENS
    if done >= wanted:
        return
    windows, special = windows_of(args.text, tokenizer), tokenizer.all_special_ids
    infos = harvest_infos(model, cache / "acts", [setup.site], windows, special, model_name=args.model, window=WINDOW,
                          seed=0, windows_per_shard=WINDOWS_PER_SHARD)
    for tokens in write_shards(model, cache / "acts", infos, windows, special, windows_per_shard=WINDOWS_PER_SHARD):
        done += tokens
        print(f"harvested {done:,} of {wanted:,} tokens", flush=True)
        if done >= wanted:
            return


def same_runs(path: Path, saes: dict[str, Any]) -> bool:
    """Whether a report is of these runs."""
    return set(read_report(path).saes) == set(saes)


def evaluate(args: argparse.Namespace, setup: Setup, model: Any, tokenizer: Any, saes: dict[str, tuple[Run, SAE]],
             stem: Path) -> None:
    """Measure all SAEs on held-out text."""
    windows = windows_of(args.held_out, tokenizer)[:setup.held_out_windows]
    plain = {name: sae for name, (_, sae) in saes.items()}
    found = evaluate_all(model, plain, list(padded_batches(windows)), tokenizer.all_special_ids)
    facts = {name: {"method": run.method, "sparsity": run.sparsity, "seed": run.seed, "learning_rate": run.rate}
             for name, (run, _) in saes.items()}
    data = {"training": args.text.name, "held_out": args.held_out.name, "tokens_trained_on": setup.steps
            * setup.batch_size, "distinct_tokens": setup.tokens, "windows": len(windows)}
    write_report(make_report(found, plain, model=args.model, data=data, facts=facts), stem.with_suffix(".json"))


# --- the report -------------------------------------------------------------------------------------

def draw(name: str, setup: Setup, tuning: dict[str, Any], stem: Path) -> None:
    """Write the plot and the table."""
    report = read_report(stem.with_suffix(".json"))
    rows = {method: [[entry for entry in report.saes.values() if entry.facts["method"] == method
                      and entry.facts["sparsity"] == sparsity] for sparsity in sweep]
            for method, sweep in setup.sweep.items()}
    pareto_plot(rows, stem, title=f"{name}, {setup.site}, {setup.d_sae:,} features")
    stem.with_suffix(".md").write_text(page(name, setup, tuning, rows))
    print(stem.with_suffix(".md").read_text())


def page(name: str, setup: Setup, tuning: dict[str, Any], rows: dict[str, list[list[Any]]]) -> str:
    """The result as Markdown."""
    tokens = next(iter(rows.values()))[0][0].scalars["tokens"]
    head = (f"# {name}: fidelity against sparsity\n\n`python benchmarks/pareto.py {name}`: {setup.site}, d_sae "
            f"{setup.d_sae:,}, trained on {setup.steps * setup.batch_size:,} tokens each, measured on {tokens:,.0f} "
            f"held-out ones; {setup.seeds} seed(s), means over seeds. Loss: nats a token. gamma: relative "
            "reconstruction bias.\n\n")
    columns = ("method", "sparsity", "L0", "FVU", "delta loss", "recovered", "gamma", "dead", "> 10 %")
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for method, by_sparsity in rows.items():
        for entries in by_sparsity:
            m = {key: sum(e.scalars[key] for e in entries) / len(entries) for key in entries[0].scalars}
            table.append(f"| {method} | {entries[0].facts['sparsity']:g} | {m['l0']:.1f} | {m['fvu']:.4f} | "
                         f"{m['delta_loss']:.4f} | {m['loss_recovered']:.4f} | {m['gamma']:.3f} | {m['dead']:.1%} | "
                         f"{m['over_10_percent']:.2%} |")
    return head + "\n".join(table) + "\n\n" + compared(setup, rows) + "\n" + tuning_table(setup, tuning)


def compared(setup: Setup, rows: dict[str, list[list[Any]]]) -> str:
    """Each method against JumpReLU at JumpReLU's own L0s, where both curves reach."""
    lines = ["## At the same L0\n", "FVU / delta loss, each over JumpReLU's (above 1: worse than JumpReLU), "
             "interpolated in log L0.\n", "| method | " + " | ".join(f"L0 {l0:g}" for l0 in setup.sweep["JumpReLU"])
             + " |", "|" + "---|" * (1 + len(setup.sweep["JumpReLU"]))]
    curves = {method: {key: [(mean(e, "l0"), mean(e, key)) for e in entries] for key in ("fvu", "delta_loss")}
              for method, entries in rows.items()}
    for method in list(rows)[1:]:
        cells = []
        for l0 in (mean(entries, "l0") for entries in rows["JumpReLU"]):
            ratios = [ratio(curves[method][key], curves["JumpReLU"][key], l0) for key in ("fvu", "delta_loss")]
            cells.append(" / ".join("-" if r is None else f"{r:.3f}" for r in ratios))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratio(theirs: list[tuple[float, float]], ours: list[tuple[float, float]], l0: float) -> float | None:
    """Their value over ours at an L0; None outside of their curve."""
    a, b = (interpolated(curve, l0) for curve in (theirs, ours))
    return None if a is None or b is None else a / b


def interpolated(curve: list[tuple[float, float]], l0: float) -> float | None:
    """The value at l0; None where the curve does not reach, but for 3 % at the ends."""
    least, most = (end(l0 for l0, _ in curve) for end in (min, max))
    return at_l0(curve, l0) if least / 1.03 <= l0 <= most * 1.03 else None


def mean(entries: list[Any], key: str) -> float:
    """Over seeds."""
    return float(sum(e.scalars[key] for e in entries) / len(entries))


def tuning_table(setup: Setup, tuning: dict[str, list[dict[float, float]]]) -> str:
    """What was tried, and taken."""
    goals = setup.sweep["JumpReLU"]
    lines = ["## Tuning\n",
             f"FVU on activations not trained on, mean over {setup.tuning_seeds} seed(s); the least is taken.\n",
             "| method | learning rate | " + " | ".join(f"L0 {l0:g}" for l0 in goals) + " |",
             "|" + "---|" * (2 + len(goals))]
    for method, tried in tuning.items():
        for rate in setup.rates[method]:
            cells = (f"**{t[rate]:.4f}**" if t[rate] == min(t.values()) else f"{t[rate]:.4f}" for t in tried)
            lines.append(f"| {method} | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
