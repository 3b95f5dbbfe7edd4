"""Edits in every way of generating: the tokens and logits of one row at a time, by hand, without any cache."""

import pytest
import torch
from core.generating import ALONE, CHOICES, LEFT, MODES, NEW, PROMPTS, by_hand, case_of, generate, holds, read, texts
from core.reference import FullEdit, edited, ordinary, relative, sample, seen
from tiny_models import MULTIMODAL, make_model, make_sae

from sae_hooks import attach_saes, detach_saes

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_the_clamp_changes_what_is_said_by_hand(any_case):
    clean = by_hand(any_case, None)
    for tokens in CHOICES:
        steered = by_hand(any_case, tokens)
        assert steered[0] != clean[0] or steered[1] != clean[1]
        assert steered[2] == clean[2]


@pytest.mark.parametrize("mode", MODES)
def test_a_left_padded_batch_says_what_each_row_says_alone_by_hand(any_case, mode):
    model = any_case.attached()
    assert texts(generate(model, **MODES[mode])) == by_hand(any_case, None)
    for tokens in CHOICES:
        with model.saes.clamp(any_case.values, tokens=tokens) as handle:
            result = generate(model, **MODES[mode])
        assert texts(result) == by_hand(any_case, tokens), tokens
        assert handle.positions_edited > 0
    assert texts(generate(model, **MODES[mode])) == by_hand(any_case, None)


@pytest.mark.parametrize("kind", ["mlp_out", "attn_out", "transcoder"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["Gemma2", "GPT2", "OPT", MULTIMODAL])
def test_sites_inside_a_layer_are_steered_as_by_hand(architecture, mode, kind):
    case = case_of(architecture, kind)
    model = case.attached()
    for tokens in CHOICES:
        with model.saes.clamp(case.values, tokens=tokens):
            got = texts(generate(model, **MODES[mode]))
        assert got == by_hand(case, tokens), tokens
    assert by_hand(case) != by_hand(case, None)


def test_what_an_assistant_model_guesses_is_verified_under_the_edit(case):
    model, assistant = case.attached(), make_model("Llama", layers=1, seed=1)
    for row in range(3):
        for tokens in CHOICES:
            with model.saes.clamp(case.of_row(row), tokens=tokens), model.saes.capture() as features:
                got = generate(model, torch.tensor([PROMPTS[row]]), assistant_model=assistant)
            assert got[0].tolist() == case.by_hand(row, tokens)[0]
            holds(case, features[case.site], read(got.tolist()))


def test_what_the_models_own_first_layers_guess_is_no_text_of_its_own(case):
    model, prompt = case.attached(), torch.tensor(PROMPTS[:1])
    inside = torch.tensor([i % 2 == 0 for i in range(prompt.shape[1])])
    with model.saes.clamp(case.of_row(0), tokens=inside):
        want = generate(model, prompt).tolist()
    for tokens in (*CHOICES, inside):
        with model.saes.clamp(case.of_row(0), tokens=tokens), model.saes.capture() as features:
            got = generate(model, prompt, assistant_early_exit=2)
        assert got.tolist() == (want if tokens is inside else [case.by_hand(0, tokens)[0]])
        holds(case, features[case.site], read(got.tolist()))


@pytest.mark.parametrize("mode", [*MODES, *ALONE])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
def test_one_row_at_a_time_says_what_it_says_by_hand(architecture, mode):
    case = case_of(architecture)
    model = case.attached()
    for row, prompt in enumerate(PROMPTS):
        for tokens in CHOICES:
            with model.saes.clamp(case.of_row(row), tokens=tokens):
                result = generate(model, torch.tensor([prompt]), **{**MODES, **ALONE}[mode])
            assert getattr(result, "sequences", result)[0].tolist() == case.by_hand(row, tokens)[0], (row, tokens)


@pytest.mark.parametrize("architecture", ["Gemma2", "Gemma3Text", "Mistral"])
@pytest.mark.parametrize("mode", MODES)
def test_texts_longer_than_a_sliding_window_are_steered_to_the_end(architecture, mode):
    model = make_model(architecture, sliding_window=6)
    x = sample(model, "model.layers.1.output", LEFT)
    sae = make_sae(32, 64, "model.layers.1.output", like=x)
    prompt = torch.tensor([PROMPTS[1]])
    width = prompt.shape[1]
    for tokens in CHOICES:
        want = prompt

        def choose(ids, mask, tokens=tokens):
            columns = torch.arange(ids.shape[1])
            return ordinary(ids) & {"all": ids >= 0, "prompt": columns < width, "generated": columns >= width}[tokens]

        with FullEdit(model, sae, lambda acts: edited(acts, "clamp", {3: 25.0}), choose=choose):
            for _ in range(NEW):
                want = torch.cat([want, model(input_ids=want).logits[:, -1:].argmax(-1)], dim=1)
        with attach_saes(model, sae).saes.clamp({3: 25.0}, tokens=tokens):
            result = generate(model, prompt, **MODES[mode])
        detach_saes(model)
        assert getattr(result, "sequences", result).tolist() == want.tolist(), tokens


def test_the_logits_of_every_step_are_those_by_hand(any_case):
    model = any_case.attached()
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with model.saes.clamp(any_case.values):
            result = generate(model, output_logits=True, return_dict_in_generate=True, **mode)
        for row in range(3):
            got = torch.stack([step[row] for step in result.logits])
            assert relative(got, any_case.by_hand(row)[1]) < 1e-4


def test_rows_left_untouched_are_generated_bit_by_bit_as_without_an_edit(any_case):
    model = any_case.attached()
    settings = {"output_logits": True, "return_dict_in_generate": True}
    clean = generate(model, **settings)
    with model.saes.clamp(any_case.values):
        got = generate(model, **settings)
    for before, after in zip(clean.logits, got.logits, strict=True):
        assert torch.equal(after[2], before[2])
    assert any(not torch.equal(a[:2], b[:2]) for a, b in zip(clean.logits, got.logits, strict=True))


def test_generates_hidden_states_show_the_edit_at_every_step(case):
    model = case.attached()
    with model.saes.clamp(case.values), seen(model, case.site) as xs:
        result = generate(model, output_hidden_states=True, return_dict_in_generate=True)
    assert len(xs) == len(result.hidden_states) == NEW
    for x, step in zip(xs, result.hidden_states, strict=True):
        assert torch.equal(step[2], x)
