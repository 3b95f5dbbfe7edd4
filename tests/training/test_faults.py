"""Whatever goes wrong, a training says what, where and what to do, and what was done before is not lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2ForCausalLM

from sae_hooks.errors import CheckpointError, DataError, SaeWarning, TrainingError
from sae_hooks.sae import SAE
from sae_hooks.training import JumpReLU, Stream, TopK, TrainConfig, Trainee, load_checkpoint, train
from sae_hooks.training.progress import Row
from sae_hooks.training.text import documents, windows

from . import streams
from .streams import IN, OUT

ROOT = Path(__file__).parents[2]
ONE = Trainee(name="one", site=IN, d_sae=24, objective=JumpReLU(sparsity=0.05))
CONFIG: dict[str, Any] = {"steps": 9, "batch_size": 40, "warmup": 3, "report_every": 3, "checkpoint_every": 3}


def trained(stream: Stream, folder: Path | None = None, *some: Trainee, log: Any = lambda row: None,
            **changes: Any) -> dict[str, SAE]:
    return train(stream, some or [ONE], TrainConfig(**CONFIG | changes), folder, log=log, progress=False)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return streams.store(tmp_path / "shards")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


class Crash(Exception):
    pass


def crash_after(step: int) -> Any:
    def log(row: Row) -> None:
        if int(row["step"]) > step:
            raise Crash
    return log


@pytest.fixture
def stopped(shards: Path, run: Path) -> Path:
    """Two checkpoints, after the steps 3 and 6 of 9."""
    with pytest.raises(Crash):
        trained(streams.cached(shards), run, log=crash_after(6))
    assert steps(run) == ["step-00000003", "step-00000006"]
    return run

# --- checkpoints --------------------------------------------------------------------------------------------

def test_a_broken_checkpoint_is_passed_over_with_a_warning_and_the_bits_come_out_the_same(
        shards: Path, stopped: Path) -> None:
    file = next((stopped / "checkpoints" / "step-00000006").glob("*one*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)

    with pytest.warns(SaeWarning, match=r"passed over the broken checkpoint .*step-00000006.*; took step 3"):
        resumed = trained(streams.cached(shards), stopped)

    assert streams.unequal(trained(streams.cached(shards)), resumed) == []
    assert steps(stopped) == ["step-00000006", "step-00000009"]


def test_if_all_checkpoints_are_broken_nothing_is_touched(shards: Path, stopped: Path) -> None:
    for folder in (stopped / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}

    with pytest.raises(CheckpointError, match=r"broken ones only: .*step-00000006.*step-00000003"):
        trained(streams.cached(shards), stopped)

    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("config", "trainee", "named"), [
    ({"batch_size": 20}, {}, "batch_size was 40, is 20"),
    ({"steps": 12, "decay": 0.5}, {}, "steps was 9, is 12, decay was 0.0, is 0.5"),
    ({}, {"d_sae": 32, "seed": 1}, "one.d_sae was 24, is 32, one.seed was 0, is 1"),
    ({}, {"objective": JumpReLU(sparsity=0.06)}, r"one.objective.sparsity was 0.05, is 0.06"),
    ({}, {"objective": TopK(k=3)}, r"kind was JumpReLU, is TopK.*one.objective.k was not there, is 3"),
    ({}, {"name": "two"}, r"one.name was one, is not there.*two.name was not there, is two"),
])
def test_the_checkpoint_of_another_training_is_refused_and_the_differences_are_named(
        config: dict[str, Any], trainee: dict[str, Any], named: str, shards: Path, stopped: Path) -> None:
    given = {"name": "one", "site": IN, "d_sae": 24, "objective": ONE.objective} | trainee
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}

    with pytest.raises(CheckpointError, match=rf"step-00000006 is of another training: .*{named}.*another folder"):
        trained(streams.cached(shards), stopped, Trainee(**given), **config)

    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_other_activations_are_refused(shards: Path, stopped: Path) -> None:
    with pytest.raises(CheckpointError, match="read other activations"):
        trained(streams.cached(shards, seed=4), stopped)


def test_how_often_it_reports_and_saves_may_change(shards: Path, stopped: Path) -> None:
    resumed = trained(streams.cached(shards), stopped, report_every=1, checkpoint_every=2)

    assert streams.unequal(trained(streams.cached(shards)), resumed) == []

# --- disks --------------------------------------------------------------------------------------------------

@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The refusal of a full disk: writing past so many bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_ends_the_training_and_the_older_ones_stay(
        shards: Path, stopped: Path) -> None:
    with files_of_at_most(2000), pytest.raises(TrainingError, match=r"step 9 could not be saved in .*from step 6"):
        trained(streams.cached(shards), stopped)

    assert steps(stopped) == ["step-00000003", "step-00000006"]
    assert streams.unequal(trained(streams.cached(shards)), trained(streams.cached(shards), stopped)) == []


def test_metrics_that_cannot_be_written_end_the_training_with_a_word_on_how_to_go_on(shards: Path, run: Path) -> None:
    with pytest.raises(Crash):
        trained(streams.cached(shards), run, report_every=1, checkpoint_every=2, log=crash_after(2))
    with files_of_at_most(600), pytest.raises(
            TrainingError, match=r"step 3 could not be reported in .*metrics.jsonl: .*File too large.*last checkpoint"):
        trained(streams.cached(shards), run, report_every=1)
    assert (run / "metrics.jsonl").stat().st_size == 600
    assert steps(run) == ["step-00000002"]

    trained(streams.cached(shards), run, report_every=1)

    assert len((run / "metrics.jsonl").read_text().splitlines()) == 9


FULL = """
import sys
from pathlib import Path
from tests.training import streams
from sae_hooks.errors import TrainingError
from sae_hooks.training import JumpReLU, TrainConfig, Trainee, train
shards, run = Path(sys.argv[1]), Path(sys.argv[2]) / "run"
ONE = Trainee(name="one", site=streams.IN, d_sae=24, objective=JumpReLU(sparsity=0.05))
CONFIG = TrainConfig(steps=9, batch_size=40, warmup=3, report_every=1, checkpoint_every=2)
def attempt(folder, log=lambda row: None):
    try:
        return train(streams.cached(shards), [ONE], CONFIG, folder, log=log, progress=False)
    except TrainingError as error:
        print(error)
