"""check(): whether an SAE belongs to a model and a place, measured on text that tiny_gemma2 was trained on."""

import math

import pytest
import torch
import transformers
from core.reference import array, encode, ordinary, reconstruct, tap
from torch.nn import functional as F

from sae_hooks import SAE, EditError, SaeAttachError, attach_saes

SITE = "model.layers.2.output"
TEXTS = [
    "And the king said unto the people, Behold, I have set before you this day the way of the LORD.",
    "Take two pounds of flour and a pint of milk, and boil the butter in it; put in some nutmeg and sugar.",
    "He looked at her for a long time without speaking, and then he went out into the garden.",
]
SPECIAL = (0, 1, 2)


@pytest.fixture
def inputs(tiny_tokenizer):
    return tiny_tokenizer(TEXTS, return_tensors="pt", padding=True)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def exact(d=192, site=SITE):
    """An SAE that reconstructs everything: features for the directions of an orthonormal basis, and their opposites."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=random))[0]
    both = torch.cat([basis, -basis])
    return SAE(both.T, torch.zeros(2 * d), both, torch.zeros(d), threshold=torch.zeros(2 * d), site=site)


def fitted(model, site, inputs, rank):
    """An SAE of the `rank` main directions of what passes at a site in these inputs, about their mean."""
    found = []
    handle = tap(model, site, lambda x: found.append(x.clone()))
    model(**inputs)
    handle.remove()
    x = found[0][ordinary(inputs["input_ids"], inputs["attention_mask"], SPECIAL)]
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False)[2][:rank]
    both = torch.cat([directions, -directions])
    return SAE(both.T, -both @ mean, both, mean, threshold=torch.zeros(2 * rank), site=site)


def loss_with(model, inputs, site, fn):
    """Next-token loss with fn(x) at a site in place of x, at the ordinary tokens, and of what is predicted there."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    chosen = ordinary(ids, mask, SPECIAL)
    handle = tap(model, site, lambda x: torch.where(chosen[..., None], fn(x), x))
    logits = model(**inputs).logits
    handle.remove()
    kept = chosen[:, :-1] & mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][kept], ids[:, 1:][kept]).item()


def test_an_sae_that_reconstructs_everything_fits(tiny_gemma2, inputs):
    row, = attach_saes(tiny_gemma2, exact()).saes.check(inputs)
    assert row.verdict == "fits"
    assert row.fvu < 1e-9
    assert row.l0 == pytest.approx(192, abs=0.5)
    assert row.loss_spliced == pytest.approx(row.loss_clean, abs=1e-4)
    assert row.loss_recovered == pytest.approx(1, abs=1e-3)
    assert row.loss_zero > row.loss_clean + 0.5
    assert row.dead < 0.05


def test_every_number_is_what_the_definitions_say(tiny_gemma2, inputs):
    # given: the same numbers by the plain equations, over the ordinary tokens alone
    sae = fitted(tiny_gemma2, SITE, inputs, 24)
    found = []
    handle = tap(tiny_gemma2, SITE, lambda x: found.append(x.clone()))
    tiny_gemma2(**inputs)
    handle.remove()
    chosen = ordinary(inputs["input_ids"], inputs["attention_mask"], SPECIAL)
    x = array(found[0][chosen])
    acts, x_hat = encode(sae, x), reconstruct(sae, x)
    # when
    row, = attach_saes(tiny_gemma2, sae).saes.check(inputs)
    tiny_gemma2.saes.detach()
    # then
    assert row.tokens == chosen.sum() == len(x)
    assert row.fvu == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5)
    assert 0.05 < row.fvu < 0.5
    assert row.l0 == pytest.approx((acts > 0).sum(1).mean())
    assert row.dead == pytest.approx((acts > 0).any(0).__invert__().mean())
    assert row.loss_clean == pytest.approx(loss_with(tiny_gemma2, inputs, SITE, lambda x: x), rel=1e-5)

    def spliced(x):
        return torch.from_numpy(reconstruct(sae, array(x))).float()

    assert row.loss_spliced == pytest.approx(loss_with(tiny_gemma2, inputs, SITE, spliced), rel=1e-5)
    assert row.loss_zero == pytest.approx(loss_with(tiny_gemma2, inputs, SITE, torch.zeros_like), rel=1e-5)
    assert row.loss_recovered == pytest.approx((row.loss_zero - row.loss_spliced) / (row.loss_zero - row.loss_clean))


def test_an_sae_of_the_layer_beside_is_told_with_that_layers_name(tiny_gemma2, inputs):
    for made_for, attached_at in ((2, 1), (1, 2)):
        sae = fitted(tiny_gemma2, f"model.layers.{made_for}.output", inputs, 24)
        sae.b_enc.sub_(3.0)  # so that small activations of another layer are no features
        attach_saes(tiny_gemma2, sae, layer=attached_at)
        here, = tiny_gemma2.saes.check(inputs)
        tiny_gemma2.saes.detach()
        attach_saes(tiny_gemma2, sae)
        there, = tiny_gemma2.saes.check(inputs)
        tiny_gemma2.saes.detach()
        assert here.fvu > 0.5 > there.fvu
        assert there.verdict == "fits"
        better = f"model.layers.{made_for}.output better (FVU {there.fvu:.2f})"
        assert here.verdict == f"wrong layer? It explains {better}"


def test_an_sae_of_another_model_does_not_explain_the_site(tiny_gemma2, inputs, random_sae):
    sae = random_sae(192, 512, SITE, norm=34)
    sae.metadata["model_name"] = "google/gemma-2-2b"
    row, = attach_saes(tiny_gemma2, sae).saes.check(inputs)
    assert row.fvu > 0.5
    assert row.verdict.startswith("does not explain this site: wrong model, site or token format?")
    assert "trained on google/gemma-2-2b" in row.verdict


