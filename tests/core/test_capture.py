"""capture(): the features of plain forward passes, with where each row came from."""

import threading

import pytest
import torch
from core.reference import array, encode, ordinary, sample
from core.steering import IDS, INPUTS, MASK, SITE, made_for

from sae_hooks import SaeMismatchError, attach_saes

pytestmark = pytest.mark.usefixtures("without_gradients")


def dense(features):
    return features.to_dense().double()


def wanted(sae, x, chosen):
    acts = torch.from_numpy(encode(sae, array(x)))
    acts[~chosen] = 0
    return acts


def test_a_pass_is_captured_as_one_row_for_each_real_token(attached, sae):
    x = sample(attached, SITE, IDS, attention_mask=MASK)
    with attached.saes.capture() as captured:
        attached(**INPUTS)
    got, real = captured[SITE], MASK.bool()
    assert list(captured) == [SITE]
    assert got.token_id.tolist() == IDS[real].tolist()
    assert got.doc_id.tolist() == real.nonzero()[:, 0].tolist()
    assert got.position.tolist() == [*range(5), *range(7), *range(7)]
    torch.testing.assert_close(dense(got), wanted(sae, x, ordinary(IDS, MASK))[real], rtol=1e-5, atol=1e-5)
    assert got.l0 > 1


def test_a_pass_of_the_model_inside_after_one_that_broke_off_before_it_is_of_its_own_tokens(attached):
    first, second = IDS[1:2, 1:], IDS[2:3, 1:]  # of one length, so that nothing but the ids tells them apart

    def breaks_off(module, args):
        raise InterruptedError

    with attached.saes.capture() as captured:
        handle = attached.register_forward_pre_hook(breaks_off)
        with pytest.raises(InterruptedError):
            attached(input_ids=first)
        handle.remove()
        attached.model(input_ids=second)
    assert captured[SITE].token_id.tolist() == second[0].tolist() != first[0].tolist()


def test_special_tokens_have_empty_rows_unless_asked_for(attached, sae):
    x = sample(attached, SITE, IDS, attention_mask=MASK)
    with attached.saes.capture() as without:
        attached(**INPUTS)
    with attached.saes.capture(special_tokens=True) as captured:
        attached(**INPUTS)
    want = wanted(sae, x, MASK.bool())[MASK.bool()]
    torch.testing.assert_close(dense(captured[SITE]), want, rtol=1e-5, atol=1e-5)
    special = torch.isin(captured[SITE].token_id, torch.tensor([0, 2]))
    assert want[special].any()
    assert not dense(without[SITE])[special].any()
    assert torch.equal(dense(without[SITE])[~special], dense(captured[SITE])[~special])


