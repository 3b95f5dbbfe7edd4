"""What a training tells: means of the steps since the last report, as rows, as JSON lines and as a bar."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_hooks.training import CachedStream, JumpReLU, Learner, TrainConfig, Trainee, train
from sae_hooks.training.progress import Row

from . import streams
from .streams import IN, OUT

CONFIG: dict[str, Any] = {"steps": 10, "batch_size": 40, "warmup": 4, "decay": 0.5, "report_every": 4}
TRAINEES = [
    Trainee(name="a", site=IN, d_sae=24, objective=JumpReLU(sparsity=0.05, l0=0.4, warmup=5), dead_after=39),
    Trainee(name="b", site=IN, d_sae=24, objective=JumpReLU(sparsity=0.5, l0=2), site_out=OUT, learning_rate=0.02),
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return streams.store(tmp_path / "shards")


def told(stream: CachedStream, folder: Path | None = None, **changes: Any) -> list[Row]:
    rows: list[Row] = []
    train(stream, TRAINEES, TrainConfig(**CONFIG | changes), folder, log=rows.append, progress=False)
    return rows


def test_a_report_comes_at_every_so_many_steps_and_at_the_end_for_each_trainee(shards: Path) -> None:
    rows = told(streams.cached(shards))

    assert [(row["step"], row["name"]) for row in rows] == [(4, "a"), (4, "b"), (8, "a"), (8, "b"), (10, "a"),
                                                            (10, "b")]
    assert [row["tokens"] for row in rows[::2]] == [160, 320, 400]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)


def test_a_report_is_the_mean_over_its_steps_of_what_a_loop_by_hand_counts(shards: Path) -> None:
    stream = streams.cached(shards)
    learners = [Learner(trainee, stream.sites) for trainee in TRAINEES]
    sums, wanted = {}, []
    for step in range(10):
        rows = stream.next(40)
        rate = (0.1 + 0.9 * (1 - math.cos(math.pi * step / 4)) / 2 if step < 4 else 1) * min(1, (10 - step) / 5)
        for learner in learners:
            if step == 0:
                learner.start(rows)
            loss, target = learner.update(rows, step, rate), rows[learner.target].double()
            variance = (target - target.mean(0)).square().sum(1).mean()
            found = torch.tensor([float(loss.reconstruction), float(variance), float(loss.l0), 1.0])
            sums[learner.trainee.name] = sums.get(learner.trainee.name, 0) + found
            if step in (3, 7, 9):
                error, variance, l0, n = sums.pop(learner.trainee.name).tolist()
                idle = learner.idle > learner.trainee.dead_after
                known = step * 40 + 40 > learner.trainee.dead_after
                wanted.append([error / n, error / variance, l0 / n, float(idle.double().mean()) if known else -1,
                               loss.coefficient, learner.trainee.learning_rate * rate])

    got = told(streams.cached(shards))

    names = ("error", "fvu", "l0", "dead", "coefficient", "learning_rate")
    for row, values in zip(got, wanted, strict=True):
        assert [-1 if row[name] is None else row[name] for name in names] == pytest.approx(values, rel=1e-5)
    assert any(row["dead"] is not None and float(row["dead"]) > 0 for row in got)
    assert [row["dead"] is None for row in got] == [row["name"] == "b" for row in got]


def test_the_learning_rate_rises_along_a_cosine_and_ends_linearly(shards: Path) -> None:
    rows = told(streams.cached(shards), report_every=1)

    rates = [float(row["learning_rate"]) for row in rows if row["name"] == "b"]
    rise = [0.1, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2]
    assert rates == pytest.approx([0.02 * r for r in [*rise, 1, 1, 0.8, 0.6, 0.4, 0.2]])
    coefficients = [float(row["coefficient"]) for row in rows if row["name"] == "a"]
    assert coefficients == pytest.approx([0.05 * min(1, step / 5) for step in range(10)])


def test_the_rows_stand_in_the_folder_as_they_were_logged(shards: Path, tmp_path: Path) -> None:
    rows = told(streams.cached(shards), tmp_path / "run")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_the_bar_shows_l0_fvu_dead_share_speed_and_time_left(
        shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(streams.cached(shards), TRAINEES, TrainConfig(**CONFIG | {"steps": 20}))

    shown = capfd.readouterr()
    assert shown.out == ""
    assert "train: 100%" in shown.err
    assert "20/20" in shown.err
    for part in ("L0 ", "FVU ", "dead ", "tokens/s"):
        assert part in shown.err
    told(streams.cached(shards))
    assert capfd.readouterr().err == ""


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [30, -1, 1])
def test_a_torn_last_line_is_left_out_and_written_again(torn: int, shards: Path, tmp_path: Path) -> None:
    whole = told(streams.cached(shards), tmp_path, report_every=1, checkpoint_every=4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for gone in ("step-00000010", "step-00000008"):
        (tmp_path / "checkpoints" / gone).rename(tmp_path / gone)
    (tmp_path / "step-00000008").rename(tmp_path / "checkpoints" / "step-00000008")
    path.write_bytes(b"".join(lines[:18]) + lines[18][:torn])

    told(streams.cached(shards), tmp_path, report_every=1, checkpoint_every=4)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [untimed(row) for row in rows] == [untimed(row) for row in whole]


def test_a_last_line_that_lacks_only_its_end_is_kept(shards: Path, tmp_path: Path) -> None:
    told(streams.cached(shards), tmp_path)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[:-1])

    told(streams.cached(shards), tmp_path)

    assert path.read_bytes() == before


def test_lines_that_are_no_reports_are_left_out(shards: Path, tmp_path: Path) -> None:
    told(streams.cached(shards), tmp_path)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"7\nnull\n[]\n{}\n\xff\xfe\n" + before + b'{"step": "x"}\n')

    told(streams.cached(shards), tmp_path)

    assert path.read_bytes() == before


def untimed(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "tokens_per_second"}
