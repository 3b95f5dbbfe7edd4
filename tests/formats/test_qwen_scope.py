"""Qwen Scope: what names tell, what sizes prove, the equation in float64, and what is refused."""

import numpy as np
import pytest
from formats.equations import D_IN, D_SAE, as_tensors, assert_agrees, decode, inputs, topk, weights

from sae_hooks.errors import SaeFormatError, SaeMismatchError
from sae_hooks.formats import qwen_scope
from sae_hooks.formats.selection import choose, wanted

REPO = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_4"
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
CONFIG = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": 2048, "d_sae": 32768, "k": 50,
          "num_layers": 28, "hook_point": "resid_post", "dtype": "float32"}


def one(repo=REPO, path="layer3.sae.pt", size=9, config=False):
    files = {path: size} | ({path.rpartition("/")[0] + "config.json": 9} if config else {})
    [entry] = qwen_scope.entries(files, repo)
    return entry


def stored(w):
    """The arrays as Qwen Scope keeps them: both matrices transposed against their names."""
    return {name: value.T.copy() if name.startswith("W_") else value for name, value in w.items()}


@pytest.mark.parametrize(("repo", "model", "width", "k"), [
    ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "Qwen/Qwen3-1.7B-Base", 2**15, 50),
    ("Qwen/SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100", "Qwen/Qwen3-30B-A3B-Base", 2**17, 100),
    ("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_100", "Qwen/Qwen3.5-27B", 81920, 100)])
def test_the_repository_name_tells_model_width_and_k(repo, model, width, k):
    entry = one(repo)
    assert (entry.model_name, entry.width, entry.l0, entry.layer) == (model, width, k, 3)
    assert (entry.site, entry.site_out, entry.kind) == ("model.layers.3.output", "model.layers.3.output", "resid_post")
    assert (entry.config, entry.flaw) == (None, None)


@pytest.mark.parametrize(("repo", "path"), [
    ("/data/SAE-Res-Qwen3-8B-Base-W64K-L0_4", "layer3.sae.pt"), ("/data/SAE-Res-Q-W32K-L0_50", f"{REPO}/layer3.sae.pt"),
    ("me/mirror", f"{REPO}/layer3.sae.pt"),
    ("/me/hub/models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_4/snapshots/abc", "layer3.sae.pt")])
def test_a_local_path_tells_it_too(repo, path):
    entry = one(repo, path)
    assert (entry.model_name, entry.width, entry.l0, entry.flaw) == ("Qwen/Qwen3-8B-Base", 65536, 4, None)


def test_other_files_are_none_of_this_format():
    assert qwen_scope.entries(dict.fromkeys(("layer3.pt", "xlayer3.sae.pt", "layer.sae.pt", "sae.pt"), 9), REPO) == []


@pytest.mark.parametrize(("d", "width"), [(2048, 32), (5120, 80), (4096, 64)])
def test_d_in_is_proved_by_size_and_width(d, width):
    features = 1024 * width
    size = 4 * (2 * d * features + features + d)
    for overhead in (1500, 3000):
        assert one(f"Qwen/SAE-Res-Qwen3-X-W{width}K-L0_50", size=size + overhead).d_in == d
    assert one(f"Qwen/SAE-Res-Qwen3-X-W{width}K-L0_50", size=size // 2 + 1500).d_in is None  # bfloat16


def test_it_agrees_with_its_equation_and_is_not_centred():
    w, x = weights(*PLAIN), inputs()
    sae = qwen_scope.build(one(), as_tensors(stored(w)), None)
    acts = topk(w, x, 4)
    assert np.count_nonzero(acts, axis=1).max() == 4
    assert_agrees(sae, x, acts, decode(w, acts))
    assert (sae.site, sae.site_out, sae.k) == ("model.layers.3.output", "model.layers.3.output", 4)
    assert sae.metadata == {"l0": 4.0, "model_name": "Qwen/Qwen3-8B-Base"}


def test_square_matrices_are_turned_too():
    w, x = weights(*PLAIN, d_sae=D_IN), inputs()
    acts = topk(w, x, 4)
    assert_agrees(qwen_scope.build(one(), as_tensors(stored(w)), None), x, acts, decode(w, acts))


@pytest.mark.parametrize("repo", ["/data/saes", "/data/SAE-Res-Qwen3-8B", "/data/SAE-Res-Qwen3-8B-W64K-L0_4b"])
def test_where_nothing_tells_k_it_is_refused_with_what_to_do(repo):
    entry = one(repo)
    assert (entry.width, entry.l0, entry.layer) == (None, None, 3)
    with pytest.raises(SaeFormatError) as caught:
        qwen_scope.build(entry, {}, None)
    for told in (entry.flaw, str(caught.value)):
        assert "tells k" in told
        assert "name the folder of the files as their repository is, SAE-Res-{model}-W" in told


def test_a_config_tells_it_where_the_folder_does_not():
    entry = one("/data/saes", config=True)
    assert (entry.config, entry.flaw) == ("config.json", None)
    found = qwen_scope.refine(entry, CONFIG)
    assert (found.width, found.l0, found.d_in, found.model_name) == (32768, 50, 2048, "Qwen/Qwen3-1.7B-Base")
    w = weights(*PLAIN)
    assert qwen_scope.build(entry, as_tensors(stored(w)), CONFIG | {"k": 4}).k == 4
    with pytest.raises(SaeFormatError, match="tells k"):
        qwen_scope.refine(entry, {"model_type": "qwen3", "k": 50})  # a language model's


@pytest.mark.parametrize(("change", "tells"), [
    ({"k": 100}, "the folder's name says 32768 features and k 50.0, config.json 32768 and 100"),
    ({"d_sae": 65536}, "config.json 65536 and 50"), ({"hook_point": "mlp_out"}, "hook_point is 'mlp_out'"),
    ({"k": -1}, "k must be a whole number"), ({"d_model": "x"}, "d_model must be a whole number")], ids=str)
def test_a_config_that_says_otherwise_is_refused(change, tells):
    entry = one("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", config=True)
    assert qwen_scope.refine(entry, CONFIG).l0 == 50
    with pytest.raises(SaeFormatError, match=tells):
        qwen_scope.refine(entry, CONFIG | change)


def test_layers_and_other_repositories_are_chosen_by_name():
    files = {f"{repo}/layer{n}.sae.pt": 9 for n in range(12)
             for repo in ("SAE-Res-Q-W32K-L0_50", "SAE-Res-Q-W32K-L0_100")}
    found = qwen_scope.entries(files, "me/mirror")
    assert qwen_scope.default(found) == found
    chosen = choose(found, wanted([2, 10], None, None, 60), "here", found)
    assert [entry.weights for entry in chosen] == [f"SAE-Res-Q-W32K-L0_50/layer{n}.sae.pt" for n in (2, 10)]


def test_missing_and_misshapen_tensors_are_all_named():
    w = stored(weights(*PLAIN))
    with pytest.raises(SaeFormatError, match="no W_dec; no b_enc"):
        qwen_scope.build(one(), as_tensors({k: w[k] for k in ("W_enc", "b_dec")}), None)
    w["W_dec"] = w["W_dec"][:, :-1]
    with pytest.raises(SaeMismatchError, match=rf"W_dec is \(39, 6\), expected \({D_SAE}, 6\)"):
        qwen_scope.build(one(), as_tensors(w), None)
