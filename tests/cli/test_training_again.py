"""`sae-hooks train` in a folder, or with a cache, that is there already: what is kept, what is refused."""

import json
import shutil

import pytest
import torch
from cli.test_training_commands import MODEL, SHORT, SITE, SMALL, done, equal, run, weights, write_texts
from safetensors.torch import load_file, save_file

from sae_hooks import FeatureStatistics, load_sae
from sae_hooks.training.shards import Shards


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A training text of many short documents."""
    path, _ = write_texts(tmp_path_factory.mktemp("texts"))
    words = " ".join(json.loads(line)["text"] for line in path.read_text().splitlines()).split()
    short = [" ".join(words[i:i + 6]) for i in range(0, len(words), 6)]
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in short * 3))
    return path


@pytest.fixture
def two_models(tmp_path):
    """Two folders of the same name, with different weights."""
    folders = [tmp_path / name / "checkpoint" for name in ("a", "b")]
    for folder in folders:
        shutil.copytree(MODEL, folder)
    path = folders[1] / "model.safetensors"
    save_file({name: t * 1.1 if "layers.0" in name else t for name, t in load_file(path).items()}, path,
              {"format": "pt"})
    return folders


@pytest.mark.parametrize("cached", [False, True])
def test_another_model_of_the_same_name_is_refused(cached, two_models, text, tmp_path):
    more = ("--cache", tmp_path / "acts") if cached else ()
    arguments = ("--text", text, *SMALL, "--tokens", 640, *more)
    done("train", two_models[0], *arguments, "--out", tmp_path / "one")
    before = weights(tmp_path / "one")
    refused = run("train", two_models[1], *arguments, "--out", tmp_path / "one")
    assert refused.exit_code == 1
    assert "one holds a training that read something else: model_weights was" in refused.stderr
    if cached:
        refused = run("train", two_models[1], *arguments, "--out", tmp_path / "two")
        assert "holds another harvest; take a new folder (model_weights: there" in refused.stderr
    done("train", two_models[0], *arguments, "--dtype", "float32", "--out", tmp_path / "wide")  # reads what is there
    done("train", two_models[0], *arguments, "--out", tmp_path / "one")
    assert equal(weights(tmp_path / "one"), before)


def test_what_was_found_out_of_an_sae_since_it_was_trained_stays(text, tmp_path):
    command = ("train", MODEL, "--text", text, *SMALL, "--tokens", 640, "--out", tmp_path / "out")
    done(*command)
    sae = load_sae(tmp_path / "out")
    sae.statistics = FeatureStatistics(1000, *[torch.full((128,), 0.5)] * 3, torch.full((3, 128), 0.5))
    sae.metadata["l0"] = 7.0
    sae.save_pretrained(tmp_path / "out")
    done(*command, "--data-licence", "CC0")
    again = load_sae(tmp_path / "out")
    assert again.statistics is not None
    assert again.statistics.tokens == 1000
    assert (again.metadata["l0"], again.metadata["data_licence"]) == (7.0, "CC0")
    (tmp_path / "out" / "cfg.json").write_text("{")
    done(*command)
    assert load_sae(tmp_path / "out").statistics is None


def test_a_cache_has_as_many_activations_as_were_asked_for(text, tmp_path):
    """Special tokens are no activations, and short texts have many."""
    done("train", MODEL, "--text", text, *SMALL, "--tokens", 960, "--cache", tmp_path / "acts", "--epochs", 1,
         "--out", tmp_path / "out")
    assert 960 + 64 <= len(Shards(tmp_path / "acts" / SITE)) < 960 + 64 + 64  # a batch more, for attention sinks


def test_a_cache_is_no_folder_of_other_things(text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".hidden").touch()
    (tmp_path / "mine" / "letters.txt").touch()
    arguments = ("train", MODEL, "--text", text, *SMALL, *SHORT, "--out", tmp_path / "out")
    refused = run(*arguments, "--cache", tmp_path / "mine")
    assert refused.exit_code == 1
    assert "mine holds letters.txt, and no activations: give --cache an empty folder" in refused.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "letters.txt", "mine"]
    (tmp_path / "mine" / "letters.txt").unlink()
    done(*arguments, "--cache", tmp_path / "mine")


@pytest.mark.parametrize("inside", [".", "run"])
def test_a_training_inside_its_cache_that_was_stopped_before_it_had_harvested_goes_on(text, tmp_path, inside):
    arguments = ("train", MODEL, "--text", text, *SMALL, *SHORT, "--out", tmp_path / "acts" / inside)
    (tmp_path / "acts").mkdir()
    assert run(*arguments, "--cache", tmp_path / "acts", "--field", "nothing").exit_code == 1
    assert [path.name for path in (tmp_path / "acts").rglob("*.json")] == ["training.json"]
    done(*arguments, "--cache", tmp_path / "acts")
