"""The commands of `sae-hooks` about features of texts: extract, find, top."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from .cli import L0, AllowPickle, Device, Dtype, Layer, Model, Revision, Site, Source, Width, app, attach
from .errors import DataError
from .export import export_features
from .find import find_features
from .language_model import load_model
from .records import OPENERS, TEXT_FILES, Records, Row, records
from .store import open_features
from .terminal import busy, counting, print_table

MOST_NAME = 255  # bytes of a file's name; a text that ends in "see README.md" may be longer
TEXTS = "A .jsonl (.xz, .gz), .txt or .md file, a folder of the last two, or a data set: owner/name[:configuration]."
Field = Annotated[str | None, typer.Option(
    help="Where the text stands in a row (default: text, messages or input_ids, whichever is there).")]
Split = Annotated[str, typer.Option(help="Of a data set.")]
Window = Annotated[int | None, typer.Option(min=2, help=(
    "Tokens that the model reads at once; longer texts are cut. Default: 1024, or what the model takes if less."))]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents, from the first on.")]


@app.command(epilog="Example: sae-hooks extract google/gemma-2-2b google/gemma-scope-2b-pt-res --layer 12 "
                    "--text texts.jsonl --out features\n\n"
                    "Many GPUs: accelerate launch -m sae_hooks.training.cli extract ...")
def extract(
    model: Model, source: Source,
    text: Annotated[str, typer.Option(help=TEXTS)],
    out: Annotated[Path, typer.Option(file_okay=False, help="The store; a new folder.")],
    layer: Layer = None, site: Site = None, width: Width = None, l0: L0 = None, revision: Revision = None,
    allow_pickle: AllowPickle = False, dtype: Dtype = "auto", device: Device = None, field: Field = None,
    split: Split = "train",
    roles: Annotated[list[str] | None, typer.Option(
        help="Of chats, only what these wrote. May be given several times.")] = None,
    values: Annotated[Literal["float16", "bfloat16", "float32"], typer.Option(
        help="How the features' activations are kept.")] = "float16",
    activations: Annotated[bool, typer.Option(
        "--activations", help="Keep the site's raw activations, too: the baseline of any probe.")] = False,
    window: Window = None,
    overlap: Annotated[int, typer.Option(min=0, help="Tokens of a window that the next one reads again.")] = 0,
    limit: Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same command was cut off.")] = False,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Positions of one forward pass.")] = 4096,
) -> None:
    """Write the features of every token of a text to disk, sparse, with the documents' other columns.

    Read them with `sae_hooks.open_features`, or look at them with `sae-hooks top`.
    """
    rows = records(text, split=split)  # what is not there is told before a model is loaded for it
    loaded, tokenizer = load_model(model, dtype, device or own_device())
    attach(loaded, source, layer, site, width, l0, revision, allow_pickle)
    with counting("extracting", how_many(text, split, limit)) as advance:
        store = export_features(
            loaded, rows, out, tokenizer=tokenizer, dtype=values, activations=activations, window=window,
            overlap=overlap, tokens_per_batch=tokens_per_batch, resume=resume, progress=advance, field=field,
            roles=roles or None, limit=limit)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(repr(store))


@app.command(epilog="Example: sae-hooks find google/gemma-2-2b google/gemma-scope-2b-pt-res --layer 12 "
                    "--positive german.txt --negative 'The weather is fine.' --negative other.txt")
def find(
    model: Model, source: Source,
    positive: Annotated[list[str], typer.Option(
        help="A text that has it, or a file of such. May be given several times.")],
    negative: Annotated[list[str], typer.Option(
        help="A text that has it not, or a file. May be given several times.")],
    layer: Layer = None, site: Site = None, width: Width = None, l0: L0 = None, revision: Revision = None,
    allow_pickle: AllowPickle = False, dtype: Dtype = "auto", device: Device = None, field: Field = None,
    window: Window = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Features to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the features that tell some texts from others: how surely (AUROC), how strongly, how densely they fire."""
    sides = [gathered(texts) for texts in (positive, negative)]
    loaded, tokenizer = load_model(model, dtype, device)
    attach(loaded, source, layer, site, width, l0, revision, allow_pickle)
    with busy("reading the texts"):
        found = find_features(loaded, *sides, tokenizer=tokenizer, n=n, window=window, field=field)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
        return
    head = ("feature", "AUROC", "contrast", "mean +", "mean -", "tokens +", "tokens -", "texts +", "texts -")
    print_table(head, [(f.feature, f"{f.auroc:.3f}", f"{f.contrast:.3g}", f"{f.mean_positive:.3g}",
                        f"{f.mean_negative:.3g}", f"{f.density_positive:.2%}", f"{f.density_negative:.2%}",
                        f"{f.share_positive:.0%}", f"{f.share_negative:.0%}") for f in found])


@app.command(epilog="Example: sae-hooks top features 1234 -n 20")
def top(
    folder: Annotated[Path, typer.Argument(help="A store that `sae-hooks extract` wrote.")],
    feature: Annotated[int, typer.Argument(min=0)],
    site: Annotated[str | None, typer.Option(help="Which SAE of the store, where there are several.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Contexts to show.")] = 10,
    context: Annotated[int, typer.Option(min=0, help="Tokens on each side.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where a feature is strongest: its activation, and the token among its neighbours."""
    store = open_features(folder)
    if feature >= (d_sae := store.d_sae(site)):
        raise typer.BadParameter(f"there is no feature {feature}; the last is {d_sae - 1}", param_hint="FEATURE")
    found = store.top(feature, n, site, context)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    elif found:
        print_table(("activation", "document", "position", "text"), [
            (f"{one.activation:.2f}", one.doc_id, one.position, str(one)) for one in found])
    else:
        typer.echo(f"feature {feature} fires on no token of {folder}")


def own_device() -> str | None:
    """The GPU of this process among those that a launcher started; None for the default."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def how_many(text: str, split: str, limit: int | None) -> int | None:
    """Documents in a file or folder; None for a data set, whose size may take a download to know."""
    if not os.path.exists(text):
        return limit
    return sum(1 for _ in islice(records(text, split=split), limit))


def gathered(texts: Sequence[str]) -> Records:
    """Texts, and the rows of those that are files. Raises DataError for what looks like a file that is not there."""
    found: list[Row] = []
    for text in texts:
        is_file = os.path.exists(text)  # Path.exists raises where a text is too long to be a name
        named = Path(text).suffix in (*OPENERS, *TEXT_FILES) and len(os.fsencode(Path(text).name)) <= MOST_NAME
        if named and not is_file:
            raise DataError(f"there is no file {text}")
        rows = records(text if is_file else [text])
        found += [(where, row[rows.field] if rows.field else row) for where, row in rows]  # field= is not for these
    return Records("texts", lambda: iter(found))