ballast = run.parent / "ballast"
def fill(row):
    if row["step"] == 5:  # between two checkpoints, all but a few bytes
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)): pass
            except OSError:
                pass
attempt(run, fill)
print(sorted(path.name for path in (run / "checkpoints").iterdir()))
attempt(run)  # still full
ballast.unlink()
print(streams.unequal(attempt(None), attempt(run)), len((run / "metrics.jsonl").read_text().splitlines()))
"""


def test_on_a_full_disk_a_training_stops_and_goes_on_when_there_is_room_with_the_same_bits(
        shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = 'mount -t tmpfs -o size=300k none "$1" && exec "$2" -c "$3" "$4" "$1"'
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
        pytest.skip("no file system of our own can be mounted here")

    ran = subprocess.run(["unshare", "-rm", "sh", "-c", command, "sh", disk, sys.executable, FULL, shards], cwd=ROOT,
                         capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})

    assert ran.returncode == 0, ran.stderr
    first, left, second, after = ran.stdout.splitlines()
    assert "No space left on device" in first
    assert left == "['step-00000002', 'step-00000004']"
    assert "No space left on device" in second
    assert after == "[] 9"


def test_a_folder_that_cannot_be_written_is_named_before_any_work_is_done(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("a file")
    stream = streams.cached(shards)

    for folder in (tmp_path / "note", tmp_path / "note" / "run", Path("/proc/run")):
        with pytest.raises(TrainingError, match=rf"cannot write to {folder}: .*another folder"):
            trained(stream, folder)

    assert stream.state_dict()["place"] == 0
    assert (tmp_path / "note").read_text() == "a file"


def test_a_folder_without_the_right_to_write_is_named_before_any_work_is_done(shards: Path) -> None:
    stream = streams.cached(shards)

    with tempfile.TemporaryDirectory() as name:
        run, user = Path(name), os.geteuid()
        run.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(TrainingError, match=rf"cannot write to {run}: .*Permission denied"):
                trained(stream, run)
        finally:
            os.seteuid(user)
        assert list(run.iterdir()) == []

    assert stream.state_dict()["place"] == 0

# --- numbers that are none ----------------------------------------------------------------------------------

@pytest.mark.parametrize("site", [IN, OUT])
def test_an_infinite_activation_is_told_from_a_bad_learning_rate_and_can_be_repaired(
        site: str, shards: Path, run: Path) -> None:
    two = Trainee(name="two", site=IN, site_out=OUT, d_sae=24, objective=ONE.objective)
    path = shards / site / "shard-00001.safetensors"
    whole, wanted = path.read_bytes(), trained(streams.cached(shards), None, ONE, two, steps=14)
    path.write_bytes(whole[:-2] + b"\x80\x7f")  # the last value of the last row: infinity in bf16

    with pytest.raises(DataError, match=rf"1 of 40 activations of {site} at step \d+ are not finite; harvest"):
        trained(streams.cached(shards), run, ONE, two, steps=14, checkpoint_every=1)

    path.write_bytes(whole)
    assert streams.unequal(wanted, trained(streams.cached(shards), run, ONE, two, steps=14)) == []


def test_an_infinite_activation_in_the_first_batch_is_named_too(shards: Path, run: Path) -> None:
    path = shards / IN / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-32 * 300] + b"\x80\x7f" * 16 * 300)

    with pytest.raises(DataError, match=r"of 40 activations of .* at step 0 are not finite"):
        trained(streams.cached(shards), run)

    assert not (run / "checkpoints").exists()


def test_a_loss_that_is_not_finite_names_the_learning_rate_and_the_checkpoint_before_stays(
        shards: Path, run: Path) -> None:
    wild = Trainee(name="wild", site=IN, d_sae=24, objective=ONE.objective, learning_rate=1e25)

    with pytest.raises(TrainingError, match=r"wild: the loss is (inf|nan) at step 1 .*learning rate \(1e\+25"):
        trained(streams.cached(shards), run, ONE, wild, checkpoint_every=1)

    assert steps(run) == ["step-00000001"]


def test_weights_that_are_not_finite_are_neither_saved_nor_given_out(shards: Path, run: Path) -> None:
    wild = Trainee(name="wild", site=IN, d_sae=24, objective=ONE.objective, learning_rate=1e40)

    with pytest.raises(TrainingError, match=r"wild: W_enc, .* became infinite or not a number; lower the l"):
        trained(streams.cached(shards), run, ONE, wild, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"wild: W_enc, .* became infinite"):
        trained(streams.cached(shards), None, wild, steps=1)

    assert not (run / "checkpoints").exists()

# --- data ---------------------------------------------------------------------------------------------------

def test_data_that_ends_early_is_an_error_and_what_was_learnt_of_it_is_saved(shards: Path, run: Path) -> None:
    with pytest.raises(DataError, match=r"the activations ended: 600 tokens were read.*epochs="):
        trained(streams.cached(shards, epochs=1), run, steps=20, checkpoint_every=10)

    found = load_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == 15
    more = trained(streams.cached(shards, epochs=2), run, steps=20)
    assert streams.unequal(trained(streams.cached(shards, epochs=2), steps=20), more) == []


def test_a_text_that_ends_early_is_an_error_and_more_text_goes_on_from_there(
        tiny_gemma2_loaded: Gemma2ForCausalLM, run: Path) -> None:
    def stream(n: int) -> Stream:
        return streams.live(tiny_gemma2_loaded, [IN], windows=list(streams.some_windows(0, 60))[:n], epochs=1)

    with pytest.raises(DataError, match=r"the texts ended: [0-9,]+ tokens were read.*Give more text"):
        trained(stream(30), run, checkpoint_every=100)

    found = load_checkpoint(run / "checkpoints")
    assert found is not None
    assert 0 < found.step < 9
    trained(stream(60), run)
    assert "step-00000009" in steps(run)


def test_a_batch_that_is_larger_than_the_data_is_named_at_once(
        shards: Path, run: Path, tiny_gemma2_loaded: Gemma2ForCausalLM) -> None:
    with pytest.raises(DataError, match=r"each of 600 .* batch of 700"):
        trained(streams.cached(shards, epochs=1), run, batch_size=700)
    with pytest.raises(DataError, match=r"buffer of 200 tokens cannot give batches of 700.*larger buffer_tokens"):
        trained(streams.live(tiny_gemma2_loaded), run, batch_size=700)
    with pytest.raises(DataError, match=r"do not fill a batch of 700"):
        trained(streams.live(tiny_gemma2_loaded, epochs=1, buffer_tokens=1000), run, batch_size=700)

    assert not (run / "checkpoints").exists()


def test_a_batch_that_is_larger_than_an_epoch_reads_on_in_the_next(shards: Path) -> None:
    assert trained(streams.cached(shards), batch_size=700, steps=2)["one"].metadata["n_training_tokens"] == 1400


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_empty_text_is_an_error_before_any_work(
        texts: list[str], tiny_gemma2_loaded: Gemma2ForCausalLM, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="holds no text at all"):
        streams.live(tiny_gemma2_loaded, windows=windows(documents(texts), tiny_tokenizer, 16))


def test_a_vocabulary_of_special_tokens_only_is_an_error_before_any_work(
        tiny_gemma2_loaded: Gemma2ForCausalLM) -> None:
    with pytest.raises(DataError, match=r"no ordinary token is left to train on: .*special_ids has 4,096"):
        streams.live(tiny_gemma2_loaded, special_ids=range(4096))

# --- what is asked for --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("some", "named"), [
    ([], r"one trainee or more, of different names; got \[\]"),
    ([ONE, Trainee(name="two", site=IN, d_sae=80), ONE], r"different names; got \['one', 'two', 'one'\]"),
    ([Trainee(name="_stream", site=IN, d_sae=80)], "cannot begin with an underscore, as _stream does"),
    ([Trainee(name="two", site="layers.9.output", d_sae=80)], f"two: no activations of layers.9.output; .* are {IN}"),
    ([Trainee(name="two", site=IN, site_out="layers.9.output", d_sae=80)], "no activations of layers.9.output"),
])
def test_trainees_that_cannot_be_are_refused_before_anything_is_written(
        some: list[Trainee], named: str, shards: Path, run: Path) -> None:
    with pytest.raises(TrainingError, match=named):
        train(streams.cached(shards), some, TrainConfig(**CONFIG), run, progress=False)

    assert not run.exists()


@pytest.mark.parametrize("name", ["steps", "batch_size", "report_every", "checkpoint_every"])
def test_counts_below_one_are_refused(name: str, shards: Path, run: Path) -> None:
    with pytest.raises(TrainingError, match=f"expected {name} of 1 or more, got 0"):
        trained(streams.cached(shards), run, **{name: 0})

    assert not run.exists()


def test_an_sae_of_one_feature_trains_by_every_objective(shards: Path) -> None:
    some = [Trainee(name=name, site=IN, d_sae=1, objective=replace(o, l0=0.5) if getattr(o, "l0", None) else o)
            for name, o in streams.OBJECTIVES.items() if not hasattr(o, "k") and name != "jumprelu-prefixes"]
    some.append(Trainee(name="topk", site=IN, d_sae=1, objective=TopK(k=1)))

    found = trained(streams.cached(shards), None, *some)

    assert {sae.d_sae for sae in found.values()} == {1}
    x = streams.cached(shards).next(50)[IN]
    assert all(sae(x).isfinite().all() for sae in found.values())


def test_a_name_with_slashes_is_no_path(shards: Path, run: Path) -> None:
    name = "../../layer 1/l0=30"
    found = trained(streams.cached(shards), run, Trainee(name=name, site=IN, d_sae=8, objective=TopK(k=2)))

    again = trained(streams.cached(shards), run, Trainee(name=name, site=IN, d_sae=8, objective=TopK(k=2)))

    assert streams.unequal(found, again) == []
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "shards"]


def test_what_fails_in_a_tracker_comes_through_and_loses_nothing(shards: Path, run: Path) -> None:
    with pytest.raises(Crash):
        trained(streams.cached(shards), run, log=crash_after(3))
    torch.manual_seed(1)

    assert streams.unequal(trained(streams.cached(shards)), trained(streams.cached(shards), run)) == []
    shutil.rmtree(run)
