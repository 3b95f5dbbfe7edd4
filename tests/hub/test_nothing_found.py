"""What is said where a source has no SAE that is known, and where of what it has not all can be had."""

import json

import pytest
import torch
from formats.openmoss import HYPERPARAMS, drawn, linear
from formats.sparsify_files import CONFIG, write
from hub.files import write_npz
from hub.test_hostile_pickles import saved
from hub.test_pickles_on_request import trainer
from hub.test_transcoder_sets import write_layer, write_set
from safetensors.torch import save_file

from sae_hooks import attach_saes
from sae_hooks.errors import (
    SaeDownloadError,
    SaeFormatError,
    SaeMismatchError,
    SaeNotFoundError,
    SaeWarning,
    UnsafeFileError,
)
from sae_hooks.hub import find_saes, list_saes, load_sae, save_pretrained
from sae_hooks.sites import resolve


@pytest.mark.parametrize(("files", "tells"), [
    (("config.json", "model.safetensors", "tokenizer.json"), "model.safetensors is what the weights of a language"),
    (("config.json", "pytorch_model-00001-of-00002.bin"), "pytorch_model-00001-of-00002.bin is what the weights of a"),
    (("adapter_config.json", "adapter_model.safetensors"), "adapter_model.safetensors is what .* or an adapter"),
    (("a/cfg.json", "a/model.safetensors"), "Looked for")])
def test_a_language_model_is_told_from_a_repository_of_saes(files, tells, repo, cache):
    made = repo("plain")
    for name in files:
        (made.dir / name).parent.mkdir(exist_ok=True)
        (made.dir / name).write_bytes(b"{}")
    with pytest.raises(SaeNotFoundError, match=tells) as caught:
        list_saes(made.id, cache_dir=cache)
    assert ("give a repository or folder of SAEs as the source" in str(caught.value)) == (tells != "Looked for")


@pytest.mark.parametrize(("name", "tells"), [
    ("sae_weights.safetensors", "has no config.json (Llama Scope) or cfg.json (SAELens) beside it"),
    ("layers.1/sae.safetensors", "has no cfg.json (sparsify) beside it"),
    ("L1R/checkpoints/final.safetensors", "has no hyperparams.json (Llama Scope) in the folder above"),
    ("layer_1.safetensors", "has no config.yaml (circuit-tracer) beside it, which says what it reads and writes")])
def test_weights_without_their_config_are_told_what_they_lack(name, tells, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(SaeNotFoundError) as caught:
        load_sae(tmp_path)
    assert f"{name} {tells}" in str(caught.value)
    assert "more" not in str(caught.value)


def test_a_set_of_transcoders_without_its_config_is_not_taken_for_the_pickles_beside_it(repo, cache):
    """As mwhanna/qwen3-14b-transcoders is published."""
    made = repo("qwen3-14b-transcoders")
    for layer in range(3):
        write_layer(made.dir, layer)
    (made.dir / "features").mkdir()
    (made.dir / "features/layer_0.bin").write_bytes(b"dashboards")
    with pytest.raises(SaeNotFoundError, match=r"layer_0\.safetensors has no config\.yaml .*; nor have 2 more"):
        find_saes(made.id, cache_dir=cache)


def test_a_pickle_without_its_config_is_refused_with_what_it_lacks(tmp_path):
    saved(tmp_path / "trainer_0", {"W_enc": torch.zeros(2, 2)}, "ae.pt")
    with pytest.raises(UnsafeFileError, match=r"ae\.pt is a pickle.*trainer_0/ae\.pt has no config\.json"):
        load_sae(tmp_path, allow_pickle=True)


def test_a_folder_that_is_not_there_is_told_what_is(gemma_repo, cache):
    with pytest.raises(SaeNotFoundError, match=f"no such folder or weight file; {gemma_repo.id} has README.md, "
                                               "layer_0, layer_1$"):
        find_saes(f"{gemma_repo.id}/layer_7/width_4k", cache_dir=cache)
    with pytest.raises(SaeNotFoundError, match=r"/layer_1/width_4k has average_l0_176, average_l0_22, average_l0_82$"):
        find_saes(f"{gemma_repo.id}/layer_1/width_4k/average_l0_71", cache_dir=cache)


def test_a_config_that_is_named_is_told_that_its_folder_is_to_be(tmp_path):
    folder = write(tmp_path / "layers.1")
    with pytest.raises(SaeNotFoundError, match=rf"cfg\.json goes with weights; name its folder, {folder}$"):
        load_sae(folder / "cfg.json")


# --- one weight file of a repository --------------------------------------------------------------------

def test_a_weight_file_of_a_repository_can_be_named(hub, repo, cache):
    made = repo("qwen3-4b-transcoders")
    write_set(made.dir / "low")
    sae = load_sae(f"{made.id}/low/layer_1.safetensors", cache_dir=cache)
    assert torch.equal(sae.W_enc.T, write_layer(made.dir / "again", 1)["W_enc"])
    assert sae.metadata["source"].endswith("/low/layer_1.safetensors")
    assert len(hub.seen("^GET .*_cdn")) == 1


def test_the_repository_s_name_still_tells_what_its_file_is(gemma_repo, cache):
    file = f"{gemma_repo.id}/layer_1/width_4k/average_l0_22/params.npz"
    assert [f.entry.weights for f in find_saes(file, cache_dir=cache)] == ["params.npz"]
    sae = load_sae(file, site="model.layers.1.output", cache_dir=cache)
    assert torch.equal(sae.W_enc, load_sae(gemma_repo.id, layer=1, l0=22, cache_dir=cache).W_enc)


def test_a_file_of_llama_scope_s_first_layout_is_read_with_the_config_above_it(repo, cache):
    made = repo("Tiny-LXR")
    folder = made.dir / "L15R"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "hyperparams.json").write_text(json.dumps(HYPERPARAMS))
    save_file(linear(drawn(threshold=False), torch.float32), folder / "checkpoints/final.safetensors")
    sae = load_sae(f"{made.id}/L15R/checkpoints/final.safetensors", cache_dir=cache)
    assert sae.site == "model.layers.15.output"


