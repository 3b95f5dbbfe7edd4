"""Products in bfloat16: what is rounded, and what is not."""

from __future__ import annotations

import pytest
import torch

from sae_hooks.training import BatchTopK, Gated, JumpReLU, ReLU, SiteInfo, TanhJumpReLU, TopK, Trainee
from sae_hooks.training.codes import DenseCode, Encoder, SparseCode, encode
from sae_hooks.training.learner import Learner

D_IN, D_SAE, BATCH = 48, 160, 96
SITES = {"s": SiteInfo(d_in=D_IN, rms_norm=1.0, typical_norm=1.0)}
OBJECTIVES = [
    JumpReLU(sparsity=0.01, threshold=0.1), JumpReLU(l0=9, pre_bias=True), JumpReLU(l0=9, prefixes=(40,)),
    TanhJumpReLU(sparsity=0.01), Gated(sparsity=0.1), TopK(k=8), BatchTopK(k=8), ReLU(sparsity=0.1)]


def batches(n: int) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(5)
    rows = torch.randn(n, BATCH, D_IN, generator=g)
    return [{"s": x / D_IN ** 0.5} for x in rows]


def trained(objective, bf16, steps=3):
    learner = Learner(Trainee(name="t", site="s", d_sae=D_SAE, objective=objective, bf16=bf16), SITES)
    found = batches(steps)
    learner.start(found[0])
    return learner, [learner.update(rows, step, 1.0) for step, rows in enumerate(found)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_in_bfloat16_a_training_keeps_its_state_in_float32_and_goes_almost_the_same_way(objective):
    exact, losses = trained(objective, bf16=False)
    rounded, close = trained(objective, bf16=True)
    assert all(t.dtype == torch.float32 for t in (*rounded.trained.values(), *rounded.sae.parameters()))
    assert not torch.equal(exact.sae.W_enc, rounded.sae.W_enc), "nothing was rounded"
    for ours, theirs in zip(close, losses, strict=True):
        assert ours.total.dtype == torch.float32
        torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=0.03, atol=0)
        torch.testing.assert_close(ours.l0, theirs.l0, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_in_bfloat16_bias_and_threshold_still_decide_in_float32(form):
    """A pre-activation of 1 + 2^-12, whose excess is all in the bias: bfloat16 would round it away."""
    W_enc, bias, floor = torch.tensor([[1.0]]), torch.tensor([2.0 ** -12]), torch.tensor([1.0])
    with torch.autocast("cpu", torch.bfloat16):
        code = encode(torch.tensor([[1.0]]), Encoder(W_enc, bias), floor, form)
    assert isinstance(code, DenseCode if form == "dense" else SparseCode)
    assert code.pre.flatten().tolist() == [1 + 2.0 ** -12]
    assert code.pre.dtype == torch.float32
