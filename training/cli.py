"""The command line `sae-hooks`, whole: to list, check, generate and convert come train, eval and push."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from sae_hooks.cli import L0, AllowPickle, Device, Dtype, Layer, Model, Revision, Site, Source, Width, app
from sae_hooks.errors import DataError, SaeNotFoundError, TrainingError
from sae_hooks.features_cli import TEXTS, Split
from sae_hooks.formats.selection import matches, placed, summary, wanted
from sae_hooks.hub import SaeFile, find_saes, list_saes
from sae_hooks.hub.sources import open_source
from sae_hooks.identity import weights_digest
from sae_hooks.language_model import load_model, loading
from sae_hooks.sae import SAE
from sae_hooks.sites import context_length
from sae_hooks.terminal import busy, print_table, progress

from .assess import Text, assess, draw
from .card import REPORT, write_card
from .job import Job, facts_of, places
from .objectives import OBJECTIVES
from .parallel import parallel
from .plan import aimed_at, describe, model_cost, plan, possible
from .publish import PLOTS, push_folder
from .recipes import RECIPES, Recipe, changed, variants
from .report import EvaluationReport, write_report
from .text import documents

INTERRUPTED = 130  # exit code, as shells have it
UNIFORMITY_POSITIONS = 4  # of each window
CONTEXT = 1024  # arXiv 2408.05147, 3.3
PLANNED = ((1, 1), (8, 1), (8, 2), (8, 8))  # GPUs, and how many of them share the features

# --- options --------------------------------------------------------------------------------------

NUMBERS = "NUMBER[,NUMBER ...]"
Field = Annotated[str, typer.Option(help="Where the text stands in a line of JSON or a row of a data set.")]
Shuffle = Annotated[bool, typer.Option(help="Shuffle the texts; holds those of files in memory.")]
Context = Annotated[int | None, typer.Option(min=4, help="Tokens of a window; at most what the model takes.")]
ModelName = Annotated[str | None, typer.Option(
    help="What to call the language model in files. Default: MODEL, or the last part of its path.")]
Licence = Annotated[str | None, typer.Option(help="Of the SAEs, for the card: cc-by-4.0, apache-2.0 ...")]

TrainText = Annotated[str | None, typer.Option(help=f"What to train on. {TEXTS}")]
Layers = Annotated[list[int] | None, typer.Option(help="Counted from 0. May be given several times.")]
Sites = Annotated[list[str] | None, typer.Option(help=(
    "resid_post, mlp_out, attn_out, transcoder, or a module path. May be given several times; each is trained "
    "from the same forward passes. Default: resid_post."))]
Out = Annotated[Path | None, typer.Option(file_okay=False, help="Where everything goes; made if needed.")]
RecipeName = Annotated[Literal["quick", "paper"], typer.Option(
    help="quick: converges in minutes. paper: the numbers of JumpReLU's paper and of Gemma Scope.")]
Kind = Annotated[str, typer.Option(help=f"One of {', '.join(OBJECTIVES)}.")]
Targets = Annotated[list[str] | None, typer.Option("--l0", metavar=NUMBERS, help=(
    "Features active on a token to aim at (the k of topk and batchtopk). Several: an SAE each, side by side."))]
Sparsity = Annotated[list[str] | None, typer.Option(
    metavar=NUMBERS, help="Coefficient of the penalty. Several: an SAE each, side by side.")]
Features = Annotated[int | None, typer.Option(min=1, help="Number of features.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="How many to train on, also of a shorter text.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Tokens a step.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=(
    "Any other number of the recipe, as decay=0.2 or objective.bandwidth=0.05. May be given several times."))]
Skip = Annotated[bool, typer.Option("--skip", help="Give transcoders an affine skip.")]
Cache = Annotated[Path | None, typer.Option(
    file_okay=False, help="Harvest the activations into this folder first, or take what is there.")]
CacheTokens = Annotated[int | None, typer.Option(
    min=1, help="How many to harvest; a longer training reads them again. Default: --tokens.")]
Epochs = Annotated[int | None, typer.Option(
    min=1, help="How often the text may be read. Default: as often as needed.")]
HeldOut = Annotated[str | None, typer.Option(help=f"Text to evaluate on at the end. {TEXTS}")]
HeldOutSplit = Annotated[str, typer.Option(help="Of a data set.")]
HeldOutTokens = Annotated[int, typer.Option(
    min=16, help="How many of it, the first of its texts as they are shuffled.")]
DataLicence = Annotated[str | None, typer.Option(help="Of the text, in your words, for the card.")]
FeatureShards = Annotated[int, typer.Option(min=1, help=(
    "Under `accelerate launch`: so many processes share the features; groups of them share the batches."))]
OnlyPlan = Annotated[bool, typer.Option(
    "--plan", help="Print memory, hours and disk of this on one H100 and on eight; train nothing.")]


# --- commands -------------------------------------------------------------------------------------

@app.command(epilog="Example: sae-hooks train google/gemma-2-2b --text monology/pile-uncopyrighted --layer 12 "
                    "--l0 30,60 --held-out held-out.jsonl --out my-saes\n\n"
                    "What the paper's training would take: sae-hooks train google/gemma-2-9b --recipe paper --layer 20 "
                    "--plan")
def train(
    model: Model, text: TrainText = None, layer: Layers = None, site: Sites = None, out: Out = None,
    recipe: RecipeName = "quick", objective: Kind = "jumprelu", l0: Targets = None, sparsity: Sparsity = None,
    d_sae: Features = None, tokens: Tokens = None, batch_size: BatchSize = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None, settings: Settings = None,
    skip: Skip = False, cache: Cache = None, cache_tokens: CacheTokens = None, epochs: Epochs = None,
    held_out: HeldOut = None, held_out_split: HeldOutSplit = "train", held_out_tokens: HeldOutTokens = 100_000,
    field: Field = "text", split: Split = "train", context: Context = None, shuffle: Shuffle = True,
    licence: Licence = None, data_licence: DataLicence = None, model_name: ModelName = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1)] = 0, dtype: Dtype = "auto", device: Device = None,
    shards: FeatureShards = 1, only_plan: OnlyPlan = False,
) -> None:
    """Train SAEs for a language model, evaluate them, and write a card: a folder that `push` can publish.

    The same command goes on where a stopped one was. Ctrl-C saves first. On several GPUs: accelerate launch -m
    sae_hooks.training.cli train ...
    """
    if cache_tokens is not None and cache is None:
        raise typer.BadParameter("it says how many to harvest into --cache, which is not given",
                                 param_hint="--cache-tokens")
    given = {"d_sae": d_sae, "tokens": tokens, "batch_size": batch_size, "learning_rate": learning_rate}
    recipes = _recipes(recipe, objective, _floats(l0), _floats(sparsity), given, _pairs(settings))
    first, layers, sites = next(iter(recipes.values())), layer or [], site or ["resid_post"]
    if only_plan:
        _print_plan(model, layers, sites, recipes, context, cache_tokens or first.tokens if cache else None)
        return
    if text is None or out is None:
        raise typer.BadParameter("--text and --out are needed, but for --plan")
    what = _text(Text(source=text, field=field, split=split, shuffled=shuffle))
    held = None if held_out is None else _text(Text(source=held_out, field=field, split=held_out_split))
    together = parallel(shards)
    where = str(together.device) if together.mesh is not None and device is None else device
    loaded, tokenizer = load_model(model, dtype, where)
    job = Job(model_name=model_name or _model_name(model), recipes=recipes, text=what, out=out, cache=cache, skip=skip,
              places=places(loaded, layers, sites), context=context_length(loaded, context or first.context),
              cache_tokens=cache_tokens or first.tokens, epochs=epochs, seed=seed, data_licence=data_licence,
              dtype=str(loaded.dtype).removeprefix("torch."), weights=weights_digest(loaded))
    together.by_main(job.claim)
    with _interruptible(out, together.main):
        with _tf32():
            saes = job.run(loaded, tokenizer, _sae_device(where), parallel=together)
        if together.main and held is not None:
            _report_held_out(job, loaded, tokenizer, saes, held, held_out_tokens)
    if together.main:
        write_card(out, licence=licence)
        typer.echo("\n".join(str(job.folder(name)) for name in saes))


@app.command("eval", epilog="Example: sae-hooks eval google/gemma-2-2b google/gemma-scope-2b-pt-res --layer 12 "
                            "--text held-out.jsonl --json report.json --plots plots")
def eval_command(
    model: Model, source: Source,
    text: Annotated[str, typer.Option(help=f"Held-out text. {TEXTS}")],
    layer: Layer = None, site: Site = None, width: Width = None, l0: L0 = None, revision: Revision = None,
    allow_pickle: AllowPickle = False,
    every: Annotated[bool, typer.Option("--all", help="Every SAE that the options fit, not one a site.")] = False,
    tokens: Annotated[int, typer.Option(min=16, help=(
        "How many to measure on, the first of the texts as they are shuffled (the paper: 2,097,152)."))] = 100_000,
    attribution: Annotated[bool, typer.Option(
        "--attribution", help="Measure the uniformity of attribution, too: backward passes.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the report here.")] = None,
    plots: Annotated[Path | None, typer.Option(
        file_okay=False, help="Draw frequencies and Pareto curves into this folder.")] = None,
    field: Field = "text", split: Split = "train", context: Context = None, shuffle: Shuffle = True,
    model_name: ModelName = None, dtype: Dtype = "auto", device: Device = None,
) -> None:
    """Evaluate SAEs as the paper does: L0, FVU, what the reconstruction costs the model, shrinkage, frequencies."""
    if every and l0 is not None:
        raise typer.BadParameter("--all takes SAEs of every L0; give one of the two", param_hint="--l0")
    what = _text(Text(source=text, field=field, split=split, shuffled=shuffle))
    if plots is not None:
        _check_matplotlib()
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)  # before the work: what cannot be there is told at once
    with busy(f"looking at {source}"):
        found = _every(source, layer, site, width, revision, allow_pickle) if every else find_saes(
            source, layer=layer, site=site, width=width, l0=l0, revision=revision, allow_pickle=allow_pickle)
    loaded, tokenizer = load_model(model, dtype, device)
    saes = {_name(file, found): file.load().float() for file in progress(found, "loading")}
    facts = {name: facts_of(sae) for name, sae in saes.items()}
    report = assess(loaded, tokenizer, saes, what, model_name=model_name or _model_name(model), tokens=tokens,
                    context=context_length(loaded, context or CONTEXT), facts=facts,
                    uniformity_positions=UNIFORMITY_POSITIONS if attribution else 0)
    _print_evaluations(report)
    if json_path is not None:
        typer.echo(str(write_report(report, json_path)))
    for path in draw(report, plots) if plots is not None else ():
        typer.echo(str(path))


@app.command(epilog="Example: sae-hooks push my-saes me/gemma-2-2b-saes --licence cc-by-4.0")
def push(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `train` or `convert` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name; made if needed.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made.")] = False,
    licence: Licence = None,
) -> None:
    """Publish a folder of SAEs on the Hugging Face Hub: weights, card, report and pictures, in one commit.

    Needs `hf auth login`. Every SAE is checked first. Checkpoints stay here.
    """
    with busy(f"pushing {folder} to {repo_id}"):
        address = push_folder(folder, repo_id, private=private, licence=licence)
    typer.echo(address)


# --- what train asks for ----------------------------------------------------------------------------

def _recipes(name: str, objective: str, l0: Sequence[float], sparsity: Sequence[float], given: Mapping[str, Any],
             settings: Mapping[str, str]) -> dict[str, Recipe]:
    """By variant: the recipe with what was given in its place. Raises TrainingError for what no SAE is trained by."""
    plain = {key: text for key, text in settings.items() if not key.startswith("objective.")}
    own = {key: text for key, text in settings.items() if key.startswith("objective.")}
    base = dataclasses.replace(RECIPES[name], **{key: value for key, value in given.items() if value is not None})
    made = variants(changed(base, plain), objective, l0, sparsity)
    found = {variant: changed(recipe, own) for variant, recipe in made.items()}
    for recipe in found.values():
        recipe.check()
    return found


def _floats(given: Iterable[str] | None) -> list[float]:
    """The numbers of options such as "30" and "30,60"."""
    try:
        return [float(part) for one in given or () for part in one.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{', '.join(given or ())!r} is not a number, or numbers such as 30,60") from None


def _pairs(given: Iterable[str] | None) -> dict[str, str]:
    found = {}
    for one in given or ():
        name, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r} is not NAME=VALUE, such as decay=0.2")
        found[name.strip()] = value.strip()
    return found


def _text(text: Text) -> Text:
    """The same. Raises DataError for a source that is not there, before a model is loaded for it."""
    documents(text.source, field=text.field, split=text.split)
    return text


def _model_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _sae_device(device: str | None) -> str:
    """Where SAEs are trained: where the model is, or on the first GPU of those it is spread over."""
    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device)


@contextmanager
def _interruptible(out: Path, main: bool) -> Iterator[None]:
    """Ctrl-C ends with a message instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        told = str(stopped) or f"stopped; what was saved before is in {out}: the same command goes on from there"
        if main:
            typer.secho(told, err=True, fg="yellow")
        raise typer.Exit(INTERRUPTED) from stopped


