"""Beams, samples, padding and masks: which rows and positions of a generation an edit touches."""

import pytest
import torch
from core.generating import (
    CHOICES,
    CHOOSE,
    LEFT,
    MODES,
    NEW,
    PROMPTS,
    RIGHT,
    WIDTH,
    by_hand,
    case_of,
    generate,
    holds,
    texts,
    under_the_plain_hook,
)
from core.reference import ordinary, relative, sample, seen

from sae_hooks import EditError

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("mode", ["cache", "no cache", "static cache", "chunked prefill"])
@pytest.mark.parametrize("tokens", CHOICES)
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Bloom"])
def test_beams_get_their_requests_strength(architecture, tokens, mode):
    case = case_of(architecture)
    beams = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    want = under_the_plain_hook(case, choose=CHOOSE[tokens], **beams)
    model = case.attached()
    with model.saes.clamp(case.values, tokens=tokens):
        got = generate(model, return_dict_in_generate=True, **beams, **MODES[mode])
    assert got.sequences.tolist() == want.sequences.tolist()
    assert relative(got.sequences_scores, want.sequences_scores) < 1e-4
    clean = generate(model, return_dict_in_generate=True, **beams, **MODES[mode])
    assert clean.sequences[:2].tolist() != got.sequences[:2].tolist() or (
        clean.sequences[2:4].tolist() != got.sequences[2:4].tolist())
    assert clean.sequences[4:].tolist() == got.sequences[4:].tolist()


@pytest.mark.parametrize("mode", ["cache", "no cache", "static cache", "chunked prefill"])
@pytest.mark.parametrize("tokens", CHOICES)
def test_every_sample_of_a_request_gets_the_requests_strength(case, tokens, mode):
    sampling = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3}
    want = under_the_plain_hook(case, choose=CHOOSE[tokens], seed=7, **sampling)
    model = case.attached()
    torch.manual_seed(7)
    with model.saes.clamp(case.values, tokens=tokens):
        got = generate(model, **sampling, **MODES[mode])
    assert got.tolist() == want.sequences.tolist()
    torch.manual_seed(7)
    clean = generate(model, **sampling, **MODES[mode])
    assert clean.tolist()[:6] != got.tolist()[:6]
    assert len({tuple(row) for row in got[:3].tolist()}) > 1


@pytest.mark.parametrize("mode", ["cache", "no cache", "static cache"])
@pytest.mark.parametrize("tokens", CHOICES)
def test_padding_on_the_right_is_padding_too(case, tokens, mode):
    want = under_the_plain_hook(case, RIGHT, choose=CHOOSE[tokens])
    model = case.attached()
    with model.saes.clamp(case.values, tokens=tokens):
        got = generate(model, RIGHT, **MODES[mode])
    assert got.tolist() == want.sequences.tolist()
    assert got.tolist() != generate(model, RIGHT, **MODES[mode]).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("two_dimensional", [False, True])
def test_a_mask_chooses_columns_of_the_prompt_and_nothing_generated(case, mode, two_dimensional):
    mask = torch.tensor([False, False, False, False, True, False, True, True, False])
    if two_dimensional:
        mask = torch.stack([mask, ~mask, torch.zeros_like(mask)])

    def choose(ids, keep):
        inside = torch.zeros(ids.shape, dtype=torch.bool)
        inside[:, :WIDTH] = mask
        return ordinary(ids, keep) & inside

    want = under_the_plain_hook(case, choose=choose)
    model = case.attached()
    with model.saes.clamp(case.values, tokens=mask):
        got = generate(model, **MODES[mode])
    assert texts(got) == texts(want)
    assert texts(got) != by_hand(case, None)


