"""Fixtures of the tests of the core: a small Llama, and an SAE for the output of its middle layer."""

import pytest
import torch
from core.generating import EVERY, case_of
from core.reference import sample
from core.steering import IDS, SITE, firing

from sae_hooks import attach_saes


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model(random_model):
    return random_model("Llama")


@pytest.fixture
def sae(model, random_sae):
    return random_sae(32, 64, SITE, like=sample(model, SITE, IDS))


@pytest.fixture
def fires(model, sae):
    """Features that fire often, most often first."""
    return firing(sae, sample(model, SITE, IDS))


@pytest.fixture
def attached(model, sae, fires):
    return attach_saes(model, sae)


@pytest.fixture(params=EVERY)
def any_case(request):
    """A model of each architecture with its SAE, a clamp, and what they say (generating.py)."""
    return case_of(request.param)


@pytest.fixture
def case():
    return case_of("Llama")
