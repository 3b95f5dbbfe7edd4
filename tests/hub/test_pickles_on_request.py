"""SAEs that are published as pickles: listed always, read where the caller allows it, and never for a safer file."""

import json
import shutil

import pytest
import torch
from hub.test_hostile_pickles import saved

from sae_hooks import attach_saes
from sae_hooks.errors import SaeFormatError, SaeMismatchError, SaeWarning, UnsafeFileError
from sae_hooks.hub import find_saes, list_saes, load_sae, save_pretrained

D, F = 32, 1024
QWEN = "SAE-Res-Tiny-W1K-L0_4"


def qwen(folder, layers=(0, 1, 2), k=4, d=D):
    """A folder of Qwen Scope, W_enc of layer n filled with n + 1 on its diagonal."""
    for layer in layers:
        W_enc = torch.zeros(F, d)
        W_enc[:d] = (layer + 1) * torch.eye(d)
        saved(folder / QWEN.replace("L0_4", f"L0_{k}"), {
            "W_enc": W_enc, "W_dec": torch.ones(d, F), "b_enc": torch.zeros(F), "b_dec": torch.zeros(d)},
            f"layer{layer}.sae.pt")
    return folder / QWEN.replace("L0_4", f"L0_{k}")


def trainer(folder, layer=1, k=20, d=D, dict_size=64, **more):
    """A folder of dictionary_learning: BatchTopK with the threshold 0.5."""
    draw = torch.Generator().manual_seed(layer)
    content = {"encoder.weight": torch.randn(dict_size, d, generator=draw), "encoder.bias": torch.zeros(dict_size),
               "decoder.weight": torch.randn(d, dict_size, generator=draw), "b_dec": torch.ones(d),
               "k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(0.5)}
    saved(folder, content, "ae.pt")
    told = {"dict_class": "BatchTopKSAE", "activation_dim": d, "dict_size": dict_size, "k": k, "layer": layer,
            "lm_name": "meta-llama/Tiny", "submodule_name": f"resid_post_layer_{layer}", **more}
    (folder / "config.json").write_text(json.dumps({"trainer": told, "buffer": {"io": "out", "ctx_len": 128}}))
    return folder


@pytest.fixture(params=["qwen", "dictionary_learning"])
def folder(request, tmp_path):
    """A folder with SAEs of layers 0 to 2, in either format."""
    if request.param == "qwen":
        return qwen(tmp_path)
    for layer in range(3):
        trainer(tmp_path / f"saes/resid_post_layer_{layer}/trainer_0", layer)
    return tmp_path / "saes"


def test_without_a_word_a_pickle_is_listed_and_refused_with_both_ways_out_and_never_opened(folder, random_model,
                                                                                           watched):
    with watched() as opened:
        table = list_saes(folder)
        assert [entry.site for entry in table] == [f"model.layers.{n}.output" for n in range(3)]
        for read in (lambda: load_sae(folder, layer=1), lambda: find_saes(folder),
                     lambda: attach_saes(random_model("Llama"), folder)):
            with pytest.raises(UnsafeFileError) as caught:
                read()
            assert "pt is a pickle, which can run code when it is opened. allow_pickle=True (--allow-pickle) reads " \
                   "it with torch's weights_only loader, which runs no code of the file; `sae-hooks convert SOURCE " \
                   "FOLDER --allow-pickle` writes it as safetensors" in str(caught.value)
    assert not [line for line in opened if ".pt" in line and line.startswith("open ")]


def test_a_file_that_was_found_without_a_word_is_not_read_later(folder):
    [file] = find_saes(folder, layer=1, allow_pickle=True)
    assert file.load().d_in == D
    with pytest.raises(UnsafeFileError, match=r"allow_pickle=True \(--allow-pickle\) reads it"):
        type(file)(file.entry, file.where, file.source).load()


def test_with_it_a_pickle_is_attached_read_at_first_use_and_computes_its_equation(folder, random_model, watched):
    model = random_model("Llama")
    ids = torch.arange(1, 9)[None]
    with watched() as opened:
        attach_saes(model, folder, allow_pickle=True)
        assert not [line for line in opened if ".pt" in line and line.startswith("open ")]
    expected = load_sae(folder, layer=1, allow_pickle=True)
    hidden = model(ids, output_hidden_states=True).hidden_states[2]
    with torch.no_grad(), model.saes.capture() as captured:
        model(ids)
    found = captured["model.layers.1.output"].to_dense()[-1]
    torch.testing.assert_close(found, expected.encode(hidden)[0, -1].detach(), rtol=1e-3, atol=1e-3, check_dtype=False)
    assert found.count_nonzero() > 3
    assert list(model.saes) == [f"model.layers.{n}.output" for n in range(3)]


def test_one_file_can_be_named(folder):
    [file] = find_saes(folder, layer=2, allow_pickle=True)
    assert torch.equal(load_sae(file.where, allow_pickle=True).W_enc, file.load().W_enc)


def test_an_sae_of_another_width_is_refused_before_it_is_read(tmp_path, random_model, watched):
    model = random_model("Llama")
    for source in (qwen(tmp_path, layers=(1,), d=16), trainer(tmp_path / "resid_post_layer_1", d=16)):
        with watched() as opened, pytest.raises(SaeMismatchError, match="it reads 16 values"):
            attach_saes(model, source, allow_pickle=True)
        assert not [line for line in opened if ".pt" in line and line.startswith("open ")]


@pytest.mark.parametrize("allowed", [False, True])
def test_where_a_safetensors_file_of_the_site_is_it_is_meant(allowed, folder):
    [file] = find_saes(folder, layer=1, allow_pickle=True)
    save_pretrained({"model.layers.1.output": file.load()}, folder)
    [found] = find_saes(folder, layer=1, allow_pickle=allowed)
    assert found.entry.weights == "model.layers.1.output/sae_weights.safetensors"
    assert torch.equal(load_sae(folder, layer=1, allow_pickle=allowed).W_enc, file.load().W_enc)
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        find_saes(folder, layer=2)


def test_pickles_take_no_other_file_along_where_all_layers_are_meant(folder, random_model):
    [file] = find_saes(folder, layer=1, allow_pickle=True)
    save_pretrained({"model.layers.1.output": file.load()}, folder)
    with pytest.warns(SaeWarning, match=r"2 left out, as PyTorch pickled it, which allow_pickle=True reads: .*pt$"):
        model = attach_saes(random_model("Llama"), folder)
    assert list(model.saes) == ["model.layers.1.output"]
    assert len(find_saes(folder, allow_pickle=True)) == 3
    for asked in ({"layer": (1, 2)}, {"site": "model.layers.2.output"}):
        with pytest.raises(UnsafeFileError, match="is a pickle"):
            find_saes(folder, **asked)


def test_a_pickle_of_a_site_that_another_file_has_is_not_spoken_of(folder):
    for file in find_saes(folder, allow_pickle=True):
        save_pretrained({str(file.entry.site): file.load()}, folder)
    assert {f.entry.dialect for f in find_saes(folder)} == {"saelens"}


def test_a_pickle_that_could_not_be_read_anyway_takes_no_other_file_along(tmp_path, random_sae):
    shutil.copytree(qwen(tmp_path / "q"), tmp_path / "mixed/renamed")
    save_pretrained(random_sae(D, 64, "transformer.h.1.output"), tmp_path / "mixed/mine")
    with pytest.warns(SaeWarning, match="3 left out, as PyTorch pickled it"):
        assert [f.entry.site for f in find_saes(tmp_path / "mixed")] == ["transformer.h.1.output"]


def test_layer_fetches_the_configs_of_that_layer_alone_and_l0_its_one_weight_file(hub, repo, cache, tmp_path):
    made = repo("saebench")
    for layer in range(6):
        for n, k in enumerate((20, 40, 80)):
            trainer(made.dir / f"gemma/resid_post_layer_{layer}/trainer_{n}", layer, k)
            trainer(made.dir / f"gemma/resid_post_layer_{layer}_checkpoints/trainer_{n}_step_9", layer, k)
    before = len(hub.requests)
    sae = load_sae(made.id, layer=4, l0=45, cache_dir=cache, allow_pickle=True)
    asked = [line for line, _ in hub.requests[before:] if "/resolve/" in line or "_cdn" in line]
    assert {line.split("gemma/")[1].split("?")[0] for line in asked if "config.json" in line} == {
        f"resid_post_layer_4/trainer_{n}/config.json" for n in range(3)}
    assert {line.split("gemma/")[1].split("?")[0] for line in asked if "ae.pt" in line} == {
        "resid_post_layer_4/trainer_1/ae.pt"}
    assert sae.metadata["source"].endswith("gemma/resid_post_layer_4/trainer_1/ae.pt")
    checkpoint = f"{made.id}/gemma/resid_post_layer_4_checkpoints/trainer_2_step_9"
    assert load_sae(checkpoint, cache_dir=cache, allow_pickle=True).metadata["l0"] == 80


def test_a_repository_of_qwen_scope_is_told_by_names_alone(hub, repo, cache, tmp_path):
    made = repo(QWEN)
    qwen(tmp_path)
    shutil.copytree(tmp_path / QWEN, made.dir, dirs_exist_ok=True)
    found = find_saes(made.id, cache_dir=cache, allow_pickle=True)
    assert [(file.entry.layer, file.entry.l0, file.entry.d_in) for file in found] == [(n, 4.0, D) for n in range(3)]
    assert not hub.seen(r"sae\.pt|_cdn")
    assert found[2].load().W_enc[0, 0] == 3


def test_a_folder_of_qwen_scope_that_does_not_tell_k_is_listed_and_refused_before_it_is_read(tmp_path, watched):
    nameless = qwen(tmp_path).rename(tmp_path / "saes")
    assert [entry.shown for entry in list_saes(nameless)] == ["(unreadable)"] * 3
    with watched() as opened, pytest.raises(SaeFormatError, match=r"layer1\.sae\.pt: neither a folder's name nor a"):
        find_saes(nameless, layer=1, allow_pickle=True)
    assert not [line for line in opened if ".sae.pt" in line and line.startswith("open ")]


def test_a_width_that_the_name_does_not_keep_is_refused(tmp_path):
    wrong = qwen(tmp_path, layers=(1,)).rename(tmp_path / "SAE-Res-Tiny-W2K-L0_4")
    with pytest.raises(SaeFormatError, match="not what its name or config says: width is 1024, expected 2048"):
        load_sae(wrong, allow_pickle=True)


def test_a_checkpoint_from_the_middle_of_a_training_is_refused_by_name(tmp_path):
    at = trainer(tmp_path / "resid_post_layer_1/trainer_0")
    state = {"step": 9, "ae": torch.load(at / "ae.pt", weights_only=True), "optimizer": {"state": {}}, "config": {},
             "norm_factor": 1.5}
    torch.save(state, at / "ae.pt")
    with pytest.raises(SaeFormatError, match=r"ae\.pt: .*'ae' is a dict, 'optimizer' is a dict.*middle of a training"):
        load_sae(at, allow_pickle=True)


def test_a_transcoder_is_left_out_with_a_warning_and_refused_where_it_is_meant(tmp_path):
    trainer(tmp_path / "resid_post_layer_1/trainer_0", 1)
    other = trainer(tmp_path / "mlp_layer_2/trainer_0", 2, submodule_name="mlp_layer_2")
    told = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(told | {"buffer": {"io": "in_and_out"}}))
    with pytest.warns(SaeWarning, match="1 left out.*in_and_out.*a transcoder"):
        assert len(find_saes(tmp_path, site="resid_post", allow_pickle=True)) == 1
    with pytest.raises(SaeFormatError, match=r"mlp_layer_2/trainer_0/config\.json: buffer\.io is 'in_and_out'"):
        load_sae(other, allow_pickle=True)


