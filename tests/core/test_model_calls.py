"""Edits in other ways through a model: hidden states, embeddings, half precision, gradients, any module."""

import contextlib
import math

import pytest
import torch
from core.reference import FullEdit, array, decode, edited, encode, ordinary, relative, seen
from core.steering import EVERY, IDS, INPUTS, MASK, NAN, SITE, STRENGTHS, firing, made_for, outcome, strengths
from torch import nn
from transformers import DynamicCache

from sae_hooks import SAE, EditError, SaeMismatchError, attach_saes

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("architecture", EVERY)
def test_output_hidden_states_shows_the_edited_activations(architecture, asked_before, random_model):
    model = random_model(architecture)
    sae = made_for(model, "resid_post")
    if asked_before:  # transformers installs hooks of its own at the first call
        model(**INPUTS, output_hidden_states=True)
    attach_saes(model, sae)
    with model.saes.clamp({3: 9.0}), seen(model, sae.site) as xs:
        got = model(**INPUTS, output_hidden_states=True).hidden_states
    assert torch.equal(got[2], xs[0])
    with FullEdit(model, sae, lambda a: edited(a, "clamp", {3: 9.0}), read=sae.site):
        (want,), _ = outcome(model, sae.site)
    assert relative(got[2], want) < 1e-5


def test_embeddings_in_place_of_ids_are_refused_because_special_tokens_cannot_be_told(attached):
    embeddings = attached.get_input_embeddings()(IDS)
    with pytest.raises(EditError, match=r"no input_ids.*special_tokens=True"), attached.saes.clamp({3: 9.0}):
        attached(inputs_embeds=embeddings, attention_mask=MASK)


def test_embeddings_in_place_of_ids_work_where_special_tokens_are_asked_for(attached):
    embeddings = attached.get_input_embeddings()(IDS)
    with attached.saes.clamp({3: 9.0}, special_tokens=True):
        _, want = outcome(attached, SITE)
        _, got = outcome(attached, SITE, inputs_embeds=embeddings, attention_mask=MASK)
    assert torch.equal(got, want)


def test_positional_ids_and_calls_of_the_inner_model_are_edited_too(attached):
    with attached.saes.clamp({3: 9.0}), seen(attached, SITE) as xs:
        attached(IDS, MASK)
        attached.model(input_ids=IDS, attention_mask=MASK)
        attached.model(IDS, MASK)
        attached(**INPUTS)
    assert all(torch.equal(x, xs[0]) for x in xs)
    assert len(xs) == 4


def raising(*args):
    raise KeyError("in a pass")


@pytest.mark.parametrize("end", ["returns", "raises", "generates", "runs inside"])
def test_a_layer_called_by_itself_takes_no_tokens_of_a_pass_that_has_ended(attached, end):
    layer, calls = attached.model.layers[1], []
    layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    if end == "raises":
        attached.model.norm.register_forward_hook(raising)
    run = {"generates": lambda: attached.generate(**INPUTS, max_new_tokens=1), "raises": lambda: attached(**INPUTS),
           "returns": lambda: attached(**INPUTS), "runs inside": lambda: attached.model(**INPUTS)}[end]
    with attached.saes.clamp({3: 9.0}) as edit, contextlib.suppress(KeyError):
        run()
    edited, (args, kwargs) = edit.positions_edited, (calls[0][0], {**calls[0][1], "past_key_values": None})
    assert edited == ordinary(IDS, MASK).sum()
    with attached.saes.clamp({3: 9.0}) as edit, attached.saes.add({5: 1.0}, special_tokens=True) as everywhere:
        with contextlib.suppress(KeyError):
            run()
        with pytest.raises(EditError, match=r"no input_ids .*a layer called by itself\?.*special_tokens=True"):
            layer(*args, **kwargs)
        edit.remove()
        layer(*args, **kwargs)
    assert edit.positions_edited == edited
    assert everywhere.positions_edited == 2 * IDS.numel() - int((MASK == 0).sum())


