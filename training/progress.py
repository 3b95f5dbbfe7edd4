"""What a training tells while it runs: a bar, a line of JSON a report, and a call for any tracker."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sae_hooks.errors import TrainingError

from .learner import Learner, TrainConfig
from .objectives import Loss
from .objectives.base import spread
from .parallel import ALONE, Parallel

Row = dict[str, float | int | str | None]
Log = Callable[[Row], None]


class Progress:
    """Means since the last report, of each learner.

    A row has: name, step, tokens; error (mean squared L2 error, of a mean squared norm of 1), fvu (error over the
    batches' variance), l0 (features active on a token), dead (share, None until `dead_after` tokens were read),
    coefficient (of the sparsity), learning_rate, tokens_per_second.
    """

    def __init__(self, folder: Path | None, learners: Mapping[str, Learner], config: TrainConfig, start: int, log: Log,
                 shown: bool, parallel: Parallel = ALONE) -> None:
        self.learners, self.config, self.parallel = learners, config, parallel
        self.log: Log = log if parallel.main else lambda row: None
        self.path = folder / "metrics.jsonl" if folder and parallel.main else None
        if self.path:
            _cut(self.path, start)
        self.bar = tqdm(total=config.steps, initial=start, desc="train", unit=" steps",
                        disable=not (shown and parallel.main))
        self.sums: dict[str, Tensor] = {}
        self._begin(start)

    def _begin(self, step: int) -> None:
        self.since, self.clock = step, time.monotonic()
        self.sums = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, learner: Learner, loss: Loss, rows: Mapping[str, Tensor]) -> None:
        """Count a step of one learner."""
        name, target = learner.trainee.name, rows[learner.target]
        variance = spread(target, self.parallel.over_batches)
        found = torch.stack([loss.reconstruction, variance, loss.l0.to(target.dtype)]).double()
        self.sums[name] = self.sums.get(name, 0) + found

    def advance(self, step: int, rate: float) -> None:
        """A step of all learners is done: `step` steps are, now."""
        self.bar.update()
        if step % self.config.report_every and step != self.config.steps:
            return
        rows = [self._row(learner, step, rate) for learner in self.learners.values()]
        self._begin(step)
        for row in rows:
            self.log(row)
        if self.path:
            _append(self.path, rows)
        dead = "" if rows[0]["dead"] is None else f"dead {rows[0]['dead']:.1%} "
        self.bar.set_postfix_str(f"L0 {rows[0]['l0']:.1f} FVU {rows[0]['fvu']:.3f} {dead}"
                                 f"{rows[0]['tokens_per_second']:.0f} tokens/s")

    def _row(self, learner: Learner, step: int, rate: float) -> Row:
        steps, seconds = step - self.since, time.monotonic() - self.clock
        error, variance, l0 = (self.sums[learner.trainee.name] / steps).tolist()
        tokens, dead = step * self.config.batch_size, learner.dead()  # all processes ask, or none
        return {"name": learner.trainee.name, "step": step, "tokens": tokens, "error": error,
                "fvu": error / variance if variance > 0 else float("nan"), "l0": l0,
                "dead": dead if tokens > learner.trainee.dead_after else None,
                "coefficient": learner.objective.coefficient(step - 1),
                "learning_rate": learner.trainee.learning_rate * rate,
                "tokens_per_second": round(steps * self.config.batch_size / max(seconds, 1e-9), 1)}


def _append(path: Path, rows: Sequence[Row]) -> None:
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise TrainingError(f"step {rows[0]['step']} could not be reported in {path}: {error}. Make room, or set right "
                            "what the error names; the same training then goes on from its last checkpoint") from error


def _cut(path: Path, step: int) -> None:
    """Leave out the rows after `step`: they will be written again. Fails at once where nothing can be written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        try:
            scratch.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write to {path.parent}: {error}. Take another folder, or set right what the error "
                            "names; nothing was changed") from error


def _step_of(line: str) -> float:
    """A row's step; infinity for a row that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
