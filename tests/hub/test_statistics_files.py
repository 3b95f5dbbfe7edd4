"""feature_statistics.safetensors beside an SAE: saved, pushed, read back; refused like weights if it is not sound."""

import contextlib
import itertools
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hub.files import safetensors_file
from safetensors.torch import load_file, save_file

from sae_hooks import attach_saes
from sae_hooks.errors import SaeDownloadError, SaeFormatError, SaeMismatchError, SaeWarning, UnsafeFileError
from sae_hooks.hub import find_saes, list_saes, load_sae, push_to_hub, save_pretrained
from sae_hooks.sae import SAE
from sae_hooks.statistics import FeatureStatistics

NAME, SITE = "feature_statistics.safetensors", "model.layers.1.output"
FILES = ["cfg.json", NAME, "sae_weights.safetensors"]
NUMBERS = itertools.count(5000)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's LFS upload


def measured(d_sae=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    largest = torch.rand(d_sae, generator=draw) + 1
    quantiles = largest * torch.tensor([0.25, 0.5, 0.75])[:, None]
    return FeatureStatistics(1000 + seed, torch.rand(d_sae, generator=draw) + 1e-3 - 1e-3 * largest / 2,
                             largest / 3, largest, quantiles)


@pytest.fixture
def sae(random_sae):
    """An SAE of 8 -> 16 with statistics, of weights that the Hub has never seen."""
    made = random_sae(8, 16, SITE, seed=next(NUMBERS))
    made.statistics = measured()
    return made


def same(one, other):
    names = ("frequency", "mean", "max", "quantiles")
    return one.tokens == other.tokens and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- folders ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(sae, tmp_path, dtype):
    folder = sae.to(dtype).save_pretrained(tmp_path)
    assert names(folder) == FILES
    for source in (folder, folder / "sae_weights.safetensors"):
        assert same(load_sae(source, dtype=torch.float16).statistics, sae.statistics)


def test_an_sae_without_statistics_has_no_such_file_and_takes_away_that_of_the_one_before(sae, tmp_path, random_sae):
    sae.save_pretrained(tmp_path)
    bare = random_sae(8, 16, SITE, seed=1)
    bare.save_pretrained(tmp_path)
    assert names(tmp_path) == ["cfg.json", "sae_weights.safetensors"]
    assert load_sae(tmp_path).statistics is None


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("measured_anew", [True, False])
@pytest.mark.parametrize("stated", [True, False], ids=["digest", "file of before"])
def test_a_save_that_was_cut_off_never_leaves_the_statistics_of_another_sae(
        sae, tmp_path, random_sae, monkeypatch, nth, measured_anew, stated):
    path = sae.save_pretrained(tmp_path) / NAME
    if not stated:
        save_file(load_file(path), path)
    new = random_sae(8, 16, SITE, seed=next(NUMBERS))
    new.statistics = measured(seed=1) if measured_anew else None
    renamed = []

    def replace(source, target, real=os.replace):
        if len(renamed) == nth:
            raise KeyboardInterrupt
        renamed.append(real(source, target))

    def unlink(path, missing_ok=False, real=Path.unlink):
        assert not renamed, "the new weights lay beside the old statistics"
        real(path, missing_ok)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        new.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaeWarning)
        loaded = load_sae(tmp_path)
    whose = new if torch.equal(loaded.W_enc, new.W_enc) else sae
    assert loaded.statistics is None or same(loaded.statistics, whose.statistics)


@pytest.mark.parametrize("k", [None, 4])
def test_statistics_beside_weights_that_were_replaced_by_others_are_left_out_with_a_warning(tmp_path, random_sae, k):
    sae, other = (random_sae(8, 16, SITE, seed=next(NUMBERS), k=k) for _ in range(2))
    sae.statistics = measured()
    sae.save_pretrained(tmp_path / "a")
    shutil.copy(other.save_pretrained(tmp_path / "b") / FILES[2], tmp_path / "a")
    with pytest.warns(SaeWarning, match=f"{NAME} holds the statistics of other weights than .*{FILES[2]}"):
        assert load_sae(tmp_path / "a", dtype=torch.bfloat16).statistics is None


def test_the_same_weights_in_a_wider_dtype_keep_their_statistics_and_so_does_a_file_without_a_digest(sae, tmp_path):
    folder = sae.to(torch.bfloat16).save_pretrained(tmp_path)
    weights = load_file(folder / FILES[2])
    save_file({name: tensor.double() for name, tensor in weights.items()}, folder / FILES[2])
    assert same(load_sae(folder).statistics, sae.statistics)
    save_file(load_file(folder / NAME), folder / NAME)
    save_file(weights | {"b_enc": weights["b_enc"] + 1}, folder / FILES[2])
    assert same(load_sae(folder).statistics, sae.statistics)


