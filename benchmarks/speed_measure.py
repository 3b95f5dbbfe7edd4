"""How the ways of speed.py are timed and checked. Not run by itself.

It needs nothing but PyTorch, so that peers' environments, where sae_hooks is not, can use it.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Call = Callable[[], Any]


def rounds(ways: Mapping[str, Callable[[], float]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """What each way says of itself (its CPU seconds), in rounds of another order each: as many as take about so long,
    `least` to 200. By chance, for what a way finds in the caches depends on the one before it."""
    names, chance = list(ways), random.Random(0)
    once = sum(ways[name]() for name in names)  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(min(max(round(seconds / once), least), 200)):
        for name in chance.sample(names, len(names)):
            times[name].append(ways[name]())
    return times


def compare(ways: Mapping[str, Call], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """CPU seconds of a call of each way, in each of interleaved rounds, `least` at least."""
    first = {name: cpu_seconds(way) for name, way in ways.items()}
    shortest = min(t if t > 0.05 else cpu_seconds(ways[name]) for name, t in first.items())
    repeats = max(1, min(2000, round(0.003 / shortest)))  # so that the shortest takes 3 ms
    timed = {name: lambda way=way: cpu_seconds(way, repeats) for name, way in ways.items()}
    return {name: [t / repeats for t in found] for name, found in rounds(timed, seconds, least).items()}


def cpu_seconds(way: Call, repeats: int = 1) -> float:
    """CPU seconds of so many calls."""
    start = time.process_time()
    for _ in range(repeats):
        way()
    return time.process_time() - start


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """How many times as long one way takes as the other: the median over rounds."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def fastest(ways: Sequence[Callable[[], Any]]) -> int:
    """Which of these is the quickest, by a short trial."""
    times = compare({str(i): way for i, way in enumerate(ways)}, 0.05, least=1)
    return min(range(len(ways)), key=lambda i: statistics.median(times[str(i)]))


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """AssertionError unless all that was found is as expected, to rounding."""
    for name, tensor in found.items():
        apart = float((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-30))
        assert apart < tolerance, f"{name} is {apart:.1e} of its length away from the dense way's"
