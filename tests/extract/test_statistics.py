"""feature_statistics against a dense reference; FeatureStatistics refuses what cannot be."""

import copy
import pickle

import numpy as np
import pytest
import torch

from sae_hooks import statistics
from sae_hooks.errors import DataError, SaeFormatError, SaeMismatchError
from sae_hooks.sparse import SparseFeatures
from sae_hooks.statistics import LEVELS, FeatureStatistics, feature_statistics

SITE = "model.layers.1.output"


def sparse(dense):
    """The rows of an array (n, d_sae) as SparseFeatures."""
    dense = torch.as_tensor(dense)
    rows, indices = dense.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    nowhere = torch.zeros(len(dense), dtype=torch.int64)
    return SparseFeatures(indptr, indices, dense[rows, indices], dense.shape[1], nowhere, nowhere, nowhere)


def activations(rows=400, d_sae=30, seed=0):
    """Float32 activations of which some features fire always, some never, one once, many with ties."""
    draw = np.random.default_rng(seed)
    values = np.exp(draw.normal(size=(rows, d_sae)) * 4).astype(np.float32)
    values[:, ::3] = values[:, ::3].round(1)
    fires = draw.random((rows, d_sae)) < np.linspace(0, 1, d_sae)
    fires[:, 1] = False
    fires[7, 1] = True
    return values * fires


def reference(dense, tokens):
    """The same numbers from the dense array, a feature at a time, by numpy's own means."""
    found = {"frequency": [], "mean": [], "max": [], "quantiles": []}
    for column in dense.T:
        fired = column[column > 0]
        found["frequency"].append(len(fired) / tokens)
        found["mean"].append(fired.astype(np.float64).mean() if len(fired) else 0)
        found["max"].append(fired.max(initial=0))
        found["quantiles"].append([np.quantile(fired, q, method="nearest") if len(fired) else 0 for q in LEVELS])
    return {name: torch.tensor(np.array(v).T.astype(np.float32)) for name, v in found.items()}


def fields(measured):
    return {name: getattr(measured, name) for name in ("frequency", "mean", "max", "quantiles")}


@pytest.mark.parametrize("at_once", [2**25, 700, 1], ids=["one pass", "some passes", "a pass a feature"])
@pytest.mark.parametrize("cut", [1, 3, 400])
def test_statistics_equal_the_dense_reference_exactly(at_once, cut, monkeypatch):
    monkeypatch.setattr(statistics, "AT_ONCE", at_once)
    dense = activations()
    parts = [sparse(piece) for piece in np.array_split(dense, cut)]
    measured = feature_statistics(parts, 450, 30)
    expected = reference(dense, 450)
    assert measured.tokens == 450
    assert expected["max"][0] == 0
    for name, tensor in fields(measured).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_half_activations_are_taken_as_they_are_and_what_underflowed_does_not_fire():
    dense = torch.tensor(activations()).clamp(max=60_000) * 1e-4
    stored = sparse(dense)
    half = SparseFeatures(stored.indptr, stored.indices.int(), stored.values.half(), 30, stored.doc_id,
                          stored.position, stored.token_id)
    assert (half.values == 0).any()
    measured = feature_statistics([half], 400, 30)
    expected = reference(dense.half().float().numpy(), 400)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fields(measured).items())


def test_the_parts_are_walked_as_often_as_is_said_and_a_generator_once(monkeypatch):
    monkeypatch.setattr(statistics, "AT_ONCE", 2000)
    dense = activations()
    walked = []

    def parts():
        walked.append(1)
        yield from (sparse(piece) for piece in np.array_split(dense, 5))

    again = feature_statistics(parts, 400, 30)
    passes = len(walked)
    assert 1 + np.ceil((dense > 0).sum() / 2000) <= passes <= 1 + np.ceil((dense > 0).sum() / 2000) + 3
    once = feature_statistics(parts(), 400, 30)
    assert len(walked) == passes + 1
    assert all(torch.equal(fields(once)[name], tensor) for name, tensor in fields(again).items())


