"""Activations of four dimensions: places of images, heads, streams of one text."""

import pytest
import torch
from core.reference import array, edited, encode, relative, seen
from core.steering import STRENGTHS
from tiny_models import make_sae
from torch import nn

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
