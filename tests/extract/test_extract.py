"""extract_features: the rows that a capture gives, whatever the batches, and the model as it was."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from sae_hooks import attach_saes
from sae_hooks.errors import DataError, EditError, SaeAttachError
from sae_hooks.extract import extract_features
from sae_hooks.sparse import concatenate

SITE, LOWER = "model.layers.2.output", "model.layers.0.output"
TEXTS = ["In the beginning God created the heaven and the earth.", "def f(x):\n    return x + 1", "", "Add the butter.",
         "If the file is empty, return an error, and say so on the standard error of the process. " * 3]


@pytest.fixture
def model(tiny_gemma2, random_sae):
    attach_saes(tiny_gemma2, random_sae(192, 512, SITE, norm=34))
    return attach_saes(tiny_gemma2, random_sae(192, 320, LOWER, seed=1, norm=23))


def joined(parts, site=SITE):
    return concatenate([part.features[site] for part in parts])


def same(one, other, tolerance=1e-4):
    for name in ("indptr", "indices", "doc_id", "position", "token_id"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.allclose(one.values, other.values, atol=tolerance)


def captured(model, tokenizer, texts, site=SITE):
    """A text at a time, through model.saes.capture: the second implementation."""
    parts = []
    for number, text in enumerate(texts):
        if text:
            with torch.no_grad(), model.saes.capture() as found:
                model(**tokenizer(text, return_tensors="pt"))
            parts.append(found[site])
            parts[-1].doc_id.fill_(number)
    return concatenate(parts)


@pytest.mark.parametrize("site", [SITE, LOWER])
def test_the_rows_are_those_of_a_capture_of_each_text_alone(model, tiny_tokenizer, site):
    found = joined(extract_features(model, TEXTS, tokenizer=tiny_tokenizer), site)
    assert len(found.indices) > 10 * len(TEXTS)
    same(found, captured(model, tiny_tokenizer, TEXTS, site))


@pytest.mark.parametrize(("per_part", "per_batch"), [(1, 1), (16, 40), (50, 4096), (10_000, 64)])
def test_rows_do_not_depend_on_parts_and_batches(model, tiny_tokenizer, per_part, per_batch):
    whole = joined(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
    parts = list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer, tokens_per_part=per_part,
                                  tokens_per_batch=per_batch))
    same(joined(parts), whole)
    assert [d.number for part in parts for d in part.documents] == list(range(len(TEXTS)))


def test_torchs_default_device_makes_no_difference(model, tiny_tokenizer):
    want = joined(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
    with torch.device("meta"):
        found = list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
        empty, = extract_features(model, ["", ""], tokenizer=tiny_tokenizer)
    same(joined(found), want)
    assert empty.features[SITE].values.tolist() == []


def test_a_long_document_is_cut_into_windows_that_see_what_came_before(model, tiny_tokenizer):
    ids = tiny_tokenizer(TEXTS[-1])["input_ids"]
    found = joined(extract_features(model, [{"input_ids": ids}], tokenizer=tiny_tokenizer, window=24, overlap=7))
    assert found.token_id.tolist() == ids
    assert found.position.tolist() == list(range(len(ids)))
    second = [ids[0], *ids[24 - 7:24 - 7 + 23]]  # BOS, 7 tokens of context, 16 of its own
    with torch.no_grad(), model.saes.capture() as alone:
        model(torch.tensor([second]))
    same_rows = found[24:40]
    assert torch.equal(same_rows.indices, alone[SITE][8:].indices)


def test_every_window_of_token_ids_begins_as_the_document_does_with_a_tokenizer_or_without(model, tiny_tokenizer):
    rows = [{"input_ids": tiny_tokenizer(text)["input_ids"]} for text in TEXTS]
    known, alone = (joined(extract_features(model, rows, tokenizer=tokenizer, window=24, overlap=7))
                    for tokenizer in (tiny_tokenizer, None))
    assert torch.equal(alone.values, known.values)
    same(alone, known)


def test_activations_stand_beside_the_features_row_by_row(model, tiny_tokenizer):
    (part,) = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, activations=True)
    sae, x = model.saes[SITE], part.activations[SITE]
    assert x.shape == (len(part), 192)
    again = sae.encode(x) * part.ordinary[SITE][:, None]
    assert torch.allclose(again, part.features[SITE].to_dense(), atol=1e-5)


def test_special_tokens_have_empty_rows_unless_they_are_asked_for(model, tiny_tokenizer):
    (plain,), (all_of_them,) = (extract_features(model, TEXTS, tokenizer=tiny_tokenizer, special_tokens=special)
                                for special in (False, True))
    bos = plain.features[SITE].token_id == tiny_tokenizer.bos_token_id
    assert bos.sum() == len(TEXTS) - 1
    assert not plain.ordinary[SITE][bos].any()
    assert (plain.features[SITE].indptr.diff()[bos] == 0).all()
    assert all_of_them.ordinary[SITE].all()


def test_nothing_above_the_deepest_site_runs(model, tiny_tokenizer):
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
    assert set(ran) == {0, 1, 2}
    ran.clear()
    list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer, sites=[LOWER]))
    assert set(ran) == {0}


def test_only_the_sites_that_are_named_are_encoded(model, tiny_tokenizer):
    (part,) = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, sites=[LOWER])
    assert list(part.features) == [LOWER]
    with pytest.raises(EditError, match="there are"):
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, sites=["model.layers.1.output"])


def test_an_edit_reaches_the_sites_above_it_and_not_its_own(model, tiny_tokenizer):
    plain = list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
    with model.saes.clamp({3: 200.0}, layer=0):
        changed = list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
    same(joined(changed, LOWER), joined(plain, LOWER))
    assert not torch.equal(joined(changed).indices, joined(plain).indices)


def test_the_model_is_as_it_was_between_parts_and_after_an_error(model, tiny_tokenizer):
    model.train()
    parts = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, tokens_per_part=8)
    next(parts)
    assert not model.saes._runtime.requests()
    assert all(module.training for module in model.modules())
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(parts)
    assert not model.saes._runtime.requests()
    assert hooks == {name: len(m._forward_hooks) for name, m in model.named_modules()}


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "GPTNeoX", "Gemma3"])
def test_other_architectures_and_token_ids_without_a_tokenizer(random_model, random_sae, architecture):
    model = random_model(architecture)
    site = {"GPT2": "transformer.h.1.output", "GPTNeoX": "gpt_neox.layers.1.output",
            "Gemma3": "model.language_model.layers.1.output"}.get(architecture, "model.layers.1.output")
    attach_saes(model, random_sae(32, 64, site))
    rows = [[2, 11, 12, 13], np.arange(20, 60), torch.arange(9, 30)]
    (part,) = extract_features(model, rows)
    found = part.features[next(iter(model.saes))]
    assert found.token_id.tolist() == [int(i) for row in rows for i in row]
    assert found.doc_id.bincount().tolist() == [4, 40, 21]
    assert len(found.indices)


@pytest.mark.parametrize(("architecture", "site", "longest"), [
    ("Llama", "model.layers.1.output", 128), ("GPT2", "transformer.h.1.output", 128),
    ("OPT", "model.decoder.layers.1.output", 128), ("Bloom", "transformer.h.1.output", 300)])
def test_no_window_is_longer_than_the_model_takes(random_model, random_sae, architecture, site, longest):
    model, read = random_model(architecture), []
    attach_saes(model, random_sae(32, 64, site))
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    (part,) = extract_features(model, [np.arange(300) % 128])
    assert len(part) == 300
    assert max(read) == longest


@pytest.mark.parametrize(("name", "site", "settings", "longest"), [
    ("Roberta", "encoder.layer.1.output", {"pad_token_id": 1, "max_position_embeddings": 64}, 62),
    ("Esm", "encoder.layer.1.output", {"pad_token_id": 1, "max_position_embeddings": 66}, 64),
    ("Bert", "encoder.layer.1.output", {"max_position_embeddings": 64}, 64),
    ("Mpt", "transformer.blocks.1.output", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, 64)])
def test_limits_that_are_stated_otherwise_are_kept(random_sae, name, site, settings, longest):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**({} if name == "Mpt" else sizes), vocab_size=128, **settings)
    model, read = getattr(transformers, f"{name}Model")(config).eval(), []
    attach_saes(model, random_sae(32, 64, site))
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    (part,) = extract_features(model, [np.arange(150) % 100 + 5])
    assert len(part) == 150
    assert max(read) == longest


def test_a_window_longer_than_the_model_takes_is_refused_with_both_numbers(model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"window=257, but Gemma2ForCausalLM takes 256 tokens at most"):
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, window=257)
    assert list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer, window=256))
    with pytest.raises(DataError, match=r"window must be a whole number, 1 or more; got 2.5"):
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, window=2.5)


def test_what_is_no_number_of_tokens_is_refused_at_once(model, tiny_tokenizer):
    for name in ("tokens_per_part", "tokens_per_batch"):
        with pytest.raises(DataError, match=f"{name} must be a whole number, 1 or more; got 0"):
            extract_features(model, TEXTS, tokenizer=tiny_tokenizer, **{name: 0})


def test_a_token_id_without_an_embedding_is_refused_by_its_document(model):
    with pytest.raises(DataError, match=r"document 1 has the token id 4096, Gemma2ForCausalLM has ids 0 to 4095"):
        list(extract_features(model, [[2, 4095], [2, 4096]]))


class Averaging(nn.Module):
    """A model of one's own, in which every token sees all of its row, also what comes after it."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(64, 32), nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = h + layer(h).relu() + h.mean(1, keepdim=True)
        return h


