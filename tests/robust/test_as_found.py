"""After detach, and after any failure, the model is as it was (design.md rule 1, users-and-faults.md rows 28 to 31)."""

import gc
import threading
import weakref

import pytest
import torch
from robust.as_found import differences, snapshot, unchanged

from sae_hooks import (
    EditError,
    SaeAttachError,
    SaeError,
    SaeFormatError,
    SaeMismatchError,
    SiteError,
    attach_saes,
    detach_saes,
)
from sae_hooks.runtime import Slot

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


# --- attach is all or nothing


def failing_attaches(random_sae):
    good, narrow = random_sae(32, 64), random_sae(16, 64)
    gain_free = "model.layers.0.input_layernorm.normalized"
    return {
        "width": (SaeMismatchError, {SITE: narrow}, {}, ["16", "32", SITE]),
        "width, the third of five": (SaeMismatchError, {
            "model.layers.0.output": good, SITE: good, "model.layers.2.output": narrow,
            "model.layers.0.mlp.output": good, "model.layers.1.mlp.output": good}, {}, ["model.layers.2.output"]),
        "layer": (SiteError, {"model.layers.3.output": good}, {}, ["layers 0 to 2", "layer 3"]),
        "layer by number": (SiteError, good, {"layer": 99}, ["layers 0 to 2"]),
        "site": (SiteError, {"model.layers.1.mpl.output": good}, {}, ["nearest", "model.layers.1.mlp"]),
        "side": (SiteError, {"model.layers.1": good}, {}, [".output"]),
        "alias": (SiteError, good, {"layer": 1, "site": "resid_pre"}, ["resid_post"]),
        "writes what can only be read": (SaeMismatchError, {gain_free: good}, {}, ["normalized", "not written"]),
        "two at one site": (SaeAttachError, {SITE: good, "layers.1.output": good}, {"name": None}, ["name="]),
        "not told where": (SiteError, random_sae(32, 64, None), {}, ["layer="]),
        "no such folder": (SaeError, "./no/such/folder", {}, ["no/such/folder"]),
    }


FAILING_ATTACHES = ("width", "width, the third of five", "layer", "layer by number", "site", "side", "alias",
                    "writes what can only be read", "two at one site", "not told where", "no such folder")


@pytest.mark.parametrize("case", FAILING_ATTACHES)
def test_an_attach_that_fails_says_why_and_attaches_nothing(model, ids, random_sae, case):
    error, source, select, words = failing_attaches(random_sae)[case]
    with unchanged(model, ids), pytest.raises(error) as raised:
        attach_saes(model, source, **select)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_every_misfit_is_named_at_once(model, ids, random_sae):
    narrow = random_sae(16, 64)
    with unchanged(model, ids), pytest.raises(SaeMismatchError) as raised:
        attach_saes(model, {SITE: narrow, "model.layers.7.output": narrow, "model.layers.0.output": random_sae(32, 64)})
    assert SITE in str(raised.value)
    assert "layer 7" in str(raised.value)
    assert "layers.0.output" not in str(raised.value)


def test_nothing_is_attached_when_the_third_of_five_fails_to_load(model, ids, random_sae, monkeypatch):
    load, loads = Slot.sae.fget, []

    def third_is_broken(slot):
        loads.append(slot.name)
        if len(loads) == 3:
            raise SaeFormatError("layer_2/params.npz is cut short")
        return load(slot)

    monkeypatch.setattr(Slot, "sae", property(third_is_broken))
    five = {site: random_sae(32, 64, site) for site in (SITE, *OTHER_SITES, "model.layers.0.mlp.output")}
    with unchanged(model, ids), pytest.raises(SaeFormatError, match="cut short"):
        attach_saes(model, five, preload=True)
    assert len(loads) == 3


def test_nothing_is_attached_when_putting_in_the_third_hook_fails(model, ids, random_sae, monkeypatch):
    def refuse(*args, **kwargs):
        raise MemoryError("no room for another hook")

    sites = ("model.layers.0.output", SITE, "model.layers.2.output")
    with unchanged(model, ids):
        model.model.layers[2].register_forward_hook = refuse
        with pytest.raises(MemoryError):
            attach_saes(model, {site: random_sae(32, 64, site) for site in sites})
        del model.model.layers[2].register_forward_hook


def test_a_second_attach_that_fails_leaves_the_first_one_working(model, ids, sae, random_sae):
    attach_saes(model, sae)
    with model.saes.clamp({3: 9.0}) as clamp, torch.no_grad():
        steered = model(ids).logits
        with unchanged(model), pytest.raises(SaeAttachError, match="name="):
            attach_saes(model, {"model.layers.0.output": random_sae(32, 64), SITE: sae})
        with unchanged(model), pytest.raises(SaeMismatchError):
            attach_saes(model, {"model.layers.0.output": random_sae(16, 64)})
        assert list(model.saes) == [SITE]
        assert torch.equal(model(ids).logits, steered)
        assert clamp.positions_edited == 2 * ids.numel()


# --- an edit that fails changes nothing


