"""The command line `sae-hooks`: list, check, generate, convert."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from typer.core import TyperGroup

from .attach import attach_saes
from .check import Report, Row
from .edits import Edits
from .errors import DataError, EditError, SaeError, SaeMismatchError, SaeNotFoundError
from .formats import saelens
from .formats.selection import matches, placed, summary, wanted
from .hub import SaeFile, SaeTable, find_saes, list_saes, save_pretrained
from .hub.safe_files import staged
from .hub.sources import STATISTICS
from .language_model import load_model
from .processes import end_group
from .saes import Saes
from .sites import context_length, text_config
from .terminal import busy, print_table, progress, short_warnings, ticks

PROBLEM = 1  # exit code; 2 is bad usage, as typer has it
TEXT = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and \
dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether \
that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that \
war. We have come to dedicate a portion of that field, as a final resting place for those who here gave their lives \
that that nation might live.

Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice \
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the \
use of a book," thought Alice, "without pictures or conversations?" So she was considering in her own mind (as well as \
she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would \
be worth the trouble of getting up and picking the daisies.

In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon \
the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: and \
there was light. And God saw the light, that it was good: and God divided the light from the darkness.

It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. \
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is \
so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or \
other of their daughters.
"""  # A. Lincoln 1863, L. Carroll 1865, King James Bible, J. Austen 1813: public domain

Source = Annotated[str, typer.Argument(
    help="Hub repository (owner/name), a folder or weight file in it (owner/name/folder), local folder or file.")]
Model = Annotated[str, typer.Argument(help="The language model: a local folder or a Hub id.")]
Layer = Annotated[int | None, typer.Option(help="The layer, counted from 0.")]
Site = Annotated[str | None, typer.Option(
    help="resid_post, mlp_out, attn_out, transcoder, or a module path such as model.layers.20.output.")]
Width = Annotated[str | None, typer.Option(help="Number of features: 16384, or a label such as 16k.")]
L0 = Annotated[str | None, typer.Option("--l0", help="Average number of active features; the nearest is taken "
                                                     "(default: canonical, nearest 100).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository of SAEs.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help=(
    "Read SAEs that PyTorch pickled (.pt), too, by its weights_only loader, which runs no code of the file."))]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(
    help="Of the language model; auto: as stored.")]
Device = Annotated[str | None, typer.Option(
    help="cpu, cuda, cuda:1 ...; auto spreads the model over what there is. Default: cuda if there is one, else cpu.")]
Changes = list[str] | None


class Commands(TyperGroup):
    """Tells errors that are meant for people in one message on stderr, exit code 1, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with short_warnings():
                result = super().invoke(ctx)
            end_group()
            return result
        except BrokenPipeError:
            raise
        except (SaeError, OSError) as error:
            typer.secho(f"error: {error}", err=True, fg="red")
            raise typer.Exit(PROBLEM) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=(
    "Sparse autoencoders in running Hugging Face models: see what a source offers, check that an SAE fits a model, "
    "generate with features edited, convert files."))


@app.command("list", epilog="Example: sae-hooks list google/gemma-scope-9b-pt-res --layer 20 --width 16k")
def list_command(
    source: Source, layer: Layer = None, site: Site = None, width: Width = None, revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the SAEs that a repository or folder offers. Downloads no weights."""
    want = wanted(layer, site, width, None)
    with busy(f"looking at {source}"):
        offered = list_saes(source, revision=revision)
    chosen = SaeTable(entry for entry in offered if matches(placed(entry, want), want))
    if not chosen:
        raise SaeNotFoundError(f"{source} has nothing like that. It offers:\n{summary(offered)}")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in chosen], indent=1))
        return
    rows = [(e.shown, e.layer, e.width, e.l0, e.d_in, e.weights) for e in chosen]
    print_table(("site", "layer", "width", "L0", "d_in", "path"), rows)


