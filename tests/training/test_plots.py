"""The pictures: both kinds are written, the same each time, and show what they were given."""

from __future__ import annotations

import json
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from sae_hooks.errors import DataError, TrainingError
from sae_hooks.training.metrics import FrequencyHistogram
from sae_hooks.training.plots import frequency_plot, pareto_plot

FREQUENCIES = torch.tensor([0.0, 0.0, 0.0, 1e-5, 2e-5, 0.003, 0.02, 0.02, 0.5, 1.0], dtype=torch.float64)


@dataclass
class Result:
    l0: float
    fvu: float
    delta_loss: float


CURVES = {"JumpReLU": [[Result(20, 0.3, 0.1), Result(24, 0.32, 0.2)], [Result(5, 0.5, 0.6)]],
          "TopK": [[Result(20, 0.35, 0.15)], [Result(6, 0.55, 0.7)]]}


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    figures: list[Any] = []
    real = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig",
                        lambda figure, *args, **kwargs: (figures.append(figure), real(figure, *args, **kwargs))[1])
    return figures


@pytest.mark.parametrize("plot", [lambda stem: pareto_plot(CURVES, stem, title="of a & b"),
                                  lambda stem: frequency_plot({"a": FREQUENCIES}, stem, title="of a & b")])
def test_a_png_and_an_svg_are_written_the_same_each_time(tmp_path: Path, plot: Any) -> None:
    png, svg = plot(tmp_path / "l0.5")
    first = png.read_bytes(), svg.read_bytes()

    with matplotlib.rc_context({"font.size": 33, "svg.hashsalt": "other", "axes.facecolor": "red"}):
        settings = matplotlib.rcParams.copy()
        plot(tmp_path / "l0.5")
        assert matplotlib.rcParams.copy() == settings

    assert (png.name, svg.name) == ("l0.5.png", "l0.5.svg")
    assert (png.read_bytes(), svg.read_bytes()) == first
    width, height = struct.unpack(">II", first[0][16:24])
    assert width > 900 < 2 * height
    ElementTree.fromstring(first[1])
    assert not re.search(rb"<dc:date>|\d{4}-\d\d-\d\dT", first[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l0.5.png", "l0.5.svg"]
    assert "matplotlib.pyplot" not in sys.modules


def test_a_point_is_the_mean_of_its_seeds_and_its_bars_their_range(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)

    pareto_plot(CURVES, tmp_path / "a")

    fvu, loss = figures[0].axes
    curve = next(line for line in fvu.lines if line.get_label() == "JumpReLU")
    assert curve.get_xydata().tolist() == [[5, 0.5], [22, pytest.approx(0.31)]]
    bars = [path.vertices.tolist() for c in loss.collections for path in c.get_paths()]
    assert [[22, pytest.approx(0.1)], [22, pytest.approx(0.2)]] in bars
    assert [[20, pytest.approx(0.15)], [24, pytest.approx(0.15)]] in bars
    assert [axes.get_xscale() for axes in figures[0].axes] == ["log", "log"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["JumpReLU", "TopK"]


def test_results_without_numbers_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    good, bad = Result(9, 0.4, 0.3), [Result(0, 1, 1), Result(9, float("nan"), 1), Result(9, 0.4, float("inf"))]

    pareto_plot({"a": [[good, *bad], bad], "nothing": [bad, []]}, tmp_path / "a")

    assert figures[0].axes[0].lines[-1].get_xydata().tolist() == [[9, 0.4]]
    with pytest.raises(DataError, match="nothing to draw"):
        pareto_plot({"nothing": [bad]}, tmp_path / "b")
    assert not (tmp_path / "b.png").exists()


def test_dead_features_are_not_drawn_but_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)

    histogram = FrequencyHistogram.of(FREQUENCIES)
    frequency_plot({"a": FREQUENCIES, "b": histogram, "none": torch.zeros(4)}, tmp_path / "a")

    axes = figures[0].axes[0]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["a: 7 alive, 3 dead", "b: 7 alive, 3 dead", "none: none alive, 4 dead"]
    values, edges, _ = axes.patches[0].get_data()
    shown = {round(float(edge), 1): n for edge, n in zip(edges, values, strict=False) if n >= 1}
    assert shown == {-5.0: 1, -4.8: 1, -2.6: 1, -1.8: 2, -0.4: 1, -0.2: 1}
    assert axes.get_yscale() == "log"
    with pytest.raises(DataError, match="nothing to draw"):
        frequency_plot({"none": torch.zeros(4)}, tmp_path / "b")


def test_every_feature_is_counted_once_in_the_histogram() -> None:
    histogram = FrequencyHistogram.of(torch.cat([FREQUENCIES, torch.tensor([1e-12, 1e-3, 0.1], dtype=torch.float64)]))

    assert sum(histogram.counts) == 10
    assert histogram.dead == 3
    assert [i for i, n in enumerate(histogram.counts) if n] == [0, 30, 33, 50, 54, 63, 70, 76, 79]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("old")
    real = matplotlib.figure.Figure.savefig

    def fail(figure: Any, target: Any, *, format: str, **rest: Any) -> None:
        if format == "svg":
            raise OSError("no space left on device")
        real(figure, target, format=format, **rest)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)

    with pytest.raises(OSError, match="no space"):
        frequency_plot({"a": FREQUENCIES}, tmp_path / "a")
    assert (tmp_path / "a.png").read_text() == "old"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(TrainingError, match=r"pip install 'sae-hooks\[train\]'"):
        frequency_plot({"a": FREQUENCIES}, tmp_path / "a")
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == "[]"
