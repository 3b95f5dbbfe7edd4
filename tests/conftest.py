"""Fixtures for every test. First what is read at import: huggingface_hub's environment, for which the Hub on loopback
is started, and Triton's, whose kernels are interpreted where there is no GPU."""

import os

import loopback  # isort: skip

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, make_sae

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY_GEMMA2 = Path(__file__).parent / "models" / "tiny-gemma2"


def pytest_unconfigure() -> None:
    loopback.stop()


@pytest.fixture
def hub():
    """The Hub on loopback (tests/fake_hub), without faults and with an empty list of requests."""
    loopback.HUB.faults.clear()
    loopback.HUB.requests.clear()
    yield loopback.HUB
    loopback.HUB.faults.clear()


@pytest.fixture
def fake_gpus():
    """The module fakegpu, with its devices there; skipped where torch's private means for them are missing."""
    try:
        import fakegpu
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this torch has no such private means: {error}")
    with fakegpu.fake_gpus():
        yield fakegpu


@pytest.fixture(scope="session")
def tiny_gemma2_loaded():
    """The one loaded copy behind `tiny_gemma2`; read only."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        TINY_GEMMA2, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def tiny_gemma2(tiny_gemma2_loaded):
    """A trained Gemma 2 of 4 layers, d 192, vocabulary 4096, float32, eager attention; each test's own."""
    return copy.deepcopy(tiny_gemma2_loaded)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer of tiny_gemma2: <pad> 0, <eos> 1, <bos> 2 (prepended), padding on the left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA2, padding_side="left")


@pytest.fixture(scope="session")
def random_model():
    """random_model(architecture, layers=3, seed=0, **config): a model of random weights (tiny_models.py)."""
    return make_model


@pytest.fixture(scope="session")
def random_sae():
    """random_sae(d_in, d_sae, site, seed=0, ...): a SAE of which a tenth fires (tiny_models.py)."""
    return make_sae


@pytest.fixture
def nothing_compiled():
    """torch.compile starts anew, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """The graphs compiled so far by `backend`."""
    return []


@pytest.fixture
def backend(graphs):
    """A backend for torch.compile that runs each graph as it was traced."""
    def counting(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward
    return counting
