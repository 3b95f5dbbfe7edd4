"""unit="max": strengths in multiples of the largest activation in the statistics that are kept with the SAE."""

import json
import re

import pytest
import torch

from sae_hooks import attach_saes
from sae_hooks.errors import EditError
from sae_hooks.statistics import FeatureStatistics

SITE = "model.layers.2.output"
MAXIMA = {3: 8.0, 5: 0.5, 9: 20.0}
IDS = torch.tensor([[2, 100, 200, 300], [2, 400, 500, 600]])


@pytest.fixture
def model(tiny_gemma2, random_sae):
    """tiny_gemma2 with an SAE of 64 features, of which only 3, 5 and 9 ever fired."""
    sae = random_sae(192, 64, SITE, norm=34)
    largest = torch.zeros(64)
    largest[list(MAXIMA)] = torch.tensor(list(MAXIMA.values()))
    fired = (largest > 0).float()
    sae.statistics = FeatureStatistics(1000, fired / 4, largest / 2, largest, (largest / 2).repeat(3, 1))
    return attach_saes(tiny_gemma2, sae)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("op", ["clamp", "add"])
def test_a_strength_in_maxima_is_the_same_edit_as_in_activations(model, op):
    with getattr(model.saes, op)({3: 2.0, 5: -1.0}, unit="max") as handle:
        in_maxima = logits(model)
    with getattr(model.saes, op)({3: 16.0, 5: -0.5}):
        assert torch.equal(logits(model), in_maxima)
    assert json.loads(handle.to_json())["edits"][0]["values"] == [[16.0, -0.5]]


def test_maxima_are_found_whatever_torchs_default_device_is(model):
    with torch.device("meta"):
        handle = model.saes.clamp({3: 2.0, 5: -1.0}, unit="max")
    with handle:
        logits(model)
    assert json.loads(handle.to_json())["edits"][0]["values"] == [[16.0, -0.5]]


def test_a_batch_keeps_a_strength_for_each_row_and_nan_leaves_one_untouched(model):
    plain = logits(model)
    with model.saes.clamp({9: torch.tensor([float("nan"), 0.5])}, unit="max") as handle:
        edited = logits(model)
    assert json.loads(handle.to_json())["edits"][0]["values"] == [[None], [10.0]]
    assert torch.equal(edited[0], plain[0])
    assert not torch.equal(edited[1], plain[1])


def test_the_document_of_an_edit_needs_no_statistics_where_it_is_applied(model):
    with model.saes.clamp({3: 2.0}, unit="max") as handle:
        document, expected = handle.to_json(), logits(model)
    model.saes[SITE].statistics = None
    with model.saes.apply(document):
        assert torch.equal(logits(model), expected)


def test_without_statistics_the_error_says_how_to_get_them(model):
    model.saes[SITE].statistics = None
    with pytest.raises(EditError, match=rf'unit="max" needs the statistics of {re.escape(SITE)}.*export_features'):
        model.saes.clamp({3: 2.0}, unit="max")


def test_a_feature_that_never_fired_has_no_maximum(model):
    with pytest.raises(EditError, match=r"feature 4 at .* never fired in the 1000 tokens"):
        model.saes.add({3: 1.0, 4: 2.0}, unit="max")


@pytest.mark.parametrize(("values", "unit", "match"), [
    ({64: 1.0}, "max", "the SAE has features 0 to 63"), ({3: float("nan")}, "max", "must be finite"),
    ({9: 3e38}, "max", "too large for float32"), ({3: 1e30}, "max", "overflow"), ({}, "max", "names no feature"),
    ({3: 1.0}, "maximum", "one of activation, max; got 'maximum'"), ({3: 1.0}, None, "one of activation, max"),
])
def test_what_cannot_be_meant_is_refused_and_nothing_is_opened(model, values, unit, match):
    plain = logits(model)
    with pytest.raises(EditError, match=match):
        model.saes.clamp(values, unit=unit)
    assert torch.equal(logits(model), plain)


def test_the_default_unit_is_the_activation(model):
    with model.saes.clamp({3: 2.0}) as unsaid:
        default = logits(model)
    with model.saes.clamp({3: 2.0}, unit="activation") as named:
        assert torch.equal(logits(model), default)
    assert unsaid.to_json() == named.to_json()


def test_a_factor_has_no_unit(model):
    with pytest.raises(TypeError, match="unit"):
        model.saes.scale({3: 2.0}, unit="max")
