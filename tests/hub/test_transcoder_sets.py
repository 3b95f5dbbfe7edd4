"""circuit-tracer's sets of transcoders, found and loaded from folders and from the Hub (on loopback)."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_hooks import attach_saes
from sae_hooks.errors import SaeFormatError, SaeNotFoundError, SaeWarning, UnsafeFileError
from sae_hooks.hub import find_saes, list_saes, load_sae, save_pretrained

CONFIG = """# as circuit-tracer's authors publish it
model_name: Qwen/Qwen3-0.6B
model_kind: transcoder_set
feature_input_hook: mlp.hook_in
feature_output_hook: mlp.hook_out
scan: [qwen3-0.6b]
"""
LISTED = "transcoders:\n" + "".join(
    f"- hf://google/gemma-scope-2b-pt-transcoders/layer_{n}/width_16k/average_l0_76/params.npz\n" for n in range(26))


def write_layer(folder, layer, d=32, d_sae=64, **more):
    draw = torch.Generator().manual_seed(layer)
    tensors = {"W_enc": torch.randn(d_sae, d, generator=draw), "W_dec": torch.randn(d_sae, d, generator=draw),
               "b_enc": torch.randn(d_sae, generator=draw), "b_dec": torch.randn(d, generator=draw)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | more, folder / f"layer_{layer}.safetensors")
    return tensors


def write_set(folder, layers=3, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    for layer in range(layers):
        write_layer(folder, layer)
    return folder


def test_one_layer_of_many_fetches_the_one_config_and_its_own_weights(hub, repo, cache):
    made = repo("qwen3-0.6b-transcoders-lowl0")
    write_set(made.dir, layers=28)
    sae = load_sae(made.id, layer=5, cache_dir=cache)
    assert torch.equal(sae.W_enc.T, write_layer(made.dir, 5)["W_enc"])
    assert (sae.site, sae.site_out) == ("model.layers.5.mlp.input", "model.layers.5.mlp.output")
    assert sae.metadata["source"].endswith("/layer_5.safetensors")
    asked_for = {line.split("/resolve/")[1].split("/", 1)[1] for line, _ in hub.seen("/resolve/")}
    assert asked_for == {"config.yaml", "layer_5.safetensors"}
    assert len(hub.seen("^GET .*config")) == len(hub.seen("^GET /_cdn")) == 1


def test_all_layers_are_found_with_one_request_for_their_config_and_no_weights(hub, repo, cache):
    made = repo("qwen3-0.6b-transcoders-lowl0")
    write_set(made.dir, layers=28)
    found = find_saes(made.id, cache_dir=cache)
    assert [file.entry.layer for file in found] == list(range(28))
    assert len(hub.seen(r"^GET .*config\.yaml")) == len(hub.seen(r"^HEAD .*config\.yaml")) == 1
    assert not hub.seen("safetensors|_cdn")
    table = sorted(list_saes(made.id, cache_dir=cache), key=lambda entry: entry.layer)
    assert [(e.kind, e.site, e.site_out) for e in table] == [
        ("transcoder", f"model.layers.{n}.mlp.input", f"model.layers.{n}.mlp.output") for n in range(28)]


def test_the_config_of_all_layers_is_read_once(tmp_path, watched):
    folder = write_set(tmp_path / "set", layers=9)
    with watched() as opened:
        assert len(list_saes(folder)) == 9
    assert len([line for line in opened if line.endswith("config.yaml")]) == 1


@pytest.mark.parametrize("asked", [
    {"layer": 2}, {"site": "transcoder", "layer": 2}, {"site": "model.layers.2.mlp.input"},
    {"site": "layers.2.mlp.input"}], ids=str)
def test_a_layer_is_chosen_by_number_kind_or_path(asked, tmp_path):
    [found] = find_saes(write_set(tmp_path / "set"), **asked)
    assert (found.entry.layer, found.entry.width, found.entry.d_in) == (2, 64, 32)


@pytest.mark.parametrize("asked", [{"layer": 3}, {"site": "resid_post"}, {"site": "model.layers.1.output"}], ids=str)
def test_what_a_set_does_not_have_is_listed_against_what_it_has(asked, tmp_path):
    with pytest.raises(SaeNotFoundError, match=r"(?s)nothing for .* It offers:\n.*layers 0-?"):
        find_saes(write_set(tmp_path / "set"), **asked)


def test_one_file_is_loaded_with_the_config_beside_it(tmp_path):
    folder = write_set(tmp_path / "set")
    assert load_sae(folder / "layer_1.safetensors").site == "model.layers.1.mlp.input"
    (folder / "config.yaml").unlink()
    with pytest.raises(SaeNotFoundError, match=r"layer_1\.safetensors has no config\.yaml \(circuit-tracer\) "):
        load_sae(folder / "layer_1.safetensors")


def test_several_sets_in_one_repository_are_told_apart_by_their_folder(repo, cache):
    made = repo("gemma-sets")
    write_set(made.dir / "small", config=CONFIG)
    write_set(made.dir / "big", config=CONFIG.replace("mlp.hook_in", "hook_resid_mid"))
    assert load_sae(f"{made.id}/big", layer=1, cache_dir=cache).site == "model.layers.1.post_attention_layernorm.input"
    assert load_sae(f"{made.id}/small", layer=1, cache_dir=cache).site == "model.layers.1.mlp.input"


def test_a_set_is_attached_to_every_layer_and_loaded_at_first_use(repo, cache, hub, random_model):
    made = repo("qwen3-tiny-transcoders")
    write_set(made.dir)
    model = attach_saes(random_model("Qwen3"), made.id, cache_dir=cache)
    assert list(model.saes) == [f"model.layers.{n}.mlp.input" for n in range(3)]
    assert not hub.seen("safetensors|_cdn")
    ids = torch.tensor([[5, 9, 77]])
    with torch.no_grad():
        clean = model(ids).logits
        with model.saes.splice(layer=1):
            spliced = model(ids).logits
    assert not torch.allclose(spliced, clean, atol=1e-2)
    assert len(hub.seen("^GET /_cdn")) == 1
    assert len(hub.seen(r"/resolve/.*layer_1\.")) == len(hub.seen(r"/resolve/.*safetensors"))


def test_what_is_loaded_is_saved_as_a_skip_transcoder_that_loads_the_same(tmp_path):
    folder = write_set(tmp_path / "set", config=CONFIG.replace("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B"))
    write_layer(folder, 1, W_skip=torch.randn(32, 32))
    sae = load_sae(folder, layer=1)
    again = load_sae(save_pretrained(sae, tmp_path / "saved"))
    x = torch.randn(7, 32)
    assert torch.equal(again(x), sae(x))
    assert (again.site, again.site_out) == (sae.site, sae.site_out)


# --- what is refused --------------------------------------------------------------------------------

@pytest.mark.parametrize("asked", [{}, {"layer": 3}, {"site": "transcoder"}], ids=str)
def test_a_config_that_lists_files_of_another_repository_is_refused_by_name_and_they_are_not_asked_for(
        asked, hub, repo, cache):
    made = repo("gemma-scope-transcoders")
    (made.dir / "config.yaml").write_text(CONFIG + LISTED)
    (made.dir / "features").mkdir()
    (made.dir / "features/layer_0.bin").write_bytes(b"what a dashboard shows")
    with pytest.raises(SaeFormatError, match=r"config\.yaml: its transcoders are files of "
                                             "google/gemma-scope-2b-pt-transcoders .*nothing outside of the source"):
        find_saes(made.id, cache_dir=cache, **asked)
    [entry] = list_saes(made.id, cache_dir=cache)
    assert "google/gemma-scope-2b-pt-transcoders" in entry.flaw
    assert not hub.seen("google")


def test_a_set_without_its_layers_is_refused_as_empty(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(SaeFormatError, match=r"lists no transcoders, and there is no layer_N\.safetensors beside it"):
        find_saes(tmp_path)


def test_cross_layer_transcoders_are_listed_and_refused(repo, cache):
    made = repo("clt-llama-3.2-1b-524k")
    (made.dir / "config.yaml").write_text(CONFIG.replace("transcoder_set", "cross_layer_transcoder"))
    for name in ("W_enc_0", "W_dec_0", "W_enc_1", "W_dec_1"):
        (made.dir / f"{name}.safetensors").write_bytes(b"never fetched")
    assert [entry.shown for entry in list_saes(made.id, cache_dir=cache)] == ["(clt)"]
    with pytest.raises(SaeFormatError, match=r"(?s)clt SAEs span several layers.*clt: not supported"):
        find_saes(made.id, cache_dir=cache)


def test_a_config_that_lists_cross_layer_transcoders_of_elsewhere_is_refused_as_such(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("transcoder_set", "cross_layer_transcoder") + LISTED)
    with pytest.raises(SaeFormatError, match="clt SAEs span several layers"):
        find_saes(tmp_path)


def test_layers_beside_a_config_of_something_else_are_refused_and_take_no_other_sae_along(tmp_path, random_sae):
    write_set(tmp_path / "run", config="seed: 3\nmodel: {name: mine}\n")
    with pytest.raises(SaeFormatError, match=r"run.config\.yaml: model_kind is None; in a config\.yaml of circuit-tr"):
        load_sae(tmp_path, layer=1)
    save_pretrained(random_sae(8, 16, "model.layers.1.output"), tmp_path / "mine")
    with pytest.warns(SaeWarning, match="3 left out, as its config cannot be read: .*model_kind is None"):
        assert [file.entry.site for file in find_saes(tmp_path)] == ["model.layers.1.output"]


def test_a_config_beside_pickles_does_not_hide_that_they_are_pickles(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "layer_0.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        find_saes(tmp_path)


@pytest.mark.parametrize("name", ["log_threshold", "threshold", "W_enc.weight"])
def test_tensors_that_circuit_tracer_does_not_write_are_refused(name, tmp_path):
    folder = write_set(tmp_path / "set")
    write_layer(folder, 0, **{name: torch.ones(64)})
    with pytest.raises(UnsafeFileError, match=f"does not know: '{name}'"):
        load_sae(folder, layer=0)


def test_weights_with_nan_are_refused_by_file_and_tensor(tmp_path):
    folder = write_set(tmp_path / "set")
    bad = torch.ones(64)
    bad[3] = np.nan
    write_layer(folder, 0, b_enc=bad)
    with pytest.raises(SaeFormatError, match=r"layer_0\.safetensors: b_enc has 1 NaN or infinite values"):
        load_sae(folder, layer=0)


def test_a_config_of_something_else_without_any_weights_is_told_as_that(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 0.1\n")
    with pytest.raises(SaeFormatError, match=r"no weights are here, and in the config model_kind is None"):
        load_sae(tmp_path)
    (tmp_path / "layer_0.safetensors").write_bytes(b"never looked at")
    with pytest.raises(SaeFormatError, match=r"config\.yaml: model_kind is None"):
        load_sae(tmp_path)
