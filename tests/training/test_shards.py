"""The harvest on disk: whole shards or none, gone on with after any stop, and of one harvest alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sae_hooks.errors import DataError, SaeWarning
from sae_hooks.training.harvest import harvest
from sae_hooks.training.shards import UNSTATED, HarvestInfo, Shards, harvest_infos, read_info, write_shards
from sae_hooks.training.stream import CachedStream
from sae_hooks.training.text import Window, Windows

from .conftest import BOS, SINK

SITE, OTHER = "model.layers.1.output", "model.layers.0.output"
NORMED = "model.layers.1.post_attention_layernorm.normalized"  # has no sinks
SPECIAL = [0, BOS]
WINDOWS = [np.array(ids, dtype=np.int32)
           for ids in ([BOS, 9, SINK, 10, 11], [12, 13], [14, 15, 16, BOS], [17, 18, 19])]
MANY = [np.array([BOS, i, i + 1], dtype=np.int32) for i in range(10, 20)]  # of two ordinary tokens
RESULT = {0: 3, 1: 2, 2: 3, 3: 3}  # ordinary tokens of each shard of one window


def info_of(site: str = SITE, **changes: Any) -> HarvestInfo:
    facts: dict[str, Any] = {"site": site, "model_name": "tiny", "typical_norm": 4.0, "rms_norm": 2.0,
                             "d_in": 16, "window": 5, "seed": 0}
    return HarvestInfo(**(facts | changes))


def write(model: LlamaForCausalLM, folder: Path, sites: tuple[str, ...] = (SITE,), windows: Any = WINDOWS,
          **changes: Any) -> list[int]:
    named = {name: changes.pop(name) for name in ("worker", "workers", "windows_per_shard") if name in changes}
    infos = [info_of(site, **changes) for site in sites]
    return list(write_shards(model, folder, infos, windows, SPECIAL, **({"windows_per_shard": 1} | named)))


def files_in(folder: Path) -> dict[str, torch.Tensor | str]:
    """Everything below a folder: tensors, and the text of what is none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): load_file(path)["x"] if path.suffix == ".safetensors" else path.read_text()
            for path in files}


def same(one: Path, other: Path) -> bool:
    here, there = files_in(one), files_in(other)
    return here.keys() == there.keys() and all(
        torch.equal(x, there[name]) if isinstance(x, torch.Tensor) else x == there[name]  # type: ignore[arg-type]
        for name, x in here.items())


# --- going on -------------------------------------------------------------------------------------


