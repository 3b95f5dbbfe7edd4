"""What the command line shows: tables on stdout; progress bars and short warnings on stderr. rich is imported late.

Texts may come from anybody: what rich or a terminal would take for a command is shown as it is written.
"""

from __future__ import annotations

import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import typer

if TYPE_CHECKING:
    from rich.progress import Progress, Task

Item = TypeVar("Item")
PIPE_WIDTH = 200  # columns of a table that no terminal shows
TEXT_COLUMNS = ("site", "SAE", "path")  # to the left, all others to the right


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout: as wide as the terminal, or whole lines in a pipe. None shows as a dash, what stdout cannot
    encode as Python escapes it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold", justify="left" if name in TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*(Text(_plain(cell, console.encoding)) for cell in row))
    console.print(table)


def _plain(cell: Any, encoding: str) -> str:
    """A cell as text, what is a control character or not of the encoding written as Python writes it."""
    text = "-" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell)
    shown = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c != "\n" else c for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _bar() -> Progress:
    """A progress bar on stderr with rate and time left; it vanishes when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(),
                    console=Console(stderr=True), transient=True)


def progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, with a progress bar on stderr."""
    with _bar() as bar:
        yield from bar.track(items, description=what)


@contextmanager
def counting(what: str, documents: int | None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr over so many documents (None: nobody knows), advanced by (tokens, documents)."""
    started, done = time.monotonic(), 0
    with _bar() as bar:
        task = bar.add_task(what, total=documents)

        def advance(tokens: int, some: int) -> None:
            nonlocal done
            done += tokens
            rate = done / max(time.monotonic() - started, 1e-3)
            bar.update(task, advance=some, description=f"{what}: {done:,} tokens, {rate:,.0f}/s; documents")

        yield advance


@contextmanager
def ticks(total: int) -> Iterator[Any]:
    """Stopping criteria for `generate` that stop nothing, but move a progress bar at each token."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    with _bar() as bar:
        task = bar.add_task("tokens", total=total)

        class Tick(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
                bar.advance(task)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        yield StoppingCriteriaList([Tick()])


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while the block runs."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def short_warnings() -> Iterator[None]:
    """Warnings as one line each, for people."""
    def show(message: Warning | str, *rest: Any, **named: Any) -> None:
        typer.secho(f"warning: {message}", err=True, fg="yellow")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before
