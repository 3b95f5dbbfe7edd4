"""Llama Scope (OpenMOSS): what names and configs tell, what is found in repositories and folders, and attaching it."""

import json

import pytest
import torch
from formats.equations import D_IN, D_SAE, openmoss_2024, weights
from formats.openmoss import BASE, CONFIG, HYPERPARAMS, READ, SCOPE_2, WRITTEN, bare, drawn, first, later, linear
from safetensors.torch import save_file

from sae_hooks import attach_saes
from sae_hooks.errors import SaeFormatError, SaeNotFoundError, UnsafeFileError
from sae_hooks.formats import DIALECTS, llama_scope
from sae_hooks.hub import find_saes, list_saes, load_sae

# --- what names tell ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("repo", "folder", "told"), [
    (BASE, "Llama3_1-8B-Base-L15R-8x", ("resid_post", 15, 32768, None, "meta-llama/Llama-3.1-8B")),
    ("fnlp/x", "Llama3_1-8B-Base-L0M-32X", ("mlp_out", 0, 131072, None, "meta-llama/Llama-3.1-8B")),
    ("fnlp/x", "Llama3_1-8B-Base-L31A-8x", ("attn_out", 31, 32768, None, "meta-llama/Llama-3.1-8B")),
    ("fnlp/x", "Llama3_1-8B-Base-L8TC-8x", ("transcoder", 8, 32768, None, "meta-llama/Llama-3.1-8B")),
    ("/data/Llama3_1-8B-Base-L8TC-8x", "", ("transcoder", 8, 32768, None, "meta-llama/Llama-3.1-8B")),
    ("/data/L3R", "Llama3_1-8B-Base-L8TC-8x", ("transcoder", 8, 32768, None, "meta-llama/Llama-3.1-8B")),
    ("me/mine", "", (None, None, None, None, None)),
])
def test_a_folder_of_2024_tells_kind_layer_width_and_model(repo, folder, told):
    weights, config = "checkpoints/final.safetensors", "hyperparams.json"
    before = f"{folder}/" if folder else ""
    [e] = llama_scope.entries({before + weights: 9, before + config: 9, "README.md": 1}, repo)
    assert (e.kind, e.layer, e.width, e.l0, e.model_name) == told
    assert (e.weights, e.config, e.site) == (before + weights, before + config, None)


