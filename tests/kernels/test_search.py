"""What is above, and what is largest, found in numpy on CPUs and in PyTorch elsewhere: the same either way."""

import pytest
import torch

from sae_hooks import kernels
from sae_hooks.kernels import search, tiles


@pytest.fixture(params=["numpy", "elsewhere", "many threads"])
def found_by(request, monkeypatch):
    """Each way, whatever the size."""
    monkeypatch.setattr(search, "FEW_MARKS", 0)
    if request.param == "elsewhere":
        monkeypatch.setattr(search, "on_cpu", lambda t: False)
    if request.param == "many threads":
        monkeypatch.setattr(search, "THREADS", 0)
    return request.param


def matrix(n, m, dtype=torch.float32, seed=0):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed)).to(dtype)


def largest_of_each(pre, k):
    """[(row, column, value)] by sorting each row in Python: the first of equal ones is whichever."""
    found = []
    for i, row in enumerate(pre.tolist()):
        best = sorted(range(len(row)), key=lambda j, row=row: -row[j])[:k]
        found += [(i, j, row[j]) for j in sorted(best) if row[j] > 0]
    return found


def listed(found):
    return list(zip(*(part.tolist() for part in found), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "k"), [
    (5, 37, 0), (5, 37, 1), (5, 37, 3), (5, 37, 30), (5, 37, 37), (5, 37, 50), (1, 1, 1), (0, 37, 3), (2, 0, 3),
    (1, 2000, 60), (7, 1003, 20)])
def test_the_largest_of_each_row_are_named_by_row_then_by_column(found_by, n, m, k, dtype):
    pre = matrix(n, m, dtype)
    found = search.largest(pre, k)
    assert listed(found) == largest_of_each(pre, k)
    assert found[2].dtype == dtype


def test_rows_of_which_few_are_positive_give_those(found_by):
    pre = matrix(6, 400) - torch.linspace(0, 6, 6)[:, None]
    found = listed(search.largest(pre, 20))
    counts = [sum(row == i for row, _, _ in found) for i in range(6)]
    assert counts[0] == 20
    assert 0 < min(count for count in counts if count) < 20
    assert counts[-1] == 0
    assert found == largest_of_each(pre, 20)
    assert listed(search.largest(torch.zeros(3, 400), 20)) == []


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_of_equal_ones_so_many_are_kept_as_there_is_room_for(found_by, rest):
    pre = torch.full((2, 300), rest)
    pre[0, ::30] = 2.0
    pre[1] = 1.0
    found = search.largest(pre, 15)
    of_first = [column for row, column, _ in listed(found) if row == 0]
    assert set(range(0, 300, 30)) <= set(of_first)
    assert len(of_first) == (15 if rest else 10)
    assert int((found[0] == 1).sum()) == 15
    assert listed(found) == sorted(set(listed(found)))


def test_nan_is_never_kept_and_infinity_always(found_by):
    pre = matrix(4, 300)
    pre[0, 7], pre[1, 8], pre[2] = torch.nan, torch.inf, torch.nan
    found = listed(search.largest(pre, 10))
    assert (1, 8, torch.inf) in found
    assert sum(row == 1 for row, _, _ in found) == sum(row == 3 for row, _, _ in found) == 10
    first = [column for row, column, _ in found if row == 0]
    best = pre[0].nan_to_num(0.0).topk(10).indices.tolist()
    assert 9 <= len(first) <= 10
    assert set(first) <= set(best)
    assert not any(row == 2 for row, _, _ in found)
    pre[3, 20:] = torch.nan  # these take all places
    assert not any(row == 3 for row, _, _ in listed(search.largest(pre, 10)))


def test_values_carry_gradients_and_nothing_is_changed(found_by):
    pre = matrix(3, 200).requires_grad_()
    before = pre.detach().clone()
    rows, columns, values = search.largest(pre, 5)
    values.sum().backward()
    wanted = torch.zeros(3, 200)
    wanted[rows, columns] = 1.0
    assert torch.equal(pre.grad, wanted)
    assert torch.equal(pre.detach(), before)


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 400), (37,), (0, 9)])
def test_all_but_the_largest_become_zero_with_their_gradients(found_by, shape):
    pre = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    kept = search.keep_largest(pre, 6)
    least = pre.detach().sort(dim=-1).values[..., -6, None]
    mask = (pre.detach() >= least) & (pre.detach() > 0)
    assert torch.equal(kept, pre.detach() * mask)
    kept.sum().backward()
    assert torch.equal(pre.grad, mask.float())


def test_what_is_not_zero_is_marked_nan_too(found_by):
    acts = torch.tensor([[0.0, -0.0, 1.0, -2.0], [torch.nan, torch.inf, 1e-45, 0.0]], requires_grad=True)
    assert search.not_zero(acts).tolist() == [[False, False, True, True], [True, True, True, False]]