def test_inputs_without_an_ordinary_token_are_no_measurement(tiny_gemma2):
    row, = attach_saes(tiny_gemma2, exact()).saes.check(torch.tensor([[2, 1, 0]]))
    assert row.tokens == 0
    assert math.isnan(row.fvu)
    assert row.verdict == "no ordinary token in these inputs: nothing was measured"


def test_several_saes_are_each_measured_alone(tiny_gemma2, inputs):
    alone, = attach_saes(tiny_gemma2, exact()).saes.check(inputs)
    attach_saes(tiny_gemma2, exact(site="model.layers.0.output"))
    rows = tiny_gemma2.saes.check(inputs)
    assert [row.name for row in rows] == [SITE, "model.layers.0.output"]
    assert rows[0] == alone
    only, = tiny_gemma2.saes.check(inputs, layer=0)
    assert only == rows[1]


def test_the_report_prints_a_line_for_each_sae(tiny_gemma2, inputs):
    report = attach_saes(tiny_gemma2, exact()).saes.check(inputs)
    head, line = str(report).splitlines()
    assert head.split() == ["SAE", "FVU", "L0", "dead", "clean", "spliced", "zero", "recovered"]
    assert line.startswith(SITE)
    assert line.endswith("fits")
    assert repr(report) == str(report)


def test_ids_alone_will_do_and_say_the_same(tiny_gemma2, tiny_tokenizer):
    ids = tiny_tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    attach_saes(tiny_gemma2, exact())
    mapping = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert tiny_gemma2.saes.check(ids) == tiny_gemma2.saes.check(mapping)


def test_torchs_default_device_makes_no_difference(tiny_gemma2, inputs):
    attach_saes(tiny_gemma2, exact())
    want = tiny_gemma2.saes.check(inputs)
    with torch.device("meta"):
        assert tiny_gemma2.saes.check(inputs) == want


@pytest.mark.parametrize("wrong", [
    "a text", torch.tensor([1, 2, 3]), torch.tensor([[1]]), {"input_ids": [[1, 2]]}, None,
    {"attention_mask": torch.ones(2, 3)}])
def test_inputs_that_are_no_token_ids_are_refused(tiny_gemma2, wrong):
    with pytest.raises(EditError, match="token ids"):
        attach_saes(tiny_gemma2, exact()).saes.check(wrong)


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification",
                                  "T5ForConditionalGeneration"])
def test_a_model_that_is_no_causal_language_model_is_refused(random_model, random_sae, kind):
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=128)
    model = getattr(transformers, kind)(config if kind.startswith("T5") else random_model("Llama").config).eval()
    site = {"LlamaModel": "layers.1", "T5ForConditionalGeneration": "encoder.block.1"}.get(kind, "model.layers.1")
    attach_saes(model, random_sae(32, 64, f"{site}.output"))
    with pytest.raises(SaeAttachError, match=rf"causal language model, .* vocabulary\); .* not to {kind}"):
        model.saes.check(torch.tensor([[2, 17, 45, 99], [2, 5, 6, 7]]))


def test_nothing_is_measured_while_an_edit_is_open(tiny_gemma2, inputs):
    attach_saes(tiny_gemma2, exact())
    with tiny_gemma2.saes.clamp({3: 1.0}):
        tiny_gemma2(**inputs)
        with pytest.raises(EditError, match="close the open edits"):
            tiny_gemma2.saes.check(inputs)


def test_checking_leaves_the_model_as_it_was(tiny_gemma2, inputs):
    want = tiny_gemma2(**inputs).logits
    attach_saes(tiny_gemma2, exact())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_gemma2.modules()]
    tiny_gemma2.saes.check(inputs)
    assert torch.equal(tiny_gemma2(**inputs).logits, want)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_gemma2.modules()]
    assert not tiny_gemma2.saes._runtime.active


def test_a_model_in_training_is_measured_without_dropout_and_neither_it_nor_the_random_state_is_changed(
        random_model, random_sae):
    model, ids = random_model("GPT2"), torch.arange(3, 123).reshape(4, 30)
    attach_saes(model, random_sae(32, 64, "transformer.h.1.output"))
    want = model.saes.check(ids)
    model.train()
    model.transformer.h[0].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    assert model.saes.check(ids) == want
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert 0 < sum(modes) < len(modes)


def test_a_transcoder_is_judged_by_what_it_should_write(tiny_gemma2, inputs):
    read, write = "model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output"
    found = {read: [], write: []}
    handles = [tap(tiny_gemma2, site, lambda x, site=site: found[site].append(x.clone())) for site in found]
    tiny_gemma2(**inputs)
    for handle in handles:
        handle.remove()
    chosen = ordinary(inputs["input_ids"], inputs["attention_mask"], SPECIAL)
    x, target = (found[site][0][chosen] for site in (read, write))
    affine = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1).double(), target.double()).solution.float()
    zeros = torch.zeros
    sae = SAE(zeros(192, 4), zeros(4) - 1, zeros(4, 192), affine[-1], threshold=zeros(4), W_skip=affine[:-1], site=read,
              site_out=write)
    row, = attach_saes(tiny_gemma2, sae).saes.check(inputs)
    x_hat = reconstruct(sae, array(x))
    want = ((array(target) - x_hat) ** 2).sum() / ((array(target) - array(target).mean(0)) ** 2).sum()
    assert row.fvu == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert row.l0 == 0
    assert row.dead == 1
