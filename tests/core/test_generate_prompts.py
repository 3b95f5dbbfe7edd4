"""What is prompt, for models that generate otherwise: wrappers, encoder-decoders, from nothing, or unseen."""

import pytest
import torch
import transformers
from core.generating import LEFT, NEW, WIDTH, generate, told_apart
from tiny_models import LLAMA_LIKE, SIXTEEN_WIDE, make_model, make_sae

from sae_hooks import EditError, attach_saes

pytestmark = pytest.mark.usefixtures("without_gradients")
IDS = torch.tensor([[17, 45, 99, 23, 1], [31, 13, 77, 31, 13]])
SPREAD = {"d_model": 32, "vocab_size": 128, "decoder_start_token_id": 2, "eos_token_id": None}


def bart(model_class=transformers.BartForConditionalGeneration):
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = transformers.BartConfig(**SPREAD, **heads, encoder_layers=2, decoder_layers=2, max_position_embeddings=64,
                                     pad_token_id=1, bos_token_id=0, forced_eos_token_id=None, init_std=0.5)
    return seeded(model_class, config)


def t5():
    config = transformers.T5Config(**{**SPREAD, "decoder_start_token_id": 0}, d_kv=8, d_ff=64, num_layers=2,
                                   num_heads=4, pad_token_id=0, initializer_factor=3.0)
    return seeded(transformers.T5ForConditionalGeneration, config)


def seeded(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    return model


MAKERS = {"bart": (bart, "model.decoder.layers.0", "model.encoder.layers.0"),
          "t5": (t5, "decoder.block.0", "encoder.block.0")}


def llama4():
    text = {**LLAMA_LIKE, "vocab_size": 128, "intermediate_size_mlp": 64, "num_hidden_layers": 3, "head_dim": 8,
            "num_local_experts": 2, "attention_chunk_size": 64, "pad_token_id": 0, "bos_token_id": 2}
    vision = {**SIXTEEN_WIDE, "image_size": 8, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16,
              "projector_output_dim": 16}
    config = transformers.Llama4Config(text_config=text, vision_config=vision, image_token_index=5,
                                       boi_token_index=6, eoi_token_index=7)
    return seeded(transformers.Llama4ForConditionalGeneration, config)


def test_a_wrapper_that_generates_for_the_model_inside_it_tells_the_prompt():
    def call(model):
        return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, do_sample=False)

    told_apart(llama4, "language_model.model.layers.1", 5, 2, call)


@pytest.mark.parametrize("name", MAKERS)
def test_a_decoders_prompt_is_its_start_token(name):
    make, decoder, _ = MAKERS[name]
    told_apart(make, decoder, 1, 2, lambda model: model.generate(IDS, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("with_start", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_a_decoders_prompt_is_what_it_was_given_with_its_start_token_before_it(name, with_start):
    make, decoder, _ = MAKERS[name]

    def call(model):
        start = torch.full((2, 1), model.config.decoder_start_token_id)
        given = torch.cat([start, IDS[:, :2]], 1) if with_start else IDS[:, :2]
        return model.generate(IDS, decoder_input_ids=given, max_new_tokens=NEW, do_sample=False)

    told_apart(make, decoder, 3, 2, call)


@pytest.mark.parametrize("name", MAKERS)
def test_all_that_an_encoder_reads_is_prompt(name):
    make, _, encoder = MAKERS[name]
    model = attach_saes(make(), make_sae(32, 64, f"{encoder}.output"))
    mask = IDS.ne(model.config.pad_token_id).long()
    for tokens in ("all", "prompt"):
        with model.saes.add({3: 25.0}, tokens=tokens, special_tokens=True) as edit:
            model.generate(IDS, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert edit.positions_edited == mask.sum()
    with pytest.warns(UserWarning, match="touched no position"), model.saes.add({3: 25.0}, tokens="generated"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=NEW, do_sample=False)


def test_a_decoders_beams_get_their_requests_strength():
    def text(strength):
        model = attach_saes(bart(), make_sae(32, 64, "model.decoder.layers.0.output"))
        with model.saes.add({3: strength}, special_tokens=True):
            return model.generate(IDS, max_new_tokens=NEW, do_sample=False, num_beams=3)

    together = text(torch.tensor([float("nan"), 25.0]))
    assert together[0].tolist() == bart().generate(IDS, max_new_tokens=NEW, do_sample=False, num_beams=3)[0].tolist()
    assert together[1].tolist() == text(25.0)[1].tolist()


class Otherwise(transformers.BartForConditionalGeneration):
    """Begins with tokens of its own, as Whisper does."""

    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs, decoder_input_ids=torch.tensor([[2, 5, 6]] * 2))


def test_an_encoder_decoder_that_begins_in_its_own_way_is_refused_where_the_prompt_matters():
    model = attach_saes(bart(Otherwise), make_sae(32, 64, "model.decoder.layers.0.output"))
    for tokens in ("prompt", "generated"):
        with pytest.raises(EditError, match="where its prompt ends"), model.saes.add({3: 25.0}, tokens=tokens):
            model.generate(IDS, max_new_tokens=NEW)
    with model.saes.add({3: 25.0}) as edit:
        model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    assert edit.positions_edited > 0


def test_generation_from_nothing_has_its_bos_as_prompt_whatever_the_default_device_is():
    for settings in ({}, {"do_sample": True, "num_return_sequences": 3}):
        torch.manual_seed(0)
        rows = settings.get("num_return_sequences", 1)
        sae = make_sae(32, 64)
        del sae.metadata["typical_norm"]
        model = attach_saes(make_model("Llama"), sae)
        for tokens, count in (("prompt", rows), ("generated", (NEW - 1) * rows), ("all", NEW * rows)):
            with model.saes.add({3: 25.0}, tokens=tokens, special_tokens=True) as edit, torch.device("meta"):
                model.generate(max_new_tokens=NEW, **settings)
            assert edit.positions_edited == count


@pytest.mark.parametrize("cached", [True, False])
def test_generate_of_a_model_around_the_one_attached_to_is_refused_where_the_prompt_matters(cached):
    model = make_model("Llama")
    inner = attach_saes(model.model, make_sae(32, 64, "layers.1.output"))
    for tokens in ("prompt", "generated"):
        with pytest.raises(EditError, match="Attach the SAEs to the model whose generate is called"), \
                inner.saes.add({3: 25.0}, tokens=tokens):
            generate(model, use_cache=cached)
    clean = generate(model, use_cache=cached)
    with inner.saes.add({3: 25.0}):
        assert generate(model, use_cache=cached)[:, WIDTH:].tolist() != clean[:, WIDTH:].tolist()
    with inner.saes.add({3: 25.0}, tokens="prompt", special_tokens=True) as edit:
        model(input_ids=LEFT, attention_mask=(LEFT != 0).long())
    assert edit.positions_edited == (LEFT != 0).sum()


def test_generated_tokens_of_a_model_without_tokens_are_refused():
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 4))
    attach_saes(network, make_sae(32, 64, "0.output"))
    with pytest.raises(EditError, match="needs the model's input_ids"), \
            network.saes.add({3: 9.0}, tokens="generated", special_tokens=True):
        network(torch.zeros(5, 8))
