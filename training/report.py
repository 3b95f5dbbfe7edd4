"""Evaluations as one JSON file: what was measured, of which SAEs, on which model and text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_hooks.errors import DataError, SaeFormatError
from sae_hooks.hub.parsing import parse_json
from sae_hooks.hub.safe_files import write_atomically
from sae_hooks.sae import SAE

from .metrics import Evaluation, FrequencyHistogram

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SaeReport:
    """One SAE and what was measured of it: `Evaluation.scalars` without those that were not, and the histogram of
    its feature frequencies. facts: whatever else tells it from others (method, seed, sparsity), plain JSON."""

    site: str
    site_out: str
    d_in: int
    d_out: int
    d_sae: int
    gate: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float | int]
    histogram: FrequencyHistogram

    @property
    def l0(self) -> float:
        """Mean number of features active on a token."""
        return self.scalars["l0"]

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return self.scalars["fvu"]

    @property
    def delta_loss(self) -> float:
        """Nats a prediction that splicing costs."""
        return self.scalars["delta_loss"]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """SAEs by name, the model's name, and the text that all were measured on: data, in the user's words, and text, the
    SHA-256 of its token ids."""

    model: str
    data: Mapping[str, Any]
    text: str
    saes: Mapping[str, SaeReport]


def make_report(evaluations: Mapping[str, Evaluation], saes: Mapping[str, SAE], *, model: str,
                data: Mapping[str, Any] | None = None,
                facts: Mapping[str, Mapping[str, Any]] | None = None) -> EvaluationReport:
    """Put evaluations of one text together with the SAEs of the same names. facts: of each name, what tells it apart.

    Raises DataError if there is none, if an SAE is missing, or if they are of different texts.
    """
    texts = {evaluation.text for evaluation in evaluations.values()}
    if len(texts) != 1:
        raise DataError(f"a report is of one text, these {len(evaluations)} evaluations are of {len(texts)}")
    missing = sorted(set(evaluations) - set(saes))
    if missing:
        raise DataError(f"no SAE is given for the evaluations of {', '.join(missing)}")
    made = {name: _entry(e, saes[name], (facts or {}).get(name, {})) for name, e in evaluations.items()}
    return EvaluationReport(model=model, data=dict(data or {}), text=texts.pop(), saes=made)


def write_report(report: EvaluationReport, path: str | Path) -> Path:
    """Write path, whole or not at all; the same report gives the same bytes. Returns path.

    Raises SaeFormatError if data or facts are not plain JSON, OSError.
    """
    saes = {name: {**vars(entry), "scalars": {k: _plain(v) for k, v in entry.scalars.items()},
                   "histogram": vars(entry.histogram)} for name, entry in report.saes.items()}
    content = {"format": FORMAT, **vars(report), "saes": saes}
    try:
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SaeFormatError(f"data and facts must be plain JSON (text, finite numbers, lists, dicts): {error}"
                             ) from error
    one_line = re.sub(r"\[[\d,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)  # counts
    write_atomically({Path(path): one_line.encode() + b"\n"})
    return Path(path)


def read_report(path: str | Path) -> EvaluationReport:
    """What write_report wrote. Raises OSError, or SaeFormatError if it is something else."""
    try:
        content = parse_json(Path(path).read_bytes(), "report")
        version = content.pop("format", None)
        if version != FORMAT:
            raise SaeFormatError(f"format {version!r}, this version reads {FORMAT}")
        saes = {name: _read_entry(entry) for name, entry in content.pop("saes").items()}
        return EvaluationReport(**content, saes=saes)
    except (SaeFormatError, KeyError, TypeError, AttributeError) as error:
        raise SaeFormatError(f"{path} is no report of an evaluation: {error!r}") from error


def _entry(evaluation: Evaluation, sae: SAE, facts: Mapping[str, Any]) -> SaeReport:
    scalars = {name: value for name, value in evaluation.scalars().items() if value is not None}
    return SaeReport(site=sae.site or "", site_out=sae.site_out or "", d_in=sae.d_in, d_out=sae.d_out, d_sae=sae.d_sae,
                     gate="jumprelu" if sae.k is None else f"top {sae.k}", facts=dict(facts), scalars=scalars,
                     histogram=evaluation.histogram)


def _plain(value: float | int) -> float | int | None:
    """JSON has no nan, which is what could not be measured."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _read_entry(entry: Mapping[str, Any]) -> SaeReport:
    scalars = {name: math.nan if value is None else value for name, value in entry["scalars"].items()}
    histogram = FrequencyHistogram(tuple(entry["histogram"]["counts"]), entry["histogram"]["dead"])
    return SaeReport(**{**entry, "scalars": scalars, "histogram": histogram})