@pytest.mark.parametrize("expand", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_each_row_of_a_mask_serves_all_beams_and_samples_of_its_request(case, expand):
    mask = torch.zeros(3, WIDTH, dtype=torch.bool)
    mask[0, -2:] = mask[1, 4:6] = True

    def choose(ids, keep):
        inside = torch.zeros(ids.shape, dtype=torch.bool)
        inside[:, :WIDTH] = mask.repeat_interleave(len(ids) // 3, dim=0)
        return ordinary(ids, keep) & inside

    want = under_the_plain_hook(case, choose=choose, seed=3, **expand)
    model = case.attached()
    torch.manual_seed(3)
    with model.saes.clamp(case.values, tokens=mask):
        assert generate(model, **expand).tolist() == want.sequences.tolist()


@pytest.mark.parametrize("shape", [(WIDTH + 1,), (WIDTH - 1,), (2, WIDTH)])
def test_a_mask_that_does_not_fit_the_prompt_is_refused(case, shape):
    model = case.attached()
    with pytest.raises(EditError, match=f"the input has 3 rows of {WIDTH} tokens"), \
            model.saes.clamp(case.values, tokens=torch.ones(shape, dtype=torch.bool)):
        generate(model)


def test_positions_edited_counts_the_ordinary_tokens_that_were_computed(case):
    model = case.attached()
    ordinary_prompt = int(ordinary(LEFT).sum())
    generated = torch.tensor([text[len(p):-1] for text, p in zip(by_hand(case), PROMPTS, strict=True)])
    ordinary_generated = int(ordinary(generated).sum())
    with model.saes.clamp(case.values) as everything:
        generate(model)
    assert everything.positions_edited == ordinary_prompt + ordinary_generated
    assert everything.positions_skipped == 3 + generated.numel() - ordinary_generated  # a BOS each
    with model.saes.clamp(case.values, tokens="prompt") as prompt:
        generate(model)
    assert (prompt.positions_edited, prompt.positions_skipped) == (ordinary_prompt, 3)
    with model.saes.clamp(case.values, tokens="generated") as later:
        generate(model)
    assert later.positions_edited + later.positions_skipped == 3 * (NEW - 1)
    with model.saes.clamp(case.values) as beams:
        generate(model, num_beams=2, max_new_tokens=1)
    assert beams.positions_edited == 2 * ordinary_prompt


def test_an_edit_of_generated_tokens_warns_where_none_was_ever_read(case):
    model = case.attached()
    with pytest.warns(UserWarning, match="touched no position"), model.saes.clamp(case.values, tokens="generated"):
        generate(model, max_new_tokens=1)  # the one new token is said, but never read


def test_a_forward_pass_after_generate_is_no_part_of_it(case):
    model = case.attached()
    with model.saes.clamp(case.values):
        plain = model(input_ids=LEFT).logits
        generate(model)
        assert torch.equal(model(input_ids=LEFT).logits, plain)
    longer = torch.cat([LEFT, LEFT.clamp(min=9)], dim=1)
    for tokens, chosen in (("generated", torch.zeros_like(longer, dtype=torch.bool)), ("prompt", ordinary(longer))):
        with model.saes.clamp({3: 9.0}, tokens=tokens):
            generate(model)
            with seen(model, case.site) as xs:
                model(input_ids=longer)
        clean = sample(case.model, case.site, longer)
        assert torch.equal((xs[0] != clean).any(-1), chosen)


def test_a_generation_that_fails_leaves_nothing_behind(case):
    model = case.attached()
    with model.saes.clamp(case.values, tokens="prompt"):
        want = model(input_ids=LEFT).logits
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate(model, max_new_tokens=-1)
        assert torch.equal(model(input_ids=LEFT).logits, want)
        assert texts(generate(model)) == by_hand(case, "prompt")


@pytest.mark.parametrize("call", ["inputs", "input_ids", "mapping"])
def test_the_prompt_may_be_given_under_any_name(case, call):
    model = case.attached()
    mask = (LEFT != 0).long()
    arguments = {"inputs": {"inputs": LEFT}, "input_ids": {"input_ids": LEFT}, "mapping": {"input_ids": LEFT}}[call]
    with model.saes.clamp(case.values, tokens="generated"):
        got = model.generate(**arguments, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert texts(got) == by_hand(case, "generated")


@pytest.mark.parametrize("mode", MODES)
def test_without_a_mask_padding_is_told_by_its_id_as_transformers_does(case, mode):
    model = case.attached()
    with model.saes.clamp(case.values, special_tokens=True) as handle, model.saes.capture() as features:
        model.generate(LEFT, max_new_tokens=1, do_sample=False, **MODES[mode])
    assert handle.positions_edited == (LEFT != 0).sum()
    holds(case, features[case.site], PROMPTS)


def test_prompts_as_embeddings_work_where_special_tokens_are_asked_for(case):
    prompt = torch.tensor([PROMPTS[1]])
    model = case.attached()
    embeddings = model.get_input_embeddings()(prompt)
    for tokens in CHOICES:
        with model.saes.clamp(case.of_row(1), tokens=tokens, special_tokens=True):
            want = generate(model, prompt)[:, prompt.shape[1]:]
            got = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
        assert got.tolist() == want.tolist()
    with pytest.raises(EditError, match=r"special_tokens=True"), model.saes.clamp(case.of_row(1)):
        model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