@app.command(epilog="Example: sae-hooks check google/gemma-2-2b google/gemma-scope-2b-pt-res --layer 12")
def check(
    model: Model, source: Source, layer: Layer = None, site: Site = None, width: Width = None, l0: L0 = None,
    revision: Revision = None, allow_pickle: AllowPickle = False, dtype: Dtype = "auto", device: Device = None,
    text: Annotated[Path | None, typer.Option(
        exists=True, dir_okay=False, help="UTF-8 text to measure on, paragraphs separated by empty lines. "
                                          "Default: four paragraphs of English prose.")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Use at most so many tokens of it.")] = 1024,
) -> None:
    """Tell whether SAEs fit a model: reconstruction error, sparsity, and the model's loss with the reconstruction.

    Exit code 1 if one does not fit (wrong layer, wrong model, wrong token format).
    """
    words = TEXT if text is None else _text_of(text)
    loaded, tokenizer = load_model(model, dtype, device)
    attach(loaded, source, layer, site, width, l0, revision, allow_pickle)
    rows = _paragraphs(tokenizer, words, tokens, context_length(loaded, tokens))
    inputs = {key: values.to(loaded.device) for key, values in rows.items()}
    saes: Saes = loaded.saes
    report = Report(row for name in progress(list(saes), "checking") for row in saes.check(inputs, name=name))
    _print_report(report)
    if any(row.verdict != "fits" for row in report):
        raise typer.Exit(PROBLEM)


@app.command(epilog="Example: sae-hooks generate google/gemma-2-2b google/gemma-scope-2b-pt-res --layer 12 "
                    "--prompt 'My favourite place is' --clamp 1234=80 --compare\n\n"
                    "A sweep, one text for each strength: --clamp 1234=20,40,80,plain")
def generate(
    model: Model, source: Source,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    clamp: Annotated[Changes, typer.Option(
        metavar="FEATURE=VALUE", help="Set an activation, whether or not the feature fires; in its own units.")] = None,
    scale: Annotated[Changes, typer.Option(metavar="FEATURE=FACTOR", help="Multiply an activation.")] = None,
    add: Annotated[Changes, typer.Option(
        metavar="FEATURE=AMOUNT", help="Add so much of the feature's decoder row.")] = None,
    ablate: Annotated[list[int] | None, typer.Option(metavar="FEATURE", help="Set an activation to 0.")] = None,
    edits: Annotated[Path | None, typer.Option(
        exists=True, dir_okay=False, help="Apply edits that were saved as JSON.")] = None,
    save_edits: Annotated[Path | None, typer.Option(
        dir_okay=False, help="Save the edits of this call as JSON.")] = None,
    layer: Layer = None, site: Site = None, width: Width = None, l0: L0 = None, revision: Revision = None,
    allow_pickle: AllowPickle = False, dtype: Dtype = "auto", device: Device = None,
    tokens: Annotated[Literal["all", "prompt", "generated"], typer.Option(help="Which tokens to edit.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 60,
    sample: Annotated[bool, typer.Option("--sample", help="Sample, instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="For --sample.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Print the unedited text, too.")] = False,
) -> None:
    """Generate text with features edited. Options that change features may be given several times.

    Several values, as in --clamp 1234=20,40,plain, give one text each, from one batch ("plain": left alone).
    """
    changes = {"clamp": _strengths(clamp), "scale": _strengths(scale), "add": _strengths(add)}
    loaded, tokenizer = load_model(model, dtype, device)
    if chat and not tokenizer.chat_template:
        raise typer.BadParameter(f"there is no chat template in {model}", param_hint="--chat")
    attach(loaded, source, layer, site, width, l0, revision, allow_pickle)
    ask = _Asker(loaded, tokenizer, prompt, chat, {"max_new_tokens": max_new_tokens, "do_sample": sample}, seed)
    ask.check_length()
    with ExitStack() as stack:
        asked = _open(stack, loaded.saes, changes, ablate or [], edits, tokens)
        if save_edits:
            save_edits.write_text(asked.to_json() + "\n")
        rows = max((len(edit.values) for edit in asked), default=1)
        texts = ask.text(rows)
    if compare:  # in a batch of the same size, which rounds alike
        _say("plain", ask.text(rows)[0], headed=True)
    for row, text in enumerate(texts):
        _say(_label(asked, row), text, headed=compare or rows > 1)


@app.command(epilog="Example: sae-hooks convert google/gemma-scope-2b-pt-res my-saes --layer 12 --layer 20 "
                    "--dtype float16")
def convert(
    source: Source, folder: Annotated[Path, typer.Argument(file_okay=False, help="Where to write; made if needed.")],
    layer: Annotated[list[int] | None, typer.Option(help="May be given several times. Default: every layer.")] = None,
    site: Site = None, width: Width = None, l0: L0 = None, revision: Revision = None,
    allow_pickle: AllowPickle = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(
        help="Of the two matrices; thresholds and biases stay float32. Default: as they are.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace SAEs that are there.")] = False,
) -> None:
    """Write SAEs of any readable format as SAELens 6 folders: cfg.json and sae_weights.safetensors.

    One SAE goes into FOLDER itself, several into a folder for each site inside it; of two that read at one site, each
    has to be converted by itself. Nothing appears there before all have been read and written.
    """
    with busy(f"looking at {source}"):
        found = find_saes(source, layer=layer or None, site=site, width=width, l0=l0, revision=revision,
                          allow_pickle=allow_pickle)
    targets = _targets(folder, found, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder) as stage:
        for file in progress(found, "converting"):
            sae = file.load(dtype=getattr(torch, dtype) if dtype else None)
            save_pretrained(sae if len(found) == 1 else {str(file.entry.site): sae}, stage)
        _publish(stage, folder)
    for target in targets:
        typer.echo(str(target))


def attach(loaded: Any, source: str, layer: int | None, site: str | None, width: str | None, l0: str | None,
           revision: str | None, allow_pickle: bool) -> None:
    """attach_saes, with a spinner."""
    with busy(f"looking at {source}"):
        attach_saes(loaded, source, layer=layer, site=site, width=width, l0=l0, revision=revision,
                    allow_pickle=allow_pickle)


def _text_of(path: Path) -> str:
    """What a file holds. Raises DataError if that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _paragraphs(tokenizer: Any, text: str, most: int, window: int) -> dict[str, torch.Tensor]:
    """`most` tokens of a text at most, a row for the first `window` of each paragraph, padded on the left: input_ids
    and attention_mask (paragraphs, tokens). Raises EditError if there is none."""
    rows = [part for part in text.split("\n\n") if part.strip()]
    room, kept = most, []
    for ids in tokenizer(rows, verbose=False)["input_ids"] if rows else []:
        kept.append(ids[:min(room, window)])
        room -= len(kept[-1])
        if room < 2:
            break
    if not kept or max(map(len, kept)) < 2:
        raise EditError("the text has not even two tokens to measure on")
    pad = tokenizer.pad_token_id or 0  # any id will do under the mask
    longest = max(map(len, kept))
    ids = [[pad] * (longest - len(row)) + row for row in kept]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in kept]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _strengths(given: Sequence[str] | None) -> dict[int, float | torch.Tensor]:
    """{feature: strength, or one a row} of options such as "1234=80" and "1234=20,80,plain"."""
    found: dict[int, float | torch.Tensor] = {}
    for one in given or []:
        feature, _, values = one.partition("=")
        try:
            numbers = [float("nan") if v.strip() == "plain" else float(v) for v in values.split(",")]
            number = int(feature)
        except ValueError:
            raise typer.BadParameter(f"{one!r} is not FEATURE=VALUE, such as 1234=80 or 1234=20,40,plain") from None
        if number in found:
            raise typer.BadParameter(f"feature {number} is given twice; for several strengths, write 1234=20,40")
        found[number] = torch.tensor(numbers) if len(numbers) > 1 else numbers[0]
    return found


def _open(stack: ExitStack, saes: Any, changes: Mapping[str, Mapping[int, Any]], ablate: Sequence[int],
          document: Path | None, tokens: str) -> Edits:
    """Open all that was asked for; returns it as one document."""
    handles = [getattr(saes, op)(values, tokens=tokens) for op, values in changes.items() if values]
    if ablate:
        handles.append(saes.ablate(ablate, tokens=tokens))
    if document:
        handles.append(saes.apply(_text_of(document)))
    for handle in handles:
        stack.enter_context(handle)
    return Edits(tuple(edit for handle in handles for edit in handle.edits))


@dataclasses.dataclass(frozen=True)
class _Asker:
    """A prompt, and how to go on from it."""

    model: Any
    tokenizer: Any
    prompt: str
    chat: bool
    settings: dict[str, Any]
    seed: int

    def check_length(self) -> None:
        """Raise EditError where the text would outgrow learned positions; rotary ones go on, and transformers warns."""
        if getattr(text_config(self.model), "rope_parameters", None):
            return
        read, more = self._inputs(1)["input_ids"].shape[1], self.settings["max_new_tokens"]
        if (limit := context_length(self.model, read + more - 1)) < read + more - 1:  # the last one is not read
            raise EditError(f"the prompt has {read} tokens, {more} more are asked for, and {type(self.model).__name__} "
                            f"takes {limit} at most; give a shorter --prompt or a smaller --max-new-tokens")

    def text(self, rows: int) -> list[str]:
        """`rows` continuations from one batch: prompt and text, or the answer alone of a chat."""
        inputs = self._inputs(rows).to(self.model.device)
        torch.manual_seed(self.seed)
        with ticks(self.settings["max_new_tokens"]) as criteria, torch.no_grad():
            out = self.model.generate(**inputs, **self.settings, stopping_criteria=criteria,
                                      pad_token_id=self.tokenizer.pad_token_id)
        start = inputs["input_ids"].shape[1] if self.chat else 0
        found: list[str] = self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
        return found

    def _inputs(self, rows: int) -> Any:
        prompt = self.prompt
        if self.chat:
            turns = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer([prompt] * rows, return_tensors="pt", add_special_tokens=not self.chat)


def _label(asked: Edits, row: int) -> str:
    """What was done to a row: "clamp 1234=80"."""
    told = []
    for edit in asked:
        values = edit.values[row if len(edit.values) > 1 else 0].tolist()
        told += [f"{edit.op} {feature}={value:g}" for feature, value in zip(edit.features, values, strict=True)
                 if value == value]
    return ", ".join(told) or "plain"


def _say(label: str, text: str, *, headed: bool) -> None:
    if headed:
        typer.secho(f"--- {label}", bold=True)
    typer.echo(text)


def _targets(folder: Path, found: Sequence[SaeFile], force: bool) -> list[Path]:
    """The folder of each SAE. Raises FileExistsError if there is one already, unless it may be replaced, and
    SaeMismatchError where two SAEs (a transcoder is one) read at one site, and so would have one folder."""
    names = [Path(str(file.entry.site)) for file in found] if len(found) > 1 else [Path()]
    for n, name in enumerate(names):
        if name in names[:n]:
            both = " and ".join(file.entry.weights for file in (found[names.index(name)], found[n]))
            raise SaeMismatchError(f"{both} both read at {name}, and a site has one folder; convert each by itself: "
                                   "name its folder or file as the source")
    taken = [folder / name / part for name in names for part in (saelens.CONFIG, saelens.WEIGHTS)]
    there = [path for path in taken if path.exists()]
    if there and not force:
        raise FileExistsError(f"{there[0]} exists; give --force to replace it, or another folder")
    return [folder / name for name in names]


def _publish(stage: Path, folder: Path) -> None:
    """Move the staged SAEs into their folder, the cfg.json last."""
    staged = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    for path in staged:
        if path.name == saelens.CONFIG:  # statistics of the SAE that was there are not the new one's
            (folder / path.relative_to(stage)).with_name(STATISTICS).unlink(missing_ok=True)
    for path in sorted(staged, key=lambda path: path.name == saelens.CONFIG):
        target = folder / path.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def _print_report(report: Sequence[Row]) -> None:
    head = ("SAE", "tokens", "FVU", "L0", "dead", "loss clean", "spliced", "zeroed", "recovered")
    print_table(head, [(r.name, r.tokens, f"{r.fvu:.3f}", f"{r.l0:.1f}", f"{r.dead:.0%}", f"{r.loss_clean:.3f}",
                         f"{r.loss_spliced:.3f}", f"{r.loss_zero:.3f}", f"{r.loss_recovered:.3f}") for r in report])
    for row in report:
        typer.echo(f"{row.name}: {row.verdict}")


if __name__ == "__main__":
    app()