class Masked(Averaging):
    def forward(self, input_ids, attention_mask=None):
        assert attention_mask is not None
        return super().forward(input_ids)


class HandingOn(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("wrap", [nn.Module.eval, HandingOn, partial(torch.compile, backend="eager")],
                         ids=["plain", "wrapped", "compiled"])
def test_a_module_without_an_attention_mask_reads_rows_without_padding(random_sae, wrap):
    torch.manual_seed(0)
    model = Averaging()
    rows = [[int(i) for i in torch.randint(3, 64, (n,))] for n in (5, 2, 5, 9, 1, 5)]
    outside = wrap(model)
    attach_saes(outside, random_sae(32, 64, "layers.1.input", norm=5.0))
    (part,) = extract_features(outside, rows, activations=True)
    name = next(iter(outside.saes))
    with torch.no_grad():
        alone = [h + model.layers[0](h).relu() + h.mean(0) for h in map(model.embed, map(torch.tensor, rows))]
    assert torch.allclose(part.activations[name], torch.cat(alone), atol=1e-5)


def test_a_module_with_an_attention_mask_and_no_use_cache_is_given_the_mask(random_sae):
    model = attach_saes(Masked(), random_sae(32, 64, "layers.1.output"))
    assert [len(part) for part in extract_features(model, [[5, 6, 7], [8, 9]])] == [5]


def test_a_module_that_takes_no_input_ids_is_told_what_is_called(random_sae):
    model = attach_saes(nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32)), random_sae(32, 64, "1.output"))
    with pytest.raises(SaeAttachError, match=r"calls Sequential\(input_ids=.*whose forward takes input; wrap it"):
        extract_features(model, [[5, 6, 7]])


