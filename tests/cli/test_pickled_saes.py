"""The commands on SAEs that are published as pickles: --allow-pickle, and what happens without it."""

import json

import pytest
import torch

from sae_hooks.hub import load_sae


@pytest.fixture
def pickled(tmp_path):
    """A folder of dictionary_learning for layers 1 and 2 of tiny_gemma2: x_hat = relu(x) - relu(-x) = x."""
    both = torch.cat([torch.eye(192), -torch.eye(192)])
    for layer in (1, 2):
        folder = tmp_path / f"pickled/resid_post_layer_{layer}/trainer_0"
        folder.mkdir(parents=True)
        torch.save({"encoder.weight": both, "encoder.bias": torch.zeros(384), "decoder.weight": both.T,
                    "bias": torch.zeros(192)}, folder / "ae.pt")
        trainer = {"dict_class": "AutoEncoder", "activation_dim": 192, "dict_size": 384, "layer": layer,
                   "lm_name": "tiny-gemma-2", "submodule_name": f"resid_post_layer_{layer}"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    return tmp_path / "pickled"


def test_they_are_listed_without_a_word(run, pickled):
    done = run("list", pickled, "--json")
    assert done.exit_code == 0
    assert [(row["site"], row["width"]) for row in json.loads(done.stdout)] == [
        ("model.layers.1.output", 384), ("model.layers.2.output", 384)]


def test_they_are_converted_to_safetensors_which_need_no_word_any_more(run, pickled, tmp_path):
    refused = run("convert", pickled, tmp_path / "out")
    assert refused.exit_code == 1
    assert "--allow-pickle" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run("convert", pickled, tmp_path / "out", "--allow-pickle")
    assert done.exit_code == 0, done.stderr
    expected = load_sae(pickled, layer=2, allow_pickle=True)
    assert torch.equal(load_sae(tmp_path / "out", layer=2).W_enc, expected.W_enc)
    assert not list((tmp_path / "out").rglob("*.pt"))


@pytest.mark.parametrize("command", [
    ("check", "--tokens", "64"), ("generate", "--prompt", "In the beginning", "--max-new-tokens", "1"),
    ("find", "--positive", "In the beginning God", "--negative", "x = [1, 2]")], ids=lambda c: c[0])
def test_every_command_that_reads_saes_takes_the_word(command, run, model, pickled):
    name, *options = command
    arguments = (name, model, pickled, "--layer", 2, "--device", "cpu", *options)
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "is a pickle" in refused.stderr
    done = run(*arguments, "--allow-pickle")
    assert "is a pickle" not in done.stderr
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("every", [(), ("--all",)], ids=["one a site", "--all"])
def test_they_are_evaluated_on_request(every, run, model, pickled, tmp_path):
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 40)
    arguments = ("eval", model, pickled, "--text", tmp_path / "text.txt", "--layer", 2, "--tokens", 64, "--device",
                 "cpu", *every)
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "is a pickle" in refused.stderr
    done = run(*arguments, "--allow-pickle")
    assert done.exit_code == 0, done.stderr


def test_they_are_extracted_on_request(run, model, pickled, tmp_path):
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth.")
    arguments = ("extract", model, pickled, "--text", tmp_path / "text.txt", "--layer", 2, "--device", "cpu", "--out")
    assert run(*arguments, tmp_path / "no").exit_code == 1
    done = run(*arguments, tmp_path / "yes", "--allow-pickle")
    assert done.exit_code == 0, done.stderr
