"""Columns where the cache does not count the text's tokens: recurrent states, virtual tokens, a text begun before."""

import warnings

import pytest
import torch
import transformers
from core.generating import LEFT, NEW, PROMPTS, WIDTH, generate, told_apart
from core.steering import SITE
from tiny_models import VOCABULARY, make_model, make_sae
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from sae_hooks import EditError, attach_saes

pytestmark = [
    pytest.mark.usefixtures("without_gradients"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT asks by the old name
]
LAYER = "backbone.layers.1"


def mamba():
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None}
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8,
                                      initializer_range=0.5, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.MambaForCausalLM(config).eval()


def tuned(kind):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
        return peft.get_peft_model(make_model("Llama"), config).eval()


class AtToken(BaseStreamer):
    """Calls a function after so many passes of generate."""

    def __init__(self, passes, call):
        self.left, self.call = passes, call

    def put(self, value):
        if self.left == 0:
            self.call()
        self.left -= 1  # the prompt is put before the first pass

    def end(self):
        pass


def one_row(model, **settings):
    return model.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False, **settings)


def test_a_recurrent_state_counts_no_tokens_and_prompt_and_generated_are_told_all_the_same():
    told_apart(mamba, LAYER, len(PROMPTS[0]), 1, one_row)
    sae = make_sae(32, 64, f"{LAYER}.output")
    del sae.metadata["typical_norm"]
    model, real = attach_saes(mamba(), sae), sum(map(len, PROMPTS))
    for tokens, count in {"all": real + 3 * (NEW - 1), "prompt": real, "generated": 3 * (NEW - 1)}.items():
        with model.saes.add({3: 100.0}, tokens=tokens, special_tokens=True) as edit:
            cached = generate(model)
        assert edit.positions_edited == count
        with model.saes.add({3: 100.0}, tokens=tokens, special_tokens=True):
            assert generate(model, use_cache=False).tolist() == cached.tolist()


def test_a_pass_whose_ids_are_moved_between_the_model_and_the_one_inside_it_counts_once():
    def moved(module, args, kwargs):
        return (args[0].clone(), *args[1:]), kwargs

    model = attach_saes(mamba(), make_sae(32, 64, f"{LAYER}.output", norm=1e9))
    model.backbone.register_forward_pre_hook(moved, with_kwargs=True, prepend=True)
    for tokens, count in (("prompt", len(PROMPTS[0])), ("generated", NEW - 1)):
        with model.saes.add({3: 100.0}, tokens=tokens, special_tokens=True) as edit:
            one_row(model)
        assert edit.positions_edited == count


def test_a_recurrent_models_text_is_captured_token_by_token():
    model = attach_saes(mamba(), make_sae(32, 64, f"{LAYER}.output"))
    with model.saes.capture() as captured:
        out = generate(model)
    (got,) = captured.values()
    texts = [[*row[:WIDTH][ids != 0].tolist(), *row[WIDTH:].tolist()][:-1] for row, ids in zip(out, LEFT, strict=True)]
    assert got.token_id.tolist() == [token for text in texts for token in text]
    assert got.position.tolist() == [i for text in texts for i in range(len(text))]
    assert got.doc_id.tolist() == [doc for doc, text in enumerate(texts) for _ in text]


def test_a_recurrent_state_continued_by_hand_is_refused_where_positions_matter():
    model = attach_saes(mamba(), make_sae(32, 64, f"{LAYER}.output"))
    ids = torch.tensor([PROMPTS[1]])
    mask = torch.ones(4, dtype=torch.bool)
    for opening in (model.saes.capture, lambda: model.saes.add({3: 1.0}, tokens=mask)):
        state = model(ids[:, :4], use_cache=True).cache_params
        with pytest.raises(EditError, match="positions of this pass cannot be told"), opening():
            model(ids[:, 4:], cache_params=state)
    state = model(ids[:, :4], use_cache=True).cache_params
    with model.saes.add({3: 1.0}, special_tokens=True) as edit:
        model(ids[:, 4:], cache_params=state)
    assert edit.positions_edited == ids.shape[1] - 4
    state = model(ids[:, :4], use_cache=True).cache_params
    for tokens in ("prompt", "generated"):
        with pytest.raises(EditError, match="positions of this pass"), model.saes.add({3: 1.0}, tokens=tokens):
            model.generate(ids[:, 4:], cache_params=state, max_new_tokens=2)


def test_virtual_tokens_in_the_cache_are_no_columns_of_the_text():
    told_apart(lambda: tuned("PrefixTuning"), "base_model.model.layers.1", len(PROMPTS[0]), 1, one_row)
    model = attach_saes(tuned("PrefixTuning"), make_sae(32, 64, SITE))
    with model.saes.capture() as captured:
        model.generate(input_ids=LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=NEW, do_sample=False)
    (got,) = captured.values()
    assert got.position.tolist() == [i for prompt in PROMPTS for i in range(len(prompt) + NEW - 1)]


