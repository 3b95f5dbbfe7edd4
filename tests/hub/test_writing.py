"""Saving and publishing: whole or not at all, read back the same, and nothing goes up that we did not write."""

import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import sae_hooks.hub.safe_files as safe_files
from sae_hooks.errors import SaeDownloadError, SaeFormatError, SaeNotFoundError
from sae_hooks.hub import find_saes, load_sae, push_to_hub, save_pretrained
from sae_hooks.hub.safe_files import write_atomically
from sae_hooks.sae import SAE

ROOT = Path(__file__).parents[2]
SITE = "model.layers.1.output"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's LFS upload


def equal(one, other):
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return set(mine) == set(theirs) and all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype
                                            for n in mine)


def topk(random_sae, k=3):
    sae = random_sae(8, 16, SITE)
    return SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k=k, site=SITE)


def transcoder(random_sae):
    sae = random_sae(8, 16, SITE)
    return SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, threshold=sae.threshold, W_skip=torch.randn(8, 8),
               site="model.layers.1.mlp.input", site_out="model.layers.1.mlp.output")


MAKERS = {"jumprelu": lambda r: r(8, 16, SITE), "bfloat16": lambda r: r(8, 16, SITE).to(torch.bfloat16),
          "float64": lambda r: r(8, 16, SITE).double(), "topk": topk,
          "k of numpy": lambda r: topk(r, np.int64(3)), "transcoder": transcoder}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_saved_is_loaded_bit_for_bit(kind, tmp_path, random_sae):
    sae = MAKERS[kind](random_sae)
    sae.metadata |= {"typical_norm": 3.5, "l0": 12.0, "tokens": [1, 2], "note": "é"}
    again = load_sae(sae.save_pretrained(tmp_path / "made" / "for it"))
    assert equal(sae, again)
    assert (again.site, again.site_out, again.k, again.metadata) == (sae.site, sae.site_out, sae.k, sae.metadata)
    x = torch.randn(5, 8, dtype=torch.float32)
    assert torch.equal(sae.encode(x), again.encode(x))


@pytest.mark.parametrize("gate", ["threshold", "k"])
def test_tensors_that_share_memory_are_saved_as_they_are(gate, tmp_path):
    zeros = torch.zeros(24)
    whole = {"threshold": zeros[:8]} if gate == "threshold" else {"k": 3}
    for b_enc, b_dec in ((zeros[:8], zeros[:8]), (zeros[8:16], zeros[16:])):
        sae = SAE(torch.randn(8, 8), b_enc, torch.randn(8, 8), b_dec, **whole, site=SITE)
        assert equal(sae, load_sae(sae.save_pretrained(tmp_path)))


def test_many_saes_are_one_folder_a_site(tmp_path, random_sae):
    saes = {site: random_sae(8, 16, site, seed=n) for n, site in enumerate([
        "model.layers.0.output", "model.layers.1.self_attn.o_proj.input"])}
    save_pretrained(saes, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(saes)
    loaded = {file.entry.site: file.load() for file in find_saes(tmp_path)}
    assert set(loaded) == set(saes)
    assert all(equal(saes[site], loaded[site]) for site in saes)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "a..b", "/abs", "a b"])
def test_a_site_that_is_no_module_path_never_becomes_a_folder(name, tmp_path, random_sae):
    with pytest.raises(SaeFormatError, match="is not a site"):
        save_pretrained({name: random_sae(8, 16, SITE)}, tmp_path / "inside")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("kind", ["jumprelu", "transcoder"])
def test_a_mapping_writes_each_sae_as_the_one_of_the_site_it_is_under(kind, tmp_path, random_sae):
    sae, site = MAKERS[kind](random_sae), "model.language_model.layers.2.output"
    before = (sae.site, sae.site_out)
    save_pretrained({site: sae}, tmp_path)
    again = load_sae(tmp_path, layer=2)
    assert equal(sae, again)
    assert (again.site, again.site_out) == (site, site if kind == "jumprelu" else "model.layers.1.mlp.output")
    assert (sae.site, sae.site_out) == before


@pytest.mark.parametrize("site", ["0.output", "net.blocks-1.output", "layer1.0.fc__a.input",
                                  "model.layers.2._fsdp_wrapped_module.output"])