def test_each_site_has_its_own_and_the_listing_counts_saes_only(sae, tmp_path, random_sae):
    other = random_sae(8, 32, "model.layers.0.output")
    other.statistics = measured(32, seed=1)
    save_pretrained({SITE: sae, "model.layers.0.output": other}, tmp_path)
    assert [entry.site for entry in list_saes(tmp_path)] == ["model.layers.0.output", SITE]
    loaded = {file.entry.site: file.load() for file in find_saes(tmp_path)}
    assert same(loaded[SITE].statistics, sae.statistics)
    assert same(loaded["model.layers.0.output"].statistics, other.statistics)


def test_statistics_alone_are_no_sae(sae, tmp_path):
    sae.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no SAE here"):
        list_saes(tmp_path)


def test_an_sae_attached_in_another_dtype_keeps_them(tiny_gemma2, random_sae):
    sae = random_sae(192, 16, SITE, norm=29)
    sae.statistics = measured()
    model = attach_saes(tiny_gemma2, sae, dtype=torch.bfloat16)
    assert same(model.saes[SITE].statistics, sae.statistics)


def test_an_attached_folder_gives_strengths_in_maxima(tiny_gemma2, random_sae, tmp_path):
    sae = random_sae(192, 16, SITE, norm=29)
    sae.statistics = measured()
    model = attach_saes(tiny_gemma2, sae.save_pretrained(tmp_path))
    handle = model.saes.clamp({3: 2.0}, unit="max")
    assert handle.edits.items[0].values.item() == 2 * sae.statistics.max[3].item()
    model.saes.detach()


def test_the_weights_do_not_change_with_the_statistics(sae, tmp_path):
    with_them = (sae.save_pretrained(tmp_path / "with") / "sae_weights.safetensors").read_bytes()
    sae.statistics = None
    assert (sae.save_pretrained(tmp_path / "without") / "sae_weights.safetensors").read_bytes() == with_them


# --- files that are not what they should be ---------------------------------------------

def changed(**tensors):
    return lambda old: {name: t for name, t in {**old, **tensors}.items() if t is not None}


ODD = {
    "of another SAE": (lambda old: {n: t[..., :12] if t.shape[-1] == 16 else t for n, t in old.items()},
                       SaeMismatchError, r"another SAE; this one has 16 features: frequency is \(12,\)"),
    "one missing": (changed(mean=None), SaeFormatError, "no mean"),
    "one more": (changed(W_enc=torch.ones(2)), SaeFormatError, "unknown tensor 'W_enc'"),
    "float16": (changed(mean=torch.ones(16).half()), SaeFormatError, "mean is torch.float16, expected torch.float32"),
    "int32": (changed(tokens=torch.ones(1).int()), SaeFormatError, "tokens is torch.int32, expected torch.int64"),
    "other levels": (changed(levels=torch.ones(3).double()), SaeFormatError, "quantiles at levels"),
    "two levels": (changed(levels=torch.ones(2).double()), SaeMismatchError, r"levels is \(2,\), expected \(3,\)"),
    "NaN": (changed(mean=torch.full((16,), torch.nan)), SaeFormatError, "mean has 16 NaN or infinite values"),
    "above 1": (changed(frequency=torch.full((16,), 1.5)), SaeFormatError, r"frequency \(0 to 1\): feature 0"),
    "negative": (changed(max=torch.full((16,), -1.0)), SaeFormatError, "no activations have"),
    "no tokens": (changed(tokens=torch.tensor([-5])), SaeFormatError, "tokens"),
}


