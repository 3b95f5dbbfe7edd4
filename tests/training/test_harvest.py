"""The harvest: which tokens come, in which order, and from how deep; its shards on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sae_hooks.errors import SiteError
from sae_hooks.training import (
    HarvestInfo,
    Shards,
    context_windows,
    harvest,
    measure_norms,
    padded_batches,
    site_activations,
    write_shards,
)

from .conftest import BOS, SINK

SITE = "model.layers.1.output"
WINDOWS = [np.array(ids, dtype=np.int32)
           for ids in ([BOS, 9, SINK, 10, 11], [12, 13], [14, 15, 16, BOS], [17, 18, 19])]
ORDINARY = [[9, 10, 11], [14, 15, 16], [17, 18, 19], [12, 13]]  # longest window first


def expected_rows(model: LlamaForCausalLM) -> torch.Tensor:
    """Row by row: each window alone, hidden states by name, unwanted positions picked out by hand."""
    rows = []
    for window, kept in zip((0, 2, 3, 1), ORDINARY, strict=True):
        ids = torch.tensor(WINDOWS[window][None].astype(np.int64))
        hidden = model(ids, output_hidden_states=True).hidden_states[2][0]
        rows += [hidden[i] for i, token in enumerate(ids[0].tolist()) if token in kept]
    return torch.stack(rows)


def info_of(site: str = SITE, **changes: Any) -> HarvestInfo:
    facts: dict[str, Any] = {"site": site, "model_name": "tiny", "typical_norm": 4.0, "rms_norm": 2.0,
                             "d_in": 16, "window": 5, "seed": 0}
    return HarvestInfo(**(facts | changes))


def test_ordinary_tokens_come_in_order_without_specials_padding_and_sinks(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    model = model_with_a_sink_token
    typical, _, d_in = measure_norms(model, SITE, WINDOWS, [0, BOS])

    found = harvest(model, {SITE: typical}, WINDOWS, special_ids=[0, BOS])[SITE]

    assert d_in == 16
    assert found.shape == (11, 16)
    torch.testing.assert_close(found.float(), expected_rows(model), rtol=1e-2, atol=1e-2)


def test_typical_norm_is_the_median_and_rms_norm_leaves_sinks_out(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    typical, rms, _ = measure_norms(model_with_a_sink_token, SITE, WINDOWS, [0, BOS])

    norms = expected_rows(model_with_a_sink_token).norm(dim=1)
    assert norms.min() <= typical <= norms.max()
    assert rms == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-5)


def test_the_model_runs_only_as_deep_as_the_deepest_site(model_with_a_sink_token: LlamaForCausalLM) -> None:
    model, ran = model_with_a_sink_token, []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
    ids = torch.tensor([[9, 10]])

    found = site_activations(model, ["model.layers.0.output", SITE], ids, torch.ones_like(ids))

    assert list(found) == ["model.layers.0.output", SITE]
    assert ran == [0, 1]
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_several_sites_match_the_hidden_states(model_with_a_sink_token: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9, 10, 11]])
    hidden = model_with_a_sink_token(ids, output_hidden_states=True).hidden_states

    sites = ["model.layers.0.output", SITE]
    found = site_activations(model_with_a_sink_token, sites, ids, torch.ones_like(ids))

    assert torch.equal(found["model.layers.0.output"], hidden[1])
    assert torch.equal(found[SITE], hidden[2])


def test_an_unknown_site_is_named_and_leaves_no_hook(model_with_a_sink_token: LlamaForCausalLM) -> None:
    ids = torch.tensor([[9]])

    with pytest.raises(SiteError, match="layers"):
        site_activations(model_with_a_sink_token, [SITE, "model.layers.9.output"], ids, ids)
    assert not any(layer._forward_hooks for layer in model_with_a_sink_token.model.layers)


def test_windows_hold_one_document_each_and_every_token_of_it() -> None:
    documents = [list(range(0, 10)), list(range(20, 24)), [30]]

    windows = context_windows(documents, 4, seed=0)

    cut = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [20, 21, 22, 23]]
    assert sorted(w.tolist() for w in windows) == cut
    assert [w.tolist() for w in windows] == [w.tolist() for w in context_windows(documents, 4, seed=0)]


def test_batches_keep_to_their_size_and_pad_little() -> None:
    windows = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 8, 8, 2, 8)]

    batches = list(padded_batches(windows, tokens=16))

    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 8), (2, 8), (1, 2)]
    assert [mask.sum(1).tolist() for _, mask in batches] == [[8, 8], [8, 3], [2]]


def test_a_harvest_that_was_cut_off_goes_on_where_it_stopped(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    args = (model_with_a_sink_token, tmp_path, [info_of()], WINDOWS, [0, BOS])
    first = next(write_shards(*args, windows_per_shard=1))
    untouched = (tmp_path / SITE / "shard-00000.safetensors").stat().st_mtime_ns

    rest = list(write_shards(*args, windows_per_shard=1))

    assert [first, *rest] == [3, 2, 3, 3]
    assert (tmp_path / SITE / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert list(write_shards(*args, windows_per_shard=1)) == []
    assert len(Shards(tmp_path / SITE)) == 11


def test_workers_share_the_shards(model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    for worker in (1, 0):
        list(write_shards(model_with_a_sink_token, tmp_path, [info_of()], WINDOWS, [0, BOS],
                          windows_per_shard=1, worker=worker, workers=2))

    assert len(list((tmp_path / SITE).glob("shard-*"))) == 4


def test_another_harvest_in_the_folder_is_refused(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    args = (WINDOWS, [0, BOS])
    list(write_shards(model_with_a_sink_token, tmp_path, [info_of()], *args, windows_per_shard=4))

    with pytest.raises(ValueError, match="holds another harvest"):
        list(write_shards(model_with_a_sink_token, tmp_path, [info_of(seed=1)], *args, windows_per_shard=4))


def test_an_epoch_is_every_row_once_shuffled_across_shards_and_scaled(
        model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    list(write_shards(model_with_a_sink_token, tmp_path, [info_of()], WINDOWS, [0, BOS], windows_per_shard=1))
    shards = Shards(tmp_path / SITE)

    rows = torch.cat(list(shards.batches(1, seed=0)))

    stored = torch.cat(shards.parts).float() / 2.0
    assert not torch.equal(rows, stored)
    assert torch.equal(rows[rows[:, 0].argsort()], stored[stored[:, 0].argsort()])
    assert torch.equal(rows, torch.cat(list(shards.batches(1, seed=0))))
    assert [len(b) for b in shards.batches(4, seed=0)] == [4, 4]


def test_fewer_tokens_can_be_asked_for(model_with_a_sink_token: LlamaForCausalLM, tmp_path: Path) -> None:
    list(write_shards(model_with_a_sink_token, tmp_path, [info_of()], WINDOWS, [0, BOS], windows_per_shard=1))

    assert len(Shards(tmp_path / SITE, max_tokens=4)) == 5  # whole shards: 3 + 2
    with pytest.raises(FileNotFoundError):
        Shards(tmp_path / "nothing")
