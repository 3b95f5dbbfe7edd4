"""Evaluations as pictures, each a PNG and an SVG: Pareto curves of several methods, histograms of feature frequencies.

matplotlib (the extra `train`) is imported when one is drawn; the same numbers give the same bytes, whatever the
user's own settings of it.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sae_hooks.errors import DataError, TrainingError
from sae_hooks.hub.safe_files import write_atomically

from .metrics import LOWEST, PER_DECADE, FrequencyHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; markers and dashes say it once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2)), (0, (1, 2)))
SETTINGS = {
    "svg.hashsalt": "sae_hooks", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False}
DPI = 160
MERGED = 2  # bins of a stored histogram in one of the picture: rare features' frequencies are few numbers, far apart


class Scored(Protocol):
    """What a Pareto curve needs of a result: an `Evaluation`, or a `SaeReport` that was read back."""

    @property
    def l0(self) -> float:
        """Mean number of features active on a token."""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""

    @property
    def delta_loss(self) -> float:
        """Nats a prediction that splicing costs."""


def pareto_plot(curves: Mapping[str, Sequence[Sequence[Scored]]], stem: str | Path, *,
                title: str = "") -> tuple[Path, Path]:
    """Draw FVU and delta LM loss against L0 (logarithmic), a curve for each method; returns (stem.png, stem.svg).

    curves: by method, for each setting of its sparsity the results of all seeds. A point is their mean, its bars reach
    from the least to the greatest. Results that fire nowhere or hold no number are left out. Raises DataError if
    nothing remains, TrainingError without matplotlib, OSError.
    """
    points = {name: _points(settings) for name, settings in curves.items()}
    if not any(points.values()):
        raise DataError("nothing to draw: no result has an L0 above 0 and finite numbers")

    def draw(figure: Figure) -> None:
        for axes, which, label in zip(figure.subplots(1, 2), (1, 2), (
                "fraction of variance unexplained", "increase of LM loss (nats per prediction)"), strict=True):
            _draw_curves(axes, points, which)
            axes.set_ylabel(label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        several = max((len(seeds) for settings in curves.values() for seeds in settings), default=0) > 1
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5),
                      title="means over seeds, with bars from the least to the greatest" if several else None)

    return _write(draw, stem, (9.6, 4.5), title)


def frequency_plot(saes: Mapping[str, Tensor | FrequencyHistogram], stem: str | Path, *,
                   title: str = "") -> tuple[Path, Path]:
    """Draw how many features fire how often, both logarithmic, an outline for each SAE; returns (stem.png, stem.svg).

    saes: by name, the frequencies (d_sae) or their histogram. Features that never fire are not drawn, but counted in
    the legend. Raises DataError if none ever fires, TrainingError without matplotlib, OSError.
    """
    histograms = {name: found if isinstance(found, FrequencyHistogram) else FrequencyHistogram.of(found)
                  for name, found in saes.items()}
    if not any(sum(histogram.counts) for histogram in histograms.values()):
        raise DataError("nothing to draw: no feature ever fires")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_histograms(axes, histograms)
        axes.set(xlabel="share of tokens on which a feature fires", ylabel="features", yscale="log")
        axes.set_ylim(bottom=0.7)
        axes.xaxis.set_major_formatter(lambda x, _: _share(x))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        figure.legend(loc="outside lower center", ncols=2 if len(histograms) > 1 else 1)

    return _write(draw, stem, (6.4, 4.4 + 0.12 * len(histograms)), title)


Point = tuple[tuple[float, float, float], ...]  # of l0, fvu and delta_loss each: mean, least, greatest


def _points(settings: Sequence[Sequence[Scored]]) -> list[Point]:
    """A method's points by ascending L0."""
    found = []
    for seeds in settings:
        rows = [(s.l0, s.fvu, s.delta_loss) for s in seeds]
        good = [row for row in rows if row[0] > 0 and all(map(math.isfinite, row))]
        if good:
            found.append(tuple((sum(v) / len(v), min(v), max(v)) for v in zip(*good, strict=True)))
    return sorted(found)


def _draw_curves(axes: Axes, points: Mapping[str, list[Point]], which: int) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for (name, found), colour, marker in zip(points.items(), itertools.cycle(COLOURS), itertools.cycle(MARKERS)):
        if found:
            (x, x_bars), (y, y_bars) = (_with_bars([point[i] for point in found]) for i in (0, which))
            axes.errorbar(x, y, xerr=x_bars, yerr=y_bars, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
            axes.plot(x, y, label=name, color=colour, marker=marker, markersize=4.5, linewidth=1.3)
    lows, highs = zip(*(point[0][1:] for found in points.values() for point in found), strict=True)
    least, most = min(lows) / 1.2, max(highs) * 1.25
    axes.set(xscale="log", xlim=(least, most), xlabel="L0 (active features per token)")
    narrow = most / least < 6
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if narrow else (1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _with_bars(values: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[list[float]] | None]:
    """Means, and how far bars reach down and up; None where each has but one value."""
    means = [mean for mean, _, _ in values]
    bars = [[mean - least for mean, least, _ in values], [most - mean for mean, _, most in values]]
    return means, bars if any(map(any, bars)) else None


def _draw_histograms(axes: Axes, histograms: Mapping[str, FrequencyHistogram]) -> None:
    first = 0.0
    for (name, found), colour, dashes in zip(histograms.items(), itertools.cycle(COLOURS), itertools.cycle(DASHES)):
        counts = [sum(found.counts[i:i + MERGED]) for i in range(0, len(found.counts), MERGED)]
        edges = [LOWEST + i * MERGED / PER_DECADE for i in range(len(counts) + 1)]
        alive = [i for i, n in enumerate(counts) if n]
        if alive:
            first = min(first, edges[alive[0]])
            shown = slice(alive[0], alive[-1] + 1)
            axes.stairs([max(n, 0.1) for n in counts[shown]], edges[alive[0]:alive[-1] + 2], baseline=0.1,
                        color=colour, linestyle=dashes, linewidth=1.5,
                        label=f"{name}: {sum(counts):,} alive, {found.dead:,} dead")
        else:
            axes.plot([], [], color=colour, label=f"{name}: none alive, {found.dead:,} dead")
    axes.set_xlim(first - 0.1, 0.05)
    axes.set_xticks(range(math.floor(first), 1))


def _share(exponent: float) -> str:
    """10 to a whole power, as people say it: 10 %, 1 in 1,000."""
    return f"{10 ** (exponent + 2):g} %" if exponent > -3 else f"1 in $10^{{{-exponent:.0f}}}$"


def _write(draw: Callable[[Figure], None], stem: str | Path, size: tuple[float, float],
           title: str) -> tuple[Path, Path]:
    """Draw a figure and write it as PNG and SVG, both or, on any failure, none."""
    stem, contents = Path(stem), {}
    with _matplotlib() as new_figure:
        figure = new_figure(figsize=size)
        draw(figure)
        if title:
            figure.suptitle(title)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
            contents[stem.with_name(f"{stem.name}.{kind}")] = buffer.getvalue()
    write_atomically(contents)
    png, svg = contents
    return png, svg


@contextmanager
def _matplotlib() -> Iterator[Callable[..., Figure]]:
    """What makes a figure, under our settings and none of the user's, which hold again afterwards."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise TrainingError("plots need matplotlib, which is not installed: pip install 'sae-hooks[train]'") from error
    settings: Any = SETTINGS  # the names that matplotlib knows differ by version
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield partial(Figure, layout=ConstrainedLayoutEngine(wspace=0.05))
