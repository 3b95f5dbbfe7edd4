"""After detach, and after any failure, the model is as it was."""

import gc
import weakref

import pytest
import torch
from robust.as_found import differences, snapshot, unchanged

from sae_hooks import (
    SaeAttachError,
    SaeError,
    attach_saes,
    detach_saes,
)

SITE = "model.layers.1.output"
OTHER_SITES = ("model.layers.0.output", "model.layers.2.mlp.output", "model.layers.2.self_attn.o_proj.input")


def everywhere(random_sae):
    """SAEs for an output, a sub-layer's output, an input, and a transcoder."""
    made = {site: random_sae(32, 64, site) for site in (SITE, *OTHER_SITES)}
    read, write = "model.layers.0.pre_feedforward_layernorm.output", "model.layers.0.post_feedforward_layernorm.output"
    return {**made, read: random_sae(32, 64, read, site_out=write)}


def test_the_snapshot_sees_a_hook_an_attribute_and_a_moved_weight(model, ids):
    before = snapshot(model, ids)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: None, with_kwargs=False)
    model.config.use_cache = False
    model.model.layers[0].note = 1
    torch.rand(1)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    changed = " ".join(differences(before, snapshot(model, ids)))
    handle.remove()
    for point in ("hooks of model.layers.1:", "config:", "attributes of model.layers.0:", "torch's random state:",
                  "parameters:", "logits:"):
        assert point in changed


def test_attach_then_detach_leaves_the_model_as_found(model, ids, random_sae):
    with unchanged(model, ids):
        attach_saes(model, everywhere(random_sae))
        detach_saes(model)


def test_using_everything_then_detaching_leaves_the_model_as_found(model, ids, random_sae):
    with unchanged(model, ids):
        attach_saes(model, everywhere(random_sae))
        with model.saes.clamp({3: 9.0}, site=SITE), model.saes.capture(), torch.no_grad():
            model(ids)
        with model.saes.splice(), torch.no_grad():
            model.generate(ids, max_new_tokens=3, do_sample=False)
        model.saes.check(ids)
        model.saes.detach()


def test_attaching_never_makes_the_sae_part_of_the_model(model, sae):
    names, modules = list(model.state_dict()), list(model.modules())
    attach_saes(model, sae)
    with model.saes.clamp({3: 9.0}):
        assert list(model.state_dict()) == names
        assert list(model.modules()) == modules
        model.saes[SITE]  # a touch, so that the clamp is not the only use
        model(torch.tensor([[5, 6]]))


def test_detach_lets_go_of_the_weights(model, ids, sae_for):
    sae = sae_for(model, ids)
    gone = weakref.ref(sae)
    attach_saes(model, sae)
    with model.saes.clamp({3: 9.0}, scope="context"):
        model(ids)
    detach_saes(model)
    del sae
    gc.collect()
    assert gone() is None


def test_two_attached_under_names_go_together_and_detaching_again_does_nothing(model, ids, sae):
    with unchanged(model, ids):
        attach_saes(model, sae, name="one")
        attach_saes(model, sae, name="two")
        assert list(model.saes) == ["one", "two"]
        detach_saes(model)
        detach_saes(model)
    assert not hasattr(model, "saes")


def test_attach_and_detach_many_times_leaves_the_model_as_found(model, ids, random_sae):
    with unchanged(model, ids):
        for _ in range(5):
            attach_saes(model, everywhere(random_sae))
            attach_saes(model, everywhere(random_sae), name="again")
            detach_saes(model)


def test_two_models_detach_in_any_order(random_model, ids, sae):
    first, second = random_model("Gemma2"), random_model("Gemma2", seed=1)
    with unchanged(first, ids), unchanged(second, ids):
        attach_saes(first, sae)
        attach_saes(second, sae)
        clamp = second.saes.clamp({3: 9.0})
        detach_saes(first)
        plain = second(ids).logits
        clamp.remove()
        assert not torch.equal(plain, second(ids).logits)
        detach_saes(second)


@pytest.mark.parametrize("scope", ["model", "context"])
def test_edits_open_at_detach_end_and_removing_them_later_does_nothing(model, ids, sae, scope):
    with unchanged(model, ids):
        attach_saes(model, sae)
        left = [model.saes.clamp({3: 9.0}, scope=scope), model.saes.splice(scope=scope)]
        model(ids)
        detach_saes(model)
        for handle in left:
            handle.remove()