@pytest.mark.parametrize("make", [lambda: make_model("Llama"), lambda: tuned("PrefixTuning")], ids=["plain", "prefix"])
def test_what_is_opened_while_a_text_is_generated_knows_where_in_it_it_stands(make):
    model = attach_saes(make(), make_sae(32, 64, SITE, norm=1e9))
    ids, passes = LEFT[:1], 3
    real, later = int((ids != 0).sum()), NEW - passes
    for tokens, count in (("prompt", 0), ("generated", later), ("all", later)):
        opened = []

        def opening(tokens=tokens, opened=opened):
            opened.extend((model.saes.add({3: 100.0}, tokens=tokens, special_tokens=True), model.saes.capture()))

        out = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW, do_sample=False,
                             streamer=AtToken(passes, opening))
        edit, capture = opened
        (got,) = capture.captured.values()
        assert edit.positions_edited == count
        assert got.position.tolist() == list(range(real + passes - 1, real + NEW - 1))
        assert got.token_id.tolist() == out[0, WIDTH + passes - 1:-1].tolist()
        with warnings.catch_warnings(action="ignore"):
            edit.remove()
            capture.remove()


def test_what_is_opened_in_the_middle_of_a_generates_pass_begins_with_the_next():
    # as another thread may open it at any moment
    model, passes, opened = attach_saes(make_model("Llama"), make_sae(32, 64, SITE, norm=1e9)), [], []

    def opening(module, args, output):
        passes.append(output)
        if len(passes) in (3, 6):
            opened.extend((model.saes.add({3: 100.0}), model.saes.capture()))
        if len(passes) == 5:
            close()

    def close():
        for handle in opened[-2:]:
            handle.remove()

    model.model.layers[0].register_forward_hook(opening)
    out = one_row(model)[0].tolist()
    close()
    prompt = len(PROMPTS[0])
    for edit, capture, steps in ((*opened[:2], [3]), (*opened[2:], [6, 7])):
        (got,) = capture.captured.values()
        assert edit.positions_edited == len(steps)
        assert got.position.tolist() == [prompt + step - 1 for step in steps]
        assert got.token_id.tolist() == [out[prompt + step - 1] for step in steps]


def test_positions_in_a_recurrent_models_text_that_was_begun_unseen_are_refused():
    model = attach_saes(mamba(), make_sae(32, 64, f"{LAYER}.output"))
    opened = []
    with pytest.raises(EditError, match="positions of this pass cannot be told"):
        one_row(model, streamer=AtToken(3, lambda: opened.append(model.saes.capture())))
    with pytest.warns(UserWarning, match="touched no position"):
        opened[0].remove()


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")  # PEFT drops them
def test_virtual_tokens_before_the_text_are_refused_where_positions_matter():
    model = attach_saes(tuned("PromptTuning"), make_sae(32, 64, SITE))
    for opening in (lambda: model.saes.add({3: 1.0}, tokens="prompt", special_tokens=True),
                    lambda: model.saes.add({3: 1.0}, tokens="generated", special_tokens=True),
                    lambda: model.saes.capture(special_tokens=True)):
        with pytest.raises(EditError, match="virtual tokens"), opening():
            one_row(model)
    with model.saes.add({3: 0.0}, special_tokens=True) as edit:
        one_row(model)
    assert edit.positions_edited == 4 + len(PROMPTS[0]) + NEW - 1


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 2}])
def test_new_ids_alone_with_the_cache_of_what_came_before_say_and_capture_what_the_whole_text_does(mode):
    whole = torch.tensor([PROMPTS[1]])
    sae = make_sae(32, 64)
    del sae.metadata["typical_norm"]
    model = attach_saes(make_model("Llama"), sae)

    def said(ids, tokens):
        cache = DynamicCache(config=model.config)
        model(whole[:, :5], past_key_values=cache)
        with model.saes.add({3: 100.0}, tokens=tokens, special_tokens=True) as edit, model.saes.capture() as captured:
            out = model.generate(ids, attention_mask=torch.ones_like(whole), past_key_values=cache,
                                 max_new_tokens=NEW, do_sample=False, **mode)
        (got,) = captured.values()
        assert edit.positions_edited == counts[tokens]
        return out[0, -NEW:].tolist(), got.position.tolist(), got.token_id.tolist()

    counts = {"all": whole.shape[1] - 5 + NEW - 1, "prompt": whole.shape[1] - 5, "generated": NEW - 1}
    for tokens in counts:
        want = said(whole, tokens)
        assert want[1] == list(range(5, whole.shape[1] + NEW - 1))
        assert said(whole[:, 5:], tokens) == want
