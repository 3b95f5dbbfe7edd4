"""Which rows and positions an edit touches; all others keep every bit."""

import pytest
import torch
from core.reference import FullEdit, array, edited, ordinary, reconstruct, relative
from core.steering import EVERY, IDS, INPUTS, MASK, NAN, SITE, STRENGTHS, firing, made_for, outcome

from sae_hooks import EditError, attach_saes
from sae_hooks.kernels import decoding

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("architecture", EVERY)
def test_rows_left_untouched_are_bit_equal_at_the_site_and_in_the_logits(architecture, random_model):
    model = random_model(architecture)
    sae = made_for(model, "resid_post")
    (clean,), clean_logits = outcome(attach_saes(model, sae), sae.site)
    often, other, *_ = firing(sae, clean)
    for op in STRENGTHS:
        with getattr(model.saes, op)({often: torch.tensor([NAN, 9.0, NAN]), other: torch.tensor([NAN, NAN, NAN])}):
            (got,), logits = outcome(model, sae.site)
        for row in (0, 2):
            assert torch.equal(got[row], clean[row])
            assert torch.equal(logits[row], clean_logits[row])
        assert not torch.equal(logits[1], clean_logits[1])


def test_one_rows_strength_never_reaches_another_row(attached, fires):
    results = []
    for strength in (0.0, 5.0, -400.0, NAN):
        values = torch.tensor([2.0, strength, 7.0]), torch.tensor([strength, 1.0, 2.0])
        with attached.saes.clamp(dict(zip(fires, values, strict=False))):
            results.append(outcome(attached, SITE)[1])
    for other in results[1:]:
        assert torch.equal(other[2], results[0][2])
        assert not torch.equal(other[1], results[0][1])


def test_a_row_gets_in_a_batch_what_it_gets_alone(attached):
    strengths = torch.tensor([9.0, -3.0, 40.0])
    with attached.saes.clamp({3: strengths}):
        together = outcome(attached, SITE)[1]
    for row in range(3):
        with attached.saes.clamp({3: strengths[row].item()}):
            alone = outcome(attached, SITE, input_ids=IDS[row:row + 1], attention_mask=MASK[row:row + 1])[1]
        real = MASK[row].bool()
        assert relative(together[row][real], alone[0][real]) < 1e-5


def test_strengths_for_another_number_of_rows_are_refused_during_the_pass(attached):
    with pytest.raises(EditError, match="2 rows, the batch has 3"), attached.saes.clamp({3: torch.tensor([1.0, 2.0])}):
        attached(**INPUTS)


def test_special_tokens_and_padding_are_left_alone_unless_asked_for(attached, sae):
    (clean,), _ = outcome(attached, SITE)
    special = torch.isin(IDS, torch.tensor([0, 2]))
    with attached.saes.clamp({3: 9.0}) as handle:
        (got,), _ = outcome(attached, SITE)
    assert torch.equal(got[special], clean[special])
    assert not (got[~special] == clean[~special]).all(-1).any()
    assert (handle.positions_edited, handle.positions_skipped) == ((~special).sum(), (special & MASK.bool()).sum())
    with FullEdit(attached, sae, lambda a: edited(a, "clamp", {3: 9.0}), choose=lambda ids, mask: mask.bool()):
        (want,), _ = outcome(attached, SITE)
    with attached.saes.clamp({3: 9.0}, special_tokens=True) as handle:
        (got,), _ = outcome(attached, SITE)
    assert relative(got, want) < 1e-5
    assert torch.equal(got[IDS == 0], clean[IDS == 0])
    assert (handle.positions_edited, handle.positions_skipped) == (MASK.sum(), 0)


def test_padding_in_the_middle_of_the_mask_is_padding_whatever_its_id(attached):
    mask = MASK.clone()
    mask[1, 3] = mask[2, 6] = 0
    (clean,), _ = outcome(attached, SITE, input_ids=IDS, attention_mask=mask)
    with attached.saes.clamp({3: 9.0}, special_tokens=True):
        (got,), _ = outcome(attached, SITE, input_ids=IDS, attention_mask=mask)
    assert torch.equal((got != clean).any(-1), mask.bool())


