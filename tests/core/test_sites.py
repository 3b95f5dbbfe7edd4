"""Sites: what each alias means in each architecture, checked on the tensors of a real forward pass."""

import pytest
import torch
from core import reference
from tiny_models import ARCHITECTURES, MULTIMODAL
from torch import nn

from sae_hooks import SiteError, attach_saes, sites

EVERY = [*ARCHITECTURES, MULTIMODAL]
LAYERS = {"GPT2": "transformer.h", "GPTNeoX": "gpt_neox.layers", "OPT": "model.decoder.layers",
          "Bloom": "transformer.h", MULTIMODAL: "model.language_model.layers"}
IDS = torch.tensor([[2, 17, 45, 99, 23, 8, 61], [2, 31, 13, 77, 120, 64, 33]])
OUT_PROJECTION = {"GPT2": "attn.c_proj", "GPTNeoX": "attention.dense", "OPT": "self_attn.out_proj",
                  "Bloom": "self_attention.dense"}
POST_NORMS = {"Gemma2", "Gemma3Text", MULTIMODAL}


@pytest.fixture(params=EVERY)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture, random_model):
    return random_model(architecture)


@pytest.fixture
def layer(architecture):
    """Path of layer 1."""
    return f"{LAYERS.get(architecture, 'model.layers')}.1"


def passing(model, *places):
    """What passes at sites and at modules' sides, in one forward pass."""
    with torch.no_grad(), reference.seen(model, *places) as lists:
        model(input_ids=IDS)
    lists = lists if len(places) > 1 else [lists]
    return [x[0] if x[0].ndim == 3 else x[0].reshape(*IDS.shape, -1) for x in lists]


def test_resid_post_is_what_the_next_layer_receives(model, layer):
    read, write = sites.alias(model, 1)
    assert read == write == f"{layer}.output"
    assert sites.alias(model, 1, "resid_post") == (read, write)
    got, received = passing(model, read, f"{layer[:-1]}2.input")
    assert torch.equal(got, received)


def test_mlp_out_is_what_the_mlp_adds_to_the_residual_stream(model, layer, architecture):
    read, write = sites.alias(model, 1, "mlp_out")
    assert read == write
    before, mlp, after = passing(model, f"{layer}.input", read, f"{layer}.output")
    attention = attention_out(model, layer, architecture)
    torch.testing.assert_close(after - (before + attention), mlp, rtol=0, atol=1e-5)
    assert mlp.norm() > 0.01 * before.norm()


def attention_out(model, layer, architecture):
    """What the attention adds to the residual stream."""
    projection = OUT_PROJECTION.get(architecture, "self_attn.o_proj")
    name = "post_attention_layernorm" if architecture in POST_NORMS else projection
    return passing(model, f"{layer}.{name}.output")[0]


def test_attn_out_is_the_input_of_the_attentions_output_projection(model, layer, architecture):
    read, write = sites.alias(model, 1, "attn_out")
    assert read == write == f"{layer}.{OUT_PROJECTION.get(architecture, 'self_attn.o_proj')}.input"
    heads, projected = passing(model, read, read.replace(".input", ".output"))
    projection = model.get_submodule(read.removesuffix(".input"))
    with torch.no_grad():
        torch.testing.assert_close(projection(heads), projected)
    assert sites.width(model, sites.resolve(model, read)) == heads.shape[-1]


