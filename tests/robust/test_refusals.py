"""What cannot be attached or edited is refused, in words that help, and nothing changes."""

import json

import pytest
import torch
from robust.as_found import unchanged

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
        "alias in no layer": (SiteError, random_sae(32, 64, "lm_head.input"), {"site": "mlp_out"},
                              ["mlp_out", "which layer", "lm_head.input", "layer="]),
        "alias in another tower's layer": (SiteError, random_sae(32, 64, "vision_tower.layers.1.output"),
                                           {"site": "mlp_out"}, ["which layer", "vision_tower"]),
        "writes what can only be read": (SaeMismatchError, {gain_free: good}, {}, ["normalized", "not written"]),
        "two at one site": (SaeAttachError, {SITE: good, "layers.1.output": good}, {"name": None}, ["name="]),
        "not told where": (SiteError, random_sae(32, 64, None), {}, ["layer="]),
        "no such folder": (SaeError, "./no/such/folder", {}, ["no/such/folder"]),
    }


FAILING_ATTACHES = ("width", "width, the third of five", "layer", "layer by number", "site", "side", "alias",
                    "alias in no layer", "alias in another tower's layer",
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
    "a document that was read": lambda saes: saes.apply(json.loads(document([1]))),
    "a document of bytes": lambda saes: saes.apply(document([1]).encode()),
    "no document": lambda saes: saes.apply(None),
    "a number for features": lambda saes: saes.ablate(3),
    "a feature in brackets": lambda saes: saes.ablate([[3]]),
    "a splice where one is": lambda saes: saes.splice(),
}


def document(*features):
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