@contextmanager
def _tf32() -> Iterator[None]:
    """On GPUs, products of float32 in TF32: seven times as quick, and a training hardly tells the difference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _print_plan(name: str, layers: Sequence[int], sites: Sequence[str], recipes: Mapping[str, Recipe],
                context: int | None, cache_tokens: int | None) -> None:
    """On those numbers of GPUs of PLANNED that could train it. Of the model, no weights are read."""
    model, recipe = _empty_model(name), next(iter(recipes.values()))
    found = [place for place in places(model, layers, sites) for _ in recipes]
    cost = model_cost(model, found, context_length(model, context or recipe.context))
    l0s = [aimed_at(one) for _ in found[::len(recipes)] for one in recipes.values()]
    typer.echo(describe([plan(recipe, cost, l0s=l0s, gpus=n, shards=shards, cache_tokens=cache_tokens)
                         for n, shards in PLANNED if possible(recipe, n, shards)]))


def _empty_model(name: str) -> Any:
    """The model with all weights on "meta", from its config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]


def _report_held_out(job: Job, model: Any, tokenizer: Any, saes: Mapping[str, SAE], held_out: Text,
                     tokens: int) -> None:
    """Evaluate, tell, and write it beside the SAEs, whose configs get L0, FVU and the loss."""
    report = assess(model, tokenizer, saes, held_out, model_name=job.model_name, tokens=tokens, context=job.context,
                    facts={name: facts_of(sae) for name, sae in saes.items()})
    _print_evaluations(report)
    write_report(report, job.out / REPORT)
    for name, sae in saes.items():
        measured = report.saes[name]
        sae.metadata |= {key: round(measured.scalars[key], 5) for key in ("l0", "fvu", "delta_loss", "loss_recovered")}
        sae.save_pretrained(job.folder(name))
    try:
        draw(report, job.out / PLOTS)
    except (TrainingError, DataError) as error:  # the training was not for the pictures
        typer.secho(f"warning: {error}", err=True, fg="yellow")