def test_a_folder_that_is_called_like_a_file_is_a_folder(repo, random_sae, cache):
    """As in jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs."""
    made = repo("resid-post-SAEs")
    save_pretrained(random_sae(8, 16, "model.layers.3.output"), made.dir / "v5_32k_layer_3.pt")
    assert load_sae(f"{made.id}/v5_32k_layer_3.pt", cache_dir=cache).site == "model.layers.3.output"


# --- what is offered ------------------------------------------------------------------------------------

def test_a_place_without_a_name_is_told_by_its_path(tmp_path, random_sae):
    for layer in (0, 1, 2):
        save_pretrained(random_sae(8, 16, f"transformer.h.{layer}.input"), tmp_path / f"blocks.{layer}.hook_resid_pre")
    with pytest.raises(SaeNotFoundError, match=r"It offers:\n  h\.N\.input: layers 0-2; widths 16$"):
        find_saes(tmp_path, site="mlp_out")


def test_layers_whose_configs_were_not_asked_for_are_no_unknown_sites(tmp_path):
    for layer in range(4):
        write(tmp_path / f"layers.{layer}")
    with pytest.raises(SaeNotFoundError) as caught:
        find_saes(tmp_path, layer=1, site="mlp_out")
    assert str(caught.value).splitlines()[1:] == [
        "  resid_post: layers 1; widths 40", "  layers 0, 2-3, of which `sae-hooks list` or list_saes tells more"]


def test_what_is_not_meant_without_a_site_is_offered_all_the_same(tmp_path):
    trainer(tmp_path / "resid_post_layer_1/trainer_0", 1)
    trainer(tmp_path / "mlp/trainer_0", 2, submodule_name="model.layers.2.mlp")
    with pytest.raises(SaeNotFoundError) as caught:
        find_saes(tmp_path, layer=3, allow_pickle=True)
    assert str(caught.value).splitlines()[1:] == [
        "  resid_post: layers 1", "  others, of which `sae-hooks list` or list_saes tells more"]


def test_a_layer_alone_is_answered_with_what_else_an_sae_needs_that_tells_no_place(tmp_path):
    write(tmp_path)
    with pytest.raises(SaeNotFoundError, match=r"(?s)nothing for layer=3\..*unknown site: widths 40\n.*give site= as a "
                                               "module path .* or a kind and layer="):
        load_sae(tmp_path, layer=3)
    assert load_sae(tmp_path, layer=3, site="resid_post").site == "layers.3.output"


