"""Edits of many features, of which only the active ones are decoded: what the full encode says."""

import pytest
import torch
from core.reference import FullEdit, edited, relative, sample
from core.steering import EVERY, IDS, NAN, SITE, hold_as_full_edit, made_for, outcome

from sae_hooks import SAE, EditError, attach_saes, edits, kernels, sites
from sae_hooks.edits import check, edit
from sae_hooks.kernels import decoding, gradients, tiles

FEATURES = range(5, 60)
VALUES = {
    "clamp": {f: 0.1 * (f % 7) for f in FEATURES},
    "scale": dict.fromkeys(FEATURES, 3.0),
}


@pytest.fixture(params=["copied rows", "the SAE's own"])
def taken(monkeypatch, request):
    """Fifty features are many; a list of the kernels that were taken for them, with each kind of rows."""
    calls = []
    monkeypatch.setattr(edits, "MANY", 50)
    monkeypatch.setattr(edits, "MOST", 2.0 if request.param == "copied rows" else 0.5)
    for name in ("reconstruct", "reconstruct_with_gradient"):
        plain = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *of, plain=plain, name=name: (calls.append(name), plain(*of))[1])
    return calls


@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("kind", sites.KINDS)
@pytest.mark.parametrize("architecture", EVERY)
@torch.no_grad()
def test_they_change_what_the_full_encode_and_decode_change(
        architecture, kind, tokens, random_model, taken, monkeypatch):
    monkeypatch.setattr(decoding, "SMALL", 0 if tokens == "many" else decoding.SMALL)
    model = random_model(architecture)
    sae = made_for(model, kind)
    (clean,), _ = outcome(model, sae.site_out)
    attach_saes(model, sae)
    for op, values in VALUES.items():
        hold_as_full_edit(model, sae, op, values, clean)
    assert taken == ["reconstruct"] * 2


@torch.no_grad()
def test_under_a_splice_the_edited_features_are_decoded(attached, sae, taken):
    with FullEdit(attached, sae, lambda acts: edited(acts, "clamp", VALUES["clamp"]), keep_error=False):
        (want,), _ = outcome(attached, SITE)
    with attached.saes.splice(), attached.saes.clamp(VALUES["clamp"]):
        (got,), _ = outcome(attached, SITE)
    assert relative(got, want) < 1e-5
    assert taken


MIXED = {f: torch.tensor([2.0, 0.5, f / 10]) for f in FEATURES}
ONE_A_ROW = {
    "several gains": ("scale", {f: f / 10 for f in FEATURES}, False),
    "strengths of a row": ("clamp", {**VALUES["clamp"], 5: torch.tensor([1.0, 2.0, 3.0])}, False),
    "a gain of a row": ("scale", dict.fromkeys(FEATURES, torch.tensor([0.0, 2.0, 1.5])), False),
    "a row left untouched": ("clamp", dict.fromkeys(FEATURES, torch.tensor([0.0, NAN, 1.0])), False),
    "scaled if active": ("scale", {f: f / 10 for f in FEATURES}, True),
    "ablated if active": ("clamp", dict.fromkeys(FEATURES, 0.0), True),
}
OTHERS = {
    "gains by row and feature": ("scale", MIXED, False),
    "a feature left untouched in a row": ("clamp", {**VALUES["clamp"], 5: torch.tensor([1.0, 2.0, NAN])}, False),
    "a feature left untouched": ("clamp", {**VALUES["clamp"], 5: torch.tensor([NAN])}, False),
    "few features": ("clamp", dict(list(VALUES["clamp"].items())[:49]), False),
    "clamped if active": ("clamp", VALUES["clamp"], True),
    "added if active": ("add", VALUES["clamp"], True),
}


