"""Finding and loading from the Hub (on loopback, with the real client) and from folders."""

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from hub.files import arrays, write_npz

from sae_hooks.errors import (
    SaeDownloadError,
    SaeFormatError,
    SaeMismatchError,
    SaeNotFoundError,
    SaeWarning,
    UnsafeFileError,
)
from sae_hooks.hub import find_saes, list_saes, load_sae, save_pretrained

ROOT = Path(__file__).parents[2]


def head(repo):
    repo.sync()
    return repo.heads["main"][-1]


def same(sae, found):
    """Whether an SAE has exactly these arrays."""
    return all(torch.equal(getattr(sae, name), torch.from_numpy(array)) for name, array in found.items())


# --- finding --------------------------------------------------------------------------------------

def test_all_layers_are_found_at_once_and_no_weights_are_read(hub, repo, cache):
    made = repo()
    for layer in range(26):
        for l0 in (22, 82, 176):
            write_npz(made.dir / f"layer_{layer}/width_4k/average_l0_{l0}/params.npz", d_sae=4096)
    write_npz(made.dir / "embedding/width_4k/average_l0_21/params.npz", d_sae=4096)
    head(made)  # the loopback Hub hashes what is new; that is not the client's time
    began = process_time()
    found = find_saes(made.id, cache_dir=cache)
    took = process_time() - began
    assert took < 2
    assert [file.entry.layer for file in found] == list(range(26))
    assert {file.entry.l0 for file in found} == {82.0}
    assert {file.entry.d_in for file in found} == {4}  # proved by the size of a file that was not downloaded
    assert found[3].where == f"{made.id}@{head(made)}/layer_3/width_4k/average_l0_82/params.npz"
    assert not hub.seen("params.npz|_cdn")


@pytest.mark.parametrize(("asked", "path"), [
    ({"layer": 1}, "layer_1/width_4k/average_l0_82"),
    ({"layer": 1, "l0": 30}, "layer_1/width_4k/average_l0_22"),
    ({"layer": 1, "l0": "canonical", "width": "4k"}, "layer_1/width_4k/average_l0_82"),
    ({"site": "model.layers.0.output", "l0": 500}, "layer_0/width_4k/average_l0_176"),
])
def test_load_sae_takes_the_one_that_is_meant_and_downloads_nothing_else(asked, path, hub, gemma_repo, cache):
    sae = load_sae(gemma_repo.id, cache_dir=cache, **asked)
    with np.load(gemma_repo.dir / path / "params.npz") as archive:
        assert same(sae, archive)
    assert sae.metadata["source"] == f"{gemma_repo.id}@{head(gemma_repo)}/{path}/params.npz"
    asked_for = {line.split("/resolve/")[1].split("/", 1)[1] for line, _ in hub.seen("/resolve/")}
    assert asked_for == {f"{path}/params.npz", "README.md"}


def test_several_fitting_sites_are_a_mismatch_that_lists_them(gemma_repo, cache):
    with pytest.raises(SaeMismatchError, match=r"(?s)has 2 SAEs that fit; give layer=.*layers\.0\..*layers\.1\."):
        load_sae(gemma_repo.id, cache_dir=cache)


def test_what_a_repository_does_not_have_is_listed_against_what_it_has(gemma_repo, cache):
    with pytest.raises(SaeNotFoundError, match=r"for layer=7\. It offers:\n  resid_post: layers 0-1; widths 4096"):
        find_saes(gemma_repo.id, layer=7, cache_dir=cache)


def test_a_folder_inside_a_repository_can_be_named(gemma_repo, cache):
    [found] = find_saes(f"{gemma_repo.id}/layer_1/width_4k/average_l0_176", cache_dir=cache)
    assert (found.entry.layer, found.entry.l0) == (1, 176.0)
    assert found.load().d_sae == 4096


