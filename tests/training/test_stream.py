"""Shuffled batches from shards: each row once an epoch, in an order that no stop, rank or end of an epoch changes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_hooks.errors import CheckpointError, DataError
from sae_hooks.training import stream as stream_module
from sae_hooks.training.shards import HarvestInfo, Shards
from sae_hooks.training.stream import CachedStream

A, B = "layers.1.output", "layers.2.mlp.input"
LENGTHS = (30, 1, 50, 19)  # rows of each shard: 100 in all


def store(folder: Path, lengths: tuple[int, ...] = LENGTHS, sites: tuple[str, ...] = (A, B), start: int = 0,
          **changes: Any) -> Path:
    """Shards whose row i says i: (i, 0) at site A, (-i, 0, 0) at B, rms_norm 2."""
    for site in sites:
        facts = {"site": site, "model_name": "tiny", "typical_norm": 3.0, "rms_norm": 2.0,
                 "d_in": 2 if site == A else 3, "window": 5, "seed": 0, "sites": sites} | changes
        (folder / site).mkdir(parents=True)
        (folder / site / "harvest.json").write_text(json.dumps(asdict(HarvestInfo(**facts))))
        for n, (length, end) in enumerate(zip(lengths, np.cumsum(lengths) + start, strict=True)):
            add_shard(folder, site, n, range(int(end) - length, int(end)))
    return folder


def add_shard(folder: Path, site: str, n: int, rows: range) -> None:
    x = torch.zeros(len(rows), 2 if site == A else 3, dtype=torch.bfloat16)
    x[:, 0] = torch.tensor(rows) * (1 if site == A else -1)
    save_file({"x": x}, folder / site / f"shard-{n:05d}.safetensors")


def read(stream: CachedStream, sizes: list[int], site: str = A) -> list[int]:
    """The numbers of the rows that the batches hold."""
    return [round(2 * i) for size in sizes for i in stream.next(size)[site][:, 0].tolist()]


# --- what comes, and in which order ---------------------------------------------------------------


def test_every_row_comes_once_an_epoch_however_large_the_batches(tmp_path: Path) -> None:
    store(tmp_path)

    for sizes in ([100], [7] * 14 + [2], [99, 1]):
        assert sorted(read(CachedStream(tmp_path), sizes)) == list(range(100))
    assert read(CachedStream(tmp_path), [100]) == read(CachedStream(tmp_path), [7] * 14 + [2])


def test_the_order_is_of_seed_and_epoch_alone(tmp_path: Path) -> None:
    store(tmp_path)
    orders = [read(CachedStream(tmp_path, seed=seed), [100]) for seed in (0, 0, 1)]

    twice = read(CachedStream(tmp_path, seed=0, epochs=2), [30, 100, 70])

    assert orders[0] == orders[1] != orders[2]
    assert twice[:100] == orders[0] != twice[100:]
    assert sorted(twice[100:]) == list(range(100))
    assert max(abs(np.corrcoef(range(100), order)[0, 1]) for order in orders) < 0.35


def test_batches_are_float32_of_mean_square_one_and_aligned_across_sites(tmp_path: Path) -> None:
    stream = CachedStream(store(tmp_path))

    batch = stream.next(40)

    assert list(batch) == list(stream.sites) == [A, B]
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        A: ((40, 2), torch.float32), B: ((40, 3), torch.float32)}
    assert torch.equal(batch[A][:, 0], -batch[B][:, 0])
    assert (stream.sites[B].d_in, stream.sites[B].rms_norm, stream.sites[B].typical_norm) == (3, 2.0, 3.0)
    assert stream.model_name == "tiny"
    assert list(CachedStream(tmp_path, [B]).sites) == [B]


def test_an_order_of_many_pools_is_each_row_once_and_mixes_distant_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(stream_module, "POOL_CHUNKS", 8)
    order = stream_module._Order(1001, seed=3)

    whole = order.take(0, 0, 1001)

    assert sorted(whole.tolist()) == list(range(1001))
    assert order.take(0, 30, 500).tolist() == whole[30:500].tolist()
    assert order.take(1, 0, 1001).tolist() != whole.tolist()
    assert np.ptp(whole[:32]) > 500
    assert np.abs(np.diff(whole)).mean() > 200


def test_ranks_make_up_the_batch_that_one_process_would_read(tmp_path: Path) -> None:
    store(tmp_path)
    alone = CachedStream(tmp_path, epochs=None)
    ranks = [CachedStream(tmp_path, epochs=None, share=(i, 3)) for i in range(3)]

    for size in (32, 10, 90, 1, 70):
        whole, parts = alone.next(size), [rank.next(size) for rank in ranks]
        for i, part in enumerate(parts):
            assert torch.equal(part[B], whole[B][i::3])
    assert len({str(rank.state_dict()) for rank in [alone, *ranks]}) == 1


def test_only_the_first_tokens_are_read_if_so_many_are_asked_for(tmp_path: Path) -> None:
    assert sorted(read(CachedStream(store(tmp_path), max_tokens=37), [37])) == list(range(37))


def test_several_folders_are_read_as_one_with_one_scale(tmp_path: Path) -> None:
    one = store(tmp_path / "one", (60,), (A,), rms_norm=2.0, typical_norm=3.0)
    two = store(tmp_path / "two", (40,), (A,), start=60, rms_norm=4.0, typical_norm=5.0)

    stream = CachedStream([one, two])

    rms = (0.6 * 4 + 0.4 * 16) ** 0.5
    assert stream.sites[A].rms_norm == pytest.approx(rms)
    assert stream.sites[A].typical_norm == pytest.approx(3.8)
    rows = sorted(stream.next(100)[A][:, 0].mul(rms).round().int().tolist())
    assert rows == list(range(100))


# --- going on -------------------------------------------------------------------------------------


def test_going_on_after_any_batch_gives_equal_batches_also_across_epochs(tmp_path: Path) -> None:
    store(tmp_path)
    sizes = [30, 30, 30, 30, 64, 100, 1, 15]
    through, states, batches = CachedStream(tmp_path, seed=5, epochs=3), [], []
    for size in sizes:
        states.append(through.state_dict())
        batches.append(through.next(size))

    for k, state in enumerate(states):
        again = CachedStream(tmp_path, seed=5, epochs=3)
        again.next(11)
        again.load_state_dict(json.loads(json.dumps(state)))
        for size, batch in zip(sizes[k:], batches[k:], strict=True):
            found = again.next(size)
            assert all(torch.equal(found[site], batch[site]) for site in (A, B))


@pytest.mark.parametrize("other", [{"seed": 1}, {"max_tokens": 90}, {"sites": [A]}])
def test_a_place_in_other_activations_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    state = CachedStream(store(tmp_path)).state_dict()

    with pytest.raises(CheckpointError, match="read other activations than"):
        CachedStream(tmp_path, **other).load_state_dict(state)


# --- more shards ----------------------------------------------------------------------------------


def longer(folder: Path, end: int = 160) -> CachedStream:
    """The harvest of 100 rows, made longer."""
    for site in (A, B):
        add_shard(folder, site, 4, range(100, end))
    return CachedStream(folder)


@pytest.mark.parametrize("done", [40, 90, 100])
def test_a_stream_goes_on_in_a_harvest_that_was_made_longer_and_reads_what_is_new_last(
        tmp_path: Path, done: int) -> None:
    stream = CachedStream(store(tmp_path))
    before, wanted = read(stream, [done]), read(CachedStream(tmp_path), [100])

    again = longer(tmp_path)
    again.load_state_dict(stream.state_dict())
    rows = before + read(again, [15] * ((160 - done) // 15))

    assert rows[:100] == wanted
    assert set(rows[100:]) <= set(range(100, 160))
    assert len(set(rows)) == len(rows) > 145
    assert rows[100:] != sorted(rows[100:])
    with pytest.raises(DataError, match=r"each of 160 up to 1 times"):
        again.next(15)


def test_from_the_next_epoch_on_all_rows_are_shuffled_together(tmp_path: Path) -> None:
    stream = CachedStream(store(tmp_path), epochs=3)
    read(stream, [100, 30])
    longer(tmp_path)

    again = CachedStream(tmp_path, epochs=3)
    again.load_state_dict(stream.state_dict())
    rows, following = read(again, [130]), read(again, [160])

    assert set(rows[70:]) == set(range(100, 160))
    assert sorted(following) == list(range(160))
    assert len(set(following[:100]) - set(range(100))) > 10


def test_a_harvest_may_grow_time_and_again_and_each_stop_has_the_same_bits(tmp_path: Path) -> None:
    through = CachedStream(store(tmp_path), epochs=None)
    read(through, [70])
    grown = longer(tmp_path)
    through, state = CachedStream(tmp_path, epochs=None), through.state_dict()
    through.load_state_dict(state)
    read(through, [120])  # into the second epoch, of 160
    for site in (A, B):
        add_shard(tmp_path, site, 5, range(160, 180))
    state = json.loads(json.dumps(through.state_dict()))
    stops, batches = [], []
    for size in (50, 90, 7, 200, 300):
        through = CachedStream(tmp_path, epochs=None)
        through.load_state_dict(state)
        batches.append(read(through, [size]))
        state = json.loads(json.dumps(through.state_dict()))
        stops.append(state)

    again = CachedStream(tmp_path, epochs=None)
    again.load_state_dict(stops[0])

    assert grown.rows == 160
    assert read(again, [90, 7, 200, 300]) == [row for batch in batches[1:] for row in batch]
    third = [row for batch in batches for row in batch][150:330]  # of the second epoch, 160 + 20, 30 were read before
    assert sorted(third) == list(range(180))


def test_the_scale_stays_what_it_was_when_another_folder_comes_after(tmp_path: Path) -> None:
    one = store(tmp_path / "one", (60,), (A,), rms_norm=2.0)
    stream = CachedStream(one)
    state = stream.state_dict()
    two = store(tmp_path / "two", (40,), (A,), start=60, rms_norm=4.0)

    both = CachedStream([one, two])
    assert both.sites != stream.sites
    both.load_state_dict(state)

    assert both.sites == stream.sites
    assert sorted(read(both, [100])) == list(range(100))


def test_shards_that_came_before_or_between_those_that_were_read_are_refused(tmp_path: Path) -> None:
    store(tmp_path / "hole", (30, 20, 20, 20))
    kept = {site: (tmp_path / "hole" / site / "shard-00001.safetensors").read_bytes() for site in (A, B)}
    for site in kept:
        (tmp_path / "hole" / site / "shard-00001.safetensors").unlink()
    hole = CachedStream(tmp_path / "hole").state_dict()
    for site, content in kept.items():
        (tmp_path / "hole" / site / "shard-00001.safetensors").write_bytes(content)
    one, two = (store(tmp_path / name, (50,), (A,)) for name in ("one", "two"))
    first = CachedStream([one, two]).state_dict()
    add_shard(one, A, 1, range(50, 100))

    for state, folders in ((hole, tmp_path / "hole"), (first, [one, two])):
        with pytest.raises(CheckpointError, match="only come after those that it read"):
            CachedStream(folders).load_state_dict(state)


def test_a_harvest_that_became_shorter_or_another_one_of_the_same_length_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "one")
    state = longer(tmp_path / "one").state_dict()
    other = longer(store(tmp_path / "other", seed=1))

    for site in (A, B):
        (tmp_path / "one" / site / "shard-00004.safetensors").unlink()

    for stream in (CachedStream(tmp_path / "one"), other):
        with pytest.raises(CheckpointError, match="read other activations than"):
            stream.load_state_dict(state)


# --- ends and faults ------------------------------------------------------------------------------


def test_activations_that_end_early_say_how_many_there_were_and_lose_nothing(tmp_path: Path) -> None:
    stream = CachedStream(store(tmp_path), epochs=2)
    seen = read(stream, [90, 90])

    with pytest.raises(DataError, match=r"180 tokens were read, .*100 up to 2 times, .* 20 left .* of 30.*epochs="):
        stream.next(30)

    rest = read(stream, [20])
    assert sorted(seen + rest) == sorted([*range(100), *range(100)])


def test_activations_are_read_again_without_end_if_asked(tmp_path: Path) -> None:
    stream = CachedStream(store(tmp_path), epochs=None)

    assert sorted(read(stream, [70] * 10)) == sorted(list(range(100)) * 7)


def test_sites_whose_rows_do_not_match_are_refused(tmp_path: Path) -> None:
    store(tmp_path / "counts", sites=(A,))
    store(tmp_path / "counts", (30, 1, 50, 18), sites=(B,))
    store(tmp_path / "apart", sites=(A,))
    store(tmp_path / "apart", sites=(B,))
    store(tmp_path / "other", sites=(A,), model_name="large")

    with pytest.raises(DataError, match=r"layers.1.output: 100 rows in 4 shards, .*99 rows.*harvest them together"):
        CachedStream(tmp_path / "counts")
    with pytest.raises(DataError, match="harvest them together"):
        CachedStream(tmp_path / "apart")  # of equal length, but each dropped its own sinks
    with pytest.raises(DataError, match="different models"):
        CachedStream([tmp_path / "apart", tmp_path / "other"], [A])


def test_a_harvest_that_is_being_made_is_read_as_far_as_all_sites_are(tmp_path: Path) -> None:
    store(tmp_path)
    add_shard(tmp_path, A, 4, range(100, 120))

    assert sorted(read(CachedStream(tmp_path), [100], B)) == sorted(-i for i in range(100))


def test_a_folder_without_a_harvest_and_a_broken_shard_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no harvest"):
        CachedStream(tmp_path)
    store(tmp_path)
    with pytest.raises(DataError, match=r"layers\.9\.output"):
        CachedStream(tmp_path, ["layers.9.output"])
    path = tmp_path / B / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00002\.safetensors is broken"):
        CachedStream(tmp_path)


@pytest.mark.parametrize(("given", "said"), [
    ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or more; got 0"),
    ({"max_tokens": 20.0}, "max_tokens must be .*; got 20.0"), ({"epochs": 0}, "epochs must be .*; got 0"),
    ({"epochs": True}, "epochs must be .*; got True"), ({"seed": -1}, "seed must be .*, 0 or more; got -1"),
    ({"share": (0, 0)}, r"share\[1\] must be .*; got 0"), ({"share": (-1, 2)}, r"share\[0\] must be .*; got -1"),
    ({"share": (2, 2)}, r"share must be \(i, n\), with i from 0 to n - 1; got \(2, 2\)"), ({"share": 1}, "got 1")])
def test_numbers_that_cannot_be_are_refused_by_name(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    store(tmp_path)

    with pytest.raises(DataError, match=said):
        CachedStream(tmp_path, **given)


def test_so_are_sizes_of_a_batch_and_of_what_is_mapped_and_numpys_are_numbers(tmp_path: Path) -> None:
    store(tmp_path)

    for size in (0, -1, True, 2.0):
        with pytest.raises(DataError, match=f"size must be a whole number, 1 or more; got {size}"):
            CachedStream(tmp_path).next(size)
        with pytest.raises(DataError, match=f"max_tokens must be a whole number, 1 or more; got {size}"):
            Shards(tmp_path / A, size)
    counted = CachedStream(tmp_path, seed=np.int64(3), epochs=np.int64(2), max_tokens=np.int64(40))
    assert counted.state_dict() == CachedStream(tmp_path, seed=3, epochs=2, max_tokens=40).state_dict()