def test_transcoder_reads_what_the_mlp_reads_and_writes_what_it_adds(model, layer, architecture):
    read, write = sites.alias(model, 1, "transcoder")
    assert write == sites.alias(model, 1, "mlp_out")[0]
    source, target = passing(model, read, write)
    block = model.get_submodule(layer)
    with torch.no_grad():
        if architecture in POST_NORMS:
            again = block.post_feedforward_layernorm(block.mlp(source))
        elif architecture == "OPT":
            again = block.fc2(block.activation_fn(block.fc1(source)))
        elif architecture == "Bloom":
            again = block.mlp(source, torch.zeros_like(source))
        else:
            again = block.mlp(source)
    torch.testing.assert_close(again, target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", sites.KINDS)
def test_the_width_of_a_site_is_the_width_of_what_passes(model, kind):
    for site in set(sites.alias(model, 1, kind)):
        x, = passing(model, site)
        assert sites.width(model, sites.resolve(model, site)) in (x.shape[-1], None)
    assert sites.width(model, sites.resolve(model, sites.alias(model, 1)[0])) == 32


def test_what_is_read_at_a_site_can_be_written_there(model, architecture):
    for kind in sites.KINDS:
        for place in {sites.resolve(model, site) for site in sites.alias(model, 0, kind)}:
            for value in (torch.ones(1, 2, 4), (torch.ones(1, 2, 4), None, "cache"), [torch.ones(1, 2, 4)]):
                new = torch.zeros(1, 2, 4)
                written = sites.write(value, new, str(place))
                assert type(written) is type(value)
                assert sites.read(written, str(place)) is new


def test_the_normalised_side_is_rms_normalised_without_the_gain(random_model):
    model = random_model("Gemma2")
    norm = model.model.layers[1].pre_feedforward_layernorm
    nn.init.normal_(norm.weight)
    x, = passing(model, "model.layers.1.pre_feedforward_layernorm.input")
    place = sites.resolve(model, "model.layers.1.pre_feedforward_layernorm.normalized")
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(sites.normalize(x, place.module).double(), want, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(sites.normalize(x, norm) * (1 + norm.weight), norm(x), rtol=1e-5, atol=1e-5)
    assert sites.width(model, place) == 32
    half = sites.normalize(x.bfloat16() * 1e18, norm)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("asked", ["model.layers.1.output", "layers.1.output", "base_model.model.model.layers.1.output",
                                   "_orig_mod.model.layers.1.output"])
def test_a_path_is_found_by_its_ending(random_model, asked):
    model = random_model("Llama")
    place = sites.resolve(model, asked)
    assert str(place) == "model.layers.1.output"
    assert place.module is model.model.layers[1]


class Wrapper(nn.Module):
    """A wrapper like PEFT's: the model two attributes deeper."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


def test_a_wrapped_models_sites_are_found_by_the_plain_path(random_model):
    model = random_model("Llama")
    place = sites.resolve(Wrapper(model), "model.layers.2.mlp.output")
    assert str(place) == "base_model.model.model.layers.2.mlp.output"
    assert place.module is model.model.layers[2].mlp


def test_the_text_model_is_meant_where_a_vision_tower_has_layers_too(random_model):
    model = random_model(MULTIMODAL)
    for asked in ("model.layers.0.output", "layers.0.output", "language_model.layers.0.output"):
        assert str(sites.resolve(model, asked)) == "model.language_model.layers.0.output"
    full = next(name for name, _ in model.named_modules() if "vision" in name and name.endswith("layers.0"))
    assert str(sites.resolve(model, f"{full}.output")) == f"{full}.output"


@pytest.mark.parametrize(("asked", "message"), [
    ("model.layers.1", r"ends in \.input, \.output, \.normalized.*; got 'model\.layers\.1'"),
    ("", "ends in"),
    ("model.layers.1.resid_post", "ends in"),
    ("model.layers.3.output", r"has layers 0 to 2; the SAE is for layer 3 \(model\.layers\.3\)"),
    ("model.layers.30.mlp.output", "has layers 0 to 2; the SAE is for layer 30"),
    ("model.layers.1.mpl.output", r"no module 'model\.layers\.1\.mpl'; nearest: .*model\.layers\.1\.mlp"),
    ("model.layers.1.self_attn.out_proj.input", r"no module .*nearest: .*model\.layers\.1\.self_attn\.o_proj"),
    ("mlp.output", r"fits 3 modules of LlamaForCausalLM: .*model\.layers\.0\.mlp.*full path"),
])
def test_a_place_that_the_model_has_not_is_told_with_the_nearest(random_model, asked, message):
    with pytest.raises(SiteError, match=message):
        sites.resolve(random_model("Llama"), asked)


@pytest.mark.parametrize("kind", sites.KINDS)
def test_an_alias_without_a_layer_is_of_the_layer_that_the_sae_names(random_model, random_sae, kind):
    for of_model in (False, True):
        model, sae = random_model("Gemma2"), random_sae(32, 64, "model.layers.1.output")
        model = attach_saes(model, {kind: sae} if of_model else sae, **({} if of_model else {"site": kind}))
        slot, = model.saes._slots.values()
        assert (slot.read.key, slot.write.key) == sites.alias(model, 1, kind)


def test_an_sae_that_is_of_the_kind_asked_for_stays_at_the_place_it_names(random_model, random_sae):
    norms = "model.layers.1.pre_feedforward_layernorm.normalized", "model.layers.1.post_feedforward_layernorm.output"
    model = attach_saes(random_model("Gemma2"), random_sae(32, 64, norms[0], site_out=norms[1]), site="transcoder")
    slot, = model.saes._slots.values()
    assert (slot.read.key, slot.write.key) == norms


def test_an_sae_as_wide_as_a_vision_tower_is_attached_there(random_model, random_sae):
    model = random_model(MULTIMODAL)
    site = "model.vision_tower.encoder.layers.0.output"
    assert sites.width(model, sites.resolve(model, site)) is None
    attach_saes(model, random_sae(16, 64, site))
    assert list(model.saes) == [site]
    with torch.no_grad(), model.saes.add({3: 1.0}, special_tokens=True) as edit:
        model.model.vision_tower(torch.zeros(1, 3, 8, 8))
    assert edit.positions_edited == 4


def test_an_alias_that_is_not_known_or_a_layer_too_deep_is_refused(random_model):
    model = random_model("Llama")
    with pytest.raises(SiteError, match="one of resid_post, mlp_out, attn_out, transcoder; got 'resid_mid'"):
        sites.alias(model, 1, "resid_mid")
    with pytest.raises(SiteError, match="has layers 0 to 2; the SAE is for layer 3"):
        sites.alias(model, 3)
    with pytest.raises(SiteError):
        sites.alias(model, -1)


def test_a_module_without_decoder_layers_has_no_aliases_but_sites():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with pytest.raises(SiteError, match="cannot tell the decoder layers of Sequential"):
        sites.alias(model, 0)
    assert sites.width(model, sites.resolve(model, "0.input")) == 4
    assert sites.width(model, sites.resolve(model, "0.output")) == 6
    assert sites.width(model, sites.resolve(model, "1.output")) is None


def test_hidden_states_are_found_among_a_modules_inputs():
    x, ids = torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.int64)
    assert sites.find_input((ids, x), {}, "here") == 1
    assert sites.find_input((), {"attention_mask": x, "hidden_states": x}, "here") == "hidden_states"
    assert sites.find_input((), {"input_ids": ids, "x": x}, "here") == "x"
    with pytest.raises(RuntimeError, match="here: no floating-point tensor"):
        sites.find_input((ids,), {}, "here")


def test_hidden_states_of_named_tuples_are_replaced_in_kind():
    from collections import namedtuple

    Output = namedtuple("Output", "state cache")
    value = Output(torch.ones(1, 2, 4), "cache")
    written = sites.write(value, torch.zeros(1, 2, 4), "here")
    assert type(written) is Output
    assert written.cache == "cache"
    assert written.state.count_nonzero() == 0
    with pytest.raises(RuntimeError, match="here"):
        sites.read({"x": "no tensor"}, "here")