def test_a_site_of_any_module_is_read_back(site, tmp_path, random_sae):
    assert load_sae(save_pretrained(random_sae(8, 16, site), tmp_path / "one")).site == site
    save_pretrained({site: random_sae(8, 16, SITE)}, tmp_path / "many")
    assert load_sae(tmp_path / "many").site == site


FLAWS = {
    "infinite": ({"threshold": torch.full((16,), float("inf"))}, {}, SITE, "threshold has 16 NaN or infinite values"),
    "overflown": ({"W_enc": torch.full((8, 16), 1e6).half()}, {}, SITE, "W_enc has 128 NaN or infinite values"),
    "8 bits": ({"W_dec": torch.zeros(16, 8, dtype=torch.float8_e4m3fn)}, {}, SITE, "W_dec is float8_e4m3fn"),
    "no side": ({}, {}, "model.layers.2", "'model.layers.2' is not a site"),
    "dunder": ({}, {}, "model.__class__.output", "'model.__class__.output' is not a site"),
    "a label a feature": ({}, {"labels": ["a rather long description"] * 2**16}, SITE, "read up to 1048576"),
    "2^80": ({}, {"seed": 2**80}, SITE, "a whole number of 25 digits"),
    "12 twice": ({}, {12: "a", "12": "b"}, SITE, "the key '12' twice"),
    "l0 as text": ({}, {"l0": "12"}, SITE, "could not be read back: l0 must be a number"),
    "one head": ({}, {"hook_head_index": 0}, SITE, "could not be read back: hook_head_index is 0"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_would_not_be_read_back_is_refused_before_anything_is_written(flaw, tmp_path, random_sae):
    tensors, metadata, site, tells = FLAWS[flaw]
    good = random_sae(8, 16, SITE)
    sae = SAE(**{**dict(good.named_parameters()), **tensors}, site=site, metadata=metadata)
    for what in (sae, {"model.layers.0.output": good, "kept-apart": sae}):
        with pytest.raises(SaeFormatError, match=re.escape(tells)):
            save_pretrained(what, tmp_path / "made")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.zeros(2), object()], ids=["nan", "set", "tensor", "any"])
def test_metadata_that_is_no_json_is_refused_before_anything_is_written(value, tmp_path, random_sae):
    sae = random_sae(8, 16, SITE)
    save_pretrained(sae, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sae.metadata["odd"] = value
    with pytest.raises(SaeFormatError, match="metadata must be plain JSON"):
        save_pretrained(sae, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_of_the_files_is_what_umask_says(umask, tmp_path, random_sae):
    old = os.umask(umask)
    try:
        save_pretrained(random_sae(8, 16, SITE), tmp_path)
    finally:
        os.umask(old)
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_the_header_says_pt_as_other_readers_expect(tmp_path, random_sae):
    save_pretrained(random_sae(8, 16, SITE), tmp_path)
    with safe_open(tmp_path / "sae_weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


@pytest.mark.parametrize("step", ["_write_through", "os.replace"])
@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_44_a_write_that_fails_leaves_the_old_or_the_new_and_no_litter(step, nth, error, tmp_path, monkeypatch):
    names = [tmp_path / "weights", tmp_path / "manifest"]
    write_atomically(dict.fromkeys(names, b"old"))
    owner, attribute = (os, "replace") if step == "os.replace" else (safe_files, step)
    real, calls = getattr(owner, attribute), []

    def failing(*args):
        calls.append(args)
        if len(calls) - 1 == nth:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, failing)
        with pytest.raises(type(error)):
            write_atomically(dict.fromkeys(names, b"new"))
    expected = b"new" if (step, nth) == ("os.replace", 1) else b"old"  # the manifest is renamed last
    assert (names[0].read_bytes(), names[1].read_bytes()) == (expected, b"old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest", "weights"]


def test_44_the_contents_are_on_the_disk_before_the_names_change(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda handle, real=os.fsync: (events.append(
        "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"), real(handle)))
    monkeypatch.setattr(os, "replace", lambda *a, real=os.replace: (events.append(Path(a[1]).name), real(*a)))
    write_atomically({tmp_path / "weights": b"1", tmp_path / "manifest": b"2"})
    assert events == ["file", "file", "weights", "manifest", "folder"]


KILLED = """
import os, signal, sys, types
from pathlib import Path
for name in ("sae_hooks", "sae_hooks.hub"):  # without torch: a tenth of the time
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
from sae_hooks.hub import safe_files
if sys.argv[2] == "between":
    def once(a, b, real=os.replace):
        real(a, b)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = once
else:
    os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
safe_files.write_atomically({Path(sys.argv[1]) / n: b"new" for n in ("weights", "manifest")})
"""


@pytest.mark.parametrize(("moment", "weights"), [("before", b"old"), ("between", b"new")])
def test_44_what_a_killed_process_leaves_is_whole_and_cleared_by_the_next_write(moment, weights, tmp_path):
    names = [tmp_path / "weights", tmp_path / "manifest"]
    write_atomically(dict.fromkeys(names, b"old"))
    other = tmp_path / f".weights.{os.getppid()}.abcd.tmp"  # of a process that lives
    other.write_bytes(b"being written")
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], cwd=ROOT, timeout=120)
    assert run.returncode == -9
    assert names[0].read_bytes() == weights
    assert names[1].read_bytes() == b"old"
    assert len(list(tmp_path.glob(".*.tmp"))) > 1
    write_atomically(dict.fromkeys(names, b"newest"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "manifest", "weights"]


def test_44_in_a_container_the_killed_process_had_our_number(tmp_path, monkeypatch):
    litter = tmp_path / f".weights.{os.getpid()}.abcd.tmp"
    litter.write_bytes(b"half")
    seen = []

    def replace(a, b, real=os.replace):
        write_atomically({Path(b): b"another thread's"})
        seen.append(Path(a).exists())
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b, real=os.replace: (patch.undo(), replace(a, b, real)))
        write_atomically({tmp_path / "weights": b"new"})
    assert seen == [True], "a file that is being written is no litter"
    assert (tmp_path / "weights").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_saving_over_a_file_that_is_in_use_does_not_change_what_is_loaded(tmp_path, random_sae):
    first, second = (random_sae(8, 16, SITE, seed=n) for n in (1, 2))
    loaded = load_sae(save_pretrained(first, tmp_path))
    save_pretrained(second, tmp_path)
    assert equal(loaded, first)
    assert equal(load_sae(tmp_path), second)


