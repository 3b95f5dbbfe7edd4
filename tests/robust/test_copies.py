"""Copies, pickles and saved files of a model with SAEs are those of the plain model."""

import copy
import io
import pickle

import pytest
import torch
from robust.as_found import files, unchanged

from sae_hooks import EditError, SaeAttachError, attach_saes, detach_saes

SITE = "model.layers.1.output"


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@torch.no_grad()
def text(model, ids):
    return model.generate(ids, max_new_tokens=5, do_sample=False)


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_and_loaded}


@pytest.fixture(params=WAYS)
def copied(request):
    """One way to make a copy of a model."""
    return WAYS[request.param]


@pytest.fixture
def plain(random_model, ids):
    model = random_model("Gemma2")
    return logits(model, ids), text(model, ids)


@pytest.fixture
def attached(model, sae, random_sae):
    inside = "model.layers.1.self_attn.o_proj.input"
    return attach_saes(model, {SITE: sae, inside: random_sae(32, 64, inside)})


@pytest.mark.parametrize("opened", ["nothing", "clamp", "context", "splice", "capture"])
def test_a_copy_is_a_plain_model_whatever_is_open_and_leaves_the_original_alone(attached, ids, plain, copied, opened):
    opening = {"nothing": lambda saes: None, "clamp": lambda saes: saes.clamp({3: 40.0}, layer=1, site="resid_post"),
               "context": lambda saes: saes.clamp({3: 40.0}, site=SITE, scope="context"),
               "splice": lambda saes: saes.splice(site=SITE), "capture": lambda saes: saes.capture()}[opened]
    handle = opening(attached.saes)
    steered = logits(attached, ids)
    with unchanged(attached, ids):
        twin = copied(attached)
        assert torch.equal(logits(twin, ids), plain[0])
        assert torch.equal(text(twin, ids), plain[1])
    assert torch.equal(logits(attached, ids), steered)
    if handle is not None:
        handle.remove()
    assert torch.equal(logits(attached, ids), plain[0])
    assert torch.equal(logits(twin, ids), plain[0])


def test_a_copy_runs_its_own_weights_and_not_those_of_the_original(attached, ids, copied, plain):
    twin = copied(attached)
    with torch.no_grad():
        for weight in attached.parameters():
            weight.zero_()
    assert torch.equal(logits(twin, ids), plain[0])
    assert torch.equal(text(twin, ids), plain[1])


def test_a_copy_has_no_sae_and_says_so(attached, copied):
    twin = copied(attached)
    assert len(twin.saes) == 0
    with pytest.raises(EditError, match="none"):
        twin.saes.clamp({3: 40.0})
    assert set(attached.saes) != set()


def test_a_copy_carries_no_weight_of_the_sae(model, random_sae, ids):
    before = len(pickle.dumps(model))
    attach_saes(model, random_sae(32, 4096))
    with model.saes.clamp({3: 40.0}):
        logits(model, ids)
        assert len(pickle.dumps(model)) - before < 10_000


def test_a_copy_may_have_saes_of_its_own_apart_from_the_originals(attached, ids, plain, copied, sae):
    twin = attach_saes(copied(attached), sae)
    with twin.saes.clamp({3: 40.0}) as clamp:
        steered = logits(twin, ids)
        assert not torch.equal(steered, plain[0])
        assert clamp.positions_edited == ids.numel()
        assert torch.equal(logits(attached, ids), plain[0])
    with attached.saes.clamp({3: 40.0}, site=SITE):
        assert torch.equal(logits(attached, ids), steered)
        assert torch.equal(logits(twin, ids), plain[0])
    detach_saes(twin)
    assert torch.equal(logits(twin, ids), plain[0])
    assert set(attached.saes) > {SITE}


def test_a_copy_of_a_copy_and_a_copy_of_one_layer_are_plain_too(attached, ids, plain):
    with attached.saes.clamp({3: 40.0}, site=SITE):
        logits(attached, ids)
        twin = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(attached))))
        layer = copy.deepcopy(attached.model.layers[1])
        inner = copy.deepcopy(attached.model)
    assert torch.equal(text(twin, ids), plain[1])
    with torch.no_grad():
        attached.model.layers[1] = layer
        assert torch.equal(attached(ids).logits, plain[0])
        assert inner(ids).last_hidden_state.isfinite().all()


def test_save_pretrained_writes_what_the_plain_model_writes(random_model, attached, ids, plain, tmp_path):
    random_model("Gemma2").save_pretrained(tmp_path / "bare")
    with attached.saes.clamp({3: 40.0}, site=SITE):
        logits(attached, ids)
        attached.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "bare").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes(), name
    again = type(attached).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(logits(again, ids), plain[0])
    assert files() == []


def test_the_state_dict_is_the_plain_models_and_loads_into_one_while_edits_are_open(attached, random_model, ids, plain):
    other = random_model("Gemma2", seed=5)
    with attached.saes.clamp({3: 40.0}, site=SITE), attached.saes.splice(site=SITE):
        logits(attached, ids)
        state = attached.state_dict()
    assert list(state) == list(other.state_dict())
    other.load_state_dict(state)
    assert torch.equal(logits(other, ids), plain[0])
    attached.load_state_dict(random_model("Gemma2", seed=5).state_dict())
    assert set(attached.saes) > {SITE}


def test_a_model_moved_to_another_dtype_while_attached_is_edited_in_that_dtype(attached, ids, sae):
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        attached.to(dtype)
        fresh = attach_saes(copy.deepcopy(attached), sae)
        with attached.saes.clamp({3: 9.0}, site=SITE) as clamp, fresh.saes.clamp({3: 9.0}):
            found = logits(attached, ids)
            assert found.dtype == dtype
            assert torch.equal(found, logits(fresh, ids))
        assert clamp.positions_edited == ids.numel()
        assert sae.dtype == torch.float32


def test_an_edit_that_is_open_while_the_model_changes_dtype_goes_on_in_the_new_one(attached, ids, plain):
    with attached.saes.clamp({3: 9.0}, site=SITE):
        wide = logits(attached, ids)
        attached.to(torch.bfloat16)
        narrow = logits(attached, ids)
    assert narrow.dtype == torch.bfloat16
    assert not torch.equal(logits(attached, ids), narrow)
    assert (narrow.float() - wide).abs().mean() < 0.1 * (wide - plain[0]).abs().mean() + 0.05


def test_a_replaced_layer_refuses_edits_instead_of_losing_them(attached, ids, plain):
    attached.model.layers[1] = copy.deepcopy(attached.model.layers[1])
    with pytest.raises(SaeAttachError, match="replaced"):
        attached.saes.clamp({3: 40.0}, site=SITE)
    assert torch.equal(logits(attached, ids), plain[0])
    detach_saes(attached)
    assert torch.equal(logits(attached, ids), plain[0])


def test_a_model_in_training_mode_is_edited_alike(attached, ids):
    """Without dropout, as here, the two modes compute the same."""
    with attached.saes.clamp({3: 40.0}, site=SITE):
        steered = logits(attached, ids)
        attached.train()
        assert torch.equal(logits(attached, ids), steered)
    assert attached.training
