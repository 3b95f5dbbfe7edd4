"""Exports into one folder at the same time: one of them is written, whole, and the other one is told."""

import copy
import sys
import threading

import pytest
from extract.exports import ROWS, SITE, contents, finished, worker

from sae_hooks import attach_saes
from sae_hooks.errors import DataError
from sae_hooks.processes import held
from sae_hooks.store import open_features
from sae_hooks.store.claiming import alone

OTHERS = [{"text": "Another text, and as long as that of the first export."}] * len(ROWS)


@pytest.fixture
def other_model(tiny_gemma2_loaded, random_sae):
    return attach_saes(copy.deepcopy(tiny_gemma2_loaded), random_sae(192, 512, SITE, norm=34))


@pytest.mark.parametrize("changes", [
    {}, {"resume": False}, {"dtype": "float32"}, {"documents": OTHERS}, {"tokens_per_shard": 10_000}],
    ids=lambda changes: str(next(iter(changes), "the same")))
def test_an_export_that_is_overtaken_stops_and_leaves_the_faster_ones_store(
        export, model, other_model, tmp_path, changes):
    written = []

    def overtake(*_):
        handle.remove()
        export(tmp_path, model=other_model, **changes)
        written.append(contents(tmp_path))

    handle = model.register_forward_pre_hook(overtake)
    with pytest.raises(DataError, match=r"was overtaken by another export .*; nothing of that was changed"):
        export(tmp_path, resume=changes.get("resume", True))
    assert [contents(tmp_path)] == written
    open_features(tmp_path).verify()


def test_an_export_whose_folder_is_given_to_another_before_its_end_writes_no_manifest(export, other_model, tmp_path):
    def replace(rows, documents):
        for path in tmp_path.glob("shard-*"):
            path.unlink()
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path, model=other_model, dtype="float32", progress=interrupt)

    def interrupt(rows, documents):
        raise KeyboardInterrupt

    with pytest.raises(DataError, match="was overtaken"):
        export(tmp_path, tokens_per_shard=10_000, progress=replace)
    assert not (tmp_path / "manifest.json").exists()
    export(tmp_path, model=other_model, dtype="float32").verify()


def test_a_folder_is_for_one_at_a_time(tmp_path):
    entered = threading.Event()

    def enter():
        with alone(tmp_path):
            entered.set()

    other = threading.Thread(target=enter)
    with alone(tmp_path):
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(30)
    other.join()


@pytest.mark.slow
def test_a_system_without_such_locks_exports_without(export, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert held(tmp_path, wait=False) is held(tmp_path, wait=True) is None
    export(tmp_path).verify()


def test_two_processes_that_know_nothing_of_each_other_write_one_store(tmp_path):
    finished(worker(tmp_path / "alone"))
    processes = [worker(tmp_path / "f") for _ in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    failed = [told for process, told in zip(processes, errors, strict=True) if process.returncode]
    assert len(failed) <= 1
    assert all("was overtaken by another export" in told for told in failed)
    assert contents(tmp_path / "f") == contents(tmp_path / "alone")