class Forwarding(nn.Module):
    """A wrapper that hands on whatever it gets, and names none of it."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mask_given_by_position_tells_padding_whatever_its_id(model, sae, wrapped):
    padded, mask = IDS.clone(), MASK
    padded[0, :2] = 5  # no special token of the model's
    model = attach_saes(Forwarding(model) if wrapped else model, sae)
    model.saes.special_ids = [2]
    with model.saes.clamp({3: 9.0}) as by_name, model.saes.capture() as want:
        model(input_ids=padded, attention_mask=mask)
    with model.saes.clamp({3: 9.0}) as by_position, model.saes.capture() as got:
        model(padded, mask)
    (want,), (got,) = want.values(), got.values()
    assert by_position.positions_edited == by_name.positions_edited == ordinary(padded, mask, special=(2,)).sum()
    assert got.position.tolist() == want.position.tolist() == [*range(5), *range(7), *range(7)]
    assert torch.equal(got.to_dense(), want.to_dense())


def test_a_cache_given_by_position_continues_its_text(attached):
    cache = DynamicCache()
    with attached.saes.capture() as features:
        attached(IDS[1:, :4], None, None, cache)
        attached(IDS[1:, 4:], None, None, cache)
    got = features[SITE]
    assert got.doc_id.tolist() == [0] * 7 + [1] * 7
    assert got.position.tolist() == [*range(7), *range(7)]
    assert got.token_id.tolist() == IDS[1:].flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["Gemma2", "Llama", "GPT2", "Bloom"])
def test_half_precision_models_get_the_float32_change_rounded_once(architecture, dtype, random_model):
    model = random_model(architecture)
    sae = made_for(model, "resid_post")
    model = attach_saes(model.to(dtype), sae)
    (clean,), clean_logits = outcome(model, sae.site)
    features = firing(sae, clean)
    for op in STRENGTHS:
        values = strengths(op, features)
        with FullEdit(model, sae, lambda a, op=op, v=values: edited(a, op, v), read=sae.site):
            (want,), _ = outcome(model, sae.site)
        with getattr(model.saes, op)(values):
            (got,), _ = outcome(model, sae.site)
        assert got.dtype == dtype
        assert (got != want).float().mean() < 0.002  # where float32 and float64 round to different sides
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)
    with getattr(model.saes, op)({3: torch.tensor([NAN, 9.0, NAN])}):
        (got,), logits = outcome(model, sae.site)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(logits[2], clean_logits[2])


@pytest.fixture
def loud():
    """An SAE whose first four features all write the same direction, so that their changes add up."""
    W_dec = torch.zeros(64, 32)
    W_dec[:4] = 1.0
    return SAE(torch.zeros(32, 64), torch.zeros(64), W_dec, torch.zeros(32), threshold=torch.zeros(64), site=SITE)


def test_activations_that_overflow_float16_are_refused_and_not_generated_from(model, loud):
    model = attach_saes(model.half(), loud)
    with model.saes.add({0: 30000.0, 1: 30000.0}):
        assert outcome(model, SITE)[0][0].isfinite().all()
    with pytest.raises(EditError, match="overflow float16"), model.saes.add({0: 30000.0, 1: 30000.0, 2: 30000.0}):
        model(**INPUTS)
    with pytest.raises(EditError, match="overflow"), model.saes.add({0: 70000.0}):
        model(**INPUTS)
    assert outcome(model, SITE)[1].isfinite().all()


def test_an_infinity_that_was_there_before_is_no_edits_fault(loud):
    network = attach_saes(nn.Sequential(nn.Identity()).half(), {"0.output": loud})
    x = torch.zeros(3, 32).half()
    x[1, 5] = -torch.inf
    for amounts in ({0: 1.0}, {0: 0.5, 1: 0.5}):  # one edit, and two
        edits = [network.saes.add({feature: amount}, special_tokens=True) for feature, amount in amounts.items()]
        assert torch.equal(network(x), x + 1)
        strong = {2: torch.tensor([6e4, NAN, NAN]), 3: torch.tensor([6e4, NAN, NAN])}
        with pytest.raises(EditError, match="overflow float16"), network.saes.add(strong, special_tokens=True):
            network(x)
        for edit in edits:
            edit.remove()


def plain_network():
    """No Hugging Face model at all: takes no token ids, and does not tell the width of its middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def test_any_module_can_be_edited_by_module_path_where_no_position_is_asked_for(random_sae):
    network, x = plain_network(), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    sae = random_sae(32, 64, "1.output", norm=2.0)
    hidden = network[1](network[0](x))
    acts = encode(sae, array(hidden))
    change = decode(sae, edited(acts[:, None], "clamp", {3: 9.0})[:, 0]) - decode(sae, acts)
    want = network[2](hidden + torch.from_numpy(change).float())
    attach_saes(network, sae)
    with network.saes.clamp({3: 9.0}, special_tokens=True):
        assert relative(network(x), want) < 1e-5
    with network.saes.clamp({3: torch.tensor([9.0, NAN, NAN, NAN, NAN])}, special_tokens=True):
        got = network(x)
    network.saes.detach()
    assert relative(got[0], want[0]) < 1e-5
    assert torch.equal(got[1:], network(x)[1:])


def test_an_sae_of_another_width_than_what_passes_is_told_during_the_pass(random_sae):
    network = attach_saes(plain_network(), random_sae(16, 64, "1.output"))
    with pytest.raises(SaeMismatchError, match=r"reads 16 values, 1\.output gives 32"), \
            network.saes.clamp({3: 9.0}, special_tokens=True):
        network(torch.zeros(5, 8))


def test_gradients_flow_through_an_edit_to_what_came_before(attached):
    with torch.enable_grad():
        embeddings = attached.get_input_embeddings()(IDS).detach().requires_grad_()
        with attached.saes.clamp({3: 9.0}, special_tokens=True):
            attached(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().sum() > 0


def test_a_strength_of_a_model_in_float64_is_computed_in_float64(random_model, random_sae):
    model = random_model("Llama").double()
    sae = random_sae(32, 64, SITE, norm=math.sqrt(32)).double()
    attach_saes(model, sae)
    inputs = {"input_ids": IDS[1:]}  # transformers' own mask overflows float64 where a row is padded
    with FullEdit(model, sae, lambda a: edited(a, "clamp", {3: 9.0})):
        (want,), _ = outcome(model, SITE, **inputs)
    with model.saes.clamp({3: 9.0}):
        (got,), _ = outcome(model, SITE, **inputs)
    assert got.dtype == torch.float64
    assert relative(got, want) < 1e-13