def test_an_mlp_sae_goes_where_the_caller_says_and_nowhere_else(tmp_path, random_model):
    at = trainer(tmp_path / "mlp_layer_1/trainer_0", submodule_name="mlp_layer_1")
    model = random_model("Llama")
    with pytest.raises(SaeFormatError, match=r"config\.json calls the site 'mlp_layer_1'.*give site= as a module path"):
        attach_saes(model, at, allow_pickle=True)
    attach_saes(model, {"model.layers.1.mlp.output": at}, allow_pickle=True, preload=True)
    assert list(model.saes) == ["model.layers.1.mlp.output"]


# --- the L0 that someone measured ---------------------------------------------------------------------------------

def evaluated(folder, l0, layer=1, **more):
    """A ReLU SAE, whose config tells no L0, with the eval_results.json that dictionary_learning's demo writes."""
    trainer(folder, layer, **{"dict_class": "AutoEncoder", **more})
    draw = torch.Generator().manual_seed(layer)
    size = more.get("dict_size", 64)
    torch.save({"encoder.weight": torch.randn(size, D, generator=draw), "encoder.bias": torch.zeros(size),
                "decoder.weight": torch.randn(D, size, generator=draw), "bias": torch.zeros(D)}, folder / "ae.pt")
    results = {"l2_loss": 21.5, "l1_loss": 310.0, "l0": l0, "frac_alive": 0.98, "frac_recovered": 0.97,
               "hyperparameters": {"n_inputs": 200, "context_length": 128}}
    (folder / "eval_results.json").write_text(json.dumps(results))


