"""An edit belongs to the model and every thread sees it; scope="context" is for servers."""

import asyncio
import contextvars
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sae_hooks import EditError, SaeAttachError, SaeWarning, attach_saes

SITE = "model.layers.1.output"
FEATURES = (3, 11, 42, 70)


@pytest.fixture
def attached(model, sae):
    return attach_saes(model, sae)


@pytest.fixture
def hasty_switching():
    """Threads take turns five hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_thread(function, *args):
    """Run in a new thread; give its result or raise its exception here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(timeout=60)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@torch.no_grad()
def text(model, ids, **settings):
    return model.generate(ids, max_new_tokens=8, do_sample=False, **settings)


# --- scope="model"


def test_a_second_thread_that_opens_an_edit_is_refused_and_told_the_two_ways_out(attached, ids):
    with attached.saes.clamp({3: 40.0}) as first:
        steered = logits(attached, ids)
        for opening in (lambda: attached.saes.clamp({7: 1.0}), lambda: attached.saes.add({7: 1.0}),
                        attached.saes.splice, attached.saes.capture):
            with pytest.raises(SaeAttachError) as raised:
                in_thread(opening)
            assert "rows of one batch" in str(raised.value)
            assert 'scope="context"' in str(raised.value)
        assert torch.equal(logits(attached, ids), steered)
        with attached.saes.clamp({7: 40.0}):  # the thread that has one open may open more
            assert not torch.equal(logits(attached, ids), steered)
    assert first.positions_edited == 3 * ids.numel()


def test_an_edit_for_all_is_refused_while_another_thread_has_its_own(attached, ids):
    opened, done = threading.Event(), threading.Event()

    def hold():
        with attached.saes.clamp({3: 40.0}, scope="context"):
            steered = logits(attached, ids)
            opened.set()
            done.wait(20)
            return torch.equal(logits(attached, ids), steered)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert opened.wait(20)
        with pytest.raises(SaeAttachError, match="context"):
            attached.saes.clamp({7: 40.0})
        done.set()
        assert held.result(timeout=20)


def test_a_thread_that_died_with_an_edit_of_its_own_locks_nobody_out(attached, ids):
    plain = logits(attached, ids)
    in_thread(lambda: attached.saes.clamp({3: 40.0}, scope="context"))
    assert torch.equal(logits(attached, ids), plain)
    with attached.saes.clamp({3: 40.0}):
        assert not torch.equal(logits(attached, ids), plain)


def test_once_an_edit_is_closed_another_thread_may_open_one(attached, ids):
    def steer():
        with attached.saes.clamp({3: 40.0}):
            return logits(attached, ids)

    here = steer()
    assert torch.equal(in_thread(steer), here)
    assert torch.equal(steer(), here)


def test_an_edit_opened_in_one_thread_is_seen_by_the_forward_pass_of_another(attached, ids):
    plain = logits(attached, ids)
    handle = in_thread(lambda: attached.saes.clamp({3: 40.0}))
    steered = logits(attached, ids)
    assert not torch.equal(steered, plain)
    assert torch.equal(in_thread(logits, attached, ids), steered)
    assert handle.positions_edited == 2 * ids.numel()
    handle.remove()
    assert torch.equal(logits(attached, ids), plain)


@pytest.mark.parametrize("scope", ["model", "context"])
def test_closing_in_another_thread_ends_the_edit_and_frees_its_feature(attached, ids, scope):
    plain = logits(attached, ids)
    handle = attached.saes.clamp({3: 40.0}, scope=scope)
    steered = logits(attached, ids)
    in_thread(handle.remove)
    assert torch.equal(logits(attached, ids), plain)
    with attached.saes.clamp({3: 40.0}, scope=scope):
        assert torch.equal(logits(attached, ids), steered)
    assert torch.equal(logits(attached, ids), plain)


def test_an_open_edit_gives_way_to_none_in_another_scope(attached, ids):
    """The same feature twice would count twice, whoever opened it and how."""
    for first, second in (("model", "context"), ("context", "model")):
        with attached.saes.clamp({3: 40.0}, scope=first):
            logits(attached, ids)
            with pytest.raises(EditError, match="twice"):
                attached.saes.clamp({3: 1.0}, scope=second)


