"""A training that was stopped, however and wherever, ends with the same bits as one that never was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2ForCausalLM

from sae_hooks.errors import DataError
from sae_hooks.sae import SAE
from sae_hooks.training import Stream, TrainConfig, Trainee, train
from sae_hooks.training.progress import Row

from . import streams

STEPS = 9
CONFIG: dict[str, Any] = {"steps": STEPS, "batch_size": 40, "warmup": 3, "decay": 0.4, "report_every": 1}


class Crash(Exception):
    pass


def at_step(stop: int) -> Callable[[Row], None]:
    """A log that fails when the first report of a step comes, before the step is saved."""
    def log(row: Row) -> None:
        if row["step"] == stop:
            raise Crash
    return log


def trained(stream: Stream, some: list[Trainee], folder: Path | None = None, crash: int = 0,
            checkpoint_every: int = STEPS) -> dict[str, SAE]:
    config = TrainConfig(**CONFIG, checkpoint_every=checkpoint_every)
    return train(stream, some, config, folder, log=at_step(crash), progress=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.store(tmp_path_factory.mktemp("shards"), rows=100)  # an epoch ends in the midst of a batch


# --- from shards --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(shards: Path) -> dict[str, SAE]:
    return trained(streams.cached(shards), streams.trainees())


@pytest.mark.parametrize("done", range(1, STEPS))
def test_every_kind_of_trainee_goes_on_after_any_step_with_the_same_bits(
        done: int, shards: Path, uninterrupted: dict[str, SAE], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        trained(streams.cached(shards), streams.trainees(), tmp_path, crash=done + 1, checkpoint_every=done)
    torch.manual_seed(done)  # nothing hangs on the global generator

    resumed = trained(streams.cached(shards), streams.trainees(), tmp_path)

    assert streams.unequal(uninterrupted, resumed) == []


def test_the_training_is_one_in_which_every_tensor_moves_and_features_die(
        shards: Path, uninterrupted: dict[str, SAE]) -> None:
    short = train(streams.cached(shards), streams.trainees(), TrainConfig(**CONFIG | {"steps": STEPS - 1}),
                  progress=False)
    rows: list[Row] = []
    train(streams.cached(shards), streams.trainees(dead_after=64), TrainConfig(**CONFIG), log=rows.append,
          progress=False)

    still = [(name, key) for name, sae in uninterrupted.items() for key, t in streams.tensors(sae).items()
             if torch.equal(t, streams.tensors(short[name])[key])]
    assert still == [("relu", "threshold")]
    dead = {row["name"]: row["dead"] for row in rows if row["step"] == STEPS - 1}
    assert all(dead[name] for name in ("topk", "batchtopk", "transcoder-topk"))


def test_saes_that_train_side_by_side_come_out_as_if_each_were_alone(
        shards: Path, uninterrupted: dict[str, SAE]) -> None:
    alone = {trainee.name: trained(streams.cached(shards), [trainee])[trainee.name] for trainee in streams.trainees()}

    assert streams.unequal(uninterrupted, alone) == []


def test_a_training_that_has_ended_gives_its_saes_again_and_reads_no_data(
        shards: Path, uninterrupted: dict[str, SAE], tmp_path: Path) -> None:
    trained(streams.cached(shards), streams.trainees(), tmp_path)
    stream = streams.cached(shards)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()

    again = trained(stream, streams.trainees(), tmp_path)

    assert streams.unequal(uninterrupted, again) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert [sae.metadata for sae in again.values()] == [sae.metadata for sae in uninterrupted.values()]


def test_a_training_that_stops_time_and_again_tells_each_step_once(
        shards: Path, uninterrupted: dict[str, SAE], tmp_path: Path) -> None:
    for crash in (3, 4, 8):
        with pytest.raises(Crash):
            trained(streams.cached(shards), streams.trainees(), tmp_path, crash, checkpoint_every=2)

    resumed = trained(streams.cached(shards), streams.trainees(), tmp_path, checkpoint_every=2)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert streams.unequal(uninterrupted, resumed) == []
    assert [(row["step"], row["name"]) for row in rows] == [
        (step, name) for step in range(1, STEPS + 1) for name in uninterrupted]


def test_a_training_whose_activations_ended_goes_on_when_there_are_more(tmp_path: Path) -> None:
    folder = streams.store(tmp_path / "shards", rows=300)
    later = {path: path.read_bytes() for path in folder.glob("*/shard-00001.safetensors")}
    for path in later:
        path.unlink()
    some = streams.trainees()[:1]
    with pytest.raises(DataError, match=r"150 up to 1 times.* Harvest more into the same folder"):
        trained(streams.cached(folder, epochs=1), some, tmp_path / "run")

    for path, content in later.items():
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"280 tokens were read"):
        trained(streams.cached(folder, epochs=1), some, tmp_path / "run")
    resumed = trained(streams.cached(folder, epochs=None), some, tmp_path / "run")

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert resumed.keys() == {"jumprelu"}


# --- from a model -------------------------------------------------------------------------------------------

KINDS = ("jumprelu", "topk", "batchtopk", "log-threshold", "transcoder-skip")


def few() -> list[Trainee]:
    return [trainee for trainee in streams.trainees() if trainee.name in KINDS]


@pytest.fixture(scope="module")
def from_a_model(tiny_gemma2_loaded: Gemma2ForCausalLM) -> dict[str, SAE]:
    return trained(streams.live(tiny_gemma2_loaded), few())


@pytest.mark.parametrize("done", range(1, STEPS))
def test_a_training_on_a_model_goes_on_with_the_same_bits_wherever_its_buffer_stood(
        done: int, tiny_gemma2_loaded: Gemma2ForCausalLM, from_a_model: dict[str, SAE], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        trained(streams.live(tiny_gemma2_loaded), few(), tmp_path, crash=done + 1, checkpoint_every=done)

    resumed = trained(streams.live(tiny_gemma2_loaded), few(), tmp_path)

    assert streams.unequal(from_a_model, resumed) == []


def test_a_training_goes_on_in_the_scale_in_which_it_began(
        tiny_gemma2_loaded: Gemma2ForCausalLM, from_a_model: dict[str, SAE], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        trained(streams.live(tiny_gemma2_loaded), few(), tmp_path, crash=5, checkpoint_every=4)
    measured = streams.live(tiny_gemma2_loaded).sites
    a_little_off = {site: type(info)(d_in=info.d_in, rms_norm=1.01 * info.rms_norm, typical_norm=info.typical_norm)
                    for site, info in measured.items()}  # as another device would measure it

    resumed = trained(streams.live(tiny_gemma2_loaded, norms=a_little_off), few(), tmp_path)

    assert streams.unequal(from_a_model, resumed) == []
    assert resumed["jumprelu"].metadata["typical_norm"] == measured[streams.IN].typical_norm
