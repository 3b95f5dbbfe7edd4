"""Faults on the way from the Hub: retried, told, and never a damaged file in use."""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sae_hooks.errors import SaeDownloadError
from sae_hooks.hub import find_saes, load_sae

WEIGHTS = "layer_1/width_4k/average_l0_82/params.npz"
FAULTS = {"503": {"status": 503}, "500": {"status": 500}, "429": {"status": 429}, "cut": {"cut": 1000},
          "reset": {"cut": 1000, "rst": True}, "dropped": {"cut": -1}}


def right(sae, repo):
    with np.load(repo.dir / WEIGHTS) as archive:
        return torch.equal(sae.W_enc, torch.from_numpy(archive["W_enc"]))


@pytest.fixture
def found(gemma_repo, cache):
    [file] = find_saes(gemma_repo.id, layer=1, cache_dir=cache)
    return file


@pytest.mark.parametrize("fault", FAULTS)
def test_39_a_fault_that_passes_is_outlived(fault, hub, found, gemma_repo, naps):
    hub.fail("^GET /_cdn", times=2, **FAULTS[fault])
    assert right(found.load(), gemma_repo)


@pytest.mark.parametrize("fault", FAULTS)
def test_39_a_fault_that_stays_is_told_and_the_cache_is_left_usable(fault, hub, found, gemma_repo, cache, naps):
    hub.fail("^GET /_cdn", times=-1, **FAULTS[fault])
    with pytest.raises(SaeDownloadError, match="the Hub could not be reached or broke off") as caught:
        found.load()
    assert found.where in str(caught.value)
    assert caught.value.__cause__ is not None
    assert sum(naps) < 30
    assert not list(cache.rglob("*.incomplete"))
    hub.faults.clear()
    assert right(found.load(), gemma_repo)


@pytest.mark.parametrize("fault", FAULTS)
def test_39_with_everything_cached_no_fault_is_noticed(fault, hub, found, gemma_repo, cache, naps):
    found.load()
    hub.fail(".", times=-1, **FAULTS[fault])
    assert right(found.load(), gemma_repo)
    began = time.perf_counter()
    assert right(load_sae(gemma_repo.id, layer=1, cache_dir=cache), gemma_repo)  # the branch cannot be asked for
    assert time.perf_counter() - began < 5


def test_39_a_hub_that_never_answers_is_waited_for_no_longer_than_its_time_out(hub, found, gemma_repo, cache):
    found.load()
    hub.fail("^GET /api", times=-1, delay=12)
    began = time.perf_counter()
    assert right(load_sae(gemma_repo.id, layer=1, cache_dir=cache), gemma_repo)
    assert time.perf_counter() - began < 10  # HF_HUB_ETAG_TIMEOUT is 3 s here


@pytest.mark.parametrize("fault", ["503", "429", "dropped"])
def test_39_a_dead_hub_and_an_empty_cache_are_a_download_error(fault, hub, gemma_repo, cache, naps):
    hub.fail(".", times=-1, **FAULTS[fault])
    with pytest.raises(SaeDownloadError, match="the Hub could not be reached or broke off") as caught:
        find_saes(gemma_repo.id, cache_dir=cache)
    assert gemma_repo.id in str(caught.value)
    assert caught.value.__cause__ is not None


def test_39_no_further_try_begins_after_ten_seconds(hub, gemma_repo, found, monkeypatch):
    import sae_hooks.hub.failures as ours

    tried = []

    def slow():
        tried.append(1)
        raise RuntimeError from ConnectionResetErrorLikeHttpx()

    clock = iter([0.0, 10.5])
    monkeypatch.setattr(ours.time, "monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError):
        ours.persist(slow)
    assert tried == [1]


class ConnectionResetErrorLikeHttpx(Exception):
    __module__ = "httpx2"


def test_11_a_byte_that_is_wrong_is_noticed_and_the_cached_file_is_never_used(hub, found, gemma_repo, naps):
    hub.fail("^GET /_cdn", flip=5000)
    with pytest.raises(SaeDownloadError, match=r"damaged on its way: its sha256 is .*--force-download") as caught:
        found.load()
    assert found.where in str(caught.value)
    assert right(found.load(), gemma_repo)  # downloaded anew
    assert len(hub.seen("^GET /_cdn")) == 2


def test_11_a_small_file_is_held_against_its_git_hash(hub, repo, cache, random_sae, naps):
    from sae_hooks.hub import save_pretrained

    made = repo("own")
    save_pretrained(random_sae(8, 16, "model.layers.1.output"), made.dir)
    hub.fail("^GET .*cfg.json", flip=3)
    with pytest.raises(SaeDownloadError, match=r"cfg\.json: damaged on its way: its sha1 is"):
        load_sae(made.id, cache_dir=cache)
    assert load_sae(made.id, cache_dir=cache).d_in == 8


def test_11_a_cached_file_that_rots_is_not_used_when_the_hub_is_down(hub, found, cache, naps):
    found.load()
    [blob] = [path.resolve() for path in cache.rglob("params.npz")]
    content = bytearray(blob.read_bytes())
    content[5000] ^= 255
    blob.write_bytes(content)
    hub.fail(".", times=-1, cut=-1)
    with pytest.raises(SaeDownloadError, match="the cached copy is damaged and was not used; force_download"):
        found.load()


def test_11_a_sound_file_is_hashed_once(found, monkeypatch):
    import sae_hooks.hub.sources as sources

    found.load()
    monkeypatch.setattr(sources.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    found.load()


def test_41_a_full_disk_is_told_and_leaves_the_cache_usable(found, gemma_repo, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SaeDownloadError, match=r"the file system refused: .*File too large.*is there room"):
            found.load()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert right(found.load(), gemma_repo)


def test_41_what_a_killed_download_left_does_not_matter(found, gemma_repo, cache):
    blobs = next(cache.glob("models--*")) / "blobs"
    blobs.mkdir(exist_ok=True)
    for name in ("0" * 64 + ".incomplete", "0" * 64 + ".1234-5678.incomplete"):
        (blobs / name).write_bytes(b"half")
    assert right(found.load(), gemma_repo)


OFFLINE = """
import torch
from sae_hooks import SAE, errors
from sae_hooks.hub import list_saes
from sae_hooks.training.publish import push_folder

sae = SAE(torch.ones(2, 3), torch.zeros(3), torch.ones(3, 2), torch.zeros(2), k=1, site="model.layers.1.output")
sae.save_pretrained("folder")
for action in (lambda: list_saes("fodler"), lambda: list_saes("fodler/deeper"), lambda: push_folder("folder", "a/b"),
               lambda: sae.push_to_hub("a/b"), lambda: sae.push_to_hub("a b")):
    try:
        action()
    except errors.SaeError as error:
        print(error)
"""


def test_offline_a_mistyped_folder_may_be_one_and_a_push_is_not_told_to_load(tmp_path):
    told = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout.splitlines()
    offline = "the client is offline (HF_HUB_OFFLINE)"
    typo = f"not cached, and {offline}; load it once with a connection; and there is no local path of that name"
    assert told[:2] == [f"fodler: {typo}", f"fodler/deeper: {typo}"]
    assert told[2:4] == [f"pushing to a/b: {offline}"] * 2
    assert told[4].startswith("'a b' is not the name of a Hub repository: ")
