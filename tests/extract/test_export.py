"""export_features: the store is the extraction, goes on where it was cut off, and is refused to anything else."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sae_hooks import attach_saes
from sae_hooks.errors import DataError, SaeFormatError
from sae_hooks.export import export_features
from sae_hooks.extract import extract_features
from sae_hooks.store import open_features

SITE, LOWER = "model.layers.2.output", "model.layers.1.output"
WORKER = Path(__file__).with_name("export_worker.py")
ROWS = [{"text": "In the beginning God created the heaven and the earth.", "label": "bible", "n": 1},
        {"text": "", "label": "empty"}, {"text": "def f(x):\n    return x + 1", "label": "python"},
        {"text": "Add the butter and stir until smooth. " * 12, "label": "recipe"},
        {"text": "If the file is empty, return an error.", "label": "manual"}]


@pytest.fixture
def model(tiny_gemma2, random_sae):
    return attach_saes(tiny_gemma2, random_sae(192, 512, SITE, norm=34))


@pytest.fixture
def export(model, tiny_tokenizer):
    """export(folder, documents=ROWS, model=model, **changes)"""
    def run(folder, documents=ROWS, model=model, **changes):
        settings = {"tokenizer": tiny_tokenizer, "tokens_per_shard": 40, "window": 32, "overlap": 4} | changes
        return export_features(model, documents, folder, **settings)
    return run


def contents(folder):
    """{name: digest} of every file."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_store_holds_what_extraction_yields(export, model, tiny_tokenizer, tmp_path):
    store = export(tmp_path / "f", dtype="float32", activations=True)
    parts = list(extract_features(model, ROWS, tokenizer=tiny_tokenizer, window=32, overlap=4, activations=True,
                                  tokens_per_part=40))
    assert len(parts) > 2
    assert len(store) == sum(map(len, parts))
    for part, shard in zip(parts, store.shards(SITE), strict=True):
        for name in ("indptr", "indices", "values", "doc_id", "position", "token_id"):
            assert torch.equal(getattr(part.features[SITE], name), getattr(shard, name)), name
    assert torch.equal(torch.as_tensor(store.activations(SITE)), torch.cat([p.activations[SITE] for p in parts]))
    assert store.labels("label") == [row["label"] for row in ROWS]
    assert store.labels("n") == [1, None, None, None, None]


def test_the_tokenizer_is_kept_so_that_texts_can_be_read(export, tmp_path):
    store = export(tmp_path / "f")
    assert "butter" in store.document_text(3)


def test_token_ids_are_exported_alike_with_a_tokenizer_and_without(export, tiny_tokenizer, tmp_path):
    rows = [{"input_ids": tiny_tokenizer(row["text"])["input_ids"]} for row in ROWS]
    known, alone = (export(tmp_path / f"{tokenizer is None}", rows, tokenizer=tokenizer, dtype="float32").column(5)[1]
                    for tokenizer in (tiny_tokenizer, None))
    assert len(known)
    assert torch.equal(torch.as_tensor(alone), torch.as_tensor(known))


@pytest.mark.parametrize("stop", range(3))
def test_an_export_that_failed_goes_on_and_ends_with_the_same_bytes(export, model, tmp_path, stop):
    export(tmp_path / "whole")
    seen = 0

    def fail(rows, documents):
        nonlocal seen
        seen += 1
        if seen == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "cut", progress=fail)
    with pytest.raises(SaeFormatError, match="not finished"):
        open_features(tmp_path / "cut")
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    export(tmp_path / "cut")
    handle.remove()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a finished export is made again"))
    export(tmp_path / "cut")


def test_the_window_that_was_taken_stands_in_the_settings(export, tmp_path):
    assert export(tmp_path / "f", window=None).export["settings"]["window"] == 256  # tiny_gemma2's positions
    with pytest.raises(DataError, match="window=1024, but Gemma2ForCausalLM takes 256"):
        export(tmp_path / "g", window=1024)
    assert not (tmp_path / "g").exists()


