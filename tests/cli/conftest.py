"""Folders of SAEs for tiny_gemma2, and a way to run commands in this process."""

from pathlib import Path

import pytest
import torch

from sae_hooks.hub import save_pretrained
from sae_hooks.sae import SAE

TINY_GEMMA2 = Path(__file__).parents[1] / "models" / "tiny-gemma2"
SITE = "model.layers.{}.output"


def mirror(site, d_in=192):
    """An SAE that fits every model: x_hat = relu(x) - relu(-x) = x, with 2 d_in features."""
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    return SAE(both.T.contiguous(), torch.zeros(2 * d_in), both, torch.zeros(d_in), threshold=torch.zeros(2 * d_in),
               site=site, metadata={"typical_norm": 34.0})


@pytest.fixture
def run():
    """run(*arguments): the command's result, with exit_code, stdout and stderr."""
    from typer.testing import CliRunner

    from sae_hooks.training.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def model():
    """The folder of tiny_gemma2."""
    return TINY_GEMMA2


@pytest.fixture
def one_sae(tmp_path, random_sae):
    """A folder with a random SAE of 1,024 features for layer 2."""
    return random_sae(192, 1024, SITE.format(2), norm=34.0).save_pretrained(tmp_path / "one")


@pytest.fixture
def three_saes(tmp_path, random_sae):
    """A folder with SAEs for layers 0 to 2, in folders named for their sites."""
    saes = {SITE.format(layer): random_sae(192, 256, SITE.format(layer), seed=layer, norm=30.0) for layer in range(3)}
    return save_pretrained(saes, tmp_path / "three")


@pytest.fixture
def fitting_sae(tmp_path):
    """A folder with an SAE that reconstructs layer 2 exactly."""
    return mirror(SITE.format(2)).save_pretrained(tmp_path / "fitting")