@pytest.mark.parametrize("scope", ["model", "context"])
def test_a_splice_that_keeps_the_error_leaves_nothing_open(attached, ids, scope):
    plain = logits(attached, ids)
    with attached.saes.splice(keep_error=True, scope=scope):
        assert torch.equal(logits(attached, ids), plain)
    assert not attached.saes._runtime.active


def test_a_streamer_in_a_thread_gets_the_steered_text(tiny_gemma2, tiny_tokenizer, sae_for):
    from transformers import TextIteratorStreamer

    inputs = tiny_tokenizer(["The king said to his people that"], return_tensors="pt")
    attach_saes(tiny_gemma2, sae_for(tiny_gemma2, inputs["input_ids"], d_sae=256))
    plain = text(tiny_gemma2, inputs["input_ids"])
    with tiny_gemma2.saes.clamp({5: 120.0}) as clamp:
        steered = text(tiny_gemma2, inputs["input_ids"])
        assert not torch.equal(steered, plain)
        edited = clamp.positions_edited
        streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=20)
        settings = {**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=tiny_gemma2.generate, kwargs=settings)
        thread.start()
        streamed = "".join(streamer)
        thread.join(20)
        assert clamp.positions_edited == 2 * edited
    assert streamed == tiny_tokenizer.decode(steered[0, inputs["input_ids"].shape[1] :])


# --- scope="context"


def test_a_new_thread_does_not_inherit_an_edit_of_the_context_and_the_handle_warns(attached, ids):
    plain = logits(attached, ids)
    with pytest.warns(SaeWarning, match="no position"), attached.saes.clamp({3: 40.0}, scope="context"):
        assert torch.equal(in_thread(logits, attached, ids), plain)


def test_a_thread_run_in_a_copy_of_the_context_has_its_edits_until_they_are_closed(attached, ids):
    plain = logits(attached, ids)
    with attached.saes.clamp({3: 40.0}, scope="context"):
        steered = logits(attached, ids)
        copied = contextvars.copy_context()
        assert torch.equal(in_thread(copied.run, logits, attached, ids), steered)
    assert torch.equal(in_thread(copied.run, logits, attached, ids), plain)
    with attached.saes.capture():  # and hooks look what there is
        assert torch.equal(in_thread(copied.run, logits, attached, ids), plain)


def test_an_edit_of_the_context_is_made_at_its_own_site(attached, ids, random_sae):
    attach_saes(attached, random_sae(attached.config.hidden_size, 64, "model.layers.0.output"))
    with attached.saes.clamp({3: 40.0}, layer=1):
        steered = logits(attached, ids)
    with attached.saes.capture(), attached.saes.clamp({3: 40.0}, layer=1, scope="context") as clamp:
        assert torch.equal(logits(attached, ids), steered)
    assert clamp.positions_edited == (ids != attached.config.bos_token_id).sum()


def test_other_threads_may_do_meanwhile_what_an_edit_of_their_own_would_forbid(attached, ids):
    """Guidance and continuous batching, where positions cannot be told, but nobody asks there."""
    def call():
        packed = attached.generate_batch([ids[0].tolist()], max_new_tokens=3, do_sample=False)
        return text(attached, ids, guidance_scale=2.0), [out.generated_tokens for out in packed.values()]

    guided, packed = call()
    with attached.saes.clamp({3: 40.0}, scope="context"):
        logits(attached, ids)
        got = in_thread(call)
        assert torch.equal(got[0], guided)
        assert got[1] == packed
        with pytest.raises(SaeAttachError, match="guidance_scale"):
            text(attached, ids, guidance_scale=2.0)
        with pytest.raises(SaeAttachError, match="generate_batch"):
            attached.generate_batch([ids[0].tolist()])
    with attached.saes.clamp({3: 40.0}):
        for refused in (lambda: text(attached, ids, guidance_scale=2.0), lambda: attached.generate_batch([[5]])):
            with pytest.raises(SaeAttachError, match="cannot be told"):
                in_thread(refused)
        logits(attached, ids)


def reference(model, ids, features):
    """Logits and text with a feature clamped, for each, one after the other in this thread."""
    found = {}
    for feature in features:
        with model.saes.clamp({feature: 40.0}):
            found[feature] = logits(model, ids), text(model, ids)
    return found


