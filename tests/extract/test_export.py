"""export_features: the store is the extraction, goes on where it was cut off, and is refused to anything else."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from extract.exports import ROWS, SITE, WORKER, contents, finished, refused, worker
from safetensors import safe_open
from safetensors.torch import save_file

from sae_hooks.errors import DataError, SaeFormatError
from sae_hooks.extract import extract_features
from sae_hooks.store import open_features


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


def test_a_folder_of_something_else_is_left_alone(export, tmp_path):
    (tmp_path / "thesis.tex").write_text("\\begin{document}")
    refused(export, tmp_path, "is not empty")


def test_what_cannot_be_read_or_cut_claims_no_folder(export, tmp_path):
    for wrong, told in (({"documents": tmp_path / "no.txt"}, "there is no file"), ({"field": "body"}, "expected .body"),
                        ({"overlap": 32}, "leave no room")):
        with pytest.raises(DataError, match=told):
            export(tmp_path / "f", **wrong)
        assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(("name", "least"), [("tokens_per_shard", 1), ("tokens_per_batch", 1), ("window", 1),
                                             ("overlap", 0), ("limit", 0)])
def test_what_is_no_number_of_tokens_or_documents_claims_no_folder(export, tmp_path, name, least):
    for wrong in (least - 1, True, 8.0, "8"):
        with pytest.raises(DataError, match=f"{name} must be a whole number, {least} or more; got {wrong!r}"):
            export(tmp_path / "f", **{name: wrong})
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
