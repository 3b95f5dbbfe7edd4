"""The loop: its constraints, the folding of the scale, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_hooks.check import Statistics
from sae_hooks.sae import SAE
from sae_hooks.training import JumpReLUObjective, TrainConfig, fold_scale, fresh_sae, train
from sae_hooks.training.schedules import constant, cosine_warmup, linear_end, linear_warmup, product
from sae_hooks.training.trainer import project_decoder_gradient

TRUE_FEATURES, D_IN, ACTIVE = 48, 24, 3


def sparse_mixtures(steps: int, batch: int = 256) -> Iterator[Tensor]:
    """Sums of about three of 48 unit directions in 24 dimensions, of mean squared norm 1."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(TRUE_FEATURES, D_IN, generator=g), dim=1)
    for _ in range(steps):
        on = torch.rand(batch, TRUE_FEATURES, generator=g) < ACTIVE / TRUE_FEATURES
        x = (on * (0.5 + torch.rand(batch, TRUE_FEATURES, generator=g))) @ directions
        yield x / x.square().sum(1).mean().sqrt()


def trained(steps: int = 500, sparse: bool = True) -> SAE:
    sae = fresh_sae(D_IN, 96, mean=torch.zeros(D_IN), threshold=0.03, seed=1)
    objective = JumpReLUObjective(sparsity=0.03, bandwidth=0.05, warmup=linear_warmup(steps // 3),
                                  sparse=sparse)
    schedule = product(cosine_warmup(10), linear_end(steps, 0.5))
    return train(sae, sparse_mixtures(steps), objective, TrainConfig(learning_rate=5e-3, schedule=schedule))


def test_training_finds_sparse_features_that_explain_synthetic_data() -> None:
    sae = trained()

    stats, x = Statistics(), torch.cat(list(sparse_mixtures(10)))
    stats.update(sae, x, x)
    assert stats.l0 < 8
    assert stats.fvu < 0.25


def test_decoder_rows_stay_unit_and_thresholds_stay_positive() -> None:
    sae = trained(steps=30)

    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))
    assert sae.threshold is not None
    assert (sae.threshold >= 0).all()
    assert not any(p.requires_grad for p in sae.parameters())


def test_the_same_seed_gives_the_same_sae() -> None:
    a, b = trained(steps=20), trained(steps=20)

    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_decoder_gradient_loses_its_part_along_the_row(sae64: SAE) -> None:
    sae64.W_dec.data /= sae64.W_dec.norm(dim=1, keepdim=True)
    sae64.W_dec.grad = torch.randn_like(sae64.W_dec)

    project_decoder_gradient(sae64)

    assert (sae64.W_dec.grad * sae64.W_dec).sum(1).abs().max() < 1e-12


def test_folding_the_scale_moves_everything_into_raw_units(sae64: SAE) -> None:
    x, scale = torch.randn(40, 6, dtype=torch.float64), 173.2
    acts, x_hat = sae64.encode(x), sae64(x)

    folded = fold_scale(sae64, scale)

    assert acts.count_nonzero() > 20
    torch.testing.assert_close(folded.encode(scale * x), scale * acts, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(folded(scale * x), scale * x_hat, rtol=1e-12, atol=1e-10)
    assert torch.equal(folded.W_dec, sae64.W_dec)


def test_a_fresh_sae_sees_activations_less_their_mean() -> None:
    mean = torch.randn(D_IN)
    sae = fresh_sae(D_IN, 96, mean=mean, threshold=0.03, seed=0)

    assert sae.encode(mean[None]).abs().max() == 0
    torch.testing.assert_close(sae(mean[None])[0], mean)
    assert torch.equal(sae.W_enc, sae.W_dec.T)


def test_schedules_start_and_end_where_they_say() -> None:
    warm, end = cosine_warmup(10), linear_end(100, 0.2)

    assert [constant(0), constant(99)] == [1.0, 1.0]
    assert abs(warm(0) - 0.1) < 1e-12
    assert abs(warm(5) - 0.55) < 1e-12
    assert warm(10) == 1.0
    assert [end(0), end(80), end(90), end(100)] == [1.0, 1.0, 0.5, 0.0]
    assert linear_warmup(0)(0) == 1.0
