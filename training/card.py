"""The model card (README.md) of a folder of SAEs, from their cfg.json and the report of their evaluation.

What neither says is called unknown; nothing is read but small files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_hooks.errors import SaeFormatError
from sae_hooks.formats import Entry
from sae_hooks.hub import list_saes
from sae_hooks.hub.parsing import read_config
from sae_hooks.hub.safe_files import write_atomically

from .report import EvaluationReport, SaeReport, read_report

CARD, REPORT = "README.md", "report.json"
UNKNOWN = "unknown"
TAGS = ("sparse-autoencoder", "sae", "saelens", "interpretability")
HUB_ID = 2  # parts of owner/name
COLUMNS: Mapping[str, tuple[str, str]] = {  # name of a scalar -> heading, format
    "l0": ("L0", ".1f"), "fvu": ("FVU", ".4f"), "delta_loss": ("Δ loss (nats)", ".4f"),
    "loss_recovered": ("loss recovered", ".4f"), "gamma": ("γ", ".3f"), "dead": ("dead", ".2%"),
    "over_1_percent": ("on > 1 %", ".2%"), "over_10_percent": ("on > 10 %", ".3%")}


@dataclass(frozen=True)
class Described:
    """One SAE of a folder: where it is (a relative path, "" for the folder itself), what its cfg.json says, and what
    was measured."""

    path: str
    entry: Entry
    gate: str
    facts: Mapping[str, Any]
    measured: SaeReport | None

    @property
    def name(self) -> str:
        """The path, or the site of an SAE that is alone."""
        return self.path or self.entry.site or UNKNOWN

    def scalar(self, name: str) -> float | None:
        """A number of the evaluation, or of the metadata, or None."""
        value = self.measured.scalars.get(name) if self.measured else self.facts.get(name)
        return float(value) if isinstance(value, int | float) else None


def write_card(folder: str | Path, *, source: str | None = None, licence: str | None = None) -> Path:
    """Write folder/README.md, in place of one that is there; returns its path. See `make_card`."""
    path = Path(folder) / CARD
    write_atomically({path: make_card(folder, source=source, licence=licence).encode()})
    return path


def make_card(folder: str | Path, *, source: str | None = None, licence: str | None = None) -> str:
    """The card's text, for the SAEs in folder and in the folders below it.

    source: what usage lines name (default: the folder's name). licence: of the SAEs, as the Hub abbreviates it.
    Raises SaeNotFoundError if there is no SAE, SaeFormatError for a broken cfg.json or report.json.
    """
    folder = Path(folder)
    report = read_report(folder / REPORT) if (folder / REPORT).exists() else None
    saes = [_described(folder, entry, report) for entry in list_saes(folder)]
    parts = [_header(saes, licence), _opening(saes), _usage(saes, source or folder.resolve().name),
             _metrics(saes, report), _training(saes), _data(saes), _limits(saes)]
    return "\n\n".join(parts) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository of the Hub, and not a path on somebody's disk."""
    return len(name.split("/")) == HUB_ID and all(part and part[0].isalnum() for part in name.split("/"))


def _described(folder: Path, entry: Entry, report: EvaluationReport | None) -> Described:
    config = read_config(folder / entry.config) if entry.config else {}
    facts = config.get("metadata", {})
    if not isinstance(facts, dict):
        raise SaeFormatError(f"{folder / str(entry.config)}: metadata must be an object, got {type(facts).__name__}")
    path = entry.weights.rpartition("/")[0]
    named = {} if report is None else report.saes
    alone = next(iter(named.values())) if len(named) == 1 and not path else None
    gate = str(config.get("architecture") or UNKNOWN).partition("_")[0]
    return Described(path, entry, gate, facts, named.get(path, alone))


def _values(saes: Sequence[Described], name: str) -> list[Any]:
    """The different values of a fact, in order."""
    found: list[Any] = []
    for sae in saes:
        value = sae.facts.get(name)
        if value not in (None, "", *found):
            found.append(value)
    return found


def _said(saes: Sequence[Described], name: str) -> str:
    """The values of a fact in words, or that it is unknown."""
    words = {True: "yes", False: "no"}
    return ", ".join(words[v] if isinstance(v, bool) else f"{v:,}" if isinstance(v, int) else str(v)
                     for v in _values(saes, name)) or UNKNOWN


def _header(saes: Sequence[Described], licence: str | None) -> str:
    """YAML; every value is written as JSON, which YAML is a superset of."""
    gates = [gate for gate in dict.fromkeys(sae.gate for sae in saes) if gate != UNKNOWN]
    lists = {"base_model": filter(is_hub_id, map(str, _values(saes, "model_name"))),
             "datasets": filter(is_hub_id, (str(v).partition(":")[0] for v in _values(saes, "dataset_path"))),
             "tags": [*TAGS, *gates]}
    lines = ["---", "library_name: sae_hooks", f"license: {json.dumps(licence or UNKNOWN)}"]
    for key, values in lists.items():
        if found := list(values):
            lines += [f"{key}:", *(f"- {json.dumps(value)}" for value in found)]
    return "\n".join([*lines, "---"])


def _opening(saes: Sequence[Described]) -> str:
    model = _said(saes, "model_name")
    what = "A sparse autoencoder" if len(saes) == 1 else f"{len(saes)} sparse autoencoders"
    rows = [f"| `{sae.name}` | `{_place(sae.entry)}` | {_number(sae.entry.d_in)} | {_number(sae.entry.width)} | "
            f"{sae.gate} |" for sae in saes]
    return "\n".join([f"# {what} for {model}", "", "| SAE | site | values | features | gate |",
                      "|---|---|---|---|---|", *rows])


def _place(entry: Entry) -> str:
    crosses = entry.site_out not in (None, entry.site)
    return f"{entry.site or UNKNOWN}{f' -> {entry.site_out}' if crosses else ''}"


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _usage(saes: Sequence[Described], source: str) -> str:
    models = _values(saes, "model_name")
    of_site: dict[Any, list[Described]] = {}
    for sae in saes:
        of_site.setdefault(sae.entry.site, []).append(sae)
    several = any(len(group) > 1 for group in of_site.values())
    known = all(sae.entry.l0 is not None for group in of_site.values() if len(group) > 1 for sae in group)
    choice = f", l0={saes[0].entry.l0:.0f}" if several and known else ""
    site = f', site="{saes[0].entry.site}"' if len(of_site) > 1 and saes[0].entry.site else ""
    if not known:  # then a folder alone tells one
        source, site = f"{source}/{saes[0].path}".rstrip("/"), ""
    lines = ["## Usage", "", "```python", "from sae_hooks import attach_saes",
             "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             f"name = {json.dumps(str(models[0]) if models else 'the model')}",
             "model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)",
             f"model = attach_saes(model, {json.dumps(source)}{site}{choice})",
             'inputs = tokenizer("In the beginning", return_tensors="pt")',
             "with model.saes.capture() as captured:  # which features fire where",
             "    model(**inputs)", "with model.saes.clamp({0: 10.0}):  # feature 0, held at 10",
             "    out = model.generate(**inputs, max_new_tokens=20)", "```"]
    if several:
        lines += ["", "Several SAEs are of the same site: `l0=` takes the one whose L0 is nearest." if known else
                  "Several SAEs are of the same site, and their L0 is not known: name the folder of one, as above."]
    return "\n".join([*lines, "", "`pip install sae-hooks`; the folders are in the format of SAELens 6, too."])


def _metrics(saes: Sequence[Described], report: EvaluationReport | None) -> str:
    """A row a SAE; where nothing was measured, that is said."""
    if all(sae.scalar(name) is None for sae in saes for name in COLUMNS):
        return "## Measured\n\nNothing was measured, or it is not known here: L0, FVU and loss are unknown."
    head = ["SAE", *(heading for heading, _ in COLUMNS.values())]
    rows = [[f"`{sae.name}`", *(UNKNOWN if (v := sae.scalar(name)) is None else f"{v:{form}}"
                                for name, (_, form) in COLUMNS.items())] for sae in saes]
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    text = ["## Measured", "", *table, "", f"On held-out text: {_held_out(saes, report)}. L0: features active on a "
            "token. FVU: fraction of variance unexplained. Δ loss: nats a prediction that the model loses with the "
            "reconstruction in place of the activations; recovered: share of what zeros in their place cost. γ: "
            "relative reconstruction bias, below 1 for shrinkage. Then the shares of features that fired on no token, "
            "on more than 1 % and on more than 10 % of them. Special tokens, padding and attention sinks were left "
            "alone and not counted."]
    return "\n".join(text)


def _held_out(saes: Sequence[Described], report: EvaluationReport | None) -> str:
    tokens = sorted({int(n) for sae in saes if (n := sae.scalar("tokens")) is not None})
    counted = f"{', '.join(f'{n:,}' for n in tokens)} tokens" if tokens else "an unknown number of tokens"
    name = str(report.data.get("text", "")) if report else ""
    return f"{counted}{f' of {name}' if name else ''}"


def _training(saes: Sequence[Described]) -> str:
    """Every number of the recipes; one that is the same for all is told once."""
    recipes = [_flat(sae.facts.get("recipe") or {}) for sae in saes]
    if not any(recipes):
        return f"## Training\n\nThe recipe is unknown; tokens: {_said(saes, 'n_training_tokens')}."
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    lines = ["## Training", "", f"{_said(saes, 'n_training_tokens')} tokens, with sae_hooks. Squared errors and "
             "coefficients are in units of a mean squared norm of 1.", "", "| | |", "|---|---|"]
    for name in names:
        values = list(dict.fromkeys(json.dumps(recipe.get(name)) for recipe in recipes))
        lines.append(f"| {name} | {', '.join(values)} |")
    return "\n".join(lines)


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's numbers beside the others: {"objective.l0": 30, ...}."""
    objective = recipe.get("objective")
    if not isinstance(objective, dict):
        return dict(recipe)
    inner = {f"objective.{name}": value for name, value in objective.items()}
    return {name: value for name, value in recipe.items() if name != "objective"} | inner


def _data(saes: Sequence[Described]) -> str:
    return "\n".join([
        "## Data", "", "| | |", "|---|---|", f"| text | {_said(saes, 'dataset_path')} |",
        f"| its licence | {_said(saes, 'data_licence')} |", f"| times read | {_said(saes, 'text_epochs')} |",
        f"| tokens of context | {_said(saes, 'context_size')} |",
        f"| begins with a special token (BOS) | {_said(saes, 'prepend_bos')} |", "",
        "The text is not part of this repository."])


def _limits(saes: Sequence[Described]) -> str:
    model = _said(saes, "model_name")
    return (f"## Limits\n\nThe features are those of the text above and of {model}; on other text, and on fine-tuned "
            "or quantised versions of the model, reconstruction is worse: measure it with `sae-hooks eval`. What a "
            "feature means has not been checked by anybody unless it says so here. Steering with large values breaks "
            "grammar first and sense next. Not trained on attention sinks and special tokens, which should be left "
            "alone; attach_saes does so.")
