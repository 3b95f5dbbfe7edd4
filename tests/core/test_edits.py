"""Edits as values: what each operation means on k rows, what is refused, the JSON form."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from core import reference

from sae_hooks import EditError, Edits, edits
from sae_hooks.edits import Rows, check, check_range, edit

NAN = float("nan")
SITE = "model.layers.1.output"


def rows_of(made, sae):
    """The edit's k rows in float64, as the hook would pick them."""
    picked = list(made.features)
    return Rows(sae.W_enc.T[picked].double(), sae.b_enc[picked].double(), sae.threshold[picked].double(),
                sae.W_dec[picked].double(), made.gain.double()[:, None], made.shift.double()[:, None],
                made.only_if_active, made.reads)


@pytest.mark.parametrize("only_if_active", [False, True])
@pytest.mark.parametrize("op", edits.OPS)
def test_k_rows_say_what_the_full_encode_says(random_sae, op, only_if_active):
    sae = random_sae(16, 60, seed=2)
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).double()
    values = {3: 2.5, 59: torch.tensor([-1.0, NAN]), 0: torch.tensor([0.0, 4.0])}
    made = edit(op, SITE, values, only_if_active=only_if_active)
    rows = rows_of(made, sae)
    acts = rows.acts(x)
    full = reference.encode(sae, x.numpy())
    np.testing.assert_allclose(acts, full[..., list(values)], atol=1e-12)
    assert 0 < (acts > 0).sum() < acts.numel()
    want = reference.edited(full, op, values, only_if_active) - full
    got = rows.change(acts, 1, 2).expand(2, 40, 3)
    np.testing.assert_allclose(got, want[..., list(values)], atol=1e-6)
    assert want.any()
    np.testing.assert_array_equal(np.delete(want, list(values), axis=-1), 0)


def test_a_plain_add_reads_no_activation_and_every_other_edit_does():
    assert not edit("add", SITE, {0: 1.0}).reads
    assert edit("add", SITE, {0: 1.0}, only_if_active=True).reads
    assert edit("clamp", SITE, {0: 1.0}).reads
    assert edit("scale", SITE, {0: 1.0}).reads


def test_a_nan_row_is_changed_by_exactly_nothing():
    for op in edits.OPS:
        made = edit(op, SITE, {4: torch.tensor([NAN, 3.0]), 5: torch.tensor([NAN, NAN])})
        assert made.gain[0].tolist() == [0.0, 0.0]
        assert made.shift[0].tolist() == [0.0, 0.0]
        assert (made.gain[1, 0], made.shift[1, 0]) == {"clamp": (-1, 3), "scale": (2, 0), "add": (0, 3)}[op]
        assert (made.gain[1, 1], made.shift[1, 1]) == (0, 0)


def test_each_request_gets_its_own_strength_in_every_one_of_its_beams():
    made = edit("add", SITE, {0: torch.tensor([1.0, 2.0])})
    rows = Rows(*[torch.zeros(1, 1)] * 4, made.gain[:, None], made.shift[:, None], False, False)
    assert rows.change(None, 3, 6).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(EditError, match="strengths for 2 rows, the batch has 5"):
        rows.change(None, 1, 5)


def test_a_number_serves_every_row_of_any_batch():
    made = edit("clamp", SITE, {0: 7})
    assert made.values.shape == (1, 1)
    rows = Rows(*[torch.zeros(1, 1)] * 4, made.gain[:, None], made.shift[:, None], False, True)
    assert rows.change(torch.ones(5, 3, 1), 1, 5).flatten().tolist() == [6.0] * 15


def test_numbers_and_tensors_of_strengths_stand_in_one_table():
    made = edit("clamp", SITE, {9: 1.5, 2: torch.tensor([1, 2, 3]), 4: torch.tensor(0.5), 7: torch.tensor([4.0])})
    assert made.features == (9, 2, 4, 7)
    assert made.values.tolist() == [[1.5, 1, 0.5, 4], [1.5, 2, 0.5, 4], [1.5, 3, 0.5, 4]]


def test_an_edit_keeps_copies_of_what_it_was_given():
    strengths, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    made = edit("clamp", SITE, {0: strengths}, tokens=mask)
    strengths.zero_()
    mask.fill_(True)
    assert made.values.flatten().tolist() == [1.0, 2.0]
    assert made.tokens.tolist() == [True, False]


def test_an_edit_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit("clamp", SITE, {0: 1.0}).op = "add"


@pytest.fixture
def rounding_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("rounding_default")
@pytest.mark.parametrize("rows", [[80.3], [80.3, NAN]])
def test_a_strength_is_float32_whatever_torchs_default_is(rows):
    made = edit("clamp", SITE, {3: 80.3, 4: torch.tensor(rows, dtype=torch.float64)})
    again, = Edits.from_json(Edits((made,)).to_json())
    for one in (made, again):
        assert one.values.dtype == torch.float32
        assert one.values[0].tolist() == [np.float32(80.3)] * 2


