"""What edits and splices change in a forward pass: what the full encode, edit and decode change (reference.py)."""

import pytest
import torch
from core.reference import FullEdit, array, edited, encode, ordinary, relative, sample
from core.steering import EVERY, IDS, MASK, SITE, STRENGTHS, firing, hold_as_full_edit, made_for, outcome, strengths

from sae_hooks import EditError, attach_saes, sites
from sae_hooks.kernels import decoding

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("kind", sites.KINDS)
@pytest.mark.parametrize("architecture", EVERY)
def test_k_rows_of_k_features_change_what_the_full_encode_and_decode_change(
        architecture, kind, random_model):
    model = random_model(architecture)
    sae = made_for(model, kind)
    (clean,), clean_logits = outcome(model, sae.site_out)
    attach_saes(model, sae)
    features = firing(sae, sample(model, sae.site, IDS))
    for op in STRENGTHS:
        hold_as_full_edit(model, sae, op, strengths(op, features), clean)
    (after,), after_logits = outcome(model, sae.site_out)
    assert torch.equal(after, clean)
    assert torch.equal(after_logits, clean_logits)


@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("kind", sites.KINDS)
@pytest.mark.parametrize("architecture", EVERY)
def test_splice_writes_the_reconstruction_of_what_is_read(architecture, kind, tokens, random_model, monkeypatch):
    monkeypatch.setattr(decoding, "SMALL", 0 if tokens == "many" else decoding.SMALL)
    model = random_model(architecture)
    sae = made_for(model, kind, skip=True)
    attach_saes(model, sae)
    with FullEdit(model, sae, lambda acts: acts, read=sae.site, write=sae.site_out, keep_error=False):
        (want,), want_logits = outcome(model, sae.site_out)
    with model.saes.splice():
        (got,), logits = outcome(model, sae.site_out)
    assert relative(got, want) < 1e-5
    assert relative(logits, want_logits) < 1e-5


@pytest.mark.parametrize("op", STRENGTHS)
def test_edits_under_a_splice_decode_the_edited_features(attached, sae, fires, op):
    values = strengths(op, fires)
    with FullEdit(attached, sae, lambda acts: edited(acts, op, values), keep_error=False):
        (want,), want_logits = outcome(attached, SITE)
    for first in ("edit", "splice"):  # in either order
        edit = getattr(attached.saes, op)
        with edit(values) if first == "edit" else attached.saes.splice(), \
                attached.saes.splice() if first == "edit" else edit(values):
            (got,), logits = outcome(attached, SITE)
        assert relative(got, want) < 1e-5
        assert relative(logits, want_logits) < 1e-5


def test_a_splice_that_keeps_the_error_changes_no_bit(attached):
    (clean,), clean_logits = outcome(attached, SITE)
    with attached.saes.splice(keep_error=True):
        (got,), logits = outcome(attached, SITE)
    assert torch.equal(got, clean)
    assert torch.equal(logits, clean_logits)


def test_a_splice_that_keeps_the_error_leaves_edits_as_they_are(attached, sae):
    with attached.saes.clamp({3: 9.0}):
        _, want = outcome(attached, SITE)
    with attached.saes.clamp({3: 9.0}), attached.saes.splice(keep_error=True):
        _, got = outcome(attached, SITE)
    assert torch.equal(got, want)


def test_a_splice_that_keeps_the_error_still_tells_a_site_where_nothing_is_attached(attached):
    with pytest.raises(EditError, match="layer=7"):
        attached.saes.splice(keep_error=True, layer=7)


def test_after_a_splice_that_kept_the_error_the_hooks_are_idle_again(attached):
    for scope in ("model", "context"):
        with attached.saes.splice(keep_error=True, scope=scope):
            pass
        assert not attached.saes._runtime.active


@pytest.mark.parametrize("op", STRENGTHS)
@pytest.mark.parametrize("settings", [{"k": 6}, {"k": 6, "skip": True}, {"skip": True}])
def test_topk_saes_and_saes_with_a_skip_follow_the_same_equation(model, random_sae, op, settings):
    sae = random_sae(32, 64, SITE, like=sample(model, SITE, IDS), **settings)
    values = strengths(op, firing(sae, sample(model, SITE, IDS)))
    attach_saes(model, sae)
    with FullEdit(model, sae, lambda acts: edited(acts, op, values)):
        (want,), _ = outcome(model, SITE)
    with getattr(model.saes, op)(values):
        (got,), _ = outcome(model, SITE)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", STRENGTHS)
def test_saes_in_half_precision_edit_as_their_rounded_weights_say(model, sae, fires, op, dtype):
    values = strengths(op, fires)
    attach_saes(model, sae, dtype=dtype)
    assert model.saes[SITE].dtype == dtype
    with FullEdit(model, model.saes[SITE], lambda acts: edited(acts, op, values)):
        (want,), _ = outcome(model, SITE)
    with getattr(model.saes, op)(values):
        (got,), _ = outcome(model, SITE)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("settings", [{}, {"k": 6}, {"skip": True}])
def test_under_autocast_edits_and_splices_are_computed_in_float32(model, random_sae, settings, gradients):
    sae = random_sae(32, 64, SITE, like=sample(model, SITE, IDS), **settings)
    features = firing(sae, sample(model, SITE, IDS))
    attach_saes(model, sae)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        for op in STRENGTHS:
            values = strengths(op, features)
            with FullEdit(model, sae, lambda acts, op=op, v=values: edited(acts, op, v)):
                (want,), _ = outcome(model, SITE)
            with getattr(model.saes, op)(values):
                (got,), _ = outcome(model, SITE)
            assert want.dtype == torch.float32
            assert relative(got, want) < 1e-5, op
        with FullEdit(model, sae, lambda acts: acts, keep_error=False):
            (want,), _ = outcome(model, SITE)
        with model.saes.splice():
            (got,), _ = outcome(model, SITE)
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("op", STRENGTHS)
def test_only_if_active_touches_a_feature_only_where_it_fires(attached, sae, op):
    (clean,), _ = outcome(attached, SITE)
    acts = encode(sae, array(clean))
    firing = {f for f in range(64) if 0 < (acts[..., f] > 0)[ordinary(IDS, MASK).numpy()].mean() < 1}
    values = dict.fromkeys(sorted(firing)[:4], 3.0)
    assert len(values) == 4
    with FullEdit(attached, sae, lambda a: edited(a, op, values, only_if_active=True)):
        (want,), _ = outcome(attached, SITE)
    with getattr(attached.saes, op)(values, only_if_active=True):
        (got,), _ = outcome(attached, SITE)
    assert relative(got, want) < 1e-5
    silent = torch.from_numpy((acts[..., list(values)] <= 0).all(-1)) & ordinary(IDS, MASK)
    assert silent.any()
    assert torch.equal(got[silent], clean[silent])


def test_ablating_is_clamping_to_zero(attached):
    with attached.saes.ablate([3, 40, 17]):
        _, ablated = outcome(attached, SITE)
    with attached.saes.clamp({3: 0.0, 40: 0.0, 17: 0.0}):
        _, clamped = outcome(attached, SITE)
    assert torch.equal(ablated, clamped)
    with pytest.raises(EditError, match="twice"):
        attached.saes.ablate([3, 3])