def test_attention_sinks_have_empty_rows(model, sae):
    x = sample(model, SITE, IDS[1:])
    norms = x.norm(dim=-1)
    sae.metadata["typical_norm"] = norms.median().item() / 10
    attach_saes(model, sae)
    with model.saes.capture() as captured:
        model(input_ids=IDS[1:])
    chosen = ordinary(IDS[1:]) & (norms <= norms.median())
    torch.testing.assert_close(dense(captured[SITE]), wanted(sae, x, chosen).flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_each_pass_adds_documents_of_its_own(attached):
    with attached.saes.capture() as captured:
        attached(**INPUTS)
        attached(input_ids=IDS[1:2])
        attached(**INPUTS)
    got = captured[SITE]
    assert [int((got.doc_id == doc).sum()) for doc in range(8)] == [5, 7, 7, 7, 5, 7, 7, 0]
    assert torch.equal(dense(got[got.doc_id == 4]), dense(got[got.doc_id == 0]))
    assert [len(one) for one in captured.passes(SITE)] == [19, 7, 19]


@pytest.mark.parametrize("static", [False, True])
def test_a_text_continued_by_hand_with_its_cache_stays_one_document(attached, static):
    from transformers import DynamicCache, StaticCache

    whole = IDS[1:]
    with attached.saes.capture() as wanted_:
        attached(input_ids=whole)
        attached(input_ids=whole)
    with attached.saes.capture() as captured:
        for _ in range(2):
            cache = StaticCache(attached.config, max_cache_len=16) if static else DynamicCache()
            for piece in (whole[:, :3], whole[:, 3:4], whole[:, 4:]):
                attached(input_ids=piece, past_key_values=cache)
    got, want = captured[SITE], wanted_[SITE]
    assert got.doc_id.tolist() == want.doc_id.tolist()
    assert got.position.tolist() == want.position.tolist()
    assert got.token_id.tolist() == want.token_id.tolist()
    torch.testing.assert_close(dense(got), dense(want), rtol=1e-4, atol=1e-4)


def test_a_static_cache_that_is_emptied_and_used_again_begins_new_documents(attached):
    from transformers import StaticCache

    cache = StaticCache(attached.config, max_cache_len=16)
    with attached.saes.capture() as captured:
        for row in (1, 2):
            attached(input_ids=IDS[row:row + 1, :3], past_key_values=cache)
            attached(input_ids=IDS[row:row + 1, 3:], past_key_values=cache)
            cache.reset()
    assert captured[SITE].doc_id.tolist() == [0] * 7 + [1] * 7
    assert captured[SITE].token_id.tolist() == IDS[1:].flatten().tolist()


def test_features_are_those_before_the_edits_at_their_site_and_after_those_at_earlier_ones(model, sae):
    early = made_for(model, "resid_post", 0, seed=1)
    attach_saes(attach_saes(model, sae), early)
    with model.saes.capture(layer=1) as clean:
        model(**INPUTS)
    with model.saes.clamp({3: 9.0}, layer=1), model.saes.capture(layer=1) as here:
        model(**INPUTS)
    with model.saes.clamp({3: 9.0}, layer=0), model.saes.capture(layer=1) as before:
        model(**INPUTS)
    assert torch.equal(dense(here[SITE]), dense(clean[SITE]))
    assert not torch.allclose(dense(before[SITE]), dense(clean[SITE]))


def test_what_becomes_of_the_ids_later_changes_nothing_that_was_captured(attached):
    ids = IDS[1:].clone()
    with attached.saes.capture() as captured:
        attached(input_ids=ids)
    ids.zero_()
    assert captured[SITE].token_id.tolist() == IDS[1:].flatten().tolist()


def test_several_saes_are_captured_at_once_or_one_by_its_layer(model, sae):
    others = [made_for(model, "transcoder", 0), made_for(model, "attn_out", 2)]
    attach_saes(attach_saes(model, sae), {other.site: other for other in others})
    samples = {s.site: sample(model, s.site, IDS, attention_mask=MASK) for s in (sae, *others)}
    with model.saes.capture() as captured:
        model(**INPUTS)
    assert set(captured) == set(samples)
    for one in (sae, *others):
        want = wanted(one, samples[one.site], ordinary(IDS, MASK))[MASK.bool()]
        torch.testing.assert_close(dense(captured[one.site]), want, rtol=1e-5, atol=1e-5)
    with model.saes.capture(layer=2) as single:
        model(**INPUTS)
    assert list(single) == [others[1].site]


def test_capturing_changes_no_bit(attached):
    want = attached(**INPUTS).logits
    with attached.saes.capture():
        assert torch.equal(attached(**INPUTS).logits, want)


def test_features_can_be_read_while_the_block_runs_and_after_it(attached):
    with attached.saes.capture() as captured:
        with pytest.raises(SaeMismatchError, match=r"no forward pass has reached model\.layers\.1\.output yet"):
            captured[SITE]
        attached(**INPUTS)
        inside = dense(captured[SITE])
    attached(**INPUTS)
    assert torch.equal(dense(captured[SITE]), inside)


def test_a_capture_that_saw_no_pass_warns(attached):
    with pytest.warns(UserWarning, match="touched no position"), attached.saes.capture():
        pass


def test_embeddings_are_captured_without_ids_where_special_tokens_are_asked_for(attached):
    with attached.saes.capture(special_tokens=True) as want:
        attached(**INPUTS)
    with attached.saes.capture(special_tokens=True) as captured:
        attached(inputs_embeds=attached.get_input_embeddings()(IDS), attention_mask=MASK)
    assert torch.equal(dense(captured[SITE]), dense(want[SITE]))
    assert set(captured[SITE].token_id.tolist()) == {-1}


def test_features_carry_no_gradient(attached):
    with torch.enable_grad(), attached.saes.capture() as captured:
        attached(**INPUTS)
    assert not captured[SITE].values.requires_grad


def test_passes_of_another_thread_are_captured_too(attached):
    with attached.saes.capture() as captured:
        thread = threading.Thread(target=attached, kwargs=INPUTS)
        thread.start()
        thread.join()
    assert len(captured[SITE]) == MASK.sum()
