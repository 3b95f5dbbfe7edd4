"""Replay: the layers below a site run once, and are played back only where that provably changes nothing."""

import threading

import pytest
import torch
from core.steering import IDS

from sae_hooks import sites
from sae_hooks.replay import Replay


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def ran(model):
    """Numbers of the layers whose MLP ran, in order."""
    numbers = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: numbers.append(i))
    return numbers


def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def below(model, site):
    return Replay.below(model, sites.resolve(model, site))


@pytest.mark.parametrize(("site", "again"), [
    ("model.layers.1.output", [2]), ("model.layers.1.mlp.output", [1, 2]), ("model.layers.2.mlp.input", [2]),
    ("model.layers.0.self_attn.o_proj.input", [0, 1, 2]), ("model.embed_tokens.output", [0, 1, 2])])
def test_only_the_layers_from_the_site_on_run_again(model, ran, site, again):
    replay = below(model, site)
    with replay.record():
        whole = logits(model)
    replay.prove(lambda: logits(model), whole)
    ran.clear()
    with replay.play():
        assert torch.equal(logits(model), whole)
    assert ran == again


def test_nothing_is_played_before_it_was_proven(model, ran):
    replay = below(model, "model.layers.1.output")
    with replay.record():
        whole = logits(model)
    with replay.play():
        assert torch.equal(logits(model), whole)
    assert ran == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("without", [1.0, None])
def test_a_model_whose_layers_leave_each_other_more_is_not_played_to(model, ran, without):
    # given: a layer above takes what a layer below has left for it, and fails or computes something else without
    left = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: left.append(2.0))
    model.model.layers[2].register_forward_hook(lambda module, args, x: x * (left.pop() if left else without))
    replay = below(model, "model.layers.1.output")
    with replay.record():
        whole = logits(model)
    # when
    replay.prove(lambda: logits(model), whole)
    # then
    ran.clear()
    with replay.play():
        assert torch.equal(logits(model), whole)
    assert ran == [0, 1, 2]


def test_the_layers_are_as_they_were_afterwards_also_after_an_error(model):
    own = model.model.layers[0].__dict__["forward"] = model.model.layers[0].forward  # as accelerate's hooks have it
    replay = below(model, "model.layers.1.output")
    with replay.record():
        whole = logits(model)
    replay.prove(lambda: logits(model), whole)
    with pytest.raises(KeyError), replay.play():
        raise KeyError
    assert model.model.layers[0].__dict__["forward"] is own
    assert not any("forward" in layer.__dict__ for layer in model.model.layers[1:])


def test_another_thread_meanwhile_gets_its_own_pass(model):
    other = IDS.flip(1)
    want = logits(model, other)
    replay = below(model, "model.layers.1.output")
    with replay.record():
        whole = logits(model)
    replay.prove(lambda: logits(model), whole)
    found = []

    def run():
        with torch.no_grad():
            found.append(logits(model, other))

    with replay.play():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(found[0], want)


def test_a_compiled_model_and_one_without_layers_are_let_be(model):
    model.model.layers[2].compile(backend="eager")
    for replay in (below(model, "model.layers.1.output"), below(torch.nn.Sequential(torch.nn.ReLU()), "0.output")):
        with replay.record(), replay.play():
            pass
        assert replay._layers == []
