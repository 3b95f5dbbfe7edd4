"""What belongs to an export's identity: everything that its features depend on, and nothing else."""

import json

import numpy as np
import pytest
import torch
from extract.exports import LOWER, ROWS, SITE, contents, refused

from sae_hooks import attach_saes
from sae_hooks.errors import DataError


def test_the_window_that_was_taken_stands_in_the_settings(export, tmp_path):
    assert export(tmp_path / "f", window=None).export["settings"]["window"] == 256  # tiny_gemma2's positions
    with pytest.raises(DataError, match="window=1024, but Gemma2ForCausalLM takes 256"):
        export(tmp_path / "g", window=1024)
    assert not (tmp_path / "g").exists()


def test_numbers_of_another_type_make_the_same_export(export, tmp_path):
    sizes = {"tokens_per_shard": 40, "tokens_per_batch": 64, "window": 32, "overlap": 4, "limit": 4}
    for kind in (np.int64, np.uint8, torch.tensor, int):
        changes = {name: kind(n) for name, n in sizes.items()}
        assert export(tmp_path, special_tokens=np.False_, activations=np.False_, **changes).documents == 4
    export(tmp_path, special_tokens=False, activations=False, **sizes)


def test_a_model_that_was_found_under_another_name_goes_on_and_leaves_the_first_one(export, model, tmp_path):
    export(tmp_path)
    before = contents(tmp_path)
    first = model.config._name_or_path
    model.config._name_or_path = "elsewhere/tiny"
    store = export(tmp_path)
    assert contents(tmp_path) == before
    assert store.export["model"]["name"] == first


def test_another_sae_model_tokenizer_text_or_setting_is_refused_by_name(
        export, model, tiny_tokenizer, random_sae, tmp_path, tiny_gemma2_loaded):
    folder = tmp_path / "f"
    export(folder)
    refused(export, folder, "settings.window: there 32, here 30", window=30)
    refused(export, folder, "settings.dtype", dtype="float32")
    refused(export, folder, r"dtype=torch.float16: .*'float16', .*; give its name", dtype=torch.float16)
    refused(export, folder, "say resume", resume=False)
    refused(export, folder, r"shard-00000.*other documents: their tokens differ", documents=[{"text": "Another."}])
    relabelled = [row | {"label": "x"} for row in ROWS]
    refused(export, folder, "their columns, or turns of other roles, differ", documents=relabelled)
    export(tmp_path / "single", tokens_per_shard=1)
    refused(export, tmp_path / "single", "holds shards of a longer text", documents=ROWS[:3], tokens_per_shard=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    refused(export, folder, "model.weights: there")
    model.model.load_state_dict(tiny_gemma2_loaded.model.state_dict())
    model.saes.special_ids = {2}
    refused(export, folder, "special_ids")


def test_another_text_in_turns_that_have_no_rows_is_refused(export, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}\n{% endfor %}")

    def chats(asked, answer="Let there be light."):
        return [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]] * 5

    before = chats("And God said,")
    store = export(tmp_path, before, roles="assistant")
    assert (export(tmp_path, before, roles="assistant").csr() != store.csr()).nnz == 0
    for other in (chats("And man said,"), chats("And man said, and he cried,"), chats("And God said,", "No.")):
        refused(export, tmp_path, r"shard-00000.*other documents: their .* differ. Give the same text",
                documents=other, roles="assistant")
    before[-1] = chats("And God saw")[0]
    refused(export, tmp_path, "made of other documents", documents=before, roles="assistant")


def test_another_sae_is_refused(export, model, random_sae, tmp_path):
    export(tmp_path / "f")
    model.saes.detach()
    attach_saes(model, random_sae(192, 512, SITE, seed=7, norm=34))
    refused(export, tmp_path / "f", r"saes.model.layers.2.output.weights: there '\w+', here")


@pytest.mark.parametrize("name", ["source", "name", "revision"])
def test_another_sae_is_refused_under_any_name(export, tiny_gemma2, random_sae, tmp_path, name):
    attach_saes(tiny_gemma2, random_sae(192, 512, SITE, norm=34), name=name)
    export(tmp_path, model=tiny_gemma2)
    tiny_gemma2.saes.detach()
    attach_saes(tiny_gemma2, random_sae(192, 512, SITE, seed=7, norm=34), name=name)
    refused(export, tmp_path, rf"saes.{name}.weights: there '\w+', here", model=tiny_gemma2)


def test_autocast_belongs_to_what_was_exported(export, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        export(tmp_path)
        export(tmp_path)
    refused(export, tmp_path, "autocast: there .*cpu.*bfloat16.*, here None")


def test_an_edit_that_is_open_belongs_to_what_was_exported(export, model, tmp_path):
    edit = model.saes.add({3: 1.0})
    export(tmp_path / "f")
    with pytest.warns(match="touched no position"):  # its site is where extraction ends
        edit.remove()
    refused(export, tmp_path / "f", "edits: there")


def test_a_splice_that_is_open_below_belongs_to_what_was_exported(export, model, random_sae, tmp_path):
    attach_saes(model, random_sae(192, 128, LOWER, norm=29))
    with model.saes.splice(name=LOWER):
        export(tmp_path / "spliced", sites=[SITE])
        export(tmp_path / "spliced", sites=[SITE])
    refused(export, tmp_path / "spliced", f"splices: there .*{LOWER}.*, here None", sites=[SITE])
    with pytest.warns(match="touched no position"), model.saes.splice(name=LOWER, special_tokens=True):
        refused(export, tmp_path / "spliced", "splices: there .*False.*, here .*True", sites=[SITE])
    export(tmp_path / "plain", sites=[SITE])
    with pytest.warns(match="touched no position"), model.saes.splice(name=LOWER):
        refused(export, tmp_path / "plain", "splices: there None", sites=[SITE])


def test_another_sae_behind_an_open_edit_is_refused_also_where_it_is_not_exported(export, model, random_sae, tmp_path):
    attach_saes(model, random_sae(192, 128, LOWER, norm=29))
    with model.saes.clamp({3: 5.0}, name=LOWER):
        export(tmp_path / "f", sites=[SITE])
        export(tmp_path / "f", sites=[SITE])
    own = model.saes[SITE]
    model.saes.detach()
    attach_saes(model, {SITE: own, LOWER: random_sae(192, 128, LOWER, seed=99, norm=29)})
    with pytest.warns(match="touched no position"), model.saes.clamp({3: 5.0}, name=LOWER):
        refused(export, tmp_path / "f", rf"open_saes.{LOWER}.weights: there '\w+', here", sites=[SITE])


def test_what_is_not_open_and_a_capture_leave_the_identity_as_it_is(export, model, tmp_path):
    export(tmp_path)
    assert set(json.loads((tmp_path / "export.json").read_text())) == {
        "edits", "format", "model", "saes", "settings", "special_ids", "tokenizer"}
    with pytest.warns(match="touched no position"), model.saes.capture():
        export(tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_adapters_that_are_off_or_scaled_otherwise_make_another_export(export, model, tmp_path):
    peft = pytest.importorskip("peft")
    own = model.saes[SITE]
    model.saes.detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    attach_saes(wrapped, own)
    export(tmp_path, model=wrapped)
    with wrapped.disable_adapter():
        refused(export, tmp_path, "adapters: there .*'disabled': False.*, here .*'disabled': True", model=wrapped)
    lora = wrapped.base_model.model.model.layers[1].self_attn.q_proj
    lora.scaling["default"] *= 2
    refused(export, tmp_path, "adapters: there", model=wrapped)
    lora.scaling["default"] /= 2
    export(tmp_path, model=wrapped)
