"""The report: one file, the same bytes for the same numbers, and what was written is what is read."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sae_hooks.errors import DataError, SaeFormatError
from sae_hooks.sae import SAE
from sae_hooks.training.metrics import Evaluation, evaluate_all
from sae_hooks.training.plots import frequency_plot, pareto_plot
from sae_hooks.training.report import EvaluationReport, make_report, read_report, write_report

IDS = torch.tensor([[1, 9, 10, 11, 12], [12, 13, 14, 15, 16]])
SITE = "model.layers.1.output"


@pytest.fixture
def saes() -> dict[str, SAE]:
    return {f"k{k}": SAE(torch.eye(16), torch.zeros(16), torch.eye(16), torch.zeros(16), k=k, site=SITE)
            for k in (8, 2)}


@pytest.fixture
def evaluations(model_with_a_sink_token: LlamaForCausalLM, saes: dict[str, SAE]) -> dict[str, Evaluation]:
    return evaluate_all(model_with_a_sink_token, saes, [(IDS, torch.ones_like(IDS))])


@pytest.fixture
def report(evaluations: dict[str, Evaluation], saes: dict[str, SAE]) -> EvaluationReport:
    return make_report(evaluations, saes, model="tiny", data={"file": "held-out.jsonl", "windows": 2},
                       facts={"k8": {"method": "TopK", "seed": 0}})


def test_what_was_written_is_what_is_read(report: EvaluationReport, evaluations: dict[str, Evaluation],
                                          tmp_path: Path) -> None:
    found = read_report(write_report(report, tmp_path / "report.json"))

    assert found == report
    entry = found.saes["k8"]
    assert (found.model, found.data["windows"], len(found.text)) == ("tiny", 2, 64)
    assert (entry.site, entry.site_out, entry.d_sae, entry.gate) == (SITE, SITE, 16, "top 8")
    assert entry.facts == {"method": "TopK", "seed": 0}
    assert entry.scalars == {k: v for k, v in evaluations["k8"].scalars().items() if v is not None}
    assert sum(entry.histogram.counts) + entry.histogram.dead == 16
    assert (entry.l0, entry.fvu) == (evaluations["k8"].l0, evaluations["k8"].fvu)
    assert entry.delta_loss == evaluations["k8"].delta_loss


def test_keys_have_an_order_and_the_bytes_are_the_same_each_time(report: EvaluationReport, tmp_path: Path) -> None:
    first = write_report(report, tmp_path / "a.json").read_bytes()

    assert write_report(read_report(tmp_path / "a.json"), tmp_path / "b.json").read_bytes() == first
    content = json.loads(first)
    assert list(content) == ["format", "model", "data", "text", "saes"]
    assert list(content["saes"]) == ["k8", "k2"]
    assert list(content["saes"]["k2"]["scalars"])[:6] == ["tokens", "predictions", "l0", "fvu", "gamma", "cosine"]
    assert len(first.splitlines()) < 90  # the bins of a histogram stand on one line


def test_pictures_are_drawn_from_what_is_read(report: EvaluationReport, tmp_path: Path) -> None:
    found = read_report(write_report(report, tmp_path / "report.json"))

    pareto_plot({"TopK": [[entry] for entry in found.saes.values()]}, tmp_path / "pareto")
    frequency_plot({name: entry.histogram for name, entry in found.saes.items()}, tmp_path / "frequencies")


def test_what_could_not_be_measured_comes_back_as_nan(report: EvaluationReport, tmp_path: Path) -> None:
    entry = report.saes["k8"]
    broken = dataclasses.replace(entry, scalars={**entry.scalars, "gamma": math.nan})

    found = read_report(write_report(dataclasses.replace(report, saes={"k8": broken}), tmp_path / "report.json"))

    assert math.isnan(found.saes["k8"].scalars["gamma"])


def test_evaluations_of_different_texts_do_not_go_into_one_report(
        evaluations: dict[str, Evaluation], saes: dict[str, SAE]) -> None:
    other = dataclasses.replace(evaluations["k2"], text="0" * 64)

    with pytest.raises(DataError, match="of 2"):
        make_report({"k8": evaluations["k8"], "k2": other}, saes, model="tiny")
    with pytest.raises(DataError, match="these 0 evaluations"):
        make_report({}, saes, model="tiny")
    with pytest.raises(DataError, match="no SAE is given for the evaluations of k2"):
        make_report(evaluations, {"k8": saes["k8"]}, model="tiny")


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"format": 2}', '{"format": 1, "saes": {}}', '{"format": 1, "saes": {"a": 3}}',
    '{"format": 1, "model": "", "data": {}, "text": "", "saes": {"a": {"scalars": {}, "histogram": {}}}}'])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)

    with pytest.raises(SaeFormatError, match=r"other\.json is no report"):
        read_report(tmp_path / "other.json")


def test_facts_that_are_no_json_are_refused_and_nothing_is_written(report: EvaluationReport, tmp_path: Path) -> None:
    with pytest.raises(SaeFormatError, match="plain JSON"):
        write_report(dataclasses.replace(report, data={"path": tmp_path}), tmp_path / "report.json")
    assert not list(tmp_path.iterdir())
