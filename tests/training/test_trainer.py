"""The loop: what it gives, how Ctrl-C and kill -9 end it, and that it goes on with the same bits."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_hooks import load_sae
from sae_hooks.errors import TrainingError
from sae_hooks.sae import SAE
from sae_hooks.training import BatchTopK, JumpReLU, TopK, TrainConfig, Trainee, load_checkpoint, train
from sae_hooks.training.schedules import cosine_warmup, linear_end, linear_warmup

from . import streams
from .streams import IN

ROOT = Path(__file__).parents[2]
ALONE = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = 24
CONFIG = TrainConfig(steps=STEPS, batch_size=40, warmup=10, report_every=1, checkpoint_every=8)
OFTEN = dataclasses.replace(CONFIG, checkpoint_every=1)


def few() -> list[Trainee]:
    names = ("jumprelu", "topk", "batchtopk", "transcoder-skip")
    return [trainee for trainee in streams.trainees() if trainee.name in names]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return streams.store(tmp_path / "shards")


def trained(shards: Path, folder: Path | None = None, config: TrainConfig = CONFIG, **more: Any) -> dict[str, SAE]:
    return train(streams.cached(shards), few(), config, folder, **{"progress": False} | more)


# --- where and with what ------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_a_training_runs_where_gradients_are_switched_off(
        within: Callable[[], AbstractContextManager[None]], shards: Path) -> None:
    wanted = trained(shards)
    with within():
        assert streams.unequal(trained(shards), wanted) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_training_is_in_float32_whatever_the_default_is(dtype: torch.dtype, shards: Path) -> None:
    longer = dataclasses.replace(CONFIG, steps=260)  # than bfloat16 counts
    for config, some in ((CONFIG, streams.trainees()), (longer, few()[:1])):
        wanted = train(streams.cached(shards), some, config, progress=False)
        torch.set_default_dtype(dtype)
        try:
            found = train(streams.cached(shards), some, config, progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert streams.unequal(found, wanted) == []


def test_numbers_of_other_kinds_are_taken_as_plain_ones(shards: Path, tmp_path: Path) -> None:
    def saved(number: Callable[[float], Any], folder: Path) -> dict[str, SAE]:
        whole = partial(np.int64) if number is np.float32 else number
        jump = JumpReLU(l0=number(2), prefixes=[whole(4)])
        trainees = [Trainee(name="jump", site=IN, d_sae=whole(24), objective=jump),
                    Trainee(name="top", site=IN, d_sae=whole(24), objective=TopK(k=whole(2)), betas=[number(0), 0.5])]
        config = TrainConfig(steps=whole(4), batch_size=whole(40))
        return train(streams.cached(shards), trainees, config, folder, progress=False)

    found = saved(np.float32, tmp_path / "one"), saved(float, tmp_path / "two")
    assert streams.unequal(*found) == []
    assert found[0]["jump"].metadata == found[1]["jump"].metadata


@pytest.mark.parametrize(("made", "told"), [
    (lambda: TrainConfig(steps=6.5), "TrainConfig: steps must be of type int, got 6.5"),
    (lambda: TrainConfig(steps="6"), "TrainConfig: steps must be of type int, got '6'"),
    (lambda: Trainee(name="a", site=IN, d_sae=True), "Trainee: d_sae must be of type int, got True"),
    (lambda: Trainee(name="a", site=None, d_sae=24), "Trainee: site must be of type str, got None"),
    (lambda: Trainee(name="a", site=IN, d_sae=24, objective="topk"), "objective must be of type Objective, got 'topk'"),
    (lambda: JumpReLU(kernel="rect"), "JumpReLU: kernel must be of type Literal.*rectangle.*, got 'rect'"),
    (lambda: JumpReLU(form="tokens"), "JumpReLU: form must be of type Literal"),
    (lambda: Trainee(name="a", site=IN, d_sae=64, objective=JumpReLU(l0=8, prefixes=(64,))), "a prefix of 64 is not"),
    (lambda: Trainee(name="a", site=IN, d_sae=60), "an l0 of 60 is not below the 60 features"),
    (lambda: Trainee(name="a", site=IN, d_sae=64, objective=BatchTopK(k=80)), "a k of 80 is above the 64 features"),
])
def test_what_cannot_be_is_said_before_anything_is_trained(made: Callable[[], object], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        made()


def test_two_trainings_at_once_in_one_folder_are_refused(shards: Path, tmp_path: Path) -> None:
    refused = []

    def train_there() -> None:
        with pytest.raises(TrainingError, match=f"another process trains in {tmp_path / 'run'} at this moment"):
            trained(shards, tmp_path / "run")
        refused.append(sorted(path.name for path in (tmp_path / "run").iterdir()))

    stream = streams.Watched(streams.cached(shards), 9, train_there)
    found = train(stream, few(), CONFIG, tmp_path / "run", progress=False)
    assert refused == [["checkpoints", "metrics.jsonl"]]
    assert streams.unequal(trained(shards, tmp_path / "run"), found) == []


# --- what comes out -----------------------------------------------------------------------------------------


def test_what_comes_out_is_plain_and_says_where_it_is_from(shards: Path, tmp_path: Path) -> None:
    found = trained(shards)

    assert list(found) == [trainee.name for trainee in few()]
    assert not any(t.requires_grad for sae in found.values() for t in sae.parameters())
    sae = found["jumprelu"]
    assert type(sae) is SAE
    assert (sae.site, sae.metadata["model_name"], sae.metadata["n_training_tokens"]) == (IN, "tiny", 960)
    assert sae.metadata["typical_norm"] == pytest.approx(0.9 * 7)
    recipe = {"batch_size": 40, "steps": 24, "learning_rate": 0.01, "bf16": False}
    assert recipe.items() <= sae.metadata["recipe"].items()
    assert sae.metadata["recipe"]["objective"].items() >= {"kind": "JumpReLU", "sparsity": 0.05, "warmup": 4}.items()
    sae.save_pretrained(tmp_path / "sae")
    assert load_sae(tmp_path / "sae").metadata["recipe"] == json.loads(json.dumps(sae.metadata["recipe"]))


def test_a_training_lowers_the_error_and_its_saes_work_on_raw_activations(shards: Path) -> None:
    rows: list[dict[str, Any]] = []
    sae = trained(shards, None, TrainConfig(steps=400, batch_size=100, warmup=10, report_every=50),
                  log=rows.append)["topk"]

    fvus = [row["fvu"] for row in rows if row["name"] == "topk"]
    stream = streams.cached(shards)
    x = stream.next(600)[IN] * stream.sites[IN].rms_norm
    fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvus[-1] < 0.7 * fvus[0]
    assert fvu == pytest.approx(fvus[-1], rel=0.1)


def test_the_same_call_gives_the_same_bits(shards: Path) -> None:
    one = trained(shards)
    torch.manual_seed(5)

    assert streams.unequal(one, trained(shards)) == []


def test_a_training_leaves_the_global_generator_alone(shards: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()

    trained(shards, tmp_path / "run")

    assert torch.equal(before, torch.get_rng_state())


def test_schedules_start_and_end_where_they_say() -> None:
    assert [cosine_warmup(step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert cosine_warmup(3, 12) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2)
    assert [linear_end(step, 100, 0.2) for step in (0, 80, 90, 99, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.05, 0.0])
    assert [linear_warmup(step, 4) for step in range(6)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    assert (cosine_warmup(0, 0), linear_end(99, 100, 0.0), linear_warmup(0, 0)) == (1.0, 1.0, 1.0)


# --- Ctrl-C -------------------------------------------------------------------------------------------------

LONG = """
import sys
from pathlib import Path
from sae_hooks.training import TrainConfig, train
from tests.training import streams
from tests.training.test_trainer import few
config = TrainConfig(steps=10_000, batch_size=40, warmup=10, report_every=1, checkpoint_every=5000)
train(streams.cached(Path(sys.argv[1])), few(), config, Path(sys.argv[2]))
"""


@pytest.fixture
def long_training(shards: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains, some steps on its way, with its bar."""
    process = subprocess.Popen([sys.executable, "-c", LONG, shards, tmp_path / "run"], env=ALONE, cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lines(tmp_path / "run") > 12, process)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_ctrl_c_saves_says_how_to_go_on_and_the_bits_are_those_of_a_training_that_was_not_stopped(
        long_training: subprocess.Popen[str], shards: Path, tmp_path: Path) -> None:
    long_training.send_signal(signal.SIGINT)
    _, said = long_training.communicate(timeout=60)

    found = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert long_training.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert said.rstrip().endswith(f"KeyboardInterrupt: stopped after step {found.step} of 10000; saved in "
                                  f"{tmp_path / 'run'}: the same command goes on from there")
    assert lines(tmp_path / "run") == 4 * found.step
    # the same identity in both: as many steps, of which this one and the one beside it do a few more
    more = found.step + 7
    resumed, straight = (stopped_at(more, shards, folder) for folder in (tmp_path / "run", tmp_path / "straight"))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in resumed)