def test_strengths_and_masks_of_documents_lie_on_the_cpu_whatever_torchs_default_device_is():
    for value in (80.3, torch.tensor(80.3), torch.tensor([80.3, NAN])):
        made = edit("clamp", SITE, {3: value}, tokens=torch.tensor([True, False]))
        with torch.device("meta"):
            here = edit("clamp", SITE, {3: value}, tokens=made.tokens)
            again, = Edits.from_json(Edits((made,)).to_json())
        same(made, here)
        same(made, again)


@pytest.mark.parametrize(("op", "values", "settings", "message"), [
    ("steer", {0: 1.0}, {}, "one of clamp, scale, add; got 'steer'"),
    ("clamp", {}, {}, "names no feature"),
    ("clamp", [3], {}, r"clamp takes \{feature: strength\}; got \[3\]"),
    ("add", {3}, {}, r"add takes \{feature: strength\}; got \{3\}"),
    ("clamp", {1.0: 1.0}, {}, "whole number, got 1.0"),
    ("clamp", {"7": 1.0}, {}, "whole number, got '7'"),
    ("clamp", {True: 1.0}, {}, "a number, got True"),
    ("clamp", {0: NAN}, {}, "must be finite, got nan"),
    ("add", {0: float("inf")}, {}, "must be finite, got inf"),
    ("scale", {3: torch.tensor([1.0, -float("inf")])}, {}, "feature 3: the strength must be finite"),
    ("clamp", {0: torch.tensor(NAN)}, {}, "must be finite"),
    ("clamp", {0: torch.zeros(0)}, {}, "must be finite"),
    ("clamp", {0: "80"}, {}, "a number or a tensor"),
    ("clamp", {0: None}, {}, "a number or a tensor"),
    ("clamp", {0: 10**400}, {}, "a number or a tensor"),
    ("clamp", {0: torch.zeros(2, 2)}, {}, r"shape \(batch,\); got \(2, 2\)"),
    ("clamp", {0: torch.zeros(2), 1: torch.zeros(3)}, {}, "strengths for 2 and 3 rows"),
    ("clamp", {0: 1.0}, {"tokens": "promt"}, "one of all, prompt, generated, or a boolean tensor; got 'promt'"),
    ("clamp", {0: 1.0}, {"tokens": torch.tensor([0, 1])}, "boolean"),
    ("clamp", {0: 1.0}, {"tokens": torch.ones(1, 2, 3, dtype=torch.bool)}, r"\(batch, tokens\)"),
    ("clamp", {0: 1.0}, {"tokens": [True, False]}, "boolean tensor; got"),
    ("clamp", {0: 1.0}, {"tokens": np.array([True, False])}, "boolean tensor; got array"),
])
def test_what_cannot_be_meant_is_refused_with_what_came(op, values, settings, message):
    with pytest.raises(EditError, match=message):
        edit(op, SITE, values, **settings)


def test_a_feature_may_be_any_integer_type():
    made = edit("clamp", SITE, {np.int64(3): 1.0, torch.tensor(4): 2.0})
    assert made.features == (3, 4)
    assert all(type(f) is int for f in made.features)


@pytest.mark.parametrize("feature", [-1, 60, 10**12])
def test_a_feature_that_the_sae_has_not_is_refused_with_the_range(feature):
    with pytest.raises(EditError, match=f"feature {feature} at {SITE}: the SAE has features 0 to 59"):
        check(edit("clamp", SITE, {feature: 1.0}), 60)


def test_a_feature_edited_twice_is_refused_unless_at_another_site():
    first, second = edit("clamp", SITE, {5: 1.0, 6: 1.0}), edit("add", SITE, {4: 1.0, 6: 1.0})
    with pytest.raises(EditError, match=f"feature 6 at {SITE} is edited twice"):
        check(second, 60, [first])
    check(edit("add", "model.layers.2.output", {6: 1.0}), 60, [first])
    check(edit("add", SITE, {4: 1.0}), 60, [first])
    with pytest.raises(EditError, match=r"feature 3 .* twice"):
        check(edit("clamp", SITE, {3: 1.0, np.int64(3) + 0: 2.0, torch.tensor(3): 2.0}), 60)


def test_a_strength_that_overflows_the_models_dtype_is_refused():
    decoder = torch.tensor([[0.5, -2.0]])
    check_range(edit("clamp", SITE, {0: 32000.0}), decoder, torch.float16)
    with pytest.raises(EditError, match=r"adds up to 6\.6e\+04; torch\.float16 activations overflow above 6\.55e\+04"):
        check_range(edit("clamp", SITE, {0: -33000.0}), decoder, torch.float16)
    check_range(edit("clamp", SITE, {0: 33000.0}), decoder, torch.bfloat16)
    with pytest.raises(EditError, match="bfloat16 activations overflow"):
        check_range(edit("add", SITE, {0: 1e19}), decoder, torch.bfloat16)