# --- what eval asks for -----------------------------------------------------------------------------

def _every(source: str, layer: int | None, site: str | None, width: str | None, revision: str | None,
           allow_pickle: bool) -> list[SaeFile]:
    """All SAEs that fit, whatever their L0."""
    want, at = wanted(layer, site, width, None), open_source(source, revision=revision)
    offered = [placed(entry, want) for entry in list_saes(source, revision=revision)]
    found = [SaeFile(entry, at.where(entry.weights), at, allow_pickle) for entry in offered if matches(entry, want)]
    if not found:
        raise SaeNotFoundError(f"{source} has nothing like that. It offers:\n{summary(offered)}")
    for file in found:
        file.check_allowed()
    return found


def _name(file: SaeFile, found: Sequence[SaeFile]) -> str:
    """An SAE in a report: its folder in the source, as in the card, or its site."""
    alone = len(found) == 1 or not (path := file.entry.weights.rpartition("/")[0])
    return file.entry.site or file.where if alone else path


def _check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise TrainingError("plots need matplotlib, which is not installed: pip install 'sae-hooks[train]'")


def _print_evaluations(report: EvaluationReport) -> None:
    columns = {"tokens": ("tokens", ","), "L0": ("l0", ".1f"), "FVU": ("fvu", ".4f"),
               "loss clean": ("loss_clean", ".4f"), "spliced": ("loss_spliced", ".4f"), "delta": ("delta_loss", "+.4f"),
               "recovered": ("loss_recovered", ".4f"), "gamma": ("gamma", ".4f"), "dead": ("dead", ".2%"),
               "> 1 %": ("over_1_percent", ".2%"), "> 10 %": ("over_10_percent", ".3%")}
    if any("uniformity" in sae.scalars for sae in report.saes.values()):
        columns["uniformity"] = ("uniformity", ".3f")
    rows = [(name, *(f"{sae.scalars[key]:{form}}" for key, form in columns.values()))
            for name, sae in report.saes.items()]
    print_table(("SAE", *columns), rows)


if __name__ == "__main__":
    sys.exit(app())