@pytest.fixture
def relu_saes(repo):
    """A repository with three ReLU SAEs of each of layers 1 and 2, of measured L0 30.5, 120.25 and 400, and a wide one
    of layer 2."""
    made = repo("relu")
    for layer in (1, 2):
        for n, l0 in enumerate((400.0, 30.5, 120.25)):
            evaluated(made.dir / f"resid_post_layer_{layer}/trainer_{n}", l0, layer)
    evaluated(made.dir / "resid_post_layer_2/trainer_3", 100.0, 2, dict_size=128)
    evaluated(made.dir / "resid_post_layer_3/trainer_0", 77.0, 3)
    return made


@pytest.mark.parametrize(("asked", "n"), [({}, 2), ({"l0": 40}, 1), ({"l0": 1000}, 0)], ids=str)
def test_where_no_config_tells_an_l0_the_measured_one_chooses(asked, n, relu_saes, cache):
    sae = load_sae(relu_saes.id, layer=1, cache_dir=cache, allow_pickle=True, **asked)
    assert sae.metadata["source"].endswith(f"layer_1/trainer_{n}/ae.pt")
    assert sae.metadata["l0"] == (400.0, 30.5, 120.25)[n]
    found = find_saes(relu_saes.id, cache_dir=cache, allow_pickle=True, **asked)
    assert [file.entry.weights for file in found] == [
        f"resid_post_layer_1/trainer_{n}/ae.pt", f"resid_post_layer_2/trainer_{n}/ae.pt",
        "resid_post_layer_3/trainer_0/ae.pt"]