def test_the_ids_that_count_as_special_may_be_set(attached):
    (clean,), _ = outcome(attached, SITE)
    assert attached.saes.special_ids == {0, 2}
    attached.saes.special_ids = [45, 120]
    with attached.saes.clamp({3: 9.0}):
        (got,), _ = outcome(attached, SITE)
    assert torch.equal((got != clean).any(-1), ordinary(IDS, MASK, special=(45, 120)))


@pytest.mark.parametrize("two_dimensional", [False, True])
def test_a_mask_chooses_positions_of_the_input(attached, two_dimensional):
    mask = torch.tensor([False, False, True, True, False, True, True])
    if two_dimensional:
        mask = torch.stack([mask, ~mask, torch.zeros(7, dtype=torch.bool)])
    (clean,), _ = outcome(attached, SITE)
    with attached.saes.clamp({3: 9.0}, tokens=mask):
        (got,), _ = outcome(attached, SITE)
    assert torch.equal((got != clean).any(-1), mask.expand(3, 7) & ordinary(IDS, MASK))


@pytest.mark.parametrize("shape", [(6,), (8,), (2, 7), (3, 8)])
def test_a_mask_of_another_shape_is_refused_during_the_pass(attached, shape):
    with pytest.raises(EditError, match="the input has 3 rows of 7 tokens"), \
            attached.saes.clamp({3: 9.0}, tokens=torch.ones(shape, dtype=torch.bool)):
        attached(**INPUTS)


def test_outside_generate_everything_is_prompt(attached):
    (clean,), _ = outcome(attached, SITE)
    with attached.saes.clamp({3: 9.0}, tokens="prompt"):
        (prompt,), _ = outcome(attached, SITE)
    assert torch.equal((prompt != clean).any(-1), ordinary(IDS, MASK))
    with pytest.warns(UserWarning, match="touched no position"), attached.saes.clamp({3: 9.0}, tokens="generated"):
        (generated,), _ = outcome(attached, SITE)
    assert torch.equal(generated, clean)


def test_attention_sinks_are_left_alone_and_counted(model, sae):
    (clean,), _ = outcome(model, SITE)
    norms = clean.norm(dim=-1)
    bound = norms[ordinary(IDS, MASK)].median()
    sae.metadata["typical_norm"] = bound.item() / 10
    attach_saes(model, sae)
    for special in (False, True):
        with model.saes.clamp({3: 9.0}, special_tokens=special) as handle:
            (got,), _ = outcome(model, SITE)
        chosen = MASK.bool() if special else ordinary(IDS, MASK) & (norms <= bound)
        assert torch.equal((got != clean).any(-1), chosen)
        assert handle.positions_edited == chosen.sum()
        assert handle.positions_skipped == MASK.sum() - chosen.sum()


@pytest.mark.parametrize("small", [0, decoding.SMALL], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("tokens", ["all", "mask"])
def test_a_splice_spares_what_an_edit_spares(attached, sae, tokens, small, monkeypatch):
    monkeypatch.setattr(decoding, "SMALL", small)
    (clean,), _ = outcome(attached, SITE)
    mask = torch.tensor([True, True, True, False, False, True, True])
    with attached.saes.splice(tokens="all" if tokens == "all" else mask):
        (got,), _ = outcome(attached, SITE)
    chosen = ordinary(IDS, MASK) & (mask if tokens == "mask" else True)
    assert torch.equal((got != clean).any(-1), chosen)
    want = torch.from_numpy(reconstruct(sae, array(clean[chosen])))
    assert relative(got[chosen], want) < 1e-5


def test_no_position_touched_is_told_when_the_edit_ends(attached):
    with pytest.warns(UserWarning, match="touched no position: no forward pass ran"), attached.saes.clamp({3: 1.0}):
        pass
    with pytest.warns(UserWarning, match="2 special tokens"), attached.saes.clamp({3: 1.0}):
        attached(input_ids=torch.tensor([[2, 2]]))
