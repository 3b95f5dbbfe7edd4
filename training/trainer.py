"""The training loop, to be read from top to bottom: several SAEs side by side on one stream of activations.

The state, all of it in a checkpoint: the step, the stream's position, and each learner's tensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_hooks.errors import CheckpointError, DataError, TrainingError
from sae_hooks.processes import held
from sae_hooks.sae import SAE

from .learner import Learner, TrainConfig, Trainee
from .parallel import Parallel, stated
from .progress import Log, Progress
from .schedules import cosine_warmup, linear_end
from .sharded import load_shards, save_shards
from .stream import Stream

FREE = ("report_every", "checkpoint_every")  # what a training may change when it goes on


def train(stream: Stream, trainees: Sequence[Trainee], config: TrainConfig, folder: str | Path | None = None, *,
          log: Log = lambda row: None, device: torch.device | str = "cpu", progress: bool = True,
          parallel: Parallel | None = None) -> dict[str, SAE]:
    """Train every trainee on the stream's activations: {name: plain SAE for raw activations}.

    With a folder, checkpoints go to folder/checkpoints and a line of JSON a report to folder/metrics.jsonl; the same
    call goes on from the newest whole checkpoint, and on a CPU ends with the same bits as one that was never stopped.
    Ctrl-C saves, then raises KeyboardInterrupt. log(row) gets each report, for any tracker.

    Several processes, each with its `parallel` and a stream of parallel.share, on parallel.device, train together what
    one would, but for rounding: batch_size is that of all, one of them reports, and all stop, fail and get the SAEs
    together. Any number goes on from a checkpoint where activations are cached; of a live stream as many as before, for
    each has read its own texts. parallel=Parallel() trains alone, whatever a launcher has started: give each such
    process a folder of its own.

    Raises TrainingError where a loss is not finite, the disk is full, a trainee asks for a site that the stream has
    not, several processes were launched and no `parallel` is given or another one trains in the folder at this moment,
    CheckpointError for the checkpoints of another training: what was saved before stays. Raises DataError where the
    texts end early, or the model gives activations that are not finite: what is done is saved then, and more text
    behind it (unless it is shuffled) or more activations let it go on. It comes also where shards hold what is not
    finite: then only what was saved before stays.
    """
    parallel = stated(parallel)
    place = None if folder is None else Path(folder)
    with torch.inference_mode(False), torch.enable_grad():
        learners = _learners(stream, trainees, device, parallel)
        with _alone_in(place, parallel):
            return _train(stream, learners, config, place, log, progress, parallel)


def _train(stream: Stream, learners: Mapping[str, Learner], config: TrainConfig, place: Path | None, log: Log,
           progress: bool, parallel: Parallel) -> dict[str, SAE]:
    """The loop itself."""
    start = _resume(place, config, stream, learners, parallel)
    with _interruptible(place is not None, parallel) as stop, \
            Progress(place, learners, config, start, log, progress, parallel) as bar:
        for step in range(start, config.steps):
            try:
                parallel.together(stream.check_left, config.batch_size)  # or rows would be lost where others have none
                rows = parallel.part(parallel.together(_next, stream, config.batch_size, parallel))
            except DataError:
                if place and step > start:
                    _save(place, step, config, stream, learners, parallel)
                raise
            rate = cosine_warmup(step, config.warmup) * linear_end(step, config.steps, config.decay)
            for learner in learners.values():
                if step == 0:
                    learner.start(rows)
                bar.add(learner, learner.update(rows, step, rate), rows)
            done = step + 1
            parallel.together(bar.advance, done, rate)
            stopped = parallel.any(stop.is_set())
            if place and (stopped or done % config.checkpoint_every == 0 or done == config.steps):
                _save(place, done, config, stream, learners, parallel)
            if stopped:
                raise KeyboardInterrupt(f"stopped after step {done} of {config.steps}; saved in {place}: the same "
                                        f"command goes on from there")
    return {name: _described(learner, stream, config) for name, learner in learners.items()}


def _learners(stream: Stream, trainees: Sequence[Trainee], device: torch.device | str,
              parallel: Parallel) -> dict[str, Learner]:
    names = [trainee.name for trainee in trainees]
    if not names or len(set(names)) < len(names):
        raise TrainingError(f"give one trainee or more, of different names; got {names}")
    if taken := [name for name in names if name.startswith("_")]:
        raise TrainingError(f"a trainee's name cannot begin with an underscore, as {taken[0]} does: a checkpoint has "
                            "other parts with such names")
    return {trainee.name: Learner(trainee, stream.sites, device, parallel) for trainee in trainees}


def _next(stream: Stream, size: int, parallel: Parallel) -> dict[str, Tensor]:
    """This process' rows of the next batch."""
    rows, processes = stream.next(size), parallel.share[1]
    for site, x in rows.items():
        if len(x) * processes != size:
            raise TrainingError(f"expected {size} / {processes} rows of {site} for each of {processes} processes, got "
                                f"{len(x)}: give the stream share=parallel.share, and a batch_size that is a multiple")
    return rows