@pytest.mark.parametrize("name", [*ONE_A_ROW, *OTHERS])
@torch.no_grad()
def test_what_has_one_gain_in_each_row_or_one_row_goes_the_way_of_many_features(attached, sae, taken, name):
    op, values, only_if_active = {**ONE_A_ROW, **OTHERS}[name]
    with FullEdit(attached, sae, lambda acts: edited(acts, op, values, only_if_active)):
        (want,), _ = outcome(attached, SITE)
    (clean,), _ = outcome(attached, SITE)
    with getattr(attached.saes, op)(values, only_if_active=only_if_active):
        (got,), _ = outcome(attached, SITE)
    assert relative(got, want) < 1e-5
    assert relative(got, clean) > 1e-3
    assert taken == ["reconstruct"] * (name in ONE_A_ROW)


@torch.no_grad()
def test_strengths_of_rows_are_repeated_for_each_beam(sae, taken):
    """Four beams of two requests, one of which is left untouched."""
    x = torch.randn(8, 5, 32, generator=torch.Generator().manual_seed(0))
    for op, strengths in (("clamp", [0.5, NAN]), ("scale", [3.0, 0.0]), ("add", [NAN, 2.0])):
        rows = rows_of(sae, dict.fromkeys(FEATURES, torch.tensor(strengths)), op=op)
        want = rows.change(rows.acts(x) if rows.reads else None, 4, 8) @ rows.W_dec
        torch.testing.assert_close(rows.of_many(x, 4, 8), want, rtol=1e-5, atol=1e-4)
        assert want.abs().amax((1, 2)).bool().tolist() == [True] * 8 if op == "scale" else [op == "clamp"] * 4 + [
            op == "add"] * 4
    assert taken == ["reconstruct"] * 2
    with pytest.raises(EditError, match="strengths for 2 rows, the batch has 3"):
        rows.of_many(x[:3], 1, 3)


@torch.no_grad()
def test_topk_saes_go_the_way_of_few_features(model, random_sae, taken):
    topk = random_sae(32, 64, SITE, k=6, like=sample(model, SITE, IDS))
    attach_saes(model, topk)
    with FullEdit(model, topk, lambda acts: edited(acts, "clamp", VALUES["clamp"])):
        (want,), _ = outcome(model, SITE)
    with model.saes.clamp(VALUES["clamp"]):
        (got,), _ = outcome(model, SITE)
    assert relative(got, want) < 1e-5
    assert not taken


@pytest.mark.parametrize("k", [None, 6])
@torch.no_grad()
def test_many_features_are_added_as_one_vector(model, random_sae, taken, monkeypatch, k):
    sae = random_sae(32, 64, SITE, k=k, like=sample(model, SITE, IDS))
    attach_saes(model, sae)
    with FullEdit(model, sae, lambda acts: edited(acts, "add", VALUES["clamp"])):
        (want,), _ = outcome(model, SITE)
    with model.saes.add(VALUES["clamp"]):
        outcome(model, SITE)
        monkeypatch.setattr(edits.Rows, "change", None)  # needs decoder rows
        (got,), _ = outcome(model, SITE)
    assert relative(got, want) < 1e-5
    assert not taken


@torch.no_grad()
def test_topk_saes_are_encoded_some_tokens_at_a_time(model, random_sae, monkeypatch):
    topk = random_sae(32, 64, SITE, k=6, like=sample(model, SITE, IDS))
    attach_saes(model, topk)
    with model.saes.clamp({3: 1.0, 5: 2.0}):
        (want,), _ = outcome(model, SITE)
        seen = []
        encode = topk.encode
        monkeypatch.setattr(topk, "encode", lambda x: (seen.append(len(x)), encode(x))[1])
        monkeypatch.setattr(tiles, "TOPK_SIZE", 5 * 64)
        (got,), _ = outcome(model, SITE)
    assert max(seen) <= 5
    assert sum(seen) == IDS.numel()
    assert relative(got, want) < 1e-5
    picked = torch.tensor([3, 5])
    rows = edits.Rows(*[torch.zeros(2, 1)] * 2, None, *[torch.zeros(2, 1)] * 3, False, True, picked=picked)
    assert rows.topk_acts(torch.zeros(2, 0, 32), 64, topk.encode).shape == (2, 0, 2)


