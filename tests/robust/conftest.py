"""A random Gemma 2, a SAE for its second layer, token ids; and a working directory that should stay empty."""

import pytest
import torch

SITE = "model.layers.1.output"
VOCABULARY = 128


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    """Tests here look for files that somebody left in the working directory."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(random_model):
    """Gemma 2 of random weights: 3 layers, d 32, vocabulary 128."""
    return random_model("Gemma2")


@pytest.fixture
def ids():
    """Token ids (2, 9), none of them special."""
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae_for(random_sae):
    """sae_for(model, ids, layer=1, d_sae=96, **settings): a SAE of which a tenth fires at a layer of this model."""
    def make(model, ids, layer=1, d_sae=96, **settings):
        found = []
        with torch.no_grad(), model.get_submodule(f"model.layers.{layer}").register_forward_hook(
            lambda module, args, output: found.append(output)
        ):
            model(ids)
        states, = found
        settings = {"site": f"model.layers.{layer}.output", "seed": layer, **settings}
        return random_sae(states.shape[-1], d_sae, like=states, **settings)
    return make


@pytest.fixture
def sae(sae_for, random_model, ids):
    """A SAE for the output of layer 1 of `model`, 96 features."""
    return sae_for(random_model("Gemma2"), ids)
