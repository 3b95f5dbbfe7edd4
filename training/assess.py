"""Texts by the name that people give them, and the evaluation of SAEs on one: report and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from sae_hooks.errors import DataError
from sae_hooks.sae import SAE

from .harvest import TOKENS_PER_BATCH, padded_batches
from .metrics import evaluate_all
from .plots import frequency_plot, pareto_plot
from .report import EvaluationReport, SaeReport, make_report
from .text import Window, Windows, documents, windows

MOST_DRAWN = 7  # histograms in one picture; more cannot be told apart


@dataclass(frozen=True, kw_only=True)
class Text:
    """A source as `documents` takes it: file, folder, or name of a data set. field, split: see there. shuffled: in the
    order of a seed, which holds all texts of files in memory; else as they stand, no more of them read than is asked
    for."""

    source: str
    field: str = "text"
    split: str = "train"
    shuffled: bool = True

    @property
    def name(self) -> str:
        """The data set, or the last part of a path: what may be told to others."""
        path = Path(self.source)
        return path.resolve().name if path.exists() else self.source

    def windows(self, tokenizer: Any, context: int, seed: int) -> Windows:
        """The windows of at most `context` tokens. Raises DataError for a source that is not there."""
        texts = documents(self.source, field=self.field, split=self.split, seed=seed if self.shuffled else None)
        return windows(texts, tokenizer, context)


class FirstTokens:
    """The first windows of others, until they hold so many tokens; may be read again and again. special_ids: of those
    that are given, neither these count nor the first token of a window, an attention sink."""

    def __init__(self, windows: Iterable[Window], tokens: int, special_ids: Sequence[int] = ()) -> None:
        self.windows, self.tokens, self.special_ids = windows, tokens, list(special_ids)

    def __iter__(self) -> Iterator[Window]:
        left = self.tokens
        for window in self.windows:
            if left <= 0:
                return
            left -= int((~np.isin(window[1:], self.special_ids)).sum()) if self.special_ids else len(window)
            yield window


def assess(model: nn.Module, tokenizer: Any, saes: Mapping[str, SAE], text: Text, *, model_name: str, tokens: int,
           context: int, uniformity_positions: int = 0, facts: Mapping[str, Mapping[str, Any]] | None = None,
           progress: bool = True) -> EvaluationReport:
    """Evaluate SAEs, each at its own site, on the first `tokens` tokens of a text, or, if it is shuffled, of its order
    by seed 0, which is the same every time; a bar on stderr meanwhile.

    facts: of each name, what tells it apart. The rest as in `evaluate_all`, which tells what it raises.
    """
    held_out = list(FirstTokens(text.windows(tokenizer, context, seed=0), tokens))
    batches = list(padded_batches(held_out, TOKENS_PER_BATCH))
    shown = tqdm(batches, desc="evaluate", unit=" batches", disable=not progress)
    found = evaluate_all(model, saes, shown, tokenizer.all_special_ids, uniformity_positions=uniformity_positions)
    data = {"text": text.name, "split": text.split, "tokens": sum(map(len, held_out)), "context": context}
    return make_report(found, saes, model=model_name, data=data, facts=facts)


def draw(report: EvaluationReport, folder: Path) -> list[Path]:
    """Write folder/frequencies-SITE.{png,svg} for each site, and folder/pareto-SITE.{png,svg} where a site has several
    SAEs, a curve a method; returns the paths. Raises TrainingError without matplotlib, OSError.

    A picture that would be empty, as of an SAE that never fires, is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for site in dict.fromkeys(sae.site for sae in report.saes.values()):
        here = {name: sae for name, sae in report.saes.items() if sae.site == site}
        title = f"{report.model}, {site}"
        curves: dict[str, list[list[SaeReport]]] = {}
        for sae in here.values():
            curves.setdefault(str(sae.facts.get("objective", sae.gate)), []).append([sae])
        histograms = {name: here[name].histogram for name in list(here)[:MOST_DRAWN]}
        try:
            paths += frequency_plot(histograms, folder / f"frequencies-{site}", title=title)
            paths += pareto_plot(curves, folder / f"pareto-{site}", title=title) if len(here) > 1 else ()
        except DataError:
            continue
    return paths