@pytest.fixture(params=["signs", "marks", "elsewhere"])
def gated_by(request, monkeypatch):
    """Each way, whatever the size."""
    monkeypatch.setattr(search, "FEW_GATED", 2**30 if request.param == "marks" else 0)
    if request.param == "elsewhere":
        monkeypatch.setattr(search, "on_cpu", lambda t: False)
    return request.param


def same_bits(found, wanted):
    """Also of zeros of either sign; nan is nan."""
    ints = {torch.float32: torch.int32, torch.float64: torch.int64}[wanted.dtype]
    return torch.equal(found.isnan(), wanted.isnan()) and torch.equal(
        torch.where(wanted.isnan(), 0, found).view(ints), torch.where(wanted.isnan(), 0, wanted).view(ints))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_above_becomes_zero_bit_for_bit_in_place_or_elsewhere(gated_by, dtype):
    pre = matrix(40, 90, dtype)
    threshold = torch.linspace(0, 1, 90).to(dtype)
    threshold[5], threshold[6], pre[:, 7] = torch.inf, 1e-40, 1e-40  # never above; too small to be normal, both
    pre[0] = threshold
    pre[1, 4:7], pre[2, 4:7], pre[3, 4:7], pre[4, :9] = torch.nan, torch.inf, -torch.inf, -0.0
    wanted = pre * (pre > threshold)
    assert bool((wanted == 0).logical_and(wanted.signbit()).any())
    assert bool(wanted[3, 4].isnan())
    out = torch.empty(40, 100, dtype=dtype)[:, 5:95]
    assert same_bits(search.gated(pre, threshold), wanted)
    assert search.gated(pre, threshold, out).data_ptr() == out.data_ptr()
    assert same_bits(out, wanted)
    search.gated(pre, threshold, pre)
    assert same_bits(pre, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_marked_already_is_gated_in_place(found_by, dtype):
    pre = matrix(40, 90, dtype)
    pre[0, :2], pre[1, :2] = torch.nan, -torch.inf
    marks = pre > 0.5
    wanted = pre * marks
    assert search.mask_(pre, marks) is pre
    assert same_bits(pre, wanted)


def test_what_is_gated_keeps_the_wider_dtype(gated_by):
    pre, threshold = matrix(40, 90), torch.rand(90).double()
    assert search.gated(pre, threshold).dtype == torch.float32
    assert search.gated(pre.double(), threshold.float()).dtype == torch.float64
    assert search.gated(pre.bfloat16(), threshold.float()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own forward mode
def test_autograd_and_torch_func_follow_what_is_gated(gated_by):
    pre, threshold, along = matrix(40, 90), torch.rand(90), matrix(40, 90, seed=1)

    def gate(t):
        return search.gated(t, threshold)

    leaf = pre.clone().requires_grad_()
    gate(leaf).backward(along)
    assert torch.equal(leaf.grad, along * (pre > threshold))
    assert torch.equal(torch.func.jvp(gate, (pre,), (along,))[1], along * (pre > threshold))
    assert torch.equal(torch.func.vmap(gate)(pre), gate(pre))
    assert torch.equal(torch.func.vjp(gate, pre)[1](along)[0], along * (pre > threshold))


def test_a_row_of_nan_stays_seen(found_by):
    pre = matrix(4, 300)
    pre[1] = torch.nan
    kept = search.keep_largest(pre, 10)
    assert kept.isnan().any(dim=1).tolist() == [False, True, False, False]
    assert (kept[[0, 2, 3]] > 0).sum(dim=1).tolist() == [10, 10, 10]


def test_few_candidates_are_selected_from(monkeypatch):
    seen = []
    plain = search.marked
    monkeypatch.setattr(search, "marked", lambda *args: seen.append(plain(*args)) or seen[-1])
    search.largest(matrix(20, 8192), 60)
    assert 20 * 60 <= len(seen[0][0]) < 20 * 80


def test_topk_over_several_tiles_of_tokens_is_the_dense_gate_in_csr(monkeypatch):
    monkeypatch.setattr(tiles, "TOPK_SIZE", 4 * 24)
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(11, 8, generator=generator), torch.randn(24, 8, generator=generator)
    bias = torch.full((24,), -2.0)  # so that many tokens have fewer than k positive ones
    indptr, indices, values = kernels.encode_topk(x, rows, bias, k=6)
    pre = torch.nn.functional.linear(x, rows, bias).relu()
    best = pre.topk(6)
    dense = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    expected = kernels.nonzero_csr(dense)
    assert (indptr.diff() < 6).any()
    assert torch.equal(indptr, expected[0])
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[2])


def test_a_gpu_takes_many_tokens_of_a_topk_sae_together():
    """It reads all of W_enc for each such slice."""
    tokens = torch.empty(4096, 1, device="meta")
    assert len(list(tiles.held_together(tokens, 2**17))) == 2
    assert len(list(tiles.held_together(torch.empty(4096, 1), 2**17))) == 128
