"""BatchTopK's search looks above a guess: however bad that is, the features are the largest of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_hooks.training.codes import Encoder
from sae_hooks.training.objectives import Batch, topk

N, K = 320, 5


@pytest.fixture
def encoder() -> Encoder:
    g = torch.Generator().manual_seed(0)
    return Encoder(torch.randn(24, 300, generator=g), torch.randn(300, generator=g) - 2)


@pytest.fixture
def batch() -> Batch:
    """Tokens of very different norms: some have many of the batch's largest features, some none."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 24, generator=g) * torch.rand(N, 1, generator=g)
    return Batch(x=x, target=x, step=0, idle=torch.zeros(300))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pre-activations each search came upon."""
    counts: list[int] = []
    above = topk.above

    def counted(x: Tensor, encoder: Encoder, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = above(x, encoder, floor)
        counts.append(len(pairs[0]))
        return pairs

    monkeypatch.setattr(topk, "above", counted)
    return counts


def assert_largest(batch: Batch, encoder: Encoder) -> None:
    rows, columns, values = topk.largest_of_batch(batch, encoder, K)
    pre = batch.x @ encoder.W_enc + encoder.b_enc
    wanted = pre.relu().view(-1).topk(N * K)
    wanted_at = wanted.indices[wanted.values > 0].sort().values
    assert torch.equal(rows * 300 + columns, wanted_at)
    torch.testing.assert_close(values, pre.view(-1)[wanted_at])


def test_one_search_comes_upon_little_more_than_is_kept(batch: Batch, encoder: Encoder, found: list[int]) -> None:
    assert_largest(batch, encoder)
    assert len(found) == 1
    assert N * K <= found[0] < 2.5 * N * K


@pytest.mark.parametrize(("guess", "searches"), [(8.0, 2), (1e9, 3), (0.0, 1)])
def test_a_guess_that_is_wrong_loses_nothing(
    batch: Batch, encoder: Encoder, found: list[int], monkeypatch: pytest.MonkeyPatch, guess: float, searches: int
) -> None:
    monkeypatch.setattr(topk, "likely_exceeded", lambda *_: torch.tensor(guess))
    assert_largest(batch, encoder)
    assert len(found) == searches


def test_where_fewer_are_positive_all_of_those_are_kept(batch: Batch, encoder: Encoder, found: list[int]) -> None:
    encoder.b_enc.sub_(8)
    assert_largest(batch, encoder)
    assert len(found) == 1
    assert 0 < found[0] < N * K


def test_the_guess_of_few_tokens_is_lower(batch: Batch, encoder: Encoder) -> None:
    exceeded = [float(topk.likely_exceeded(batch.x[:n], encoder, K)) for n in (1, N)]
    pre = batch.x @ encoder.W_enc + encoder.b_enc
    assert (pre[:1] >= exceeded[0] - 1e-4).sum() == int(K * (1 + topk.SPREAD))
    some = pre[::topk.ASKED]
    assert (some >= exceeded[1] - 1e-4).sum() == int(K * len(some) * (1 + topk.SPREAD / len(some) ** 0.5))