@pytest.mark.parametrize("followed", [True, False])
def test_weights_of_half_precision_are_widened_as_they_are_read(model, sae, taken, followed, monkeypatch):
    """Also where plain operations are taken, since gradients are on."""
    attach_saes(model, sae, dtype=torch.bfloat16)
    with torch.no_grad(), FullEdit(model, model.saes[SITE], lambda acts: edited(acts, "clamp", VALUES["clamp"])):
        (want,), _ = outcome(model, SITE)
    monkeypatch.setattr(gradients, "SMALL", 0 if followed else 2**62)
    for name, grad in (("reconstruct", False), ("reconstruct_with_gradient", True)):
        with torch.set_grad_enabled(grad), model.saes.clamp(VALUES["clamp"]):
            (got,), logits = outcome(model, SITE)
        assert relative(got.detach(), want) < 1e-5
        assert taken.pop() == name
        assert logits.requires_grad == grad


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_activations_of_half_precision_are_read_as_they_are(model, sae, taken, weights, monkeypatch):
    seen = []
    many = edits.Rows.of_many
    monkeypatch.setattr(edits.Rows, "of_many", lambda rows, x, *of: (seen.append(x.dtype), many(rows, x, *of))[1])
    attach_saes(model.bfloat16(), sae, dtype=weights)
    with model.saes.clamp(VALUES["clamp"]):
        (got,), _ = outcome(model, SITE)
        assert taken == ["reconstruct"]
        assert seen == [torch.bfloat16]
    monkeypatch.setattr(edits, "MANY", 1000)
    with model.saes.clamp(VALUES["clamp"]):
        (want,), _ = outcome(model, SITE)
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), want.float()) < 2e-3


@pytest.mark.parametrize(("op", "values"), [("clamp", VALUES["clamp"]), *[(op, v) for op, v, _ in ONE_A_ROW.values()]])
@pytest.mark.parametrize("followed", [True, False])
def test_gradients_are_those_of_few_features(attached, taken, followed, op, values, monkeypatch):
    """Through what is active, and where that is left to plain operations."""
    backward = []
    for name, value in (("SMALL", 0 if followed else 2**62), ("CROWDED", 1.0),
                        ("dots", lambda *of: (backward.append(of), kernels.dots(*of))[1])):
        monkeypatch.setattr(gradients, name, value)

    def gradient():
        attached.zero_grad()
        with getattr(attached.saes, op)(values):
            outcome(attached, SITE)[1].square().mean().backward()
        return attached.get_input_embeddings().weight.grad

    found = gradient()
    assert taken == ["reconstruct_with_gradient"]
    assert len(backward) == followed
    monkeypatch.setattr(edits, "MANY", 1000)
    assert relative(found, gradient()) < 1e-5
    assert taken == ["reconstruct_with_gradient"]


def rows_of(sae, values=VALUES["clamp"], dtype=torch.float32, op="clamp", **more):
    """The edit, made ready."""
    made = edit(op, SITE, values, **more)
    return edits.Rows.of(made, sae.W_enc.T, sae.b_enc, sae.threshold, sae.W_dec, sae.device, dtype)


@pytest.mark.parametrize(("weights", "dtype", "copied"), [
    (torch.float32, torch.float32, False), (torch.bfloat16, torch.float32, False),
    (torch.float16, torch.float32, False), (torch.float64, torch.float64, False), (torch.float32, torch.float64, True),
    (torch.float64, torch.float32, True), (torch.bfloat16, torch.float64, True)])
def test_an_edit_of_most_features_holds_no_copy_of_the_matrices(sae, monkeypatch, weights, dtype, copied):
    monkeypatch.setattr(edits, "MANY", 50)
    sae = sae.to(weights)
    rows, x = rows_of(sae, dtype=dtype), torch.randn(1, 9, 32, dtype=dtype)
    assert (rows.W_dec.data_ptr() != sae.W_dec.data_ptr()) == copied
    assert (rows.W_enc.data_ptr() != sae.W_enc.data_ptr()) == copied
    assert len(rows.threshold) == (len(FEATURES) if copied else sae.d_sae)
    monkeypatch.setattr(edits, "MOST", 2.0)
    want = rows_of(sae, dtype=dtype)
    accuracy = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rows.of_many(x, 1, 1), want.of_many(x, 1, 1), **accuracy)
    change = [r.change(r.acts(x), 1, 1) @ r.W_dec.to(dtype) for r in (rows, want)]
    torch.testing.assert_close(*change, **accuracy)
    torch.testing.assert_close(change[0], rows.of_many(x, 1, 1), **accuracy)
    assert change[0].abs().max() > 1e-3