@pytest.mark.parametrize("many", [1, 10])
def test_only_the_strength_of_its_own_feature_multiplies_a_decoder_row(monkeypatch, many):
    monkeypatch.setattr(edits, "MANY", many)
    decoder = torch.tensor([[0.1, 0.1], [0.45, -0.3], [9.0, 0.0], [-1.4, 1.0]])
    made = edit("clamp", SITE, {3: torch.tensor([1.0, -2.0]), 1: 60000.0})
    check_range(made, decoder.half(), torch.float16)
    check_range(edit("scale", SITE, {1: -60000.0, 3: 1.0}), decoder, torch.float16)
    with pytest.raises(EditError, match=r"adds up to 8\.4e\+04"):
        check_range(edit("add", SITE, {1: 1.0, 3: torch.tensor([NAN, -60000.0])}), decoder, torch.float16)


ALL_KINDS = (
    edit("clamp", SITE, {3: 2.5, 1: -0.1}),
    edit("scale", SITE, {2: torch.tensor([0.5, NAN, 3.0])}, only_if_active=True),
    edit("add", "b", {0: 1e-7}, tokens="generated", special_tokens=True),
    edit("add", "b", {4: 1.0}, tokens=torch.tensor([[True, False], [False, False]])),
    edit("clamp", "b", {5: torch.tensor([NAN])}, tokens=torch.tensor([False, True])),
)


def same(a, b):
    assert torch.equal(a.values.nan_to_num(12345.0), b.values.nan_to_num(12345.0))
    for name in ("op", "site", "features", "special_tokens", "only_if_active"):
        assert getattr(a, name) == getattr(b, name)
    masks = isinstance(a.tokens, torch.Tensor), isinstance(b.tokens, torch.Tensor)
    assert torch.equal(a.tokens, b.tokens) if all(masks) else a.tokens == b.tokens


def test_the_json_form_says_everything_and_comes_back_the_same():
    document = Edits(ALL_KINDS).to_json()
    again = Edits.from_json(document)
    assert len(again) == len(ALL_KINDS)
    for before, after in zip(ALL_KINDS, again, strict=True):
        same(before, after)
    assert again.to_json() == document


def test_the_json_form_is_strict_json_with_null_for_a_row_left_alone():
    content = json.loads(Edits(ALL_KINDS).to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["format"] == "sae_hooks.edits/1"
    assert content["edits"][1]["values"] == [[0.5], [None], [3.0]]
    assert content["edits"][3]["tokens"] == [[True, False], [False, False]]


def spoilt(**changes):
    item = {"op": "clamp", "site": SITE, "features": [1, 2], "values": [[1.0, 2.0]], **changes}
    return json.dumps({"format": "sae_hooks.edits/1", "edits": [{k: v for k, v in item.items() if v is not ...}]})


@pytest.mark.parametrize(("document", "message"), [
    ("", "not a document of edits"),
    ("[" * 100_000, "not a document of edits"),
    ("[]", "not a document of edits"),
    ("{}", "not a document of edits"),
    ('{"format": "sae_hooks.edits/2", "edits": []}', "in format 'sae_hooks.edits/2'"),
    ('{"format": "sae_hooks.edits/1"}', "not a document of edits"),
    ('{"format": "sae_hooks.edits/1", "edits": 3}', "not a document of edits"),
    (spoilt(op=...), "not a document of edits"),
    (spoilt(op="steer"), "one of clamp"),
    (spoilt(colour="red"), "no field 'colour'"),
    (spoilt(features=[1, 1]), "distinct features"),
    (spoilt(features=[1, 2, 3]), "one value a feature"),
    (spoilt(features=[1, 2.5]), "whole number, got 2.5"),
    (spoilt(values=[]), "one value a feature"),
    (spoilt(values=[[1.0, 2.0], [1.0]]), "one value a feature"),
    (spoilt(values=[[1.0, "inf"]]), "finite"),
    (spoilt(values=[[1.0, 1e400]]), "finite"),
    (spoilt(values=[[1.0, 10**400]]), "not a document of edits"),
    (spoilt(values=[[1.0, "x"]]), "not a document of edits"),
    (spoilt(tokens="some"), "one of all"),
    (spoilt(tokens=[1, 2]), "boolean"),
    (spoilt(tokens=[[True], [True, False]]), "not a document of edits"),
    (spoilt(tokens=7), "boolean"),
    (spoilt(tokens={}), "not a document of edits"),
])
def test_a_document_that_is_wrong_is_refused_with_the_reason(document, message):
    with pytest.raises(EditError, match=message):
        Edits.from_json(document)


def test_a_strength_survives_json_to_the_last_bit_of_float32():
    value = float(np.float32(math.pi))
    again, = Edits.from_json(Edits((edit("clamp", SITE, {0: math.pi}),)).to_json())
    assert again.values.item() == value
