"""Generation in a thread, as a packed batch, and with a compiled decoding step."""

import contextlib
import threading

import pytest
import torch
from core.generating import CHOICES, LEFT, NAN, NEW, PROMPTS, by_hand, compiled, generate, holds, read, texts
from core.reference import ordinary, sample
from core.steering import made_for
from tiny_models import make_model
from transformers import CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from sae_hooks import SaeAttachError, attach_saes, detach_saes

pytestmark = pytest.mark.usefixtures("without_gradients")


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], threading.Event()

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended.set()


@pytest.mark.parametrize("tokens", CHOICES)
def test_a_streamer_with_generate_in_a_thread_streams_the_edited_text(case, tokens):
    model = case.attached()
    streamer = Collected()
    prompt = torch.tensor([PROMPTS[1]])
    with model.saes.clamp(case.of_row(1), tokens=tokens):
        thread = threading.Thread(target=model.generate, kwargs={
            "inputs": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False,
            "streamer": streamer})
        thread.start()
        thread.join(timeout=60)
    assert streamer.ended.is_set()
    assert streamer.tokens == case.by_hand(1, tokens)[0]


def test_continuous_batching_is_refused_while_anything_is_open(case):
    model = case.attached()
    for opened in (model.saes.clamp, model.saes.scale, model.saes.add):
        with pytest.raises(SaeAttachError, match="continuous batching"), opened({3: 25.0}):
            model.generate_batch(inputs=[PROMPTS[0], PROMPTS[1]])
    with pytest.raises(SaeAttachError, match="continuous batching"), model.saes.capture():
        model.generate_batch(inputs=[PROMPTS[0], PROMPTS[1]])


def test_guidance_by_a_second_text_is_refused_while_anything_is_open(case):
    model = case.attached()
    want = generate(make_model(case.architecture), guidance_scale=1.5)
    with pytest.raises(SaeAttachError, match="guidance_scale"), model.saes.clamp({3: 25.0}):
        generate(model, guidance_scale=1.5)
    guided, silent = GenerationConfig(max_new_tokens=NEW, guidance_scale=1.5), GenerationConfig(max_new_tokens=NEW)
    for args, settings in (((guided,), {}), ((), {"generation_config": guided})):
        with pytest.raises(SaeAttachError, match="guidance_scale"), model.saes.clamp({3: 25.0}):
            model.generate(LEFT, *args, **settings)
    model.generation_config.guidance_scale = 1.5
    with pytest.raises(SaeAttachError, match="guidance_scale"), model.saes.clamp({3: 25.0}):
        model.generate(LEFT, silent)
    model.generation_config.guidance_scale = None
    assert generate(model, guidance_scale=1.5).tolist() == want.tolist()
    with model.saes.clamp(case.values):
        assert texts(generate(model, guidance_scale=1.0)) == by_hand(case)


def test_a_packed_batch_that_reaches_the_model_all_the_same_is_refused_there(case):
    class PagedAttentionCache:
        """What continuous batching passes to the model, by its name."""

    model = case.attached()
    for name in ("cache", "past_key_values"):
        with pytest.raises(SaeAttachError, match="continuous batching"), model.saes.clamp({3: 25.0}):
            model(input_ids=LEFT[1:2], **{name: PagedAttentionCache()})


@pytest.mark.slow
def test_what_was_compiled_before_never_decides_what_is_edited(case):
    # given: a model that has compiled its decoding step with nothing attached, and then with nothing open
    model = make_model(case.architecture)
    assert texts(generate(model, **compiled())) == by_hand(case, None)
    attach_saes(model, case.sae)
    for tokens in CHOICES:
        with model.saes.clamp(case.values, tokens=tokens):
            assert texts(generate(model, **compiled())) == by_hand(case, tokens)
        assert texts(generate(model, **compiled())) == by_hand(case, None)
    with model.saes.clamp(case.values), model.saes.capture() as features:
        generate(model, **compiled())
    holds(case, features[case.site], read(by_hand(case)))
    # and another site, attached after that
    attach_saes(model, case.sae, layer=0)
    with model.saes.scale({3: 1.0}, layer=0) as other, model.saes.clamp(case.values, layer=1):
        assert texts(generate(model, **compiled())) == by_hand(case)
    assert other.positions_edited == ordinary(LEFT).sum() + ordinary(torch.tensor(
        [text[len(p):] for p, text in zip(PROMPTS, read(by_hand(case)), strict=True)])).sum()
    detach_saes(model)
    assert texts(generate(model, **compiled())) == by_hand(case, None)


@pytest.mark.slow
def test_sites_inside_layers_are_edited_in_every_compiled_step(random_model):
    # layers share compiled code unless torch is told that their hooks differ
    model = random_model("Gemma2")
    generate(model, max_new_tokens=2, **compiled())
    kinds = ("attn_out", "mlp_out", "transcoder")
    saes = [made_for(model, kind, layer, seed=layer) for layer, kind in enumerate(kinds)]
    attach_saes(model, {sae.site: sae for sae in saes})
    clean = texts(generate(model))
    with contextlib.ExitStack() as handles:
        opened = [handles.enter_context(model.saes.clamp({3: 25.0, 5: -25.0}, name=name)) for name in model.saes]
        want = texts(generate(model))
        before = [handle.positions_edited for handle in opened]
        assert texts(generate(model, **compiled())) == want
        assert [handle.positions_edited for handle in opened] == [2 * n for n in before]
    assert want != clean
    assert texts(generate(model, **compiled())) == clean


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor's own import
def test_a_step_compiled_by_inductor_says_what_the_plain_one_says(random_model, random_sae):
    model = random_model("Llama", layers=2)
    attach_saes(model, random_sae(32, 64, "model.layers.1.output", like=sample(model, "model.layers.1.output", LEFT)))
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    clean = texts(generate(model, max_new_tokens=4))
    values = {3: torch.tensor([25.0, NAN, -25.0])}
    with model.saes.clamp(values):
        want = texts(generate(model, max_new_tokens=4))
        got = texts(generate(model, max_new_tokens=4, cache_implementation="static", compile_config=config))
    assert got == want
    assert got[0] != clean[0]
    got = texts(generate(model, max_new_tokens=4, cache_implementation="static", compile_config=config))
    assert got == clean
