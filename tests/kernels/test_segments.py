"""Segments in PyTorch and numpy: orders, entries of weight 0, the same bits every time. test_triton.py compares the
rest with Triton's kernels and with float64."""

import pytest
import torch

from sae_hooks.kernels import segments
from sae_hooks.kernels.segments import dots, stable_order, starts_of, weighted_sums


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("widened", "columns"), [(10**6, [19]), (60, [4, 5, 5, 5]), (1, [3, 4, 4, 4, 4])])
def test_rows_of_another_dtype_that_are_taken_are_widened_some_columns_at_a_time(dtype, widened, columns, monkeypatch):
    monkeypatch.setattr(segments, "CPU_WIDENED", widened)
    monkeypatch.setattr(segments, "FEWEST_COLUMNS", 4)
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(50, (200,), generator=random).sort().values
    ids, weights = 3 * torch.randint(10, (200,), generator=random), torch.randn(200, generator=random)
    table, x = torch.randn(30, 19, generator=random).to(dtype), torch.randn(50, 19, generator=random).to(dtype)
    table[1::3] = torch.nan
    starts = starts_of(rows, 50)
    bag, product, taken = segments.F.embedding_bag, torch.sparse.sampled_addmm, []
    monkeypatch.setattr(segments.F, "embedding_bag", lambda i, t, *of, **how: taken.append(t) or bag(i, t, *of, **how))
    monkeypatch.setattr(torch.sparse, "sampled_addmm", lambda p, x, t: taken.append(t.T) or product(p, x, t))
    sums, products = weighted_sums(starts, ids.int(), weights, table), dots(starts, rows, ids.int(), x, table)
    assert sums.dtype == products.dtype == torch.float32
    wanted = torch.zeros(50, 19).double().index_add_(0, rows, weights.double()[:, None] * table.double()[ids])
    torch.testing.assert_close(sums.double(), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(products.double(), (x.double()[rows] * table.double()[ids]).sum(1), rtol=0, atol=1e-4)
    if dtype == torch.float32:
        assert all(t.data_ptr() == table.data_ptr() for t in taken)
    else:
        assert [tuple(t.shape) for t in taken] == [(10, width) for width in columns] * 2


@pytest.mark.parametrize("wanting", ["weights", "table"])
def test_gradients_pass_through_columns_that_are_widened(wanting, monkeypatch):
    monkeypatch.setattr(segments, "CPU_WIDENED", 1)
    monkeypatch.setattr(segments, "FEWEST_COLUMNS", 2)
    random = torch.Generator().manual_seed(0)
    given = {"weights": torch.randn(3, generator=random), "table": torch.randn(4, 5, generator=random).half()}
    given[wanting].requires_grad_()
    ids, along = torch.tensor([2, 0, 2]), torch.randn(2, 5, generator=random)
    (weighted_sums(torch.tensor([0, 2, 3]), ids, **given) * along).sum().backward()
    wide = {name: t.detach().float().requires_grad_() for name, t in given.items()}
    parts = wide["weights"][:, None] * wide["table"][ids]
    (torch.stack([parts[0] + parts[1], parts[2]]) * along).sum().backward()
    torch.testing.assert_close(given[wanting].grad.float(), wide[wanting].grad, rtol=1e-2, atol=1e-2)


def test_torchs_default_device_makes_no_difference():
    rows, ids, x = torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), torch.eye(4)
    with torch.device("meta"):
        starts = starts_of(rows, 4)
        products = dots(starts, rows, ids, x, x)
    assert starts.tolist() == [0, 2, 2, 3, 3]
    assert products.tolist() == [0, 1, 0]