def test_four_threads_with_their_own_edits_each_get_what_they_would_alone(attached, ids, hasty_switching):
    expected, start = reference(attached, ids, FEATURES), threading.Barrier(4)
    plain = logits(attached, ids)
    assert len({tuple(t.flatten().tolist()) for t, _ in expected.values()}) == 4

    def work(feature):
        wrong = []
        start.wait(20)
        for turn in range(40):
            with attached.saes.clamp({feature: 40.0}, scope="context"):
                right = torch.equal(logits(attached, ids), expected[feature][0])
                right &= turn % 10 > 0 or torch.equal(text(attached, ids), expected[feature][1])
            right &= torch.equal(logits(attached, ids), plain)
            wrong += [] if right else [turn]
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, FEATURES)) == [[], [], [], []]
    assert torch.equal(logits(attached, ids), plain)
    assert not attached.saes._runtime.active


def test_four_threads_with_prompts_of_their_own_lengths_keep_prompt_and_text_apart(attached, ids, hasty_switching):
    def steer(width):
        prompt = ids[:1, :width]
        with attached.saes.clamp({3: 40.0}, tokens="generated", scope="context") as clamp:
            result = text(attached, prompt)
        return result, clamp.positions_edited

    widths = (2, 4, 6, 9)
    expected = {width: steer(width) for width in widths}
    assert {edited for _, edited in expected.values()} == {7}
    with ThreadPoolExecutor(4) as pool:
        for width, (result, edited) in zip(widths * 6, pool.map(steer, widths * 6), strict=True):
            assert torch.equal(result, expected[width][0])
            assert edited == 7


def test_four_threads_capture_only_their_own_passes(attached, hasty_switching):
    def watch(seed):
        own = torch.randint(3, 128, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
        with attached.saes.capture(scope="context") as captured:
            for _ in range(5):
                logits(attached, own)
        found = captured[SITE]
        return found.token_id.tolist(), found.values.tolist()

    expected = [watch(seed) for seed in range(4)]
    assert len(expected[3][0]) == 40
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(watch, range(4))) == expected


def test_tasks_of_one_event_loop_each_have_their_own_edits(attached, ids):
    expected, plain = reference(attached, ids, FEATURES), logits(attached, ids)

    async def request(feature):
        right = []
        for _ in range(5):
            with attached.saes.clamp({feature: 40.0}, scope="context"):
                await asyncio.sleep(0)
                right.append(torch.equal(logits(attached, ids), expected[feature][0]))
                in_pool = await asyncio.to_thread(logits, attached, ids)
                right.append(torch.equal(in_pool, expected[feature][0]))
            await asyncio.sleep(0)
            right.append(torch.equal(logits(attached, ids), plain))
        return right

    async def serve():
        return await asyncio.gather(*(request(feature) for feature in FEATURES))

    assert asyncio.run(serve()) == [[True] * 15] * 4


def test_an_edit_open_around_a_task_is_closed_for_the_task_too(attached, ids):
    plain = logits(attached, ids)

    async def serve():
        outer = attached.saes.clamp({3: 40.0}, scope="context")
        steered = logits(attached, ids)
        go_on = asyncio.Event()

        async def inherit():
            assert torch.equal(logits(attached, ids), steered)
            await go_on.wait()
            assert torch.equal(logits(attached, ids), plain)
            with attached.saes.clamp({3: 40.0}, scope="context"):  # the feature is free again
                assert torch.equal(logits(attached, ids), steered)

        task = asyncio.create_task(inherit())
        await asyncio.sleep(0)
        outer.remove()
        go_on.set()
        await task

    asyncio.run(serve())


def test_rows_of_one_batch_are_the_other_way_out(attached, ids):
    """The first way that the refusal names: two people's requests as two rows."""
    alone = [logits(attached, ids)]
    for feature in (3, 11):
        with attached.saes.clamp({feature: 40.0}):
            alone.append(logits(attached, ids))
    nan = float("nan")
    with attached.saes.clamp({3: torch.tensor([40.0, nan]), 11: torch.tensor([nan, 40.0])}):
        both = logits(attached, ids)
    torch.testing.assert_close(both[0], alone[1][0])
    torch.testing.assert_close(both[1], alone[2][1])
    assert not torch.allclose(both[0], alone[0][0])