def test_edits_of_less_than_half_of_the_features_and_others_copy_their_rows(sae, monkeypatch):
    monkeypatch.setattr(edits, "MANY", 10)
    for rows in (rows_of(sae, dict.fromkeys(range(31), 0.0)), rows_of(sae, only_if_active=True),
                 rows_of(sae, {f: 1.0 * f for f in FEATURES}, op="scale"), rows_of(sae, MIXED, op="scale")):
        assert len(rows.W_dec) == len(rows.threshold) < sae.d_sae
    assert len(rows_of(sae, dict.fromkeys(range(32), 0.0)).W_dec) == sae.d_sae


def test_what_is_too_strong_for_many_features_is_said(sae, monkeypatch):
    monkeypatch.setattr(edits, "MANY", 10)
    W_dec = torch.zeros(64, 3)
    W_dec[40, 1], W_dec[50, 2] = 5.0, -9.0
    for last, most in ((45, 5.0), (60, 9.0)):
        made = edit("clamp", SITE, dict.fromkeys(range(1, last), 60000.0 / most))
        edits.check_range(made, W_dec, torch.float16)
        with pytest.raises(EditError, match="overflow"):
            edits.check_range(made, W_dec * 1.2, torch.float16)


def test_torch_func_sees_plain_operations(sae, taken):
    rows, seen = rows_of(sae), []
    torch.func.vmap(lambda x: seen.append(rows.of_many(x, 1, 2)) or x)(torch.ones(2, 3, 32))
    assert seen == [None]
    assert not taken


@torch.no_grad()
def test_what_is_not_finite_stays_with_its_token(sae, taken):
    rows = rows_of(sae)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3] = torch.nan
    found, wanted = rows.of_many(x, 1, 3), rows.change(rows.acts(x), 1, 3) @ rows.W_dec
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-4)
    assert found[1, 2].isnan().all()
    assert taken
    assert rows.of_many(x[:, :0], 1, 3).shape == (3, 0, 32)


@torch.no_grad()
def test_a_hundred_thousand_features_are_opened_as_few_are(model):
    g = torch.Generator().manual_seed(0)
    d_sae = 100_000
    sae = SAE(torch.randn(32, d_sae, generator=g), torch.zeros(d_sae), torch.randn(d_sae, 32, generator=g) / 100,
              torch.zeros(32), threshold=torch.full((d_sae,), 12.0), site=SITE)
    attach_saes(model, sae)
    ablate = model.saes.ablate(range(d_sae))
    (got,), _ = outcome(model, SITE)
    ablate.remove()
    with FullEdit(model, sae, lambda acts: 0 * acts):
        (want,), _ = outcome(model, SITE)
    assert relative(got, want) < 1e-5
    with model.saes.apply(ablate.to_json()):
        assert torch.equal(outcome(model, SITE)[0][0], got)


def test_what_is_wrong_with_one_of_many_strengths_is_said():
    with pytest.raises(EditError, match="clamp of feature 7: the strength must be finite, got 1e\\+300"):
        edit("clamp", SITE, {3: 1.0, 7: 1e300})
    with pytest.raises(EditError, match="clamp of feature 3: the strength must be finite, got nan"):
        edit("clamp", SITE, {3: NAN, 7: 1.0})
    made = edit("clamp", SITE, dict.fromkeys(range(10), 0.1))
    assert torch.equal(made.values, torch.full((1, 10), 0.1))
    check(made, 10)
    with pytest.raises(EditError, match="features 0 to 8"):
        check(made, 9)