def test_an_sae_that_tells_no_site_takes_no_other_along_where_all_are_meant(tmp_path, random_model):
    write(tmp_path / "mine")
    with pytest.raises(SaeFormatError, match="calls the site 'mine'"):
        find_saes(tmp_path)
    for layer in range(2):
        write(tmp_path / f"layers.{layer}")
    with pytest.warns(SaeWarning, match="1 left out, as its site is not told: .*calls the site 'mine'"):
        assert [f.entry.site for f in find_saes(tmp_path)] == ["layers.0.output", "layers.1.output"]
    assert find_saes(tmp_path, layer=1)[0].entry.weights == "layers.1/sae.safetensors"


@pytest.mark.parametrize(("name", "architecture"), [
    ("embed_tokens", "Llama"), ("wte", "GPT2"), ("embed_in", "GPTNeoX")])
def test_sparsify_s_folder_of_the_embedding_is_of_the_embedding(name, architecture, tmp_path, random_model):
    write(tmp_path / name, config=CONFIG)
    write(tmp_path / "layers.1.mlp")
    with pytest.raises(SaeNotFoundError):
        find_saes(tmp_path, site="model.layers.1.output")  # was once given the embedding's
    assert [f.entry.site for f in find_saes(tmp_path)] == ["layers.1.mlp.output"]
    assert sorted((e.kind, e.site) for e in list_saes(tmp_path)) == [
        ("embedding", f"{name}.output"), ("mlp_out", "layers.1.mlp.output")]
    [file] = find_saes(tmp_path, site="embedding")
    assert file.entry.weights == f"{name}/sae.safetensors"
    assert resolve(random_model(architecture), file.entry.site).path.endswith("." + name)


def test_of_many_saes_for_another_model_some_are_named_and_the_rest_counted(tmp_path, random_model):
    for layer in range(14):
        write_npz(tmp_path / f"gemma-scope-2b-pt-res/layer_{layer}/width_4k/average_l0_22/params.npz", d_sae=4096)
    with pytest.raises(SaeMismatchError) as caught:
        attach_saes(random_model("Gemma2"), tmp_path)
    told = str(caught.value).splitlines()
    assert len(told) == 11
    assert told[-1] == "and 4 more"


def test_a_hub_that_breaks_off_is_not_asked_for_all_the_other_configs(hub, repo, cache, naps):
    made = repo("sae-llama-3-8b-32x")
    for layer in range(60):
        write(made.dir / f"layers.{layer}")
    hub.fail(r"^HEAD .*cfg\.json", status=503, times=-1)
    with pytest.raises(SaeDownloadError, match=r"layers\.\d+/cfg\.json: the Hub could not be reached"):
        find_saes(made.id, cache_dir=cache)
    asked = {line.split("?")[0] for line, _ in hub.seen(r"cfg\.json")}
    assert len(asked) < 40


def test_the_name_of_a_dtype_is_refused_before_anything_is_attached(gemma_repo, cache, random_model):
    model = random_model("Gemma2")
    with pytest.raises(SaeFormatError, match=r"dtype must be a torch\.dtype, such as torch\.bfloat16, got 'bfloat16'"):
        load_sae(gemma_repo.id, layer=1, cache_dir=cache, dtype="bfloat16")
    with pytest.raises(SaeFormatError, match="got 'float16'"):
        attach_saes(model, gemma_repo.id, cache_dir=cache, dtype="float16")
    assert not hasattr(model, "saes")


def test_a_link_to_a_folder_elsewhere_is_told_beside_other_saes_and_one_to_what_is_searched_is_not(
        tmp_path, random_sae):
    saes, site = tmp_path / "saes", "model.layers.1.output"
    save_pretrained({site: random_sae(4, 32, site)}, saes)
    (saes / "latest").symlink_to(saes / site)
    assert len(find_saes(saes)) == 1
    (saes / "run").mkdir()
    (saes / "run/theirs").symlink_to(save_pretrained(random_sae(4, 32, "model.layers.2.output"), tmp_path / "other"))
    told = r"saes: Links to folders are not followed; name one as the source: run/theirs$"
    for look in (find_saes, list_saes):
        with pytest.warns(SaeWarning, match=told):
            assert len(look(saes)) == 1