def _save(folder: Path, step: int, config: TrainConfig, stream: Stream, learners: Mapping[str, Learner],
          parallel: Parallel) -> None:
    parts: dict[str, Mapping[str, Any]] = {name: learner.state() for name, learner in learners.items()}
    identity = {"identity": json.dumps(_identity(config, learners))}
    parts = {**parts, "_stream": stream.state_dict(), "_training": identity}
    save_shards(folder / "checkpoints", step, parts, parallel)


def _resume(folder: Path | None, config: TrainConfig, stream: Stream, learners: Mapping[str, Learner],
            parallel: Parallel) -> int:
    """Load the newest checkpoint, if there is one; the steps that are done."""
    found = load_shards(folder / "checkpoints", parallel) if folder else None
    if found is None:
        return 0
    theirs, ours = json.loads(str(found.parts["_training"]["identity"])), _identity(config, learners)
    if theirs != ours:
        raise CheckpointError(f"{found.path} is of another training: {_differences(theirs, ours)}; take another "
                              f"folder, or train as there")
    place: dict[str, Any] = found.parts["_stream"]
    parallel.together(stream.load_state_dict, place)
    for name, learner in learners.items():
        learner.load(found.parts[name])
        learner.infos = stream.sites[learner.source], stream.sites[learner.target]  # as they were measured at the start
    return found.step


def _identity(config: TrainConfig, learners: Mapping[str, Learner]) -> dict[str, Any]:
    """What must be the same for a training to go on: {dotted name: value}, as JSON has it."""
    found = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    for learner in learners.values():
        trainee = dataclasses.asdict(learner.trainee)
        objective = trainee.pop("objective") | {"kind": type(learner.objective).__name__}
        found |= {f"{learner.trainee.name}.{name}": value for name, value in trainee.items()}
        found |= {f"{learner.trainee.name}.objective.{name}": value for name, value in objective.items()}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name, "nothing") != ours.get(name, "nothing")]
    return ", ".join(f"{name} was {theirs.get(name, 'not there')}, is {ours.get(name, 'not there')}" for name in names)


def _described(learner: Learner, stream: Stream, config: TrainConfig) -> SAE:
    """The finished SAE with what is known of it in its metadata."""
    sae, trainee = learner.finished(), learner.trainee
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    own = dataclasses.asdict(trainee) | {"objective": {"kind": type(learner.objective).__name__,
                                                       **dataclasses.asdict(learner.objective)}}
    recipe = fixed | {name: value for name, value in own.items() if name not in ("name", "site", "site_out")}
    sae.metadata |= {"model_name": stream.model_name, "n_training_tokens": config.steps * config.batch_size,
                     "recipe": json.loads(json.dumps(recipe))}
    return sae


@contextmanager
def _alone_in(folder: Path | None, parallel: Parallel) -> Iterator[None]:
    """Hold the folder against other trainings; the system lets go of it when the process ends, however it does."""
    holding = None if folder is None else parallel.together(lambda: _locked(folder) if parallel.main else None)
    try:
        yield
    finally:
        if holding is not None:
            os.close(holding)


def _locked(folder: Path) -> int | None:
    """What holds the folder, if anything can."""
    with suppress(OSError):  # what cannot be written to is told when it is to be
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return held(folder, wait=False)
    except BlockingIOError as error:
        raise TrainingError(f"another process trains in {folder} at this moment; wait for it, or take another "
                            "folder") from error


@contextmanager
def _interruptible(saves: bool, parallel: Parallel) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, where there is something to save; the second one interrupts as ever, but
    not under a launcher, which hands each Ctrl-C on to processes that had it already."""
    stop = threading.Event()
    if not saves or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        stop.set()
        if parallel.mesh is None:
            signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