@pytest.mark.parametrize(("repo", "folder", "told"), [
    ("OpenMOSS-Team/Llama-Scope-R1-Distill", "400M-Slimpajama-400M-OpenR1-Math-220k/L15R",
     ("resid_post", 15, None, None, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")),
    ("OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B", "transcoder/8x/k128/layer12_transcoder_8x_k128",
     ("transcoder", 12, 16384, 128.0, "Qwen/Qwen3-1.7B")),
    ("OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B", "lorsa/32x/k64/layer3_lorsa_32x_k64",
     ("lorsa", 3, 65536, 64.0, "Qwen/Qwen3-1.7B")),
    ("me/mine", "run-2", (None, None, None, None, None)),
])
def test_a_later_folder_tells_them_too(repo, folder, told):
    e = later(folder, repo)
    assert (e.kind, e.layer, e.width, e.l0, e.model_name) == told


@pytest.mark.parametrize("files", [
    ["sae_weights.safetensors"], ["a/sae_weights.safetensors", "config.json"], ["checkpoints/final.safetensors"],
    ["sae_weights.safetensors", "config.json", "cfg.json"], ["my_sae_weights.safetensors", "my_config.json"],
    ["model.safetensors", "config.json"], ["checkpoints/final.pt", "hyperparams.json"]])
def test_what_lacks_its_config_or_is_another_format_is_not_taken_for_it(files):
    assert llama_scope.entries(dict.fromkeys(files, 9), "me/mine") == []


@pytest.mark.parametrize(("place", "hooks", "kind", "sites"), [
    ("R", ["hook_resid_post"], "resid_post", ["output"]),
    ("M", ["hook_mlp_out"], "mlp_out", ["mlp.output"]),
    ("A", ["hook_attn_out"], "attn_out", ["self_attn.o_proj.output"]),
    ("A", ["attn.hook_z"], "attn_out", ["self_attn.o_proj.input"]),
    ("TC", ["ln2.hook_normalized", "hook_mlp_out"], "transcoder", ["post_attention_layernorm.normalized",
                                                                  "mlp.output"]),
])
def test_the_config_tells_the_sites(place, hooks, kind, sites):
    entry = first(f"Llama3_1-8B-Base-L15{place}-8x", repo=BASE)
    config = HYPERPARAMS | {"hook_point_in": f"blocks.15.{hooks[0]}", "hook_point_out": f"blocks.15.{hooks[-1]}",
                            "d_sae": 32768}
    e = llama_scope.refine(entry, config)
    assert (e.kind, e.site, e.site_out) == (kind, f"model.layers.15.{sites[0]}", f"model.layers.15.{sites[-1]}")
    assert (e.d_in, e.width, e.hook) == (D_IN, 32768, None)


def test_of_an_unknown_model_only_the_residual_stream_is_known():
    e = llama_scope.refine(later("run-2", "me/mine"), CONFIG | {"hook_point_in": "blocks.3.hook_resid_post",
                                                                "hook_point_out": "blocks.3.hook_resid_post"})
    assert (e.site, e.layer, e.kind) == ("model.layers.3.output", 3, "resid_post")
    e = llama_scope.refine(later("run-2", "me/mine"), CONFIG)
    assert (e.site, e.hook, e.kind, e.layer) == (None, "blocks.3.ln2.hook_normalized", "transcoder", 3)
    assert llama_scope.sites("resid_post", 3) == ("model.layers.3.output",) * 2
    assert llama_scope.sites("mlp_out", 3) is None


@pytest.mark.parametrize(("folder", "config", "tells"), [
    ("Llama3_1-8B-Base-L14R-8x", {}, r"means layer 14, its config 15 \(hook_point_in is 'blocks\.15\."),
    ("Llama3_1-8B-Base-L15M-8x", {}, "means kind mlp_out, its config resid_post"),
    ("Llama3_1-8B-Base-L15TC-8x", {}, "means kind transcoder, its config resid_post"),
    ("Llama3_1-8B-Base-L15R-8x", {"hook_point_out": "blocks.15.hook_mlp_out"}, "resid_post, its config transcoder"),
    ("Llama3_1-8B-Base-L15R-32x", {}, "means width 131072, its config 40"),
])
def test_a_name_and_a_config_that_disagree_are_refused(folder, config, tells):
    with pytest.raises(SaeFormatError, match=tells):
        llama_scope.refine(first(folder), HYPERPARAMS | config)


def test_without_a_selector_sparse_attention_is_left_out_and_one_mixture_of_texts_is_taken():
    attention, transcoder = (later(f"{kind}/8x/k64/layer3_{kind}_8x_k64") for kind in ("lorsa", "transcoder"))
    assert llama_scope.default([attention, transcoder]) == [transcoder]
    assert llama_scope.default([attention]) == [attention]
    assert llama_scope.default([]) == []
    many = [later(f"400M-Slimpajama-400M-OpenR1-Math-220k/L{n}R") for n in (14, 15)]
    assert llama_scope.default([later("0-Slimpajama-800M-OpenR1-Math-220k/L15R"), *many]) == many


# --- files ----------------------------------------------------------------------------------------------

D, F = 32, 64  # of the tiny models
PLACES = {"R": ["hook_resid_post"], "M": ["hook_mlp_out"], "A": ["hook_attn_out"],
          "TC": ["ln2.hook_normalized", "hook_mlp_out"]}


def publish(root, layer, place="R", seed=0):
    """A folder as the repositories of 2024 have them, for a tiny Llama."""
    w = weights("W_enc", "b_enc", "W_dec", "b_dec", d_in=D, d_sae=F, d_out=D, seed=seed)
    folder = root / f"L{layer}{place}"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(linear(w, torch.float32), folder / "checkpoints/final.safetensors")
    hooks = [f"blocks.{layer}.{hook}" for hook in PLACES[place]]
    (folder / "hyperparams.json").write_text(json.dumps(HYPERPARAMS | {
        "d_model": D, "d_sae": F, "hook_point_in": hooks[0], "hook_point_out": hooks[-1]}))
    return w


def test_choosing_a_layer_of_a_repository_fetches_one_config_and_its_weights(hub, tmp_path):
    repo = hub.repo("me/Llama3_1-8B-Base-LXR-tiny")
    for layer in range(8):
        publish(repo.dir, layer)
    [found] = find_saes(repo.id, layer=5, cache_dir=tmp_path)
    assert (found.entry.site, found.entry.d_in, found.entry.width) == ("model.layers.5.output", D, F)
    [by_site] = find_saes(repo.id, site="model.layers.5.output", cache_dir=tmp_path)
    assert by_site.entry == found.entry
    assert found.load().site == "model.layers.5.output"
    assert hub.seen("/L5R/hyperparams.json")
    assert not hub.seen("/L[0-46-7]R/")
    with pytest.raises(SaeNotFoundError, match="resid_post: layers 0-7"):
        find_saes(repo.id, layer=9, cache_dir=tmp_path)


def test_what_a_repository_offers_is_listed_with_what_cannot_be_read(tmp_path):
    for kind in ("transcoder", "lorsa"):
        folder = tmp_path / f"Qwen3/{kind}/8x/k5/layer3_{kind}_8x_k5"
        folder.mkdir(parents=True)
        save_file(bare(drawn()), folder / "sae_weights.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG | {"sae_type": {"lorsa": kind}.get(kind, "sae")}))
    attention, transcoder = sorted(list_saes(tmp_path / "Qwen3"), key=lambda entry: entry.kind)
    assert "sae_type is 'lorsa'" in attention.flaw
    assert (transcoder.flaw, transcoder.width, transcoder.l0, transcoder.d_in) == (None, D_SAE, 5.0, D_IN)
    with pytest.raises(SaeFormatError, match=r"'blocks\.3\.ln2\.hook_normalized', and which module that is"):
        find_saes(tmp_path / "Qwen3")


@pytest.mark.parametrize("named", ["", "sae_weights.safetensors"])
def test_sizes_that_the_config_leaves_open_are_told_by_the_weights(named, tmp_path):
    folder = tmp_path / SCOPE_2 / "run"
    folder.mkdir(parents=True)
    save_file(bare(drawn()), folder / "sae_weights.safetensors")
    config = {key: value for key, value in CONFIG.items() if key not in ("d_model", "expansion_factor")}
    (folder / "config.json").write_text(json.dumps(config))
    [found] = find_saes(folder / named, layer=3)
    assert (found.entry.d_in, found.entry.width) == (D_IN, D_SAE)
    sae = found.load()
    assert (sae.site_out, sae.d_sae) == ("model.layers.3.mlp.output", D_SAE)


@pytest.mark.parametrize("named", ["", "checkpoints/final.safetensors"])
def test_a_folder_or_its_weight_file_can_be_named(named, tmp_path):
    publish(tmp_path, 2)
    sae = load_sae(tmp_path / "L2R" / named)
    assert (sae.site, sae.d_sae) == ("model.layers.2.output", F)


def test_names_that_no_sae_has_and_values_that_are_not_finite_are_refused_by_file(tmp_path):
    publish(tmp_path, 2)
    path = tmp_path / "L2R/checkpoints/final.safetensors"
    tensors = linear(weights("W_enc", "b_enc", "W_dec", "b_dec", d_in=D, d_sae=F, d_out=D), torch.float32)
    save_file(tensors | {"optimizer.state": torch.zeros(2)}, path)
    with pytest.raises(UnsafeFileError, match=r"final\.safetensors: .*does not know: 'optimizer\.state' \(known: W_D"):
        load_sae(tmp_path)
    tensors["encoder.bias"][3] = torch.inf
    save_file(tensors, path)
    with pytest.raises(SaeFormatError, match=r"final\.safetensors: encoder\.bias has 1 NaN or infinite"):
        load_sae(tmp_path)


def test_a_distributed_checkpoint_is_told_to_be_a_pickle(tmp_path):
    (tmp_path / "sae_weights.dcp").mkdir()
    (tmp_path / "sae_weights.dcp/__0_0.distcp").write_bytes(b"x")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsafeFileError, match=r"__0_0\.distcp is a pickle"):
        load_sae(tmp_path)


def test_every_kind_of_2024_attaches_to_a_llama_and_splices(tmp_path, random_model):
    model, ids = random_model("Llama"), torch.arange(6)[None]
    w = {place: publish(tmp_path / "Llama3_1-8B-Base-LX", 1, place, seed) for seed, place in enumerate(PLACES)}
    block = model.model.layers[1]
    norm = block.post_attention_layernorm
    seen = {}
    for place, module in {"R": block, "M": block.mlp, "A": block.self_attn.o_proj, "norm": norm}.items():
        module.register_forward_hook(lambda _, args, out, place=place: seen.__setitem__(place, (args[0], out)))
    with torch.no_grad():
        model(input_ids=ids)
    clean = {place: (pair[0].clone(), pair[1].clone()) for place, pair in seen.items()}
    read = {place: clean[place][1] for place in "RMA"}
    read["TC"] = clean["norm"][1] / norm.weight
    for place, written in {"R": "R", "M": "M", "A": "A", "TC": "M"}.items():
        attach_saes(model, tmp_path / f"Llama3_1-8B-Base-LX/L1{place}")
        with torch.no_grad(), model.saes.splice(special_tokens=True):
            model(input_ids=ids)
        x = read[place][0].detach().double().numpy()
        _, x_hat = openmoss_2024(w[place], x, lambda pre: pre > 1.5, READ, WRITTEN)
        torch.testing.assert_close(seen[written][1][0].double(), torch.from_numpy(x_hat), rtol=1e-4, atol=1e-4)
        model.saes.detach()


def test_it_is_one_of_the_dialects():
    assert DIALECTS["llama_scope"] is llama_scope