@pytest.mark.parametrize("case", ODD)
def test_statistics_that_cannot_be_these_are_refused_with_the_name_of_the_file(case, sae, tmp_path):
    change, error, tells = ODD[case]
    path = sae.save_pretrained(tmp_path) / NAME
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path)
    with pytest.raises(error, match=tells) as caught:
        load_sae(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


HUGE = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
BROKEN = {
    "empty": (b"", "the file is empty"), "cut": (b"\x01\x02\x03", "cut short: 3 bytes"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    "a page": (b"<!doctype html><html>", "an HTML page"),
    "a header of 2^63 bytes": (safetensors_file({}, length=2**63), "declares a header"),
    "4 TiB declared": (safetensors_file({"mean": HUGE}, b"x" * 8), "cut short: has 8 bytes of data"),
    "a foreign name": (safetensors_file({"../../evil": HUGE | {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
                       "unknown tensor '../../evil'"),
    "JSON with a key twice": (safetensors_file(b'{"mean": 1, "mean": 2}'), "the key 'mean' twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_cheaply(case, sae, tmp_path, cheap):
    content, tells = BROKEN[case]
    path = sae.save_pretrained(tmp_path) / NAME
    path.write_bytes(content)
    with cheap(), pytest.raises(SaeFormatError) as caught:
        load_sae(tmp_path)
    assert tells in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(sae, tmp_path):
    folder = sae.save_pretrained(tmp_path / "inside")
    (folder / NAME).rename(tmp_path / "elsewhere")
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="outside"):
        load_sae(folder)


def test_a_large_file_of_another_sae_is_told_from_its_header(sae, tmp_path, cheap):
    path = sae.save_pretrained(tmp_path) / NAME
    save_file(load_file(path) | {"quantiles": torch.zeros(3, 2**23)}, path)
    with cheap(), pytest.raises(SaeMismatchError, match=r"quantiles is \(3, 8388608\), expected \(3, 16\)"):
        load_sae(tmp_path)


# --- the Hub ----------------------------------------------------------------------------

@pytest.fixture
def pushed(hub, sae):
    """The name of a repository with the SAE and its statistics."""
    name = f"alice/statistics-{next(NUMBERS)}"
    push_to_hub(sae, name, token="hf_alice")
    hub.requests.clear()
    return name


def test_statistics_are_pushed_and_read_back_from_the_hub(hub, sae, pushed, cache):
    assert sorted(hub.repos["model", pushed].files()) == ["README.md", *FILES]
    assert len(list_saes(pushed, cache_dir=cache)) == 1
    assert same(load_sae(pushed, cache_dir=cache).statistics, sae.statistics)
    assert hub.seen(f".*{NAME}")


def test_where_the_listing_shows_none_the_hub_is_not_asked(hub, random_sae, cache):
    name = f"alice/bare-{next(NUMBERS)}"
    push_to_hub(random_sae(8, 16, SITE), name, token="hf_alice")
    hub.requests.clear()
    assert load_sae(name, cache_dir=cache).statistics is None
    assert not hub.seen(f".*{NAME}")
    assert len(hub.seen(".*/tree/")) == 1


def test_when_all_is_cached_the_hub_is_not_asked_for_files_or_listings(hub, sae, pushed, cache):
    load_sae(pushed, cache_dir=cache)
    hub.requests.clear()
    assert same(load_sae(pushed, cache_dir=cache).statistics, sae.statistics)
    assert not hub.seen(".*/(tree|resolve)/")


def test_statistics_that_are_listed_but_do_not_come_are_an_error(hub, pushed, cache, naps):
    hub.fail(f"(GET|HEAD) .*{NAME}", status=503, times=-1)
    with pytest.raises(SaeDownloadError, match=NAME):
        load_sae(pushed, cache_dir=cache)


def test_mismatched_statistics_on_the_hub_are_named_by_repository_and_commit(hub, sae, pushed, cache, tmp_path):
    other = SAE(torch.ones(8, 12), torch.ones(12), torch.ones(12, 8), torch.ones(8), k=2, site=SITE)
    other.statistics = measured(12)
    folder = hub.repos["model", pushed].dir
    (folder / NAME).write_bytes((other.save_pretrained(tmp_path / "other") / NAME).read_bytes())
    with pytest.raises(SaeMismatchError, match=rf"^{pushed}@[0-9a-f]+/{NAME}: statistics of another SAE"):
        load_sae(pushed, cache_dir=cache)


@pytest.mark.parametrize("inside", ["", "deep/er"])
def test_a_push_without_statistics_deletes_those_of_the_sae_before_and_no_others(hub, sae, random_sae, inside):
    name = f"alice/stale-{next(NUMBERS)}"
    for place in (inside, "elsewhere"):
        push_to_hub(sae, name, path_in_repo=place, token="hf_alice")
    bare = random_sae(8, 16, SITE, seed=next(NUMBERS))
    push_to_hub(bare, name, path_in_repo=inside, token="hf_alice")
    push_to_hub(bare, name, path_in_repo=inside, token="hf_alice")
    files = hub.repos["model", name].files()
    assert [path for path in files if path.endswith(NAME)] == [f"elsewhere/{NAME}"]
    assert len(hub.repos["model", name].heads["main"]) == 4  # the empty first one, two, and one for both last


def test_the_same_push_again_makes_no_commit(hub, sae, pushed):
    before = len(hub.repos["model", pushed].heads["main"])
    push_to_hub(sae, pushed, token="hf_alice")
    assert len(hub.repos["model", pushed].heads["main"]) == before