def test_a_transcoder_is_encoded_where_it_reads(tiny_gemma2, tiny_tokenizer, random_sae):
    site = "model.layers.1.pre_feedforward_layernorm.output"
    sae = random_sae(192, 256, site, site_out="model.layers.1.post_feedforward_layernorm.output", norm=14)
    attach_saes(tiny_gemma2, sae)
    (part,) = extract_features(tiny_gemma2, TEXTS[:2], tokenizer=tiny_tokenizer, activations=True)
    name = next(iter(tiny_gemma2.saes))
    with torch.no_grad(), tiny_gemma2.saes.capture() as alone:
        tiny_gemma2(**tiny_tokenizer(TEXTS[0], return_tensors="pt"))
    assert torch.equal(part.features[name][:len(alone[name])].indices, alone[name].indices)


def test_no_documents_are_no_parts_and_empty_ones_an_empty_part(model, tiny_tokenizer):
    (part,) = extract_features(model, ["", None], tokenizer=tiny_tokenizer)
    assert len(part) == 0
    assert [len(d.ids) for d in part.documents] == [0, 0]
    assert part.features[SITE].d_sae == 512


def test_a_model_without_saes_is_refused(tiny_gemma2, tiny_tokenizer):
    with pytest.raises(SaeAttachError, match=r"attach_saes\(model, source\) first"):
        extract_features(tiny_gemma2, TEXTS, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_not_finite_are_no_attention_sinks(model, tiny_tokenizer, value):
    model.model.layers[0].register_forward_hook(lambda module, args, out: out.index_fill(1, torch.tensor([2]), value))
    with pytest.raises(DataError, match="not finite"):
        list(extract_features(model, TEXTS, tokenizer=tiny_tokenizer))
