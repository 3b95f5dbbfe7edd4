"""Captures of every way of generating: each token of each text once, with the features it has in the whole text."""

import pytest
import torch
from core.generating import ALONE, LEFT, MODES, NEW, PROMPTS, WIDTH, by_hand, generate, holds, read, texts
from core.reference import FullEdit
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_batch_has_each_token_once_with_its_features(any_case, mode):
    model = any_case.attached()
    with model.saes.capture() as features:
        generate(model, **MODES[mode])
    holds(any_case, features[any_case.site], read(by_hand(any_case, None)))


@pytest.mark.parametrize("mode", [*MODES, *ALONE])
def test_captures_under_an_edit_are_of_the_edited_text(case, mode):
    for row in range(3):
        model = case.attached()
        with model.saes.clamp(case.of_row(row)), model.saes.capture() as features:
            generate(model, torch.tensor([PROMPTS[row]]), **{**MODES, **ALONE}[mode])
        holds(case, features[case.site], read([case.by_hand(row)[0]]))


def test_samples_are_captured_as_documents_of_their_own(case):
    model = case.attached()
    torch.manual_seed(5)
    with model.saes.capture() as features:
        out = generate(model, do_sample=True, num_return_sequences=2)
    assert len(out) == 6
    holds(case, features[case.site], read(texts(out)))


def test_generations_captured_one_after_another_are_documents_one_after_another(case):
    model = case.attached()
    with model.saes.capture() as features:
        for prompt in PROMPTS:
            generate(model, torch.tensor([prompt]))
    holds(case, features[case.site], read(by_hand(case, None)))


def test_a_row_that_ended_early_is_captured_as_far_as_its_text_goes(case):
    whole = by_hand(case, None)
    stop = whole[0][len(PROMPTS[0]) + 2]  # the third new token of row 0
    want = []
    for prompt, text in zip(PROMPTS, read(whole), strict=True):
        new = text[len(prompt):]
        want.append(prompt + (new[:new.index(stop)] if stop in new else new))
    assert len({len(text) - len(prompt) for text, prompt in zip(want, PROMPTS, strict=True)}) > 1
    for settings in ({"pad_token_id": 0}, {"pad_token_id": stop}, {"pad_token_id": 0, "use_cache": False}):
        model = case.attached()
        with model.saes.capture() as features:
            generate(model, eos_token_id=stop, **settings)
        holds(case, features[case.site], want)


def test_what_ends_a_row_is_read_from_the_models_config_where_the_calls_own_does_not_say(case):
    whole = by_hand(case, None)
    stop = whole[0][len(PROMPTS[0]) + 2]
    new = {"max_new_tokens": NEW, "do_sample": False}
    ways = {
        "config": ((), {"generation_config": GenerationConfig(**new)}),
        "config by position": ((GenerationConfig(**new),), {}),
        "config with another EOS": ((GenerationConfig(**new, eos_token_id=stop),), {}),
        "no EOS": ((), {**new, "eos_token_id": None}),
    }
    for way, (args, settings) in ways.items():
        model = case.attached()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = stop, 0
        if way == "config with another EOS":
            model.generation_config.eos_token_id = 127
        with model.saes.capture() as features:
            model.generate(LEFT, *args, attention_mask=(LEFT != 0).long(), **settings)
        ended = [text[:text.index(stop, len(p))] if way != "no EOS" and stop in text[len(p):-1] else text[:-1]
                 for p, text in zip(PROMPTS, whole, strict=True)]
        holds(case, features[case.site], ended)


def test_a_row_that_another_criterion_ended_early_is_captured_as_far_as_its_text_goes(case):
    class AfterThree(StoppingCriteria):
        """Ends the first row after three new tokens, the others never; transformers goes on with padding there."""

        def __call__(self, input_ids, scores, **_):
            ended = torch.zeros(len(input_ids), dtype=torch.bool)
            ended[0] = input_ids.shape[1] >= WIDTH + 3
            return ended

    model, never = case.attached(), 127  # without any EOS, transformers fills up no row
    assert all(never not in text for text in by_hand(case, None))
    with model.saes.capture() as features:
        out = generate(model, stopping_criteria=[AfterThree()], eos_token_id=never)
    assert out[0, WIDTH + 3:].tolist() == [0] * (NEW - 3)
    first, *others = by_hand(case, None)
    holds(case, features[case.site], read([first[:len(PROMPTS[0]) + 3], *others]))


def test_a_row_whose_first_new_token_is_the_one_for_padding_keeps_its_prompt(case):
    def say_padding(input_ids, scores):
        scores[0] = torch.full_like(scores[0], -torch.inf).index_fill(0, torch.tensor([0]), 0.0)
        return scores

    model = case.attached()
    with model.saes.capture() as features:
        out = generate(model, logits_processor=[say_padding])
    assert out[0, WIDTH:].tolist() == [0] * NEW
    holds(case, features[case.site], [PROMPTS[0], *read(by_hand(case, None))[1:]])


def test_a_talk_continued_with_its_cache_is_captured_on_from_where_it_was(case):
    prompt, more = torch.tensor([PROMPTS[1]]), torch.tensor([[71, 72, 73]])
    model, cache = case.attached(), DynamicCache()
    with model.saes.clamp(case.of_row(1)), model.saes.capture() as features:
        first = generate(model, prompt, past_key_values=cache)
        whole = torch.cat([first, more], dim=1)
        second = generate(model, whole, past_key_values=cache)
    assert first[0].tolist() == case.by_hand(1)[0]
    want = whole
    hook = FullEdit(case.model, case.sae, lambda acts: case.edit(acts, slice(1, 2)), read=case.site)
    for _ in range(NEW):
        with hook:
            want = torch.cat([want, case.model(input_ids=want).logits[:, -1:].argmax(-1)], dim=1)
    assert second.tolist() == want.tolist()
    got = features[case.site]
    assert got.position.tolist() == list(range(want.shape[1] - 1))
    assert got.token_id.tolist() == want[0, :-1].tolist()


def test_embedded_prompts_are_captured_whole(case):
    prompt = torch.tensor([PROMPTS[1]])
    model = case.attached()
    embeddings = model.get_input_embeddings()(prompt)
    with model.saes.capture(special_tokens=True) as features:
        model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    with model.saes.capture(special_tokens=True) as plain:
        generate(model, prompt)
    got, want = features[case.site], plain[case.site]
    assert got.position.tolist() == want.position.tolist() == list(range(len(PROMPTS[1]) + NEW - 1))
    torch.testing.assert_close(got.to_dense(), want.to_dense())
    assert got.token_id.tolist() == [-1] * len(PROMPTS[1]) + want.token_id.tolist()[len(PROMPTS[1]):]


def test_every_beam_is_captured_from_the_prompt_on(case):
    model = case.attached()
    with model.saes.capture() as features:
        generate(model, num_beams=3)
    got = features[case.site]
    assert sorted(set(got.doc_id.tolist())) == list(range(9))
    for doc in range(9):
        prompt = PROMPTS[doc // 3]
        rows = got[got.doc_id == doc]
        assert rows.token_id.tolist()[:len(prompt)] == prompt
        assert rows.position.tolist() == list(range(len(prompt) + NEW - 1))