def test_evaluations_are_read_only_where_they_decide(relu_saes, cache, hub):
    list_saes(relu_saes.id, cache_dir=cache)
    find_saes(relu_saes.id, layer=3, cache_dir=cache, allow_pickle=True)
    find_saes(relu_saes.id, layer=2, width=128, cache_dir=cache, allow_pickle=True)
    assert not hub.seen("eval_results")
    find_saes(relu_saes.id, layer=2, cache_dir=cache, allow_pickle=True)
    asked = {line.split("/resolve/")[1].split("/", 1)[1].split("?")[0] for line, _ in hub.requests
             if "eval_results" in line}
    assert asked == {f"resid_post_layer_2/trainer_{n}/eval_results.json" for n in range(3)}


@pytest.mark.parametrize("content", ['{"l0": NaN}', '{"l0": "few"}', "[]", ""])
def test_results_that_cannot_be_read_are_told_and_leave_the_l0_unknown(content, tmp_path):
    for n, l0 in enumerate((400.0, 30.0, 110.0)):
        evaluated(tmp_path / f"resid_post_layer_1/trainer_{n}", l0)
    (tmp_path / "resid_post_layer_1/trainer_2/eval_results.json").write_text(content)
    with pytest.warns(SaeWarning, match=r"trainer_2/ae\.pt is of unknown L0: .*trainer_2/eval_results\.json: "):
        [file] = find_saes(tmp_path, allow_pickle=True)
    assert (file.entry.l0, file.load().metadata["l0"]) == (30.0, 30.0)


def test_the_l0_of_a_config_goes_before_the_measured_one(tmp_path):
    for n, (target, l0) in enumerate(((20.0, 90.0), (100.0, 700.0))):
        evaluated(tmp_path / f"resid_post_layer_1/trainer_{n}", l0, target_l0=target)
    [file] = find_saes(tmp_path, allow_pickle=True)
    assert (file.entry.weights, file.entry.l0) == ("resid_post_layer_1/trainer_1/ae.pt", 100.0)


@pytest.mark.filterwarnings("ignore:1 left out, as its site is not told")
def test_a_file_of_unknown_site_sets_no_pickle_aside(tmp_path, random_sae):
    save_pretrained(random_sae(D, 64, None), tmp_path / "mine")
    qwen(tmp_path, layers=(1,))
    for asked in ({}, {"site": "model.layers.1.output"}, {"layer": 1}):
        found = find_saes(tmp_path, allow_pickle=True, **asked)
        assert [file.entry.dialect for file in found] == ["qwen_scope"]