def stopped_at(step: int, shards: Path, run: Path) -> dict[str, Any]:
    """The weights at a step of the long training, stopped there by this process' own Ctrl-C."""
    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == step and row["name"] == "jumprelu":
            signal.raise_signal(signal.SIGINT)
    config = TrainConfig(steps=10_000, batch_size=40, warmup=10, report_every=1, checkpoint_every=5000)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 10000"):
        trained(shards, run, config, log=interrupt)
    found = load_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == step
    return {f"{part}.{key}": value for part, values in found.parts.items() for key, value in values.items()
            if isinstance(value, torch.Tensor)}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_interrupts_at_once(shards: Path, tmp_path: Path) -> None:
    def twice(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            told.append("the first goes on")
            signal.raise_signal(signal.SIGINT)
            told.append("the second does not")
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as error:
        trained(shards, tmp_path / "run", OFTEN, log=twice)

    assert told == ["the first goes on"]
    assert str(error.value) == ""
    assert signal.getsignal(signal.SIGINT) is before
    found = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert streams.unequal(trained(shards), trained(shards, tmp_path / "run")) == []


def test_ctrl_c_in_the_last_step_loses_nothing(shards: Path, tmp_path: Path) -> None:
    def last(row: dict[str, Any]) -> None:
        if row["step"] == STEPS and row["name"] == "jumprelu":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 24 of 24"):
        trained(shards, tmp_path / "run", log=last)

    assert streams.unequal(trained(shards), trained(shards, tmp_path / "run")) == []


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_with_nothing_to_save_interrupts_at_once(shards: Path) -> None:
    told = []

    def interrupt(row: dict[str, Any]) -> None:
        told.append(row["step"])
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(shards, log=interrupt)
    assert told == [1]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_the_handler_that_was_there_is_there_again_also_after_an_error(
        handler: Any, shards: Path, tmp_path: Path) -> None:
    def fail(row: dict[str, Any]) -> None:
        assert signal.getsignal(signal.SIGINT) is not handler
        if row["step"] == 5:
            raise ZeroDivisionError

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(ZeroDivisionError):
            trained(shards, tmp_path / "run", log=fail)
        assert signal.getsignal(signal.SIGINT) is handler
        trained(shards, tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_training_runs_in_any_thread_and_installs_no_handler_there(shards: Path, tmp_path: Path) -> None:
    found: dict[str, SAE] = {}
    seen = set()

    def work() -> None:
        found.update(trained(shards, tmp_path / "run", log=lambda row: seen.add(signal.getsignal(signal.SIGINT))))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == {before}
    assert streams.unequal(trained(shards), found) == []


# --- kill -9 ------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
from sae_hooks.training import train
from tests.training import streams
from tests.training.test_trainer import OFTEN, ROOT, few
warnings.simplefilter("error")  # a checkpoint that is passed over would be a broken one
shards, run = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3] == "live":
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests/models/tiny-gemma2", dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    def stream(): return streams.live(model)
else:
    def stream(): return streams.cached(shards)

def newest():
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????")), default=0)

def half_saved():
    return set((run / "checkpoints").glob(".step-*"))

straight = train(stream(), few(), OFTEN, progress=False)  # first, for the children inherit what it imports
kills = amid = 0
while True:
    before, goal = half_saved(), newest() + random.randint(0, 4)
    if not (child := os.fork()):
        train(stream(), few(), OFTEN, run, progress=False)
        os._exit(0)
    # every second time in the midst of a checkpoint
    while kills == 6 or newest() < goal or (kills % 2 and not half_saved() - before):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        time.sleep(0.0005 if kills % 2 else random.uniform(0, 0.03))
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills, amid = kills + 1, amid + bool(half_saved() - before)
        continue
    break
again = train(stream(), few(), OFTEN, run, progress=False)
print(kills, amid, *streams.unequal(straight, again))
"""


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_a_training_killed_time_and_again_ends_with_the_same_bits(kind: str, shards: Path, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, shards, tmp_path / "run", kind], cwd=tmp_path,
                         capture_output=True, text=True, env=ALONE)

    assert ran.returncode == 0, ran.stderr
    kills, amid, *unequal = ran.stdout.split()
    assert unequal == []
    assert int(kills) > 2
    assert int(amid) > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["name"]) for row in rows] == [
        (step, trainee.name) for step in range(1, STEPS + 1) for trainee in few()]