def test_what_is_loaded_in_inference_mode_takes_part_in_gradients_later(tmp_path, random_sae):
    folder = save_pretrained(random_sae(8, 16, SITE), tmp_path)
    with torch.inference_mode():
        sae = load_sae(folder, dtype=torch.float64)
        assert torch.is_inference_mode_enabled()
    x = torch.randn(3, 8, requires_grad=True)
    sae.requires_grad_(True)(x).sum().backward()
    assert x.grad is not None
    assert sae.W_dec.grad is not None


# --- push -------------------------------------------------------------------------------

NUMBERS = itertools.count(1000)


@pytest.fixture
def new_sae(random_sae):
    """new_sae(): weights that the Hub has never seen, so that they must be uploaded."""
    return lambda: random_sae(8, 16, SITE, seed=next(NUMBERS))


@pytest.mark.parametrize("place", ["../x", "a/../b", "a//b", "."])
def test_a_place_that_is_no_folder_of_a_repository_is_refused(place, random_sae, hub):
    with pytest.raises(SaeFormatError, match="no folder of a repository"):
        push_to_hub(random_sae(8, 16, SITE), "alice/nowhere", path_in_repo=place, token="hf_alice")
    assert ("model", "alice/nowhere") not in hub.repos


def commits(hub, repo_id):
    return len(hub.repos["model", repo_id].heads["main"])


def test_43_a_push_makes_the_repository_and_one_commit_with_a_card(hub, random_sae, cache):
    sae = random_sae(8, 16, SITE)
    address = push_to_hub(sae, "alice/first", token="hf_alice")
    repo = hub.repos["model", "alice/first"]
    assert "alice/first" in address
    assert sorted(repo.files()) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    card = repo.files()["README.md"].data.decode()
    assert "library_name: sae_hooks" in card
    assert "- sparse-autoencoder" in card
    assert 'attach_saes(model, "alice/first")' in card
    assert len(hub.seen("POST .*/commit/")) == 1
    again = load_sae("alice/first", cache_dir=cache)
    assert equal(sae, again)
    assert again.metadata["source"].startswith("alice/first@")


