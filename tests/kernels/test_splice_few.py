"""The few tokens of a decoding step are spliced at once where Triton is: on a GPU, or where there is none in its
interpreter."""

import pytest
import torch
from kernels.triton_cases import DEVICE, normal, put, same

from sae_hooks import SAE, attach_saes, kernels
from sae_hooks.handles import Handle
from sae_hooks.hooks import _spliced_at_once
from sae_hooks.kernels import segments
from sae_hooks.runtime import SpliceRequest

triton = pytest.importorskip("triton")

from sae_hooks.kernels import triton_ops  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """Let tensors on the CPU have Triton, too, if they are the ones it takes here."""
    monkeypatch.setattr(segments, "TRITON_ON", (DEVICE,))
    with torch.no_grad():
        yield


def sae_of(dtype=torch.float32, d=24, d_sae=70, **more):
    """An SAE of which about a sixth is active."""
    W_enc, b_enc, W_dec, b_dec = (normal(*shape, seed=i).float() for i, shape in enumerate(
        [(d, d_sae), (d_sae,), (d_sae, d), (d,)]))
    gate = more if "k" in more else {"threshold": torch.full((d_sae,), 5.0)} | more
    return SAE(W_enc.to(dtype), b_enc, W_dec.to(dtype), b_dec, **gate).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 600), (1, 3, 40), (3, 1, 7), (0, 5)])
def test_a_sum_goes_where_it_is_chosen_to_and_the_rest_stays_bit_for_bit(dtype, shape, monkeypatch):
    monkeypatch.setattr(triton_ops, "PART", 64)
    monkeypatch.setattr(triton_ops, "COLLECTED", 32)
    n, d = 3 if shape[0] else 0, shape[-1]
    sizes = (n, 200), (200,), (200, d), (d,)
    pre, threshold, W_dec, b_dec = (normal(*size, seed=i).float() for i, size in enumerate(sizes))
    old = normal(*shape, seed=5).to(dtype)
    sums = triton_ops.reconstruct_few(*put(pre), None, *put(threshold, W_dec, b_dec)).cpu().view(shape)
    everywhere = triton_ops.reconstruct_few(*put(pre), None, *put(threshold, W_dec, b_dec, old)).cpu()
    assert (everywhere.dtype, everywhere.shape) == (dtype, shape)
    torch.testing.assert_close(everywhere, sums.to(dtype), rtol=0 if dtype.itemsize > 2 else 1e-2, atol=0)
    chosen = torch.tensor([True, False, True])[:n].view(shape[:-1])
    for one, other in ((old, chosen), (old.mT.contiguous().mT, chosen.repeat_interleave(2, -1)[..., ::2])):
        before = one.clone()
        found = triton_ops.reconstruct_few(*put(pre), None, *put(threshold, W_dec, b_dec, one, other)).cpu()
        assert same(found[chosen], everywhere[chosen])
        assert same(found[~chosen], old[~chosen])
        assert same(one, before)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("picked", [True, False], ids=["some", "all"])
def test_an_sae_splices_what_it_reconstructs(dtype, x_dtype, picked):
    sae, x, old = sae_of(dtype), normal(2, 3, 24, seed=7).to(x_dtype).to(DEVICE), torch.ones(2, 3, 24, device=DEVICE)
    chosen = torch.tensor([[True, False, True], [False, False, True]], device=DEVICE) if picked else None
    for like in (old, old.to(x_dtype)):
        wanted = sae(x, like.dtype)
        wanted = wanted if chosen is None else torch.where(chosen[..., None], wanted, like)
        found = _spliced_at_once(sae, x, like, chosen)
        assert found.dtype == like.dtype
        torch.testing.assert_close(found, wanted, rtol=2e-2 if like.dtype in (torch.bfloat16, torch.float16) else 1e-4,
                                   atol=1e-4)


