"""Activations that are not (batch, tokens, d): places of images, heads, streams of one text, what experts get."""

import pytest
import torch
from core import steering
from core.reference import FullEdit, array, edited, encode, relative, sample, seen
from core.steering import STRENGTHS, hold_as_full_edit, outcome, strengths
from tiny_models import make_sae
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from sae_hooks import SaeAttachError, attach_saes, edits

NAN = float("nan")
IDS = torch.tensor([[17, 45, 99, 23, 8, 61], [31, 13, 77, 120, 64, 33], [50, 60, 70, 80, 90, 100]])

pytestmark = pytest.mark.usefixtures("without_gradients")


class OfImages(nn.Module):
    """Takes (batch, height, width, 8) and no tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, pixel_values):
        return self.blocks[1](self.blocks[0](pixel_values))


class OfStreams(nn.Module):
    """Computes four streams of each text, (4, batch, tokens, 8), as Gemma 3n does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(128, 8), nn.ModuleList([nn.Identity()])

    def forward(self, input_ids):
        return self.layers[0](torch.stack([self.embedding(input_ids) * i for i in range(1, 5)]))


def fitting(x, site, **settings):
    """An SAE of which a part fires at x, and has no attention sinks."""
    sae = make_sae(x.shape[-1], 32, site, like=x, **settings)
    sae.metadata.clear()
    return sae


def written_out(sae, x, op, values):
    """x (batch, ..., d) with an edit, as reference.edited has it of (batch, places, d)."""
    acts = encode(sae, array(x)).reshape(len(x), -1, sae.d_sae)
    change = (edited(acts, op, values) - acts) @ array(sae.W_dec)
    return x + torch.from_numpy(change).reshape(x.shape).float()


def firing(sae, x, n=3):
    return (torch.from_numpy(encode(sae, array(x))) > 0).flatten(0, -2).sum(0).argsort(descending=True)[:n].tolist()


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("op", edits.OPS)
def test_places_of_images_are_edited_with_one_strength_or_one_for_each_image(op, k):
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    sae = fitting(x, "blocks.0.output", k=k)
    model = attach_saes(OfImages(), sae)
    values = dict(zip(firing(sae, x), STRENGTHS[op], strict=True))
    for chosen in (values, dict(list(values.items())[:1])):
        with getattr(model.saes, op)(chosen) as edit:
            got = model(x)
        assert relative(got, written_out(sae, x, op, chosen)) < 1e-5
        assert relative(got, x) > 1e-3
        assert edit.positions_edited == 24
    with model.saes.splice():
        assert torch.equal(model(x), sae(x))


def test_features_of_images_are_captured_by_image_and_place():
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    sae = fitting(x, "blocks.0.output")
    model = attach_saes(OfImages(), sae)
    with model.saes.capture() as captured:
        model(x)
    features = captured["blocks.0.output"]
    assert torch.equal(features.to_dense(), sae.encode(x).flatten(0, -2))
    assert features.doc_id.tolist() == [row for row in range(3) for _ in range(8)]
    assert features.position.tolist() == [*range(8)] * 3


@pytest.mark.parametrize("op", edits.OPS)
def test_each_head_is_edited_and_each_text_may_have_its_strength(random_model, op):
    site, model = "model.layers.1.self_attn.q_norm.output", random_model("Qwen3")
    with seen(model, site) as xs:
        model(IDS)
    x, = xs
    assert x.shape == (3, 6, 4, 8)
    sae = fitting(x, site)
    attach_saes(model, sae)
    values = dict(zip(firing(sae, x), STRENGTHS[op], strict=True))
    with getattr(model.saes, op)(values), seen(model, site) as xs:
        model(IDS)
    assert relative(xs[0], written_out(sae, x, op, values)) < 1e-5
    assert relative(xs[0], x) > 1e-3
    with pytest.raises(SaeAttachError, match=r"\(3, 6, 4, 8\) for tokens \(3, 6\); capture needs"), \
            model.saes.capture():
        model(IDS)