def test_43_a_push_into_a_folder_keeps_the_card_and_everything_else(hub, random_sae, cache):
    push_to_hub(random_sae(8, 16, SITE), "alice/second", token="hf_alice")
    repo = hub.repos["model", "alice/second"]
    (repo.dir / "README.md").write_text("mine")
    (repo.dir / "other.txt").write_text("mine, too")
    sites = ["model.layers.2.output", "model.layers.3.output"]
    saes = {site: random_sae(8, 16, site) for site in sites}
    push_to_hub(saes, "alice/second", path_in_repo="more/", token="hf_alice")
    assert sorted(repo.files()) == ["README.md", "cfg.json", *(
        f"more/{site}/{name}" for site in sites for name in ("cfg.json", "sae_weights.safetensors")),
        "other.txt", "sae_weights.safetensors"]
    assert repo.files()["README.md"].data == b"mine"
    assert len(find_saes("alice/second", cache_dir=cache)) == 3


def test_43_only_what_we_wrote_goes_up(hub, random_sae, tmp_path, monkeypatch):
    for name in (".env", "id_rsa"):
        (tmp_path / name).write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "id_rsa")
    monkeypatch.chdir(tmp_path)
    save_pretrained(random_sae(8, 16, SITE), tmp_path).joinpath("notes").write_text("x")
    push_to_hub(load_sae(tmp_path), "alice/third", token="hf_alice")
    assert sorted(hub.repos["model", "alice/third"].files()) == ["README.md", "cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize(("request_", "fault"), [
    ("POST .*/commit/", {"status": 503}), ("POST .*/commit/", {"cut": -1}), ("POST .*/commit/", {"status": 412}),
    ("PUT /_lfs", {"status": 500}), ("PUT /_lfs", {"cut": -1}), ("POST .*/preupload", {"status": 503}),
    ("POST .*repos/create", {"status": 503}), ("POST .*repos/create", {"cut": -1}),
    ("HEAD .*README.md", {"status": 503}),
], ids=["commit 503", "commit answer lost", "commit 412", "upload 500", "upload dropped", "preupload 503", "create 503",
        "create answer lost", "card asked 503"])
def test_43_a_fault_that_passes_ends_in_exactly_one_commit(request_, fault, hub, new_sae, naps):
    name = f"alice/passing-{next(NUMBERS)}"
    befell = hub.fail(request_, **fault)
    push_to_hub(new_sae(), name, token="hf_alice")
    assert befell.times == 0
    assert sorted(hub.repos["model", name].files()) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    assert commits(hub, name) == 2  # the empty first one, and ours


@pytest.mark.parametrize(("request_", "fault"), [
    ("POST .*/commit/", {"status": 503}), ("PUT /_lfs", {"status": 500}), ("POST .*/commit/", {"status": 403})],
    ids=["commit 503", "upload 500", "no right"])
def test_43_a_fault_that_stays_changes_nothing_on_the_branch(request_, fault, hub, new_sae, naps):
    name = f"alice/staying-{next(NUMBERS)}"
    push_to_hub(new_sae(), name, token="hf_alice")
    repo = hub.repos["model", name]
    before, files = commits(hub, name), {n: f.sha256 for n, f in repo.files().items()}
    hub.fail(request_, times=-1, **fault)
    with pytest.raises(SaeDownloadError, match=f"pushing to {name}: the Hub (could not be reached|refused)") as caught:
        push_to_hub(new_sae(), name, token="hf_alice")
    assert caught.value.__cause__ is not None
    assert commits(hub, name) == before
    assert {n: f.sha256 for n, f in repo.files().items()} == files


def test_43_the_same_push_again_makes_no_commit(hub, random_sae):
    sae = random_sae(8, 16, SITE)
    push_to_hub(sae, "alice/again", token="hf_alice")
    before = commits(hub, "alice/again")
    push_to_hub(sae, "alice/again", token="hf_alice")
    assert commits(hub, "alice/again") == before


def test_43_without_a_token_the_push_is_refused_and_nothing_is_made(hub, random_sae):
    with pytest.raises((SaeDownloadError, SaeNotFoundError), match="pushing to alice/none"):
        push_to_hub(random_sae(8, 16, SITE), "alice/none")
    assert ("model", "alice/none") not in hub.repos


def test_what_a_config_file_holds_is_readable_json(tmp_path, random_sae):
    config = json.loads((save_pretrained(random_sae(8, 16, SITE), tmp_path) / "cfg.json").read_text())
    assert config["metadata"]["hf_hook_name"] == SITE
