"""Several edits at once: at one site, at several, of two SAEs at one site, and from shared documents."""

import contextlib

import pytest
import torch
from core.reference import FullEdit, array, decode, edited, encode, ordinary, relative, sample, tap
from core.steering import IDS, INPUTS, MASK, NAN, SITE, made_for, outcome

from sae_hooks import EditError, Edits, attach_saes
from sae_hooks.edits import edit

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_several_edits_at_one_site_add_up_as_one(attached, sae):
    amounts = torch.tensor([1.0, NAN, 2.0])

    def everything(acts):
        return edited(edited(edited(acts, "clamp", {3: 9.0}), "scale", {17: 3.0}), "add", {40: amounts})

    with FullEdit(attached, sae, everything):
        (want,), want_logits = outcome(attached, SITE)
    with attached.saes.clamp({3: 9.0}), attached.saes.scale({17: 3.0}), \
            attached.saes.add({40: amounts}):
        (got,), logits = outcome(attached, SITE)
    assert relative(got, want) < 1e-5
    assert relative(logits, want_logits) < 1e-5


def test_an_edit_that_ends_before_another_takes_only_itself_away(attached):
    with attached.saes.clamp({3: 9.0}):
        _, want = outcome(attached, SITE)
    stays, goes = attached.saes.clamp({3: 9.0}), attached.saes.add({5: 3.0})
    attached(**INPUTS)
    goes.remove()
    assert torch.equal(outcome(attached, SITE)[1], want)
    stays.remove()


def test_edits_at_several_sites_each_read_what_reaches_their_site(random_model):
    model = random_model("Gemma2")
    saes = [made_for(model, kind, layer, seed=i) for i, (layer, kind) in enumerate(
        [(0, "resid_post"), (1, "attn_out"), (1, "mlp_out"), (2, "transcoder"), (2, "resid_post")])]
    attach_saes(model, {sae.site: sae for sae in saes})
    with contextlib.ExitStack() as references:
        for sae in saes:
            references.enter_context(
                FullEdit(model, sae, lambda a: edited(a, "clamp", {3: 9.0}), read=sae.site, write=sae.site_out))
        _, want = outcome(model, SITE)
    with contextlib.ExitStack() as handles:
        for name in model.saes:
            handles.enter_context(model.saes.clamp({3: 9.0}, name=name))
        _, got = outcome(model, SITE)
    assert len(model.saes) == 5
    assert relative(got, want) < 1e-5


def test_two_saes_at_one_site_are_told_apart_by_name_and_read_the_same_activations(model, sae, random_sae):
    other = random_sae(32, 48, SITE, seed=5, like=sample(model, SITE, IDS))
    attach_saes(attach_saes(model, sae), other, name="other")
    assert list(model.saes) == [SITE, "other"]
    assert model.saes[SITE] is sae
    assert model.saes["other"] is other

    def both(x):
        wide, new = array(x), array(x)
        for one in (sae, other):
            acts = encode(one, wide)
            new = new + decode(one, edited(acts, "clamp", {3: 9.0})) - decode(one, acts)
        return torch.where(ordinary(IDS, MASK)[..., None], torch.from_numpy(new), x.double()).float()

    handle = tap(model, SITE, both)
    (want,), _ = outcome(model, SITE)
    handle.remove()
    with model.saes.clamp({3: 9.0}, name=SITE), model.saes.clamp({3: 9.0}, name="other"):
        (got,), _ = outcome(model, SITE)
    assert relative(got, want) < 1e-5
    with pytest.raises(EditError, match="2 SAEs are attached; say which"):
        model.saes.clamp({3: 9.0})
    with pytest.raises(EditError, match="spliced already"):
        model.saes.splice()


def test_a_feature_edited_twice_is_refused_and_the_first_edit_stands(attached):
    with attached.saes.clamp({3: 9.0}):
        _, want = outcome(attached, SITE)
        with pytest.raises(EditError, match=r"feature 3 .* edited twice"):
            attached.saes.add({3: 1.0})
        assert torch.equal(outcome(attached, SITE)[1], want)


@pytest.mark.parametrize("where", [{"site": 2}, {"layer": "2"}, {"name": 2}, {"site": ["resid_post"]}])
def test_an_edit_at_what_is_no_place_is_refused_and_told_what_there_is(attached, where):
    with pytest.raises(EditError, match=r"no SAE with .* is attached; there are: model.layers"):
        attached.saes.clamp({3: 9.0}, **where)


@pytest.mark.parametrize("layer", [None, 1])
def test_an_alias_that_means_another_place_is_told_with_it_and_the_sites_there_are(layer, random_model, random_sae):
    """On Gemma 2 "mlp_out" is after the norm that follows the MLP; SAEs of the MLP's own output go by their path."""
    model = attach_saes(random_model("Gemma2"), random_sae(32, 64, "model.layers.1.mlp.output"), name="mine")
    attach_saes(model, random_sae(32, 64, "model.layers.2.mlp.output"))
    with pytest.raises(EditError) as caught:
        model.saes.clamp({3: 9.0}, layer=layer, site="mlp_out")
    assert str(caught.value).endswith(
        "site='mlp_out' (here model.layers.1.post_feedforward_layernorm.output) is attached; there are: "
        "mine at model.layers.1.mlp.output, model.layers.2.mlp.output")
    with model.saes.clamp({3: 9.0}, layer=layer, site="model.layers.1.mlp.output") as handle:
        model(torch.arange(3, 9)[None])
    assert handle.positions_edited == 6


def test_shared_edits_do_what_the_first_ones_did(attached):
    mask = torch.tensor([True, True, True, False, False, True, True])
    with attached.saes.clamp({3: torch.tensor([9.0, NAN, 1.0])}, tokens=mask) as first, \
            attached.saes.scale({5: 2.0}) as second:
        _, want = outcome(attached, SITE)
        documents = [first.to_json(), second.edits]
    with attached.saes.apply(documents[0]), attached.saes.apply(documents[1]):
        _, got = outcome(attached, SITE)
    assert torch.equal(got, want)


def test_applying_a_document_with_one_wrong_edit_opens_none(attached):
    document = Edits((edit("clamp", SITE, {3: 9.0}), edit("clamp", SITE, {64: 9.0}))).to_json()
    _, clean = outcome(attached, SITE)
    with pytest.raises(EditError, match="feature 64"):
        attached.saes.apply(document)
    assert torch.equal(outcome(attached, SITE)[1], clean)
    with pytest.raises(EditError, match="no SAE with name='elsewhere'"):
        attached.saes.apply(Edits((edit("clamp", "elsewhere", {3: 9.0}),)))
