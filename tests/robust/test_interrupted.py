"""Whatever happens inside a block, it ends with the block."""

import gc
import threading

import pytest
import torch
from robust.as_found import unchanged

from sae_hooks import attach_saes, detach_saes


class Planned(Exception):
    """What the tests raise."""


def raise_at(call, error):
    """A hook that raises at its n-th call."""
    seen = []

    def hook(module, args, output):
        seen.append(None)
        if len(seen) == call:
            raise error
    return hook


@pytest.mark.parametrize("error", [Planned("stop"), KeyboardInterrupt()], ids=["exception", "keyboard interrupt"])
@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.2", "lm_head"])
@pytest.mark.parametrize("scope", ["model", "context"])
def test_an_exception_amid_generate_comes_out_and_the_next_generate_is_plain(model, ids, sae, error, where, scope):
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    with unchanged(model, ids):
        attach_saes(model, sae)
        theirs = model.get_submodule(where).register_forward_hook(raise_at(3, error))
        with (pytest.raises(type(error)), model.saes.clamp({3: 40.0}, scope=scope), model.saes.capture(scope=scope),
              model.saes.splice(scope=scope)):
            model.generate(ids, max_new_tokens=6, do_sample=False)
        theirs.remove()
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
        detach_saes(model)


def test_after_an_exception_amid_generate_the_next_one_tells_prompt_from_text_anew(model, ids, sae):
    """What was noted of the call that failed (its prompt, its padding) must not reach the next one."""
    attach_saes(model, sae)
    with model.saes.clamp({3: 40.0}, tokens="generated") as clamp:
        theirs = model.lm_head.register_forward_hook(raise_at(2, Planned("stop")))
        with pytest.raises(Planned):
            model.generate(ids, attention_mask=torch.ones_like(ids).tril(), max_new_tokens=6, do_sample=False)
        theirs.remove()
        before = clamp.positions_edited
        model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
        assert clamp.positions_edited - before == 5  # the last token generated is never read
        model(ids)
        assert clamp.positions_edited - before == 5


def test_an_edit_held_by_an_abandoned_generator_ends_with_it(model, ids, sae):
    def stream():
        with model.saes.clamp({3: 40.0}):
            for _ in range(10):
                yield model(ids).logits

    with torch.no_grad(), unchanged(model, ids):
        attach_saes(model, sae)
        running = stream()
        steered = next(running)
        del running
        gc.collect()
        assert not torch.equal(model(ids).logits, steered)
        with model.saes.clamp({3: 40.0}):  # and feature 3 is free again
            assert torch.equal(model(ids).logits, steered)
        detach_saes(model)


def test_a_thread_abandoned_amid_generate_holds_nothing_back(model, ids, sae):
    at_work, go_on = threading.Event(), threading.Event()

    def wait(module, args, output):
        if threading.current_thread() is not threading.main_thread():
            at_work.set()
            go_on.wait(20)

    with unchanged(model, ids):
        attach_saes(model, sae)
        theirs = model.model.layers[0].register_forward_hook(wait)
        with torch.no_grad(), model.saes.clamp({3: 40.0}) as clamp:
            thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"max_new_tokens": 3})
            thread.start()
            assert at_work.wait(20)
            model(ids)
        edited = clamp.positions_edited
        detach_saes(model)  # while the other thread is inside the model
        theirs.remove()
        go_on.set()
        thread.join(20)
        assert not thread.is_alive()
        assert clamp.positions_edited == edited == ids.numel()