def test_the_table_shows_everything_that_is_offered(gemma_repo, cache):
    table = list_saes(gemma_repo.id, cache_dir=cache)
    assert len(table) == 6
    assert Counter(entry.layer for entry in table) == {0: 3, 1: 3}
    lines = str(table).splitlines()
    assert lines[0].split() == ["site", "layer", "width", "l0", "path"]
    assert lines[1].split()[:4] == ["model.layers.0.output", "0", "4096", "176"]


def test_a_repository_of_many_pages_is_listed_whole(hub, repo, cache, monkeypatch):
    made = repo()
    for layer in range(30):
        write_npz(made.dir / f"layer_{layer}/width_32/average_l0_5/params.npz")
        (made.dir / f"layer_{layer}/notes.txt").write_text("x")
    monkeypatch.setattr(hub, "page_size", 7)
    assert len(find_saes(made.id, cache_dir=cache)) == 30
    assert len(hub.seen("/tree/")) > 10
    assert not hub.seen("notes.txt")


def test_examples_of_gemma_scope_2_are_never_asked_for(hub, repo, cache, random_sae):
    made = repo("gemma-scope-2-1b-pt")
    folder = made.dir / "resid_post/layer_7_width_32_l0_big"
    tensors = {{"W_enc": "w_enc", "W_dec": "w_dec"}.get(k, k): torch.from_numpy(v) for k, v in arrays().items()}
    write_safetensors(folder / "params.safetensors", tensors)
    write_safetensors(folder / "examples.safetensors", {"tokens": torch.zeros(10)})
    (folder / "config.json").write_text(
        '{"hf_hook_point_in": "model.layers.7.output", "architecture": "jump_relu", "l0": 131.5}')
    sae = load_sae(made.id, layer=7, cache_dir=cache)
    assert same(sae, arrays())
    assert sae.metadata["l0"] == 131.5
    assert not hub.seen("examples")


def write_safetensors(path, tensors):
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def test_saes_of_our_own_are_found_by_their_small_configs(hub, repo, cache, random_sae):
    made = repo("mine")
    sites = [f"model.layers.{n}.output" for n in (0, 3)] + ["model.layers.3.mlp.output"]
    save_pretrained({site: random_sae(8, 16, site) for site in sites}, made.dir)
    found = find_saes(made.id, cache_dir=cache)
    assert [(f.entry.site, f.entry.d_in, f.entry.width) for f in found] == [
        (sites[0], 8, 16), (sites[2], 8, 16), (sites[1], 8, 16)]
    assert not hub.seen("sae_weights")
    [one] = find_saes(made.id, site="mlp_out", cache_dir=cache)
    assert one.entry.layer == 3


def test_a_site_nobody_tells_must_be_given_and_then_is_used(repo, cache):
    made = repo("anything")
    write_npz(made.dir / "layer_3/width_32/average_l0_5/params.npz")
    with pytest.raises(SaeFormatError, match=r"neither its name nor a config tells which site .*give site="):
        find_saes(made.id, cache_dir=cache)
    assert load_sae(made.id, site="model.layers.3.mlp.output", cache_dir=cache).site == "model.layers.3.mlp.output"


def test_a_repository_without_saes_says_what_it_looked_for(repo, cache):
    made = repo("empty")
    (made.dir / "model.gguf").write_bytes(b"x")
    with pytest.raises(SaeNotFoundError, match=r"found model.gguf\. Looked for, .*\n  params.npz \(Gemma Scope\)"):
        find_saes(made.id, cache_dir=cache)


# --- one commit, and no request that the cache can answer ---------------------------------------------

def test_40_a_branch_that_moves_between_config_and_weights_is_not_followed(repo, cache, random_sae):
    made = repo("moving")
    first, second = (random_sae(8, 16, "model.layers.1.output", seed=seed) for seed in (1, 2))
    save_pretrained(first, made.dir)
    pinned = head(made)
    [found] = find_saes(made.id, cache_dir=cache)  # reads cfg.json
    save_pretrained(second, made.dir)
    assert head(made) != pinned
    sae = found.load()
    assert torch.equal(sae.W_enc, first.W_enc)
    assert pinned in found.where
    assert torch.equal(load_sae(made.id, cache_dir=cache).W_enc, second.W_enc)


