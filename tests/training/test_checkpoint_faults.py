"""Checkpoints on disks that refuse, under interrupts and under kill -9: nothing is lost and nothing is left lying."""

import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sae_hooks.errors import TrainingError
from sae_hooks.training.checkpoint import load_checkpoint, save_checkpoint

from .checkpoints import PARTS, content, names, save_two

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two(tmp_path):
    return save_two(tmp_path)


# --- disks that refuse --------------------------------------------------------------------------------------

FULL = """
import sys, torch
from pathlib import Path
from sae_hooks.errors import TrainingError
from sae_hooks.training.checkpoint import load_checkpoint, save_checkpoint
folder = Path(sys.argv[1]) / "run"
for step in range(1, 4):
    save_checkpoint(folder, step, {"a": {"x": torch.full((100_000,), step)}}, keep=3)  # 0.8 MB each
try:
    save_checkpoint(folder, 4, {"a": {"x": torch.full((50_000,), 4)}, "b": {"x": torch.full((100_000,), 4)}}, keep=3)
except TrainingError as error:
    print(error, "|", error.__cause__.errno)
print(sorted(p.name for p in folder.iterdir()))
left = load_checkpoint(folder)
print(left.step, set(left.parts["a"]["x"].tolist()))
save_checkpoint(folder, 5, {"a": {"x": torch.full((50_000,), 5)}}, keep=1)
print(sorted(p.name for p in folder.iterdir()), load_checkpoint(folder).step)
"""


def test_on_a_full_disk_nothing_is_lost_and_the_error_says_how_to_go_on(tmp_path):
    command = 'mount -t tmpfs -o size=3m none "$1" && exec "$2" -c "$3" "$1"'
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system of our own can be mounted here")
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", command, "sh", tmp_path, sys.executable, FULL], cwd=ROOT,
                         capture_output=True, text=True, check=True)
    error, listed, left, after = ran.stdout.splitlines()
    assert f"step 4 could not be saved in {tmp_path}/run: [Errno 28] No space left on device. It needs 1.2 MB" in error
    assert "free are 0.7 MB" in error
    assert error.endswith("resume: training goes on from step 3 | 28")
    assert listed == "['step-00000001', 'step-00000002', 'step-00000003']"
    assert left == "3 {3}"
    assert after == "['step-00000005'] 5"


@pytest.mark.parametrize("limit", [0, 100, 500, 2_000, 100_000, 400_000])  # bytes a file may have
def test_wherever_the_writing_is_refused_the_older_ones_stay_byte_for_byte(limit, two):
    before = content(two)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(TrainingError, match=r"File too large.*needs 0.4 MB.*goes on from step 2"):
            save_checkpoint(two, 3, {"small": {"x": 1}, "sae": {"W": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(two) == before
    assert names(two) == ["step-00000001", "step-00000002"]


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "run").write_text("a note")
    with pytest.raises(TrainingError, match=r"in .*run: .*File exists.*no earlier checkpoint is there"):
        save_checkpoint(tmp_path / "run", 1, PARTS)
    assert (tmp_path / "run").read_text() == "a note"


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("n", range(4))
def test_an_interrupt_at_any_call_leaves_what_was_there_and_no_rubbish(call, n, two, monkeypatch):
    calls, real = iter(range(100)), getattr(os, call)

    def interrupted(*args):
        if next(calls) == n:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, call, interrupted)
    try:
        save_checkpoint(two, 2, {"again": {}})  # replaces a step, which takes the most renames
    except KeyboardInterrupt:
        if list(load_checkpoint(two).parts) != ["again"]:
            assert names(two) == ["step-00000001", "step-00000002"]
    else:
        assert next(calls) <= n + 1  # so many calls there are not
    monkeypatch.undo()
    save_checkpoint(two, 3, PARTS)
    assert names(two) == ["step-00000002", "step-00000003"]


def test_the_content_is_on_the_disk_before_the_folder_gets_its_name_and_only_then_an_older_one_goes(two, monkeypatch):
    events = []

    def told(name, real):
        return lambda *args: (events.append(f"{name} {seen(args)}"), real(*args))

    def seen(args):
        path = Path(os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[-1])
        return "scratch" if path.name.endswith(".tmp") else path.name

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, told(name, getattr(os, name)))
    save_checkpoint(two, 3, {"a": {}, "b": {}})
    assert events == ["fsync 000-a.safetensors", "fsync 001-b.safetensors", "fsync manifest.json", "fsync scratch",
                      "rename step-00000003", f"fsync {two.name}", "rename scratch"]


# --- kill -9 ------------------------------------------------------------------------------------------------

KILLED = """
import os, random, shutil, signal, sys, time, warnings
from pathlib import Path
import torch
from sae_hooks.training.checkpoint import load_checkpoint, save_checkpoint
warnings.simplefilter("error")  # a checkpoint that is passed over would be a broken one

def save(folder, steps, told, keep=2):
    for step in steps:
        a, b = {"x": torch.full((20_000,), step), "n": step}, {"y": torch.tensor(step)}
        save_checkpoint(folder, step, {"a": a, "b": b}, keep=keep)
        os.write(told, b"%d " % step)

def child(folder, steps, keep=2, before=lambda: None):
    read, write = os.pipe()
    if not (pid := os.fork()):
        before()
        save(folder, steps, write, keep)
        os._exit(0)
    os.close(write)
    return pid, read

def check(folder, read):
    saved = [0, *map(int, os.read(read, 2**16).split())][-1]
    found = load_checkpoint(folder)
    step = found.step if found else 0
    assert saved <= step <= saved + 1, (saved, step)
    if found:
        assert (found.parts["a"]["x"] == step).all() and found.parts["a"]["n"] == found.parts["b"]["y"] == step
    save_checkpoint(folder, step + 1, {})
    assert all(p.name.startswith("step-") and len(p.name) == 13 for p in folder.iterdir()), list(folder.iterdir())
    return step

def kill_at(n):
    left = [n]
    def counted(real):
        def call(*args, **kwargs):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "mkdir", "open", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

root, reached, died = Path(sys.argv[1]), [], []
for n in range(int(sys.argv[2])):  # at random moments
    pid, read = child(root / str(n), range(1, 10_000))
    time.sleep(random.uniform(0.001, 0.15))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    reached.append(check(root / str(n), read))
    shutil.rmtree(root / str(n))
for n in range(1000):  # before each call that changes the disk; step 2 is saved twice
    pid, read = child(root / f"at {n}", [1, 2, 2], 1, lambda n=n: kill_at(n))
    alive = os.waitpid(pid, 0)[1] == 0
    check(root / f"at {n}", read)
    if alive:
        break
print(max(reached), n)
"""


def test_whatever_kill_9_leaves_is_the_last_step_saved_or_the_one_being_saved_whole(tmp_path):
    ran = subprocess.run([sys.executable, "-c", KILLED, tmp_path, "12"], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    reached, calls = map(int, ran.stdout.split())
    assert reached > 1  # the kills did not all come before the first was saved
    assert calls > 30


def test_what_a_living_process_writes_is_left_alone_and_a_dead_ones_rubbish_goes(two):
    for pid in (os.getppid(), 2**30, os.getpid()):  # in a container every run may have the same id
        (two / f".step-00000009.{pid}.abcd.tmp").mkdir()
        (two / f".step-00000009.{pid}.abcd.tmp" / "000-sae.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(two).step == 2
    save_checkpoint(two, 3, PARTS)
    assert names(two) == [f".step-00000009.{os.getppid()}.abcd.tmp", "step-00000002", "step-00000003"]