def test_a_harvest_that_was_cut_off_goes_on_where_it_stopped(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    args = (model_with_a_sink_token, tmp_path, [info_of()], WINDOWS, SPECIAL)
    first = next(write_shards(*args, windows_per_shard=1))
    untouched = (tmp_path / SITE / "shard-00000.safetensors").stat().st_mtime_ns

    rest = list(write_shards(*args, windows_per_shard=1))

    assert [first, *rest] == list(RESULT.values())
    assert (tmp_path / SITE / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert list(write_shards(*args, windows_per_shard=1)) == []
    assert len(Shards(tmp_path / SITE)) == 11


HARVEST = """
from pathlib import Path
import numpy as np
import torch
from torch import nn
from sae_hooks.training.shards import HarvestInfo, write_shards

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(40, 16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, input_ids, **other):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)

def shards(folder):
    windows = list(np.random.default_rng(0).integers(8, 40, (320, 12)).astype(np.int32))
    infos = [HarvestInfo(site=f"layers.{i}.output", model_name="tiny", typical_norm=2.0, rms_norm=2.0, d_in=16,
                         window=12, seed=0) for i in (0, 1)]
    yield from write_shards(Tiny(), Path(folder), infos, windows, [0, 1], windows_per_shard=4)
"""


def test_a_harvest_that_was_killed_at_any_moment_goes_on_to_the_same_files(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(HARVEST, names)
    program = HARVEST + f"for tokens in shards({str(tmp_path / 'killed')!r}): print(tokens, flush=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(5):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    left = len(list((tmp_path / "killed").rglob("shard-*")))

    rest, whole = (list(names["shards"](tmp_path / folder)) for folder in ("killed", "whole"))

    assert child.returncode == -signal.SIGKILL
    assert 10 <= left < 160
    assert len(rest) < len(whole) == 80
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_workers_share_the_shards(model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path / "one")
    for worker in (1, 0):
        write(model_with_a_sink_token, tmp_path / "two", worker=worker, workers=2)

    assert same(tmp_path / "one", tmp_path / "two")


def test_windows_that_are_read_as_they_come_give_the_same_shards(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path / "list", windows_per_shard=3)
    write(model_with_a_sink_token, tmp_path / "read", windows=Windows(WINDOWS), windows_per_shard=3)

    assert same(tmp_path / "list", tmp_path / "read")
    assert len(list((tmp_path / "list").rglob("shard-*"))) == 2


def test_a_longer_harvest_of_the_same_text_adds_shards(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    assert write(model_with_a_sink_token, tmp_path, windows=WINDOWS[:2]) == [3, 2]
    assert write(model_with_a_sink_token, tmp_path) == [3, 3]


def test_a_longer_harvest_begins_where_the_last_shard_ended_and_leaves_it_as_it_is(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    args, sites = (model_with_a_sink_token, tmp_path), (SITE, NORMED)
    assert write(*args, sites, MANY[:5], windows_per_shard=3) == [6, 4]
    stream = CachedStream(tmp_path, epochs=2)
    stream.next(7)
    short = (tmp_path / SITE / "shard-00001.safetensors").read_bytes()

    assert write(*args, sites, MANY, windows_per_shard=3, worker=1, workers=2) == [4]
    (tmp_path / SITE / "shard-00001.safetensors").unlink()
    assert write(*args, sites, MANY, windows_per_shard=3) == [4, 6]

    assert (tmp_path / SITE / "shard-00001.safetensors").read_bytes() == short
    found = torch.cat([*Shards(tmp_path / SITE).parts])
    assert torch.equal(found, harvest(model_with_a_sink_token, {SITE: 4.0}, MANY, SPECIAL)[SITE])
    assert write(*args, sites, MANY[:4], windows_per_shard=3) == []
    longer = CachedStream(tmp_path, epochs=2)
    longer.load_state_dict(stream.state_dict())
    assert len(longer.next(3 + 10 + 20)[SITE]) == 33


def test_a_harvest_of_less_than_a_shard_can_be_made_longer(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    for n, tokens in ((2, 5), (4, 6)):
        infos = claimed(model_with_a_sink_token, tmp_path, windows=WINDOWS[:n], windows_per_shard=9)
        assert list(write_shards(model_with_a_sink_token, tmp_path, infos, WINDOWS[:n], SPECIAL,
                                 windows_per_shard=9)) == [tokens]


def test_the_first_windows_of_a_text_of_which_more_is_there_are_no_other_text(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    args = (model_with_a_sink_token, tmp_path)
    infos = claimed(*args, windows=WINDOWS, windows_per_shard=3)
    assert list(write_shards(*args, infos, WINDOWS, SPECIAL, windows_per_shard=3)) == [8, 3]

    assert claimed(*args, windows=WINDOWS[:1], windows_per_shard=3, text=WINDOWS) == infos
    assert not list(write_shards(*args, infos, WINDOWS[:1], SPECIAL, windows_per_shard=3, text=WINDOWS))

    for other in (WINDOWS[1:], WINDOWS[:2]):
        with pytest.raises(DataError, match="text: there"):
            claimed(*args, windows=WINDOWS[:1], windows_per_shard=3, text=other)


def forget_windows(folder: Path) -> None:
    """Leave a folder's shards as they were before they told their windows."""
    for path in folder.rglob("*.safetensors"):
        save_file(load_file(path), path)


def test_a_full_last_shard_that_does_not_tell_its_windows_is_gone_on_behind_and_another_named(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    args = (model_with_a_sink_token, tmp_path)
    write(*args, windows=MANY[:6], windows_per_shard=3)
    forget_windows(tmp_path)
    assert write(*args, windows=MANY[:8], windows_per_shard=3) == [4]
    forget_windows(tmp_path)
    assert write(*args, windows=MANY[:8], windows_per_shard=3) == []

    with pytest.raises(DataError, match=r"shard-00002.safetensors has 4 of the 6 tokens of its 3 windows: a shorter"):
        write(*args, windows=MANY, windows_per_shard=3)

    (tmp_path / SITE / "shard-00002.safetensors").unlink()
    assert write(*args, windows=MANY, windows_per_shard=3) == [6, 2]


def test_a_full_last_shard_with_many_sinks_is_told_from_one_that_is_not(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    sinks = [np.array([SINK, SINK, 9, 10], dtype=np.int32)] * 4
    write(model_with_a_sink_token, tmp_path, windows=sinks[:2], windows_per_shard=2)
    forget_windows(tmp_path)

    assert write(model_with_a_sink_token, tmp_path, windows=sinks, windows_per_shard=2) == [4]


def test_shards_that_do_not_follow_each_other_are_named(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path, windows=MANY, windows_per_shard=3)
    path = tmp_path / SITE / "shard-00001.safetensors"
    save_file(load_file(path), path, {"windows": "4:6"})

    with pytest.raises(DataError, match=r"expected shard 1 to begin with window 3, and they say \(4, 6\)"):
        write(model_with_a_sink_token, tmp_path, windows=MANY, windows_per_shard=3)


# --- several sites --------------------------------------------------------------------------------


def test_rows_of_several_sites_are_of_the_same_tokens(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path, (SITE, NORMED))
    ids = torch.tensor(WINDOWS[0].astype(np.int64))[None]
    hidden = model_with_a_sink_token(ids, output_hidden_states=True).hidden_states[2][0]

    shards = {site: Shards(tmp_path / site) for site in (SITE, NORMED)}

    assert [len(x) for x in shards[SITE].parts] == [len(x) for x in shards[NORMED].parts] == [3, 2, 3, 3]
    torch.testing.assert_close(shards[SITE].parts[0].float(), hidden[[1, 3, 4]], rtol=1e-2, atol=1e-2)
    assert shards[NORMED].parts[0].float().norm(dim=1).tolist() == pytest.approx([4.0] * 3, rel=1e-2)


def test_a_shard_that_one_site_lacks_is_written_for_all(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path / "whole", (SITE, NORMED))
    write(model_with_a_sink_token, tmp_path / "cut", (SITE, NORMED))
    (tmp_path / "cut" / NORMED / "shard-00002.safetensors").unlink()

    assert write(model_with_a_sink_token, tmp_path / "cut", (SITE, NORMED)) == [3]
    assert same(tmp_path / "cut", tmp_path / "whole")


# --- one harvest a folder -------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "said"), [
    ({"seed": 1}, "seed: there 0, here 1"), ({"typical_norm": 5.0, "window": 7}, "window: there 5, here 7"),
    ({"windows_per_shard": 2}, "windows_per_shard: there 1, here 2"), ({"windows": WINDOWS[1:]}, "text: there"),
    ({"sites": (SITE, OTHER)}, "sites: there")])
def test_another_harvest_in_the_folder_is_refused_and_what_differs_named(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(model_with_a_sink_token, tmp_path)
    before = files_in(tmp_path).keys()

    with pytest.raises(DataError, match="holds another harvest; take a new folder") as caught:
        write(model_with_a_sink_token, tmp_path, **changes)

    assert said in str(caught.value)
    assert "model_name" not in str(caught.value)
    assert files_in(tmp_path).keys() == before


def test_a_harvest_from_before_the_text_was_noted_is_gone_on_with(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path, windows=WINDOWS[:1])
    path = tmp_path / SITE / "harvest.json"
    facts = {k: v for k, v in json.loads(path.read_text()).items() if k not in UNSTATED}
    path.write_text(json.dumps(facts))

    assert write(model_with_a_sink_token, tmp_path) == [2, 3, 3]
    assert json.loads(path.read_text()) == facts
    assert read_info(tmp_path / SITE) == info_of()


def claimed(model: LlamaForCausalLM, folder: Path, **changes: Any) -> list[HarvestInfo]:
    facts: dict[str, Any] = {"sites": [SITE, NORMED], "windows": WINDOWS, "model_name": "tiny", "window": 5, "seed": 0,
                             "windows_per_shard": 2} | changes
    return harvest_infos(model, folder, facts.pop("sites"), facts.pop("windows"), SPECIAL, **facts)


def test_what_was_measured_first_counts_for_whoever_comes_later(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    first = claimed(model_with_a_sink_token, tmp_path)
    path = tmp_path / SITE / "harvest.json"
    another = {"rms_norm": first[0].rms_norm * 1.01}  # as another machine would measure
    path.write_text(json.dumps(json.loads(path.read_text()) | another))
    first[0] = replace(first[0], **another)

    assert claimed(model_with_a_sink_token, tmp_path) == first
    assert list(write_shards(model_with_a_sink_token, tmp_path, first, WINDOWS, SPECIAL, windows_per_shard=2)) == [5, 6]
    assert first[0].sites == (SITE, NORMED)
    assert first[1].rms_norm == pytest.approx(4.0, rel=1e-3)
    with pytest.raises(DataError, match="sites: there"):
        claimed(model_with_a_sink_token, tmp_path, sites=[SITE])
    with pytest.raises(DataError, match="text: there"):
        claimed(model_with_a_sink_token, tmp_path, windows=WINDOWS[1:])


def test_another_model_of_that_name_other_rows_and_windows_read_only_once_are_refused(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    model, infos = model_with_a_sink_token, claimed(model_with_a_sink_token, tmp_path)

    def written(special: Sequence[int] = SPECIAL, windows: Any = WINDOWS) -> list[int]:
        return list(write_shards(model, tmp_path, infos, windows, special, windows_per_shard=2))

    for wrong, told in ((partial(written, [*SPECIAL, 9]), "special_ids: there"),
                        (partial(written, windows=iter(WINDOWS)), "read only once"),
                        (partial(claimed, model, tmp_path, windows=iter(WINDOWS)), "read only once")):
        with pytest.raises(DataError, match=told):
            wrong()
    model.model.embed_tokens.weight *= 2
    for wrong in (written, partial(claimed, model, tmp_path)):
        with pytest.raises(DataError, match="model_weights: there"):
            wrong()
    model.model.embed_tokens.weight /= 2
    assert written() == [5, 6]

# --- faults ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_whole_shards_and_says_how_to_go_on(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    windows: list[Window] = [*WINDOWS[:2], np.full(60, 9, dtype=np.int32), WINDOWS[3]]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the third shard has 1,920 bytes
    try:
        with pytest.raises(DataError, match=r"shard-00002.safetensors could not be written .*File too large") as caught:
            write(model_with_a_sink_token, tmp_path, windows=windows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "The 2 shards that are there are whole" in str(caught.value)
    assert sorted(os.listdir(tmp_path / SITE)) == ["harvest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert write(model_with_a_sink_token, tmp_path, windows=windows) == [60, 3]


@pytest.mark.parametrize("kept", [0, 40, -3])
def test_a_shard_that_was_cut_off_is_named_and_the_harvest_writes_it_anew(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path, kept: int) -> None:
    write(model_with_a_sink_token, tmp_path)
    broken = tmp_path / SITE / "shard-00001.safetensors"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:kept])

    with pytest.raises(DataError, match=r"shard-00001.safetensors is broken"):
        Shards(tmp_path / SITE)
    with pytest.warns(SaeWarning, match=r"written anew: .*shard-00001.safetensors is broken"):
        assert write(model_with_a_sink_token, tmp_path) == [2]
    assert broken.read_bytes() == whole


def test_files_that_a_killed_process_left_are_swept(model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / SITE).mkdir()
    (tmp_path / SITE / ".shard-00001.safetensors.123").write_bytes(b"half")

    write(model_with_a_sink_token, tmp_path)

    assert [name for name in os.listdir(tmp_path / SITE) if name.startswith(".")] == []


def test_folders_that_hold_no_harvest_or_another_width_are_named(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path)
    info = json.loads((tmp_path / SITE / "harvest.json").read_text())

    with pytest.raises(DataError, match=r"nothing holds no harvest.json"):
        Shards(tmp_path / "nothing")
    for text, said in [("{", "is not what a harvest writes"), ('{"site": "a"}', "is not what a harvest writes"),
                       (json.dumps({**info, "d_in": 8}), r"expected rows of 8, got \(3, 16\)")]:
        (tmp_path / SITE / "harvest.json").write_text(text)
        with pytest.raises(DataError, match=said):
            Shards(tmp_path / SITE)


# --- reading --------------------------------------------------------------------------------------


def test_fewer_tokens_can_be_asked_for(model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    write(model_with_a_sink_token, tmp_path)

    assert len(Shards(tmp_path / SITE, max_tokens=4)) == 5  # whole shards: 3 + 2
