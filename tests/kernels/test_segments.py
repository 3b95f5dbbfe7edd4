"""Segments in PyTorch and numpy: orders, entries of weight 0, the same bits every time. test_triton.py compares the
rest with Triton's kernels and with float64."""

import pytest
import torch

from sae_hooks.kernels import segments
from sae_hooks.kernels.segments import stable_order, starts_of, weighted_sums


@pytest.mark.parametrize("n", [1, 7, 300, 2**16, 2**16 + 1, 2**20])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_stable_order_is_that_of_torch(n, dtype):
    ids = torch.randint(n, (5000,), generator=torch.Generator().manual_seed(0)).to(dtype)
    ids[:3] = n - 1
    assert torch.equal(stable_order(ids, n), torch.sort(ids, stable=True).indices)
    assert len(stable_order(ids[:0], n)) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_entries_of_weight_0_make_no_difference(share, dtype, monkeypatch):
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(50, (400,), generator=random).sort().values
    ids, weights = torch.randint(30, (400,), generator=random).int(), torch.randn(400, generator=random).to(dtype)
    weights[torch.rand(400, generator=random) >= share] = 0
    weights[5] = -0.0
    table, starts = torch.randn(30, 9, generator=random).to(dtype), starts_of(rows, 50)
    ours = weighted_sums(starts, ids, weights, table)
    monkeypatch.setattr(segments, "MOST_KEPT", -1.0)
    assert torch.equal(ours, weighted_sums(starts, ids, weights, table))
    wanted = torch.zeros(50, 9, dtype=torch.float64)
    wanted.index_add_(0, rows, weights.double()[:, None] * table.double()[ids])
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


def test_weights_that_want_a_gradient_keep_all_entries():
    weights = torch.tensor([0.0, 2.0], requires_grad=True)
    table = torch.tensor([[3.0], [5.0]])
    weighted_sums(torch.tensor([0, 2]), torch.tensor([0, 1]), weights, table).sum().backward()
    assert weights.grad.tolist() == [3.0, 5.0]
    with torch.no_grad():
        assert weighted_sums(torch.tensor([0, 2]), torch.tensor([0, 1]), weights, table).tolist() == [[10.0]]