def test_a_tag_and_a_commit_are_revisions(repo, cache, random_sae):
    made = repo("tagged")
    first, second = (random_sae(8, 16, "model.layers.1.output", seed=seed) for seed in (1, 2))
    save_pretrained(first, made.dir)
    made.tags["v1"] = old = head(made)
    save_pretrained(second, made.dir)
    head(made)
    for revision in ("v1", old):
        assert torch.equal(load_sae(made.id, revision=revision, cache_dir=cache).W_enc, first.W_enc)


def test_nothing_is_asked_when_a_commit_is_cached(hub, gemma_repo, cache):
    commit = head(gemma_repo)
    load_sae(gemma_repo.id, layer=1, revision=commit, cache_dir=cache)
    hub.requests.clear()
    assert load_sae(gemma_repo.id, layer=1, revision=commit, cache_dir=cache).d_in == 4
    assert hub.requests == []


def test_a_cached_branch_costs_one_request(hub, gemma_repo, cache):
    load_sae(gemma_repo.id, layer=1, cache_dir=cache)
    hub.requests.clear()
    load_sae(gemma_repo.id, layer=1, cache_dir=cache)
    assert [line for line, _ in hub.requests] == [f"GET /api/models/{gemma_repo.id}"]


OFFLINE = """
import sys
from sae_hooks.hub import find_saes, load_sae
from sae_hooks.errors import SaeDownloadError
repo, cache = sys.argv[1:]
assert load_sae(repo, layer=1, cache_dir=cache).d_sae == 4096
assert len(find_saes(repo, cache_dir=cache)) == 2
for call in (lambda: load_sae(repo, layer=0, cache_dir=cache), lambda: find_saes("org/never-seen", cache_dir=cache)):
    try:
        call()
    except SaeDownloadError as error:
        assert "HF_HUB_OFFLINE" in str(error), error
        assert error.__cause__ is not None
    else:
        raise SystemExit("no error")
"""


def test_offline_the_cache_is_enough_and_what_is_not_in_it_says_so(hub, gemma_repo, cache):
    load_sae(gemma_repo.id, layer=1, cache_dir=cache)
    hub.requests.clear()
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", OFFLINE, gemma_repo.id, str(cache)], cwd=ROOT,
                         env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert hub.requests == []


def test_a_snapshot_without_a_cached_listing_is_enough_when_the_hub_is_down(hub, gemma_repo, cache, naps):
    load_sae(gemma_repo.id, layer=1, cache_dir=cache)
    shutil.rmtree(next(cache.glob("models--*")) / "trees")
    forget_listings()
    hub.fail(".", times=-1, status=503)
    with pytest.warns(SaeWarning, match="the Hub gives no listing; choosing among the 2 files that are cached"):
        assert load_sae(gemma_repo.id, layer=1, cache_dir=cache).d_sae == 4096


@pytest.mark.parametrize("readme", [True, False], ids=["README cached", "nothing cached"])
def test_41_a_cache_that_takes_no_listing_is_no_hindrance(readme, hub, gemma_repo, cache):
    forget_listings()
    if readme:
        find_saes(gemma_repo.id, cache_dir=cache)
        shutil.rmtree(next(cache.glob("models--*")) / "trees")
        forget_listings()
    folder = cache / f"models--{gemma_repo.id.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trees").write_text("not a folder")  # root may write anywhere: this is what stops it
    assert len(find_saes(gemma_repo.id, cache_dir=cache)) == 2


def test_what_configs_tell_is_listed_when_nothing_matches(repo, cache, random_sae):
    made = repo("mine")
    save_pretrained(random_sae(8, 16, "model.layers.3.output"), made.dir / "some-name")
    with pytest.raises(SaeNotFoundError, match=r"(?s)nothing for layer=9.*resid_post: layers 3; widths 16"):
        find_saes(made.id, layer=9, cache_dir=cache)


