"""benchmarks/speed.py: each of our ways computes what the dense way does, or says that it does not; small shapes."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = ["product", "objective", "update", "topk", "autograd", "by hand"]
INFERENCE = [f"inference/{who}" for who in ("ours", "topk", "dense", "by hand")]
GRADIENTS = [f"gradient/{who}" for who in ("ours", "topk", "dense")]


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_workers

    return speed_workers


@pytest.fixture
def given(workers):
    """(data, what every way must find) as a worker reads them."""
    import speed_parts
    from speed_ways import make_data

    data = make_data(64, 256, 96, 8.0, 12.0)
    return vars(data), speed_parts.expected(data)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("way", STEPS + INFERENCE + GRADIENTS)
def test_each_way_runs_and_finds_what_the_dense_one_finds(workers, given, way):
    calls, _ = workers.built(way, *given)
    assert set(calls) == ({"encode", "splice", "splice 4", "splice 1"} if way in INFERENCE else {"step"})
    for call in calls.values():
        assert workers.cpu_seconds(call, 2) > 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("way", [way for way in STEPS + INFERENCE + GRADIENTS if way != "product"])
def test_a_way_that_finds_anything_else_ends(workers, given, way):
    data, expected = given
    wrong = {name: t * 1.01 if t.is_floating_point() else t for name, t in expected.items()}
    with pytest.raises(AssertionError, match="of its length away"):
        workers.built(way, data, {**wrong, "loss of topk": expected["loss of topk"] * 1.1})
    if way in INFERENCE:
        with pytest.raises(AssertionError):
            workers.built(way, data, {**expected, "features": torch.tensor(1), "features of topk": torch.tensor(1)})


def test_tokens_whose_k_features_depend_on_rounding_are_not_compared(workers, given):
    import speed_parts
    from speed_ways import Data

    data, expected = given
    assert expected["tokens of topk"].all()
    data["W_enc"][1:-1:2], data["b_enc"][1:-1:2] = data["W_enc"][2::2], data["b_enc"][2::2]  # pairs, and two more
    data["b_enc"][0], data["b_enc"][-1] = 9.0, -9.0  # before all of them, and after
    ties = speed_parts.expected(Data(**data))
    assert not ties["tokens of topk"].any()
    with pytest.raises(AssertionError, match="too few"):
        workers.built("inference/topk", data, ties)
