"""benchmarks/speed_gpu.py runs from end to end, on the CPU with tiny shapes; what fails in it ends nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPLICED = ["bare", "nothing open", "1 spliced", "2 spliced", "capture a layer", "bare", "clamp 8 features"]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_gpu_parts

    return speed_gpu_parts


@pytest.fixture
def bench(parts):
    return parts.Bench(torch.device("cpu"), True, 3, torch.bfloat16, 0.001, print, 6)


def rows(output):
    """{section: its lines, without those that say how it was run}"""
    found = {}
    for text in re.split(r"^== ", output, flags=re.MULTILINE)[1:]:
        name, *lines = text.rstrip().splitlines()
        found[name.removesuffix(" ==")] = [line for line in lines if line][2:]
    return found


@pytest.mark.slow
def test_every_row_comes_out():
    done = subprocess.run([sys.executable, BENCHMARKS / "speed_gpu.py", "--smoke"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert not re.search("failed|out of memory|nan", done.stdout), done.stdout
    found = rows(done.stdout)
    assert [line[36:50].split() for line in found.pop("step")[1:]] == [
        ["ours"], ["dense", "autograd"], ["product"]] * 3
    assert len(found.pop("splice")) == 1 + 2 * 4 * 2
    assert [line.split()[2] for line in found.pop("sweep")[1:]] == ["50.0%", "10.0%", "3.0%", "1.5%", "0.7%", "0.2%"]
    assert found.pop("language-model") == []
    cases = {name: [line[10:28].strip() for line in lines[2:]] for name, lines in found.items()}
    wanted = {"prefill": SPLICED, "generate": SPLICED, "static": SPLICED, "compiled": ["bare", "clamp 8 features"]}
    assert cases == {f"language-model: {mode}, SAEs in bfloat16": names for mode, names in wanted.items()}


def test_what_fails_is_told_in_its_place_and_the_rest_is_measured(parts, bench, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 56.00 GiB")

    def wrong():
        raise ValueError("no such thing\nat all")

    calls = iter(range(100))
    builds = {"build": full, "call": lambda: parts.Case(full), "wrong": lambda: parts.Case(wrong),
              "later": lambda: parts.Case(lambda: full() if next(calls) > 3 else None), "well": lambda: parts.Case(int)}

    for together in (True, False):
        found = parts.measure(builds, bench, together)
        calls = iter(range(100))
        assert list(found) == list(builds)
        assert found["build"] == found["call"] == found["later"] == "out of memory"
        assert found["wrong"] == "failed: ValueError: no such thing"
        assert 0 < found["well"].seconds < 1
    assert "Traceback" in capsys.readouterr().err


def test_thresholds_give_the_l0_that_was_asked_for_also_off_the_tokens_that_set_them(parts):
    torch.manual_seed(0)
    sae = parts.random_sae(64, 2048, torch.float32, torch.device("cpu"))
    x = torch.randn(4096, 64) + torch.randn(64)

    parts.set_thresholds(sae, x[:2048], 60)

    assert parts.active(sae, x[2048:]) == pytest.approx(60, rel=0.1)
    assert bool((sae.threshold > 0).all())


def test_a_record_keeps_the_sections_that_were_not_run_again(parts, tmp_path, monkeypatch):
    from record import Record

    for section, line in (("step", "old"), ("splice", "other"), ("step", "new")):
        record = Record(tmp_path / "record.txt", "a machine")
        record.section(section)
        record.say(line)

    found = rows((tmp_path / "record.txt").read_text())
    assert found == {"step": ["new"], "splice": ["other"]}