NAN, INF = float("nan"), float("inf")
FAILING_EDITS = {
    "feature = d_sae": lambda saes: saes.clamp({96: 1.0}),
    "feature far out": lambda saes: saes.ablate([10**30]),
    "feature negative": lambda saes: saes.clamp({-1: 1.0}),
    "feature a bool": lambda saes: saes.clamp({True: 1.0}),
    "feature a float": lambda saes: saes.clamp({1.5: 1.0}),
    "feature a word": lambda saes: saes.scale({"Paris": 1.0}),
    "no feature": lambda saes: saes.clamp({}),
    "strength NaN": lambda saes: saes.clamp({1: NAN}),
    "strength infinite": lambda saes: saes.scale({1: INF}),
    "strength minus infinite": lambda saes: saes.add({1: -INF}),
    "strength infinite in one row": lambda saes: saes.add({1: torch.tensor([1.0, INF])}),
    "strength of another shape": lambda saes: saes.add({1: torch.ones(2, 2)}),
    "strength without rows": lambda saes: saes.add({1: torch.ones(0)}),
    "strength a word": lambda saes: saes.clamp({1: "much"}),
    "strengths of different numbers of rows": lambda saes: saes.clamp({1: torch.ones(2), 2: torch.ones(3)}),
    "clamp to 1e30": lambda saes: saes.clamp({1: 1e30}),
    "add 1e30": lambda saes: saes.add({1: 1e30}),
    "scale by 1e38": lambda saes: saes.scale({1: 1e38}),
    "the same feature twice": lambda saes: saes.ablate([1, 2, 1]),
    "the same feature twice in a document": lambda saes: saes.apply(document([1, 1])),
    "a feature that is being edited": lambda saes: saes.scale({7: 2.0}),
    "the second of two in a document": lambda saes: saes.apply(document([1], [96])),
    "a mask of numbers": lambda saes: saes.clamp({1: 1.0}, tokens=torch.ones(9)),
    "a mask of three dimensions": lambda saes: saes.clamp({1: 1.0}, tokens=torch.ones(1, 2, 9, dtype=torch.bool)),
    "tokens a word unknown": lambda saes: saes.clamp({1: 1.0}, tokens="last"),
    "a scope unknown": lambda saes: saes.clamp({1: 1.0}, scope="thread"),
    "a site unknown": lambda saes: saes.clamp({1: 1.0}, site="model.layers.2.output"),
    "a layer unknown": lambda saes: saes.clamp({1: 1.0}, layer=2),
    "a document of something else": lambda saes: saes.apply('{"format": "else", "edits": []}'),
    "a document cut short": lambda saes: saes.apply('{"format": '),
    "a splice where one is": lambda saes: saes.splice(),
}


def document(*features):
    import json

    edits = [{"op": "clamp", "site": SITE, "features": f, "values": [[1.0] * len(f)], "tokens": "all",
              "special_tokens": False, "only_if_active": False} for f in features]
    return json.dumps({"format": "sae_hooks.edits/1", "edits": edits})


@pytest.mark.parametrize("case", FAILING_EDITS)
def test_an_edit_that_cannot_be_meant_is_refused_before_anything_changes(model, ids, sae, case):
    with unchanged(model, ids):
        attach_saes(model, sae)
        with model.saes.clamp({7: 9.0}), model.saes.splice(), torch.no_grad():
            steered = model(ids).logits
            with unchanged(model, ids), pytest.raises(EditError) as raised:
                FAILING_EDITS[case](model.saes)
            assert len(str(raised.value)) > 20
            assert torch.equal(model(ids).logits, steered)
        detach_saes(model)


FAILING_PASSES = {
    "strengths for three rows": lambda saes: saes.clamp({1: torch.ones(3)}),
    "a mask of another length": lambda saes: saes.clamp({1: 1.0}, tokens=torch.ones(5, dtype=torch.bool)),
    "a mask of three rows": lambda saes: saes.clamp({1: 1.0}, tokens=torch.ones(3, 9, dtype=torch.bool)),
}


@pytest.mark.parametrize("case", FAILING_PASSES)
def test_an_edit_that_does_not_fit_the_batch_stops_the_pass_and_leaves_the_model_as_found(model, ids, sae, case):
    with unchanged(model, ids):
        attach_saes(model, sae)
        with pytest.raises(EditError, match="rows"), FAILING_PASSES[case](model.saes):
            model(ids)
        with pytest.raises(EditError, match="rows"), FAILING_PASSES[case](model.saes):
            model.generate(ids, max_new_tokens=3)
        detach_saes(model)


def test_strengths_that_overflow_half_precision_are_refused_and_leave_the_model_as_found(random_model, ids, sae):
    model = random_model("Gemma2").half()
    with unchanged(model, ids):
        attach_saes(model, sae)
        with pytest.raises(EditError, match="float16"), model.saes.clamp({1: 1e6}):
            model(ids)
        detach_saes(model)


# --- whatever happens inside the block, it ends


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
    with pytest.raises(SaeError, match="second"):
        model.saes["third"]


def test_an_sae_without_a_name_is_refused_where_a_named_one_is(model, ids, random_sae):
    attach_saes(model, random_sae(32, 64), name="first")
    with unchanged(model, ids), pytest.raises(SaeAttachError, match="first"):
        attach_saes(model, random_sae(32, 64), layer=1)