def test_without_rows_or_tokens_nothing_fires():
    for parts in ([], [sparse(np.zeros((3, 5), np.float32))]):
        measured = feature_statistics(parts, 0, 5)
        assert not any(tensor.any() for tensor in fields(measured).values())
        assert "0 fired, L0 0.0" in repr(measured)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_activations_that_cannot_be_are_refused_by_feature(value):
    dense = activations()
    dense[3, 4] = value
    with pytest.raises(DataError, match=f"feature 4 has the activation {value}"):
        feature_statistics([sparse(dense)], 400, 30)


def test_more_firings_than_tokens_and_other_widths_are_refused():
    dense = np.ones((4, 3), np.float32)
    with pytest.raises(DataError, match="feature 0 fires on 4 rows, but there are 3 tokens"):
        feature_statistics([sparse(dense)], 3, 3)
    with pytest.raises(SaeMismatchError, match="features of an SAE of 3, expected 5"):
        feature_statistics([sparse(dense)], 4, 5)


# --- FeatureStatistics ------------------------------------------------------------------

def sound(d_sae=4):
    ones = torch.ones(d_sae)
    return {"tokens": 10, "frequency": ones / 2, "mean": ones, "max": 2 * ones, "quantiles": ones.repeat(3, 1)}


@pytest.mark.parametrize(("field", "value", "match"), [
    ("frequency", torch.ones(3), r"frequency is \(3,\)"), ("mean", torch.ones(4).double(), "mean is .*float64"),
    ("quantiles", torch.ones(4, 3), r"quantiles is \(4, 3\) .* expected \(3, 4\)"),
    ("max", torch.tensor(1.0), r"max is \(\)"), ("mean", torch.ones(4, device="meta"), "on meta"),
])
def test_tensors_that_do_not_fit_together_are_named(field, value, match):
    with pytest.raises(SaeMismatchError, match=match):
        FeatureStatistics(**sound() | {field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("frequency", 1.5), ("frequency", -0.1), ("frequency", float("nan")), ("mean", 3.0),
    ("mean", 0.0), ("mean", float("nan")), ("max", float("inf")), ("max", 0.0), ("quantiles", 2.5),
    ("quantiles", -1.0), ("quantiles", float("nan"))])
def test_values_that_no_activations_have_are_named_with_the_feature(field, value):
    given = sound()
    given[field][..., 2] = value
    with pytest.raises(SaeFormatError, match=rf"{field} \(.*: feature 2"):
        FeatureStatistics(**given)


def test_quantiles_rise_and_tokens_are_counted():
    falling = sound()
    falling["quantiles"][1, 3] = 0.5
    with pytest.raises(SaeFormatError, match=r"quantiles .*: feature 3"):
        FeatureStatistics(**falling)
    silent = sound()
    silent["frequency"][1] = 0
    with pytest.raises(SaeFormatError, match=r"max \(finite; above 0 where frequency is\): feature 1"):
        FeatureStatistics(**silent)
    with pytest.raises(SaeFormatError, match="tokens"):
        FeatureStatistics(**sound() | {"tokens": -1})


# --- with the SAE -----------------------------------------------------------------------

def test_statistics_stay_with_an_sae_that_is_moved_copied_or_pickled(random_sae):
    sae = random_sae(8, 4, SITE)
    assert sae.statistics is None
    sae.statistics = FeatureStatistics(**sound())
    moved = copy.deepcopy(sae).to(torch.bfloat16).to("meta")
    for other in (moved, copy.copy(sae), pickle.loads(pickle.dumps(sae))):
        assert all(torch.equal(a, b) for a, b in zip(
            fields(other.statistics).values(), fields(sae.statistics).values(), strict=True))
    sae.statistics = None
    assert sae.statistics is None


def test_statistics_are_no_part_of_the_weights(random_sae):
    sae = random_sae(8, 4, SITE)
    names = [*sae.state_dict()], [name for name, _ in sae.named_parameters()]
    sae.statistics = FeatureStatistics(**sound())
    assert ([*sae.state_dict()], [name for name, _ in sae.named_parameters()]) == names


def test_statistics_of_another_number_of_features_are_refused_and_the_old_ones_stay(random_sae):
    sae = random_sae(8, 4, SITE)
    sae.statistics = kept = FeatureStatistics(**sound())
    with pytest.raises(SaeMismatchError, match=r"statistics of 5 features; the SAE at .* has 4"):
        sae.statistics = FeatureStatistics(**sound(5))
    assert sae.statistics is kept
