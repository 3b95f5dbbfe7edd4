"""One of several processes that train together: what tests/training/test_parallel.py launches.

python parallel_worker.py FOLDER CHECK... runs the checks, each in all processes, and writes {check: error or ""} to
FOLDER/outcome-RANK.json. Every check compares with one process that stands alone, which each process also plays.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import streams
import torch
import torch.distributed as dist
from torch import Tensor

from sae_hooks.errors import CheckpointError, DataError, TrainingError
from sae_hooks.sae import SAE
from sae_hooks.training import CachedStream, Stream, TrainConfig, Trainee, load_checkpoint, row_adam, train
from sae_hooks.training.codes import Encoder
from sae_hooks.training.learner import Learner
from sae_hooks.training.objectives import Batch
from sae_hooks.training.objectives.topk import largest_of_batch
from sae_hooks.training.parallel import Parallel, feature_first, parallel
from sae_hooks.training.sharded import load_shards, save_shards

CONFIG = TrainConfig(steps=6, batch_size=40, warmup=3, report_every=1, checkpoint_every=100)
CHECKS: dict[str, Callable[[Parallel, Path], None]] = {}


def check(function: Callable[[Parallel, Path], None]) -> Callable[[Parallel, Path], None]:
    CHECKS[function.__name__] = function
    return function


def some(par: Parallel) -> list[Trainee]:
    """Trainees that several processes can train as one would."""
    return [t for t in streams.trainees() if t.name != "bf16"  # which rounds its sums
            and (par.shards == 1 or t.objective.shardable)]


def stored(folder: Path, par: Parallel, **changes: Any) -> CachedStream:
    return streams.cached(folder.parent / "store", **{"share": par.share} | changes)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    found, wanted = found.detach().double(), wanted.detach().double()
    error = float((found - wanted).abs().max())
    assert error <= tolerance * max(1.0, float(wanted.abs().max())), f"{what}: {error:.2g}"


def equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(v, wanted[k]) if isinstance(v, Tensor) else v == wanted[k] for k, v in found.items())


def raised(*kinds: type[BaseException]) -> Callable[[Callable[[], object]], BaseException]:
    """The error of one of these kinds that the call ends with."""
    def call(do: Callable[[], object]) -> BaseException:
        try:
            do()
        except kinds as error:
            return error
        raise AssertionError(f"did not raise {kinds}")
    return call


# --- the mathematics ----------------------------------------------------------------------------------------


def in_float64(trainee: Trainee, sites: Any, par: Parallel) -> Learner:
    with patch.object(row_adam, "BLOCKS_ON", ()):  # torch's Adam leaves the matrices' gradients to be looked at
        learner = Learner(trainee, sites, parallel=par)
    learner.sae.double()
    for t in (*learner.extra.values(), *learner.trained.values()):
        t.data = t.data.double()
    for name, t in learner.moved.items():
        t.data = feature_first(name, learner.trained[name].data)
    return learner


@check
def steps(par: Parallel, folder: Path) -> None:
    """Gradients, weights, optimiser and counts are those of one process, to 1e-10."""
    whole, mine = stored(folder, Parallel()), stored(folder, par)
    for trainee in some(par):
        trainee = replace(trainee, dead_after=50)
        one, us = (in_float64(trainee, whole.sites, p) for p in (Parallel(), par))
        for step in range(3):
            rows, our_rows = ({site: x.double() for site, x in s.next(40).items()} for s in (whole, mine))
            if step == 0:
                one.start(rows)
                us.start(par.part(our_rows))
            loss, our_loss = one.update(rows, step, 1.0), us.update(par.part(our_rows), step, 1.0)
            for name, tolerance in (("total", 1e-10), ("reconstruction", 1e-10), ("l0", 1e-6)):  # l0 is float32
                assert_close(getattr(our_loss, name), getattr(loss, name), tolerance, f"{trainee.name} {step} {name}")
            assert torch.equal(par.whole("fired", our_loss.fired), loss.fired), trainee.name
            for name, leaf in one.trained.items():
                assert_close(par.whole(name, us.trained[name].grad), leaf.grad, 1e-10, f"{trainee.name} {step} {name}")
        found = us.state()
        for name, t in one.state().items():
            assert_close(par.whole(name, found[name]), t, 1e-10, f"{trainee.name} {name}")
        assert us.dead() == one.dead()
        sae, ours = one.finished(), streams.tensors(us.finished())
        for name, t in streams.tensors(sae).items():
            assert_close(ours[name], t, 1e-10, f"{trainee.name} finished {name}")


@check
def starts(par: Parallel, folder: Path) -> None:
    """What the first batch decides has the bits of one process."""
    whole, mine = stored(folder, Parallel()), stored(folder, par)
    rows, ours = whole.next(40), mine.next(40)
    for trainee in some(par):
        one, us = (Learner(trainee, whole.sites, parallel=p) for p in (Parallel(), par))
        one.start(rows)
        us.start(par.part(ours))
        assert equal({name: par.whole(name, t) for name, t in us.state().items()}, one.state()), trainee.name


@check
def refusals(par: Parallel, folder: Path) -> None:
    """What cannot be split is refused, and says what to do."""
    def said(par: Parallel | None, stream: Stream, trainee: Trainee, **changes: Any) -> str:
        return str(raised(TrainingError)(lambda: run(par, stream, None, [trainee], **changes)))

    assert "multiple of 3" in str(raised(TrainingError)(lambda: parallel(3)))
    trainee = some(par)[0]
    if par.shards > 1:
        assert "shards=1" in said(par, stored(folder, par), replace(trainee, objective=streams.OBJECTIVES["topk"]))
        assert "25 features" in said(par, stored(folder, par), replace(trainee, d_sae=25))
    assert "share=parallel.share" in said(par, stored(folder, Parallel()), trainee)
    assert "parallel=p" in said(None, stored(folder, par), trainee)
    assert "multiple" in said(par, stored(folder, par), trainee, batch_size=41)


@check
def largest(par: Parallel, folder: Path) -> None:
    """BatchTopK keeps the largest of all processes, wherever they are."""
    (i, n), g = par.batch_share, torch.Generator().manual_seed(1)
    mixed, apart, few = torch.randn(6, 7, generator=g), torch.rand(6, 7, generator=g), -torch.rand(6, 7, generator=g)
    apart[0::2] += torch.tensor([10.0, 4.0, 4.0])[:, None]  # the first row alone would have others looked for
    few[:4] += 0.2
    for whole, wanted in ((mixed, 12), (apart, 12), (few, int((few > 0).sum())), (-apart, 0)):
        x = whole[i::n]
        batch = Batch(x=x, target=x, step=0, idle=x, of_batches=par.of_batches, share=par.batch_share)
        rows, columns, values = largest_of_batch(batch, Encoder(torch.eye(7), torch.zeros(7)), 2)
        assert torch.equal(values, x[rows, columns])
        found = torch.zeros_like(whole)
        found[rows * n + i, columns] = 1.0
        if n > 1:
            dist.all_reduce(found)
        assert found.view(-1).nonzero().view(-1).tolist() == whole.view(-1).topk(wanted).indices.sort().values.tolist()


# --- the loop -----------------------------------------------------------------------------------------------


def watched(stream: Stream, step: int, do: Callable[[], object], rank: int) -> streams.Watched:
    """A stream that does something before a step, in one process."""
    return streams.Watched(stream, step if dist.get_rank() == rank else -1, do)


def run(par: Parallel | None, stream: Stream, folder: Path | None, trainees: list[Trainee] | None = None,
        **changes: Any) -> dict[str, SAE]:
    config = replace(CONFIG, **changes)
    return train(stream, trainees or some(par or Parallel()), config, folder, progress=False, parallel=par)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@check
def interrupted(par: Parallel, folder: Path) -> None:
    """Ctrl-C, even twice, in any process stops all after the same step; all go on from there, with the bits of a
    training that was never stopped, and with the weights and reports of one process."""
    def twice() -> None:
        interrupt()
        interrupt()

    wanted = run(par, stored(folder, par), folder / "whole")
    stopped = watched(stored(folder, par), 3, twice, rank=dist.get_world_size() - 1)
    error = raised(KeyboardInterrupt)(lambda: run(par, stopped, folder))
    assert "after step 4 of 6" in str(error), error
    dist.barrier()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000004"]

    found = run(par, stored(folder, par), folder)

    assert streams.unequal(found, wanted) == []
    alone = run(Parallel(), stored(folder, Parallel()), folder / f"alone-{dist.get_rank()}", some(par))
    for name, sae in alone.items():
        for key, t in streams.tensors(sae).items():
            assert_close(streams.tensors(found[name])[key], t, 2e-4, f"{name} {key}")
        assert found[name].metadata == sae.metadata
    rows, theirs = (json_rows(p / "metrics.jsonl") for p in (folder, folder / f"alone-{dist.get_rank()}"))
    assert [(r["name"], r["step"]) for r in rows] == [(r["name"], r["step"]) for r in theirs]
    for row, other in zip(rows, theirs, strict=True):
        for key in ("error", "fvu", "l0", "dead", "coefficient", "learning_rate", "tokens"):
            assert row[key] == other[key] or abs(row[key] / other[key] - 1) <= 1e-3, (row, other, key)


def json_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@check
def reporters(par: Parallel, folder: Path) -> None:
    """One process reports."""
    rows: list[Any] = []
    train(stored(folder, par), some(par)[:1], replace(CONFIG, steps=2), log=rows.append, progress=False, parallel=par)
    assert len(rows) == (2 if dist.get_rank() == 0 else 0)


@check
def not_finite(par: Parallel, folder: Path) -> None:
    """A number that is not finite, in one process, ends all of them; all say who read it."""
    def spoiled(step: int) -> None:
        def spoil() -> None:
            stream.stream.sites = {site: replace(info, rms_norm=0.0) for site, info in stream.sites.items()}

        stream = watched(stored(folder, par), step, spoil, rank=1)
        run(par, stream, folder / str(step), some(par)[:2])

    for step in (0, 2):
        error = raised(DataError)(partial(spoiled, step))
        said = f"20 of 40 activations of {streams.IN} at step {step}, read by process 1 of 2, are not finite"
        assert said in str(error), error
    assert par.any(True)  # they are still in step


@check
def texts_that_end(par: Parallel, folder: Path) -> None:
    """Where the texts end in one process, all save what is done and raise DataError; none has taken rows that no step
    saw, and all go on with more text."""
    texts = [window[:6] if i % 2 else window for i, window in enumerate(streams.some_windows(0))]
    live = partial(streams.live, streams.tiny_gemma2(), windows=texts, epochs=1, share=par.share)
    assert "the texts ended" in str(raised(DataError)(lambda: run(par, live(), folder, some(par)[:2])))
    found, alone = load_shards(folder / "checkpoints", par), live()
    assert found
    assert found.step == 3
    for _ in range(3):
        alone.next(40)
    assert equal(found.parts["_stream"], alone.state_dict())
    if par.main:
        alone.next(40)  # it was the other one's texts that ended
    run(par, live(windows=[*texts, *streams.some_windows(1)]), folder, some(par)[:2])


@check
def live_streams(par: Parallel, folder: Path) -> None:
    """Each process goes on in its own texts and buffer; another number of processes is refused."""
    model, trainees = streams.tiny_gemma2(), some(par)[:2]
    wanted = run(par, streams.live(model, share=par.share), None, trainees)
    stopped = watched(streams.live(model, share=par.share), 2, interrupt, rank=0)
    raised(KeyboardInterrupt)(lambda: run(par, stopped, folder, trainees))

    found = run(par, streams.live(model, share=par.share), folder, trainees)

    assert streams.unequal(found, wanted) == []
    raised(CheckpointError)(lambda: par.by_main(run, Parallel(), streams.live(model), folder, trainees))


@check
def diverged(par: Parallel, folder: Path) -> None:
    """A weight that is not finite, in one process, ends all of them."""
    learner = learners(par, folder, some(par)[:1])["jumprelu"]
    if dist.get_rank() == 1:
        learner.sae.W_enc.data[0, 0] = torch.inf
    assert "W_enc" in str(raised(TrainingError)(learner.state))
    assert par.any(True)  # they are still in step


# --- checkpoints --------------------------------------------------------------------------------------------


def learners(par: Parallel, folder: Path, trainees: Sequence[Trainee] = ()) -> dict[str, Learner]:
    """After two steps."""
    stream = stored(folder, par)
    found = {trainee.name: Learner(trainee, stream.sites, parallel=par) for trainee in trainees or some(par)}
    for step in range(2):
        rows = par.part(stream.next(40))
        for learner in found.values():
            if step == 0:
                learner.start(rows)
            learner.update(rows, step, 1.0)
    return found


def parts_of(par: Parallel, learners: Mapping[str, Learner]) -> dict[str, dict[str, Any]]:
    state = torch.Generator().manual_seed(par.share[0]).get_state()
    mine = {"rank": par.share[0], "rows": torch.arange(3) + par.share[0], "empty": torch.empty(0, 5), "state": state}
    return {name: learner.state() for name, learner in learners.items()} | {"_stream": mine, "_training": {"x": 0.1}}


@check
def resharding(par: Parallel, folder: Path) -> None:
    """What some processes saved is read by as many and by one, and the other way round, bit for bit."""
    here = learners(par, folder)
    parts = parts_of(par, here)
    whole = {name: {key: par.whole(key, t) for key, t in learner.state().items()} for name, learner in here.items()}

    save_shards(folder / "ours", 2, parts, par)
    ours, one = load_shards(folder / "ours", par), load_shards(folder / "ours", Parallel())
    alone = folder / f"alone-{dist.get_rank()}"
    save_shards(alone, 2, whole | {"_stream": {}}, Parallel())
    dist.barrier()
    back = load_shards(folder / "alone-0", par)

    assert ours is not None
    assert one is not None
    assert back is not None
    assert ours.parts.keys() == parts.keys()
    assert all(equal(ours.parts[name], parts[name]) for name in parts)
    assert all(equal(one.parts[name], whole[name]) for name in whole)
    assert one.parts["_stream"]["rank"] == 0
    assert all(equal(back.parts[name], parts[name]) for name in whole)
    again = Learner(here["jumprelu"].trainee, stored(folder, par).sites, parallel=par)
    again.load(ours.parts["jumprelu"])
    assert equal(again.state(), parts["jumprelu"])
    assert "together" in str(raised(CheckpointError)(lambda: load_checkpoint(folder / "ours")))


@check
def broken_checkpoints(par: Parallel, folder: Path) -> None:
    """A checkpoint with a flaw is passed over by all, for the one before."""
    parts = parts_of(par, learners(par, folder, some(par)[:1]))
    for step in (1, 2, 3):
        save_shards(folder, step, parts, par)
    dist.barrier()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    if par.main:
        file = next((folder / "step-00000003").glob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = load_shards(folder, par)
    assert found is not None
    assert found.step == 2
    assert any("SHA-256" in str(w.message) for w in told) == par.main


@check
def a_full_disk(par: Parallel, folder: Path) -> None:
    """Where one process cannot write, all raise, and the older checkpoint stays as it was."""
    parts = parts_of(par, learners(par, folder, some(par)[:1]))
    save_shards(folder, 1, parts, par)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        error = raised(TrainingError)(lambda: save_shards(folder, 2, parts, par))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step 2 could not be saved" in str(error), error
    assert "goes on from step 1" in str(error), error
    dist.barrier()
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def main() -> None:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    accelerate.PartialState(cpu=True, timeout=timedelta(seconds=30))
    outcomes = dict.fromkeys(wanted, "not reached")
    report = folder / f"outcome-{dist.get_rank()}.json"
    for name in wanted:
        kind, shards = name.rsplit("-", 1)
        place = folder / name
        place.mkdir(exist_ok=True)
        try:
            CHECKS[kind](parallel(int(shards)), place)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the others wait somewhere in this check
        finally:
            report.write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