@pytest.mark.parametrize("name", ["gemma-sae.output", "2.input", "my_sae.output"])
def test_a_folder_whose_name_only_ends_as_a_site_does_tells_none(tmp_path, random_sae, name):
    save_pretrained(random_sae(8, 16, "model.layers.3.output"), tmp_path / name)
    assert load_sae(tmp_path).site == "model.layers.3.output"


def forget_listings():
    import huggingface_hub._tree_cache as tree_cache

    tree_cache._IN_MEMORY_TREE_CACHE.clear()


def test_two_at_once_make_one_download(hub, gemma_repo, cache):
    [found] = find_saes(gemma_repo.id, layer=1, cache_dir=cache)
    hub.fail("^GET /_cdn", times=-1, delay=0.3)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(found.load())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loaded) == 2
    assert torch.equal(loaded[0].W_enc, loaded[1].W_enc)
    assert len(hub.seen("^GET /_cdn")) == 1


def test_a_snapshot_folder_of_the_cache_is_a_source_and_its_links_are_followed(gemma_repo, cache):
    load_sae(gemma_repo.id, layer=1, cache_dir=cache)
    [snapshot] = cache.glob("models--*/snapshots/*")
    weights = snapshot / "layer_1/width_4k/average_l0_82/params.npz"
    assert weights.is_symlink()
    for source in (snapshot, weights):
        assert load_sae(source).site == "model.layers.1.output"


# --- what is not there, or not for us -------------------------------------------------

def test_38_missing_repositories_revisions_and_files_are_not_found(hub, gemma_repo, cache):
    for source, more, tells in [
            ("org/nothing", {}, "org/nothing: no such repository on the Hub, .*; and there is no local path of that"),
            (gemma_repo.id, {"revision": "v9"}, f"{gemma_repo.id}@v9: .* has no such revision"),
            (gemma_repo.id, {"revision": "0" * 40}, "no such revision"),
            (f"{gemma_repo.id}/layer_9", {}, "no SAE here.*found no files"),
            ("https://hf.co/a/b", {}, "is an address; give "), ("no name!", {}, "neither a local path nor the name")]:
        with pytest.raises(SaeNotFoundError, match=tells):
            find_saes(source, cache_dir=cache, **more)


def test_38_a_file_that_is_deleted_later_is_still_there_at_the_commit(hub, gemma_repo, cache):
    [found] = find_saes(gemma_repo.id, layer=1, cache_dir=cache)
    shutil.rmtree(gemma_repo.dir / "layer_1")
    head(gemma_repo)
    assert found.load().d_sae == 4096
    with pytest.raises(SaeNotFoundError, match="layer=1"):
        find_saes(gemma_repo.id, layer=1, cache_dir=cache)


def test_38_a_gated_repository_says_where_to_ask(repo, cache):
    made = repo(gated=True, allowed=["alice"])
    write_npz(made.dir / "layer_1/width_4k/average_l0_82/params.npz", d_sae=4096)
    (made.dir / "README.md").write_text("# x")
    for token in (None, "hf_bob"):
        with pytest.raises(SaeDownloadError, match=f"gated: ask for it on the page of {made.id}.*hf auth login") as e:
            find_saes(made.id, token=token, cache_dir=cache / str(token))  # told at once, not at a site's first use
        assert type(e.value.__cause__).__name__ == "GatedRepoError"
    assert load_sae(made.id, token="hf_alice", cache_dir=cache).d_sae == 4096


def test_38_a_private_repository_looks_missing_until_a_token_is_given(repo, cache):
    made = repo(private=True)
    write_npz(made.dir / "layer_1/width_4k/average_l0_82/params.npz", d_sae=4096)
    with pytest.raises(SaeNotFoundError, match="or a private one: check the name, or run `hf auth login`, or pass"):
        find_saes(made.id, cache_dir=cache)
    assert load_sae(made.id, token="hf_alice", cache_dir=cache).d_sae == 4096