def test_only_few_tokens_without_gradients_of_a_threshold_are(monkeypatch):
    x = normal(3, 24).float().to(DEVICE)
    assert _spliced_at_once(sae_of(), x, x, None) is not None
    assert _spliced_at_once(sae_of(k=5), x, x, None) is None
    assert _spliced_at_once(sae_of(W_skip=torch.eye(24)), x, x, None) is None
    assert _spliced_at_once(sae_of(), x.repeat(30, 1), x.repeat(30, 1), None) is None
    assert _spliced_at_once(sae_of(), x, x[:2], None) is None
    assert _spliced_at_once(sae_of(), x, x[:, :23], None) is None
    with torch.enable_grad():
        assert _spliced_at_once(sae_of(), x.clone().requires_grad_(), x, None) is None
        assert _spliced_at_once(sae_of().requires_grad_(), x, x, None) is None
        assert _spliced_at_once(sae_of(), x, x.clone().requires_grad_(), None) is None
    monkeypatch.setattr(segments, "TRITON_ON", ())
    assert _spliced_at_once(sae_of(), x, x, None) is None


@pytest.mark.parametrize("choice", ["ordinary", "all", "a mask"])
def test_a_hooked_model_takes_it(choice, random_model, random_sae, monkeypatch):
    model, sae = random_model("Gemma2").to(DEVICE), random_sae(32, 64, "model.layers.1.output").to(DEVICE)
    attach_saes(model, sae)
    ids = torch.tensor([[2, 5, 6, 7], [2, 2, 9, 8]], device=DEVICE)  # 2: the BOS
    how = {"ordinary": {}, "all": {"special_tokens": True},
           "a mask": {"tokens": torch.tensor([[False, True, False, True]] * 2)}}[choice]
    took, taking = [], kernels.splice_few
    monkeypatch.setattr(kernels, "splice_few", lambda *args: took.append(taking(*args)) or took[-1])
    with model.saes.splice(**how) as handle:
        found = model(input_ids=ids).logits
    assert [t is None for t in took] == [False]
    monkeypatch.setattr(segments, "TRITON_ON", ())
    with model.saes.splice(**how) as plain:
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert handle.positions_edited == plain.positions_edited
    assert not torch.allclose(found, model(input_ids=ids).logits, atol=1e-2)


def test_what_else_a_splice_writes_is_left_to_others(random_model, random_sae, monkeypatch):
    model, sae = random_model("Gemma2").to(DEVICE), random_sae(32, 64, "model.layers.1.output").to(DEVICE)
    attach_saes(model, sae)
    ids, found = torch.tensor([[2, 5, 6, 7]], device=DEVICE), []
    for kinds in ((DEVICE,), ()):
        monkeypatch.setattr(segments, "TRITON_ON", kinds)
        with model.saes.splice(), model.saes.clamp({3: 40.0}):
            found.append(model(input_ids=ids).logits)
        slot, = model.saes._slots.values()
        request = SpliceRequest(slot, rebuild=lambda sae, x, target: target + 1)
        with Handle(model.saes._runtime, [request], "model"):
            found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], found[3])


def test_what_else_a_splice_writes_stands_for_activations_in_float32(random_model, random_sae):
    model, sae = random_model("Gemma2").to(DEVICE, torch.bfloat16), random_sae(32, 64, "model.layers.1.output")
    attach_saes(model, sae.to(DEVICE))
    slot, = model.saes._slots.values()
    targets = []
    with Handle(model.saes._runtime, [SpliceRequest(slot, rebuild=lambda _, x, t: targets.append(t) or t)], "model"):
        model(input_ids=torch.tensor([[2, 5, 6, 7]], device=DEVICE))
    assert [t.dtype for t in targets] == [torch.float32]


def test_gradients_go_another_way(random_model, random_sae):
    model, sae = random_model("Gemma2").to(DEVICE), random_sae(32, 64, "model.layers.1.output").to(DEVICE)
    attach_saes(model, sae)
    with torch.enable_grad(), model.saes.splice():
        model(input_ids=torch.tensor([[2, 5, 6, 7]], device=DEVICE)).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
