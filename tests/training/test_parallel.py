"""Several processes train what one would. The checks are in parallel_worker.py: all of them in one launch, for that
takes most of the time; here each gets its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_hooks.errors import TrainingError
from sae_hooks.training import TrainConfig, train
from sae_hooks.training.parallel import ALONE, Parallel, parallel

from . import streams

WORKER = Path(__file__).with_name("parallel_worker.py")
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--main_process_port=0", "--num_processes"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
BATCHES, FEATURES = 1, 2  # how many of two processes share the features

TWO = ["steps", "starts", "largest", "refusals", "interrupted", "reporters", "not_finite", "diverged", "texts_that_end",
       "live_streams", "resharding", "broken_checkpoints", "a_full_disk"]
FOUR = ["steps", "starts", "largest", "resharding"]

Outcome = Callable[[str, int], str]


def launched(folder: Path, launcher: list[str], processes: int, checks: list[str]) -> Outcome:
    """Run the checks; outcome(check, shards) is then the first error of a process, or ""."""
    streams.store(folder / "store", rows=100)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", *launcher, str(processes), str(WORKER), str(folder), *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("outcome-*.json"))]
    assert len(reports) == processes, done.stderr[-5000:]

    def outcome(check: str, shards: int) -> str:
        return next((report[f"{check}-{shards}"] for report in reports if report[f"{check}-{shards}"]), "")

    return outcome


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    checks = [f"{name}-{shards}" for name in TWO for shards in (BATCHES, FEATURES)]
    return launched(tmp_path_factory.mktemp("two"), ACCELERATE, 2, checks)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return launched(tmp_path_factory.mktemp("four"), TORCHRUN, 4, [f"{name}-2" for name in FOUR])


either = pytest.mark.parametrize("shards", [BATCHES, FEATURES], ids=["batches", "features"])


# --- two processes, by accelerate launch --------------------------------------------------------------------


@either
def test_gradients_weights_and_counts_of_two_processes_are_those_of_one(two: Outcome, shards: int) -> None:
    assert two("steps", shards) == ""


@either
def test_what_the_first_batch_decides_has_the_bits_of_one_process(two: Outcome, shards: int) -> None:
    assert two("starts", shards) == ""


@either
def test_batchtopk_keeps_the_largest_of_all_processes_wherever_they_are(two: Outcome, shards: int) -> None:
    assert two("largest", shards) == ""


@either
def test_what_cannot_be_split_is_refused(two: Outcome, shards: int) -> None:
    assert two("refusals", shards) == ""


@either
def test_ctrl_c_in_one_process_stops_all_after_the_same_step_and_all_go_on_with_the_same_bits(
        two: Outcome, shards: int) -> None:
    assert two("interrupted", shards) == ""


@either
def test_one_process_reports(two: Outcome, shards: int) -> None:
    assert two("reporters", shards) == ""


@either
def test_where_activations_are_not_finite_all_processes_end_and_say_who_read_them(two: Outcome, shards: int) -> None:
    assert two("not_finite", shards) == ""


@either
def test_a_weight_that_is_not_finite_in_one_process_ends_all(two: Outcome, shards: int) -> None:
    assert two("diverged", shards) == ""


@either
def test_texts_that_end_in_one_process_end_all_and_what_is_done_is_saved(two: Outcome, shards: int) -> None:
    assert two("texts_that_end", shards) == ""


@either
def test_live_streams_go_on_each_in_its_own_texts(two: Outcome, shards: int) -> None:
    assert two("live_streams", shards) == ""


@either
def test_checkpoints_of_two_processes_are_read_by_one_and_the_other_way_round(two: Outcome, shards: int) -> None:
    assert two("resharding", shards) == ""


@either
def test_a_broken_checkpoint_is_passed_over_by_all(two: Outcome, shards: int) -> None:
    assert two("broken_checkpoints", shards) == ""


@either
def test_a_disk_that_is_full_for_one_process_leaves_the_older_checkpoint(two: Outcome, shards: int) -> None:
    assert two("a_full_disk", shards) == ""


# --- four, by torchrun: two share the features, two the batches ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("check", FOUR)
def test_features_and_batches_are_shared_at_once(four: Outcome, check: str) -> None:
    assert four(check, 2) == ""


# --- one ----------------------------------------------------------------------------------------------------


def test_without_a_launcher_a_process_stands_alone() -> None:
    assert parallel() == ALONE == Parallel()
    assert (ALONE.share, ALONE.main, ALONE.mesh) == ((0, 1), True, None)
    assert not torch.distributed.is_initialized()


def test_alone_nothing_is_copied() -> None:
    t = torch.ones(4, 3)

    same = [ALONE.over_shards(t), ALONE.over_batches(t), ALONE.whole_batch(t), ALONE.mean(t),
            ALONE.sum_over_batches(t), ALONE.local("W_dec", t), ALONE.whole("W_dec", t)]

    assert all(found is t for found in same)
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.by_main(len, t) == ALONE.together(len, t) == 4


def test_features_cannot_be_shared_by_one_process() -> None:
    with pytest.raises(TrainingError, match="num_processes 2"):
        parallel(shards=2)


def test_rows_that_are_not_the_whole_batch_are_refused(tmp_path: Path) -> None:
    stream = streams.cached(streams.store(tmp_path, rows=100), share=(0, 2))

    with pytest.raises(TrainingError, match=r"share=parallel\.share"):
        train(stream, streams.trainees()[:1], TrainConfig(steps=2, batch_size=40), progress=False)


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher tells each of two processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_a_script_that_forgets_parallel_under_a_launcher_is_refused_before_anything_is_written(
        one_of_two: None, tmp_path: Path) -> None:
    stream = streams.cached(streams.store(tmp_path / "store"))

    with pytest.raises(TrainingError, match=r"2 processes were launched .*parallel=p, .*share=p.share"):
        train(stream, streams.trainees()[:1], TrainConfig(steps=2, batch_size=40), tmp_path / "run", progress=False)

    assert not (tmp_path / "run").exists()
    assert stream.state_dict() == streams.cached(tmp_path / "store").state_dict()


def test_under_a_launcher_a_process_trains_alone_if_it_says_so(one_of_two: None, tmp_path: Path) -> None:
    config = TrainConfig(steps=2, batch_size=40)
    stream = streams.cached(streams.store(tmp_path / "store"))

    saes = train(stream, streams.trainees()[:1], config, tmp_path / "run-0", progress=False, parallel=Parallel())

    assert list(saes) == ["jumprelu"]
    assert (tmp_path / "run-0" / "metrics.jsonl").exists()
