"""Activations computed as they are needed: every token once, shuffled, and gone on with exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM, LlamaForCausalLM

from sae_hooks.errors import CheckpointError, DataError, SiteError
from sae_hooks.training.harvest import SiteInfo, harvest
from sae_hooks.training.live import LiveStream
from sae_hooks.training.shards import harvest_infos, write_shards
from sae_hooks.training.text import Window, windows

from .conftest import BOS, SINK

SITE, NORMED = "model.layers.1.output", "model.layers.1.post_attention_layernorm.normalized"
SPECIAL = [0, BOS]
RANDOM = np.random.default_rng(0)
WINDOWS = [np.concatenate([[BOS], RANDOM.integers(8, 40, n)]).astype(np.int32) for n in RANDOM.integers(3, 12, 60)]
WINDOWS[5][2] = SINK
TOKENS = sum(len(window) - 1 for window in WINDOWS) - 1


def live(model: LlamaForCausalLM, source: Any = WINDOWS, **changes: Any) -> LiveStream:
    facts: dict[str, Any] = {"buffer_tokens": 100, "tokens_per_batch": 32, "seed": 3} | changes
    return LiveStream(model, facts.pop("sites", [SITE, NORMED]), source, facts.pop("special_ids", SPECIAL), **facts)


def drain(stream: LiveStream, size: int, most: int | None = None) -> dict[str, Tensor]:
    """All rows, in batches of a size."""
    found: list[dict[str, Tensor]] = []
    try:
        while most is None or len(found) < most:
            found.append(stream.next(size))
    except DataError:
        pass
    return {site: torch.cat([batch[site] for batch in found]) for site in stream.sites}


def in_order(x: Tensor) -> Tensor:
    return x[np.lexsort(x.numpy().T[::-1])]


def all_rows(model: LlamaForCausalLM, stream: LiveStream, some: list[Window] = WINDOWS) -> dict[str, Tensor]:
    norms = {site: info.typical_norm for site, info in stream.sites.items()}
    rows = harvest(model, norms, some, SPECIAL, tokens=1)  # a window at a time
    return {site: x.float() / stream.sites[site].rms_norm for site, x in rows.items()}


# --- what comes -----------------------------------------------------------------------------------


def test_every_ordinary_token_comes_once_an_epoch_in_another_order(model_with_a_sink_token: LlamaForCausalLM) -> None:
    stream = live(model_with_a_sink_token)

    found = drain(stream, 1)

    expected = all_rows(model_with_a_sink_token, stream)
    assert len(found[SITE]) == len(found[NORMED]) == TOKENS
    for site in (SITE, NORMED):
        torch.testing.assert_close(in_order(found[site]), in_order(expected[site]), rtol=0.02, atol=0.02)
    assert not torch.allclose(found[SITE][:50], expected[SITE][:50], atol=0.1)


def test_rows_of_the_sites_are_of_the_same_token_and_of_mean_square_one(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    stream = live(model_with_a_sink_token)
    norm = stream.sites[SITE].rms_norm

    found = drain(stream, 10)

    raw = found[SITE] * norm
    attended = found[NORMED] * stream.sites[NORMED].rms_norm
    assert found[SITE].dtype == torch.float32
    assert found[SITE].square().sum(1).mean() == pytest.approx(1, rel=0.05)
    cosine = torch.cosine_similarity(raw, attended)
    assert cosine.mean() > 0.8  # the MLP adds little
    assert torch.cosine_similarity(raw, attended.roll(1, 0)).mean() < 0.3


def test_real_text_runs_through_a_real_model(tiny_gemma2: Gemma2ForCausalLM, tiny_tokenizer: Any) -> None:
    texts = ["In the beginning God created the heaven and the earth. " * 3, "def main():\n    return 0\n" * 4] * 8
    stream = LiveStream(tiny_gemma2, [SITE], windows(texts, tiny_tokenizer, 16), tiny_tokenizer.all_special_ids,
                        buffer_tokens=200, tokens_per_batch=64)

    batch = stream.next(64)[SITE]

    hidden = tiny_gemma2(torch.tensor([list(next(iter(windows(texts, tiny_tokenizer, 16))))]),
                         output_hidden_states=True).hidden_states[2][0, 1:]
    distances = torch.cdist(hidden / stream.sites[SITE].rms_norm, batch)
    assert (distances.min(1).values < 0.02).sum() >= 3  # most of the first window is among the first 64 of 200
    assert stream.model_name == tiny_gemma2.config._name_or_path


def test_shares_read_all_texts_between_them(model_with_a_sink_token: LlamaForCausalLM) -> None:
    shares = [live(model_with_a_sink_token, share=(i, 3)) for i in range(3)]

    sizes = [[len(share.next(size)[SITE]) for share in shares] for size in (10, 9, 1)]
    found = torch.cat([share_rows for share in [live(model_with_a_sink_token, share=(i, 3)) for i in range(3)]
                       for share_rows in [drain(share, 3)[SITE]]])

    assert sizes == [[4, 3, 3], [3, 3, 3], [1, 0, 0]]
    expected = all_rows(model_with_a_sink_token, shares[0])[SITE]
    torch.testing.assert_close(in_order(found), in_order(expected), rtol=0.02, atol=0.02)
    assert len({share.sites[SITE] for share in shares}) == 1


def test_a_callable_opens_each_epoch(model_with_a_sink_token: LlamaForCausalLM) -> None:
    opened: list[int] = []

    def source(epoch: int) -> Iterator[Window]:
        opened.append(epoch)
        return iter(WINDOWS)

    found = drain(live(model_with_a_sink_token, source, epochs=2), 1)

    assert len(found[SITE]) == 2 * TOKENS
    assert opened == [0, 0, 1]  # first for the norms


def test_the_buffer_says_what_memory_it_takes(model_with_a_sink_token: LlamaForCausalLM) -> None:
    stream = live(model_with_a_sink_token, buffer_tokens=1_000_000, norms=dict.fromkeys(
        (SITE, NORMED), SiteInfo(d_in=16, rms_norm=4.0, typical_norm=4.0)))

    assert stream.buffer_bytes == 1_000_000 * 32 * 2
    assert "1,000,000 tokens, 0.06 GB" in repr(stream)


# --- going on -------------------------------------------------------------------------------------


def test_going_on_after_any_batch_gives_equal_batches_also_across_epochs(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    through, states, batches = live(model_with_a_sink_token, epochs=2), [], []
    for _ in range(2 * TOKENS // 37):
        states.append(through.state_dict())
        batches.append(through.next(37))

    for k, state in enumerate(states):
        again = live(model_with_a_sink_token, epochs=2, seed=8)
        again.next(11)
        again.load_state_dict(state)
        for batch in batches[k:k + 5]:
            found = again.next(37)
            assert all(torch.equal(found[site], batch[site]) for site in (SITE, NORMED))


def test_a_state_holds_plain_values_and_only_the_unread_rows(model_with_a_sink_token: LlamaForCausalLM) -> None:
    stream = live(model_with_a_sink_token)
    stream.next(30)

    state = stream.state_dict()

    assert all(isinstance(value, Tensor | int | float | str) for value in state.values())
    rows = state[f"rows.{SITE}"]
    assert isinstance(rows, Tensor)
    assert rows.dtype == torch.bfloat16
    assert 50 < len(rows) <= 70
    kept = rows.clone()
    drain(stream, 10)
    assert torch.equal(rows, kept)


def test_the_norms_that_a_training_began_with_stay(model_with_a_sink_token: LlamaForCausalLM) -> None:
    first = live(model_with_a_sink_token)
    again = live(model_with_a_sink_token, norms=NORMS)
    assert again.sites != first.sites

    again.load_state_dict(first.state_dict())

    assert again.sites == first.sites


@pytest.mark.parametrize(("other", "said"), [
    ({"buffer_tokens": 90}, "source"), ({"share": (1, 2)}, "source"), ({"sites": [SITE]}, "source"),
    ({"model_name": "b"}, "source"), ({"source": WINDOWS[1:]}, "text"), ({"source": WINDOWS[:40]}, "text"),
    ({"source": [window[:6] for window in WINDOWS]}, "text"), ({"special_ids": [0]}, "special_ids"),
    ({"tokens_per_batch": 64}, "tokens_per_batch")])
def test_a_state_of_another_stream_is_refused_and_what_differs_named(
        model_with_a_sink_token: LlamaForCausalLM, other: dict[str, Any], said: str) -> None:
    state, stream = live(model_with_a_sink_token).state_dict(), live(model_with_a_sink_token, **other)

    with pytest.raises(CheckpointError, match=rf"something else \({said}: there .* give the same, or start anew"):
        stream.load_state_dict(state)


def test_a_state_of_another_model_of_that_name_is_refused(model_with_a_sink_token: LlamaForCausalLM) -> None:
    state = live(model_with_a_sink_token).state_dict()
    model_with_a_sink_token.model.norm.weight[3] += 1
    with pytest.raises(CheckpointError, match=r"something else \(model_weights: there"):
        live(model_with_a_sink_token).load_state_dict(state)


def test_text_may_become_longer_and_an_older_state_that_tells_nothing_of_it_goes_on(
        model_with_a_sink_token: LlamaForCausalLM) -> None:
    state = live(model_with_a_sink_token, WINDOWS[:40]).state_dict()
    older = {name: value for name, value in state.items()
             if name not in ("text", "special_ids", "tokens_per_batch", "model_weights")}

    for kept in (state, older):
        stream = live(model_with_a_sink_token)
        stream.load_state_dict(kept)

        assert len(drain(stream, 1)[SITE]) == TOKENS


def test_a_pass_that_fails_loses_no_text(model_with_a_sink_token: LlamaForCausalLM) -> None:
    expected, stream = drain(live(model_with_a_sink_token), 10), live(model_with_a_sink_token)
    first = stream.next(10)
    passes = iter(range(100))

    def fail(module: Any, args: Any) -> None:
        if next(passes) == 1:
            raise KeyboardInterrupt

    hook = model_with_a_sink_token.register_forward_pre_hook(fail)
    interrupted: list[int] = []
    found = [first]
    while len(found) < len(expected[SITE]) // 10:
        try:
            found.append(stream.next(10))
        except KeyboardInterrupt:
            interrupted.append(len(found))
    hook.remove()

    assert len(interrupted) == 1
    assert torch.equal(torch.cat([batch[SITE] for batch in found]), expected[SITE])


# --- ends and faults ------------------------------------------------------------------------------


def test_texts_that_end_early_say_how_many_tokens_there_were(model_with_a_sink_token: LlamaForCausalLM) -> None:
    stream = live(model_with_a_sink_token)
    read = len(drain(stream, 50)[SITE])

    with pytest.raises(DataError, match=rf"the texts ended: {read:,} tokens were read in 1 epochs.*epochs="):
        stream.next(50)

    assert len(stream.next(TOKENS - read)[SITE]) == TOKENS - read

    half = live(model_with_a_sink_token, share=(1, 2))
    drain(half, 50)
    with pytest.raises(DataError, match="left do not fill this process' 25 rows of a batch of 50"):
        half.next(50)


def test_texts_are_read_again_without_end_if_asked(model_with_a_sink_token: LlamaForCausalLM) -> None:
    assert len(drain(live(model_with_a_sink_token, epochs=None), 50, most=40)[SITE]) == 2000 > 3 * TOKENS


NORMS = dict.fromkeys((SITE, NORMED), SiteInfo(d_in=16, rms_norm=4.0, typical_norm=4.0))


@pytest.mark.parametrize(("act", "error", "said"), [
    (lambda model: live(model, special_ids=range(40)), DataError, "no ordinary token is left"),
    (lambda model: live(model, special_ids=range(40), norms=NORMS, epochs=None).next(1), DataError, "a whole epoch"),
    (lambda model: live(model, special_ids=range(40), norms=NORMS).next(1), DataError, "the texts ended: 0 tokens"),
    (lambda model: live(model, []), DataError, "no window"),
    (lambda model: live(model, buffer_tokens=30).next(40), DataError, "buffer of 30 tokens cannot give batches of 40"),
    (lambda model: live(model, buffer_tokens=0), DataError, "buffer_tokens must be a whole number, 1 or more; got 0"),
    (lambda model: live(model, tokens_per_batch=0), DataError, "tokens_per_batch must be .*; got 0"),
    (lambda model: live(model, epochs=0), DataError, "epochs must be a whole number, 1 or more; got 0"),
    (lambda model: live(model, seed=-1), DataError, "seed must be a whole number, 0 or more; got -1"),
    (lambda model: live(model, share=(2, 2)), DataError, r"share must be \(i, n\).*; got \(2, 2\)"),
    (lambda model: live(model).next(0), DataError, "size must be a whole number, 1 or more; got 0"),
    (lambda model: live(model, sites=["model.layers.7.output"]), SiteError, "layers 0 to 2")])
def test_what_cannot_be_read_is_said(model_with_a_sink_token: LlamaForCausalLM,
                                     act: Callable[[LlamaForCausalLM], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        act(model_with_a_sink_token)


@pytest.mark.parametrize("size", ["windows_per_shard", "tokens_per_batch"])
def test_so_it_is_of_a_harvest_before_anything_is_written(model_with_a_sink_token: LlamaForCausalLM, size: str,
                                                          tmp_path: Path) -> None:
    def harvested(windows_per_shard: Any = 4, tokens_per_batch: Any = 64) -> None:
        infos = harvest_infos(model_with_a_sink_token, tmp_path, [SITE], WINDOWS, SPECIAL, model_name="tiny", window=16,
                              seed=0, windows_per_shard=windows_per_shard)
        list(write_shards(model_with_a_sink_token, tmp_path, infos, WINDOWS, SPECIAL,
                          windows_per_shard=windows_per_shard, tokens_per_batch=tokens_per_batch))

    for wrong in (0, True, 2.0):
        with pytest.raises(DataError, match=f"{size} must be a whole number, 1 or more; got {wrong}"):
            harvested(**{size: wrong})
    assert not list(tmp_path.rglob("*.safetensors"))
    harvested(**{size: np.int64(8)})
    assert list(tmp_path.rglob("*.safetensors"))