def test_a_model_that_was_found_under_another_name_goes_on_and_leaves_the_first_one(export, model, tmp_path):
    export(tmp_path)
    before = contents(tmp_path)
    first = model.config._name_or_path
    model.config._name_or_path = "elsewhere/tiny"
    store = export(tmp_path)
    assert contents(tmp_path) == before
    assert store.export["model"]["name"] == first


def refused(export, folder, message, **changes):
    before = contents(folder)
    with pytest.raises(DataError, match=message):
        export(folder, **changes)
    assert contents(folder) == before


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
    refused(export, folder, "their columns differ", documents=relabelled)
    export(tmp_path / "single", tokens_per_shard=1)
    refused(export, tmp_path / "single", "holds shards of a longer text", documents=ROWS[:3], tokens_per_shard=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    refused(export, folder, "model.weights: there")
    model.model.load_state_dict(tiny_gemma2_loaded.model.state_dict())
    model.saes.special_ids = {2}
    refused(export, folder, "special_ids")


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


def test_a_folder_of_something_else_is_left_alone(export, tmp_path):
    (tmp_path / "thesis.tex").write_text("\\begin{document}")
    refused(export, tmp_path, "is not empty")


def test_what_cannot_be_read_or_cut_claims_no_folder(export, tmp_path):
    for wrong, told in (({"documents": tmp_path / "no.txt"}, "there is no file"), ({"field": "body"}, "expected .body"),
                        ({"overlap": 32}, "leave no room")):
        with pytest.raises(DataError, match=told):
            export(tmp_path / "f", **wrong)
        assert not (tmp_path / "f").exists()


def test_an_export_that_was_begun_and_has_no_shard_gives_way_to_another(export, tmp_path):
    for wrong in ({"tokenizer": None}, {"window": 30}):
        with pytest.raises(DataError, match="has the token id 9999"):
            export(tmp_path / "f", [[9999]], **wrong)
        assert (tmp_path / "f" / "export.json").exists()
    export(tmp_path / "f", resume=False)
    export(tmp_path / "whole")
    assert contents(tmp_path / "f") == contents(tmp_path / "whole")


def test_a_file_is_no_folder(export, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is a file"):
        export(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_holds_only_a_tokenizer_of_the_users_is_left_alone(export, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    refused(export, tmp_path, "is not empty")


def test_a_kill_before_the_tokenizer_was_saved_is_mended(export, tmp_path):
    export(tmp_path / "whole")
    export(tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer").rename(tmp_path / "cut" / ".tokenizer")
    (tmp_path / "cut" / ".tokenizer" / "tokenizer.json").unlink()
    export(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_broken_shard_stops_the_resume_and_says_what_to_do(export, tmp_path):
    export(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SaeFormatError, match="shard-00001"):
        export(tmp_path)


def rewritten(path, change_metadata=lambda stated: stated, change_values=lambda values: values):
    """Change a shard as no writer would, everything else in it being as it should be."""
    with safe_open(path, framework="pt") as opened:
        [(key, stated)] = opened.metadata().items()
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  no mapping
    tensors[f"{SITE}/values"] = change_values(tensors[f"{SITE}/values"])
    save_file(tensors, path, {key: json.dumps(change_metadata(json.loads(stated)))})


def without_checksum(stated):
    return {key: value for key, value in stated.items() if key != "crc32"}


@pytest.mark.parametrize("what", ["values", "activations"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_was_changed_is_not_taken_over_and_is_mended_once_deleted(export, tmp_path, what, finished):
    export(tmp_path, activations=True)
    whole, shard = contents(tmp_path), tmp_path / "shard-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + json.loads(raw[8 : 8 + length])[f"{SITE}/{what}"]["data_offsets"][0] + 1] ^= 0x10
    shard.write_bytes(raw)
    if not finished:
        (tmp_path / "manifest.json").unlink()
    changed = contents(tmp_path)
    with pytest.raises(SaeFormatError, match=r"shard-00001.* changed since it was written.*elete"):
        export(tmp_path, activations=True)
    assert contents(tmp_path) == changed
    shard.unlink()
    export(tmp_path, activations=True).verify()
    assert contents(tmp_path) == whole


def test_shards_of_before_they_had_a_checksum_go_on_and_are_held_against_the_manifest(export, tmp_path):
    store = export(tmp_path)
    features = store.csr()
    for shard in tmp_path.glob("shard-*"):
        rewritten(shard, without_checksum)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-00002.safetensors").unlink()
    again = export(tmp_path)
    again.verify()
    assert (again.csr() != features).nnz == 0
    rewritten(tmp_path / "shard-00000.safetensors", change_values=lambda values: values * 2)
    with pytest.raises(SaeFormatError, match=r"shard-00000.safetensors was changed .* not the manifest's. Delete"):
        export(tmp_path)


def test_a_broken_manifest_is_not_made_anew_over_shards_that_it_may_belie(export, tmp_path):
    export(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SaeFormatError, match=r"manifest\.json.*; delete it to have it made anew"):
        export(tmp_path)
    (tmp_path / "manifest.json").unlink()
    export(tmp_path)
    assert contents(tmp_path) == whole


def test_a_value_that_float16_cannot_hold_is_refused_and_bfloat16_takes_it(export, model, tmp_path):
    with torch.no_grad():
        model.saes[SITE].W_enc[:, 5] *= 1e5
    with pytest.raises(DataError, match=r"feature 5 is .* too large for float16; take dtype='bfloat16'"):
        export(tmp_path / "f16")
    assert export(tmp_path / "bf16", dtype="bfloat16").column(5, SITE)[1].max() > 65504


def test_roles_that_nobody_has_leave_the_folder_to_those_that_were_meant(export, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    chats = [[{"role": "user", "content": "Add the butter."}]] * 9
    with pytest.raises(DataError, match="messages of all documents are of user"):
        export(tmp_path, chats, roles="usr")
    assert len(export(tmp_path, chats, roles="user")) > 9


def test_documents_without_any_token_make_a_store_of_no_rows(export, tmp_path):
    store = export(tmp_path, documents=["", None])
    assert (len(store), store.documents) == (0, 2)
    assert store.pooled("max").shape == (2, 512)


# --- processes that die, and several at once ------------------------------------------------------------------

def worker(folder, *arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, *launcher, str(WORKER), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "f"
    finished(worker(folder))
    return folder


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(uninterrupted, tmp_path):
    random_moments, folder, killed = random.Random(0), tmp_path / "f", 0
    for _ in range(12):
        process = worker(folder)
        process.stdout.readline()  # it is loaded, and begins
        time.sleep(random_moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        process.stderr.close()
    finished(worker(folder))
    assert killed >= 3
    assert contents(folder) == contents(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no", "--main_process_port=0", "--num_processes", "2")], ids=["torchrun", "accelerate"])
def test_two_processes_write_what_one_does(uninterrupted, tmp_path, launcher):
    finished(worker(tmp_path / "f", launcher=launcher))
    assert contents(tmp_path / "f") == contents(uninterrupted)


@pytest.mark.parametrize("what", [[], ["--also-tokenizer"]])
def test_a_full_disk_loses_nothing_and_leaves_no_litter(uninterrupted, tmp_path, what):
    done = subprocess.run([sys.executable, str(WORKER), str(tmp_path / "f"), "--file-size", "20000", *what],
                          capture_output=True, text=True, timeout=200,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    assert "DataError" in done.stderr
    assert "could not be written" in done.stderr
    assert not list((tmp_path / "f").rglob("*.tmp"))
    assert not (tmp_path / "f" / ".tokenizer").exists()
    finished(worker(tmp_path / "f"))
    assert contents(tmp_path / "f") == contents(uninterrupted)