def test_where_rows_or_tokens_cannot_be_told_an_edit_with_one_strength_works_and_all_else_says_so():
    model, site = OfStreams(), "layers.0.output"
    x = model(IDS)
    sae = fitting(x, site)
    attach_saes(model, sae)
    feature, = firing(sae, x, 1)
    with model.saes.scale({feature: 3.0}):
        assert relative(model(IDS), written_out(sae, x, "scale", {feature: 3.0})) < 1e-5
    with model.saes.splice():
        assert relative(model(IDS), sae(x)) < 1e-6
    shapes = r"layers.0.output gives activations \(4, 3, 6, 8\) for tokens \(3, 6\)"
    for call in (model.saes.clamp, model.saes.scale, model.saes.add):
        with pytest.raises(SaeAttachError, match=f"{shapes}; the rows .* Give one number"), \
                call({feature: torch.tensor([1.0, 2.0, NAN])}):
            model(IDS)
    with pytest.raises(SaeAttachError, match=f"{shapes}; capture"), model.saes.capture():
        model(IDS)
    with pytest.raises(SaeAttachError, match=f"{shapes}; positions"), model.saes.clamp({feature: 1.0}, tokens=IDS > 20):
        model(IDS)


def test_streams_are_not_taken_for_rows_where_there_are_as_many_rows_and_tokens():
    model, ids = OfStreams(), IDS.flatten()[:16].view(4, 4)
    attach_saes(model, fitting(model(ids), "layers.0.output"))
    with pytest.raises(SaeAttachError, match=r"\(4, 4, 4, 8\) for tokens \(4, 4\); the rows .* Give one number"), \
            model.saes.add({3: torch.tensor([NAN, NAN, NAN, 5.0])}, special_tokens=True):
        model(ids)
    with model.saes.add({3: 5.0}, special_tokens=True) as edit:
        model(ids)
    assert edit.positions_edited == 64


LAYER = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def of_experts():
    """A mixture of experts: (batch * tokens, d) goes into mlp.experts and comes out, (batch, tokens, d) elsewhere."""
    config = MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=128, num_local_experts=4, bos_token_id=2, pad_token_id=0,
                           eos_token_id=None, initializer_range=0.15)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(("read", "write"), [
    (f"{LAYER}.input", f"{LAYER}.experts.output"), (f"{LAYER}.experts.input", f"{LAYER}.output")])
def test_a_transcoder_may_read_tokens_by_row_and_write_them_flat_or_the_reverse(of_experts, read, write):
    sae = make_sae(32, 64, read, site_out=write, like=sample(of_experts, read, steering.IDS))
    sae.metadata.clear()
    (clean,), _ = outcome(of_experts, write)
    assert clean.ndim == (2 if "experts" in write else 3)
    model = attach_saes(of_experts, sae)
    for op in edits.OPS:
        hold_as_full_edit(model, sae, op, strengths(op, steering.firing(sae, sample(model, read, steering.IDS))), clean)
    with FullEdit(model, sae, lambda acts: acts, read=read, write=write, keep_error=False):
        (want,), _ = outcome(model, write)
    with model.saes.splice():
        (got,), _ = outcome(model, write)
    assert relative(got, want) < 1e-5
    with model.saes.clamp({3: 5.0}):
        (got,), _ = outcome(model, write, input_ids=steering.IDS[2:])
    assert got.ndim == clean.ndim
    model.saes.detach()


def test_a_transcoder_between_places_with_other_tokens_is_refused():
    model = nn.Sequential(nn.Identity(), nn.Flatten(1))
    sae = make_sae(8, 32, "0.output", site_out="1.output", d_out=32)
    attach_saes(model, sae)
    for opened in (lambda: model.saes.clamp({3: 1.0}, special_tokens=True), model.saes.splice):
        with pytest.raises(SaeAttachError, match=r"reads activations \(3, 4, 8\) at 0.output and writes \(3, 32\)"), \
                opened():
            model(torch.zeros(3, 4, 8))