def test_38_a_disabled_repository_and_a_bad_token_are_refused_access(repo, gemma_repo, cache):
    disabled = repo(disabled=True)
    for source, more in ((disabled.id, {}), (gemma_repo.id, {"token": "hf_wrong"})):
        with pytest.raises((SaeDownloadError, SaeNotFoundError), match=r"refused access|or pass token=") as caught:
            find_saes(source, cache_dir=cache, **more)
        assert caught.value.__cause__ is not None


def test_38_an_absent_config_and_a_dead_hub_are_told_apart(hub, repo, cache, naps):
    made = repo("gemma-scope-2-1b-pt")
    folder = made.dir / "resid_post/layer_7_width_32_l0_big"
    write_safetensors(folder / "params.safetensors", {
        {"W_enc": "w_enc", "W_dec": "w_dec"}.get(k, k): torch.from_numpy(v) for k, v in arrays().items()})
    assert load_sae(made.id, cache_dir=cache).site == "model.layers.7.output"  # no config.json: told by its folder
    (folder / "config.json").write_text('{"architecture": "jump_relu", "l0": 131.5}')
    hub.fail("config.json", times=-1, status=503)
    with pytest.raises(SaeDownloadError, match=r"config\.json: the Hub could not be reached"):
        load_sae(made.id, cache_dir=cache)


def test_42_hostile_paths_in_a_listing_are_refused_before_anything_is_asked_for(hub, repo, cache, tmp_path):
    for path in ("../x/params.npz", "/abs/params.npz", "a\\..\\params.npz"):
        made = repo()
        made.sync()
        made.sync = lambda: None
        from fake_hub.store import File

        made.commit("main", {path: File(path, b"x"), "README.md": File("README.md", b"x")})
        with pytest.raises(UnsafeFileError, match="a path that leads out of the repository"):
            find_saes(made.id, cache_dir=cache)
    assert not hub.seen("resolve/.*params.npz")
    assert not list(tmp_path.rglob("params.npz"))


# --- local ------------------------------------------------------------------------------------------

def test_a_local_copy_of_a_repository_is_found_like_the_repository(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-mlp"
    for layer in (0, 4):
        write_npz(root / f"layer_{layer}/width_4k/average_l0_82/params.npz", d_sae=4096)
    for source in (root, str(root)):
        found = find_saes(source)
        assert [f.entry.site for f in found] == [
            f"model.layers.{n}.post_feedforward_layernorm.output" for n in (0, 4)]
        assert {f.entry.d_in for f in found} == {4}
    file = root / "layer_4/width_4k/average_l0_82/params.npz"
    assert find_saes(file)[0].entry.layer == 4
    assert find_saes(file)[0].where == str(file)


def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(hub, tmp_path):
    for source in (tmp_path / "org/name", str(tmp_path / "org/name"), "./org/name", "~/org/name-that-is-not-there"):
        with pytest.raises(SaeNotFoundError, match="does not exist"):
            find_saes(source)
    assert hub.requests == []


def test_a_local_header_proves_d_in_and_width(tmp_path, random_sae):
    path = write_npz(tmp_path / "params.npz", d_in=6, d_sae=10)
    [found] = find_saes(path, site="model.layers.1.output")
    assert (found.entry.d_in, found.entry.width) == (6, 10)


def test_device_and_dtype_are_given_at_load_and_what_decides_stays_float32(gemma_repo, cache):
    sae = load_sae(gemma_repo.id, layer=1, dtype=torch.bfloat16, cache_dir=cache)
    assert sae.W_enc.dtype == sae.W_dec.dtype == torch.bfloat16
    assert sae.threshold.dtype == sae.b_enc.dtype == torch.float32
    assert load_sae(gemma_repo.id, layer=1, device="meta", cache_dir=cache).device.type == "meta"