def test_a_model_attached_again_knows_nothing_of_edits_left_open_before(model, ids, sae):
    with torch.no_grad():
        plain = model(ids).logits
        attach_saes(model, sae)
        left = model.saes.clamp({3: 9.0})
        model(ids)
        detach_saes(model)
        attach_saes(model, sae)
        assert torch.equal(model(ids).logits, plain)
        with model.saes.clamp({3: 9.0}):
            left.remove()
            assert not torch.equal(model(ids).logits, plain)


# --- other people's hooks


def test_hooks_of_others_before_and_after_ours_stay_in_order_and_see_the_edit(model, ids, sae, random_sae):
    layer, calls, seen = model.model.layers[1], [], {}

    def note(name):
        def hook(module, args, output):
            calls.append(name)
            seen[name] = output
        return hook

    before = layer.register_forward_hook(note("before"))
    kept_first = layer.register_forward_hook(note("first"), prepend=True)
    attach_saes(model, {SITE: sae, "model.layers.1.mlp.output": random_sae(32, 64)})
    after = layer.register_forward_hook(note("after"))
    with torch.no_grad(), model.saes.clamp({3: 40.0}, site=SITE):
        model(ids)
    assert calls == ["first", "before", "after"]
    edited = [seen[name] for name in calls]
    detach_saes(model)
    calls.clear()
    with torch.no_grad():
        model(ids)
    assert calls == ["first", "before", "after"]
    assert all(not torch.equal(seen[name], was) for name, was in zip(calls, edited, strict=True))
    assert list(layer._forward_hooks) == [kept_first.id, before.id, after.id]


def test_a_hook_that_another_removes_or_adds_while_attached_is_left_to_him(model, ids, sae):
    def theirs(module, args, output):
        return output * 1.5

    def plain_hook(module, args):
        return None

    early = model.model.layers[1].register_forward_hook(theirs)
    attach_saes(model, sae)
    early.remove()
    model.model.layers[1].register_forward_hook(theirs)
    model.model.layers[1].register_forward_pre_hook(plain_hook)
    model.generation_config.max_new_tokens = 5
    detach_saes(model)
    assert list(model.model.layers[1]._forward_hooks.values()) == [theirs]
    assert list(model.model.layers[1]._forward_pre_hooks.values()) == [plain_hook]
    assert model.generation_config.max_new_tokens == 5


def test_a_generate_of_ones_own_is_called_while_attached_and_put_back(model, ids, sae):
    calls, plain = [], model.generate

    def mine(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    model.generate = mine
    with unchanged(model, ids):
        attach_saes(model, sae)
        with model.saes.clamp({3: 40.0}):
            model.generate(ids, max_new_tokens=2)
        detach_saes(model)
    assert model.generate is mine
    assert calls == [1]


def test_a_generate_put_over_ours_while_attached_survives_the_detach(model, ids, sae):
    attach_saes(model, sae)
    ours = model.generate

    def over(*args, **kwargs):
        return ours(*args, **kwargs)

    model.generate = over
    with model.saes.clamp({3: 40.0}):
        steered = model.generate(ids, max_new_tokens=4, do_sample=False)
    detach_saes(model)
    assert model.generate is over
    assert not torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), steered)


def test_a_model_with_an_attribute_saes_of_its_own_is_refused(model, ids, sae):
    model.saes = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with unchanged(model, ids), pytest.raises(SaeAttachError, match="of its own"):
        attach_saes(model, sae)


# --- the mapping


def test_every_name_in_the_mapping_gives_its_own_sae_also_where_one_is_named_by_the_site(model, random_sae):
    first, second = random_sae(32, 64), random_sae(32, 64, seed=1)
    attach_saes(model, first)
    attach_saes(model, second, name="second")
    assert dict(model.saes) == {SITE: first, "second": second}
    assert "third" not in model.saes
    assert model.saes.get("third") is None
    with pytest.raises(SaeError, match="second"):
        model.saes["third"]


def test_an_sae_without_a_name_is_refused_where_a_named_one_is(model, ids, random_sae):
    attach_saes(model, random_sae(32, 64), name="first")
    with unchanged(model, ids), pytest.raises(SaeAttachError, match="first"):
        attach_saes(model, random_sae(32, 64), layer=1)
