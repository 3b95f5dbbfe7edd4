"""What the Triton kernels find above thresholds: on a GPU, or where there is none in the interpreter."""

import pytest
import torch
from kernels.triton_cases import DEVICE, close, far, normal, padded, put, same, strided

triton = pytest.importorskip("triton")

from sae_hooks.kernels import triton_ops  # noqa: E402


def check_above(pre, threshold, slack=None):
    limit = threshold.double() if slack is None else threshold.double() - slack[0].double()[:, None] * slack[1].double()
    expected = (pre.double() > limit).nonzero()
    slack = None if slack is None else tuple(put(*slack))
    rows, columns, values = triton_ops.Above(*put(pre, threshold), slack=slack).listed()
    assert rows.dtype == columns.dtype == torch.int64
    assert values.dtype == pre.dtype
    assert same(torch.stack([rows, columns], 1), expected)
    assert same(values, pre[expected[:, 0], expected[:, 1]])
    return len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "f"), [(1, 1), (5, 3), (3, 1024), (2, 1025), (4, 2500)])
def test_above_finds_what_is_above_in_order(n, f, dtype):
    check_above(normal(n, f).to(dtype), normal(f, seed=1).to(dtype).abs())


@pytest.mark.parametrize(("n", "f"), [(0, 5), (5, 0), (0, 0), (3, 1100)])
def test_above_may_find_nothing(n, f):
    assert check_above(normal(n, f).float(), torch.full((f,), 99.0)) == 0


def test_above_finds_everything_and_single_entries_in_blocks_of_nothing():
    assert check_above(normal(3, 1100).float(), torch.full((1100,), -99.0)) == 3300
    pre = torch.zeros(3, 4000)
    pre[[0, 2, 2], [3999, 0, 1024]] = 1
    assert check_above(pre, torch.zeros(4000)) == 3


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_above_is_strict_and_nan_is_above_nothing():
    inf, nan = torch.inf, torch.nan
    pre = torch.tensor([[0.0, 1.0, nan, inf, -inf, -0.0], [1e-45, nan, -1.0, -inf, inf, 2.0]])
    for threshold in ([0.0] * 6, [-0.0, 1.0, -inf, inf, -inf, 0.0], [nan, 0.5, nan, 1.0, inf, 2.0], [-inf] * 6):
        check_above(pre, torch.tensor(threshold))
    check_above(pre, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 2.0]), (torch.tensor([0.0, nan]), torch.ones(6)))
    check_above(pre, torch.zeros(6), (torch.tensor([inf, 1.0]), torch.ones(6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slack_lowers_thresholds_and_ties_stay_below(dtype):
    random = torch.Generator().manual_seed(0)
    pre, threshold, by_row, by_column = (  # small integers, so that a quarter are ties, exactly
        torch.randint(-3, 4, shape, generator=random).to(dtype) for shape in [(3, 1100), (1100,), (3,), (1100,)])
    without = check_above(pre, threshold)
    assert without < check_above(pre, threshold, (by_row.abs(), by_column.abs()))
    check_above(pre, threshold, (by_row, by_column))
    check_above(pre, threshold, (by_row.bfloat16(), by_column.float()))
    assert without == check_above(pre, threshold, (torch.zeros(3), by_column))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_is_added_as_pytorch_adds_it(dtype):
    pre, bias, threshold = (normal(*shape, seed=i).to(dtype) for i, shape in enumerate([(3, 1100), (1100,), (1100,)]))
    bias *= 1e3
    threshold[:500] = pre[1, :500] + bias[:500]  # ties stay below
    for vector in (bias, strided(bias[None])[0]):
        found = triton_ops.Above(*put(pre, threshold, vector)).listed()
        added = triton_ops.Above(*put(pre + bias, threshold)).listed()
        assert all(same(*pair) for pair in zip(found, added, strict=True))


def test_how_many_are_above_is_told_before_they_are_listed():
    found = triton_ops.Above(*put(normal(3, 1100).float(), torch.zeros(1100)))
    assert 1500 < found.total() < 1800
    assert {len(part) for part in found.listed()} == {found.total()}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "f", "d"), [
    (1, 1, 1), (3, 40, 600), (2, 200, 7), (0, 4, 4), (4, 4, 0), (3, 0, 5)])
def test_few_tokens_are_reconstructed_without_a_question(n, f, d, stored, monkeypatch):
    monkeypatch.setattr(triton_ops, "PART", 64)
    monkeypatch.setattr(triton_ops, "COLLECTED", 32)
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    shapes = (n, f), (f,), (f,), (d,)
    pre, bias, threshold, b_dec = (normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    W_dec = normal(f, d, seed=4, dtype=stored).to(stored)
    acts = (pre + bias) * (pre + bias > threshold)
    found = triton_ops.reconstruct_few(*put(pre, bias, threshold, W_dec, b_dec))
    assert found.dtype == dtype
    close(found, acts.double() @ W_dec.double() + b_dec.double())
    again = triton_ops.reconstruct_few(*put(pre + bias), None, *put(threshold, W_dec, b_dec))
    assert same(found, again)
    views = strided(pre.to(DEVICE)), strided(bias[None].to(DEVICE))[0], strided(threshold[None].to(DEVICE))[0]
    others = strided(W_dec.to(DEVICE)), strided(b_dec[None].to(DEVICE))[0]
    assert same(found, triton_ops.reconstruct_few(*views, *others))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_few_tokens_that_are_not_finite_become_nan():
    pre = -torch.ones(5, 5000)
    pre[0, 4999], pre[1, 0], pre[3, 4500] = torch.nan, torch.inf, -torch.inf
    nothing, W_dec, b_dec = torch.zeros(5000), torch.ones(5000, 3), torch.ones(3)
    found = triton_ops.reconstruct_few(*put(pre), None, *put(nothing, W_dec, b_dec)).cpu()
    assert found.isnan().all(1).tolist() == [True, True, False, True, False]
    assert found[[2, 4]].tolist() == [[1.0] * 3] * 2


def test_above_takes_strided_matrices(tmp_path):
    pre, threshold = normal(3, 40).float(), normal(40, seed=1).float()
    expected = triton_ops.Above(*put(pre, threshold)).listed()
    matrix = far(tmp_path, torch.float32)
    matrix.copy_(pre)
    on = pre.to(DEVICE)
    for other in (strided(on), padded(on), on.T.contiguous().T, matrix):
        found = triton_ops.Above(other, strided(threshold.to(DEVICE)[None])[0]).listed()
        assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_entries_are_told_without_asking_how_many_there_are_unless_they_are_too_many():
    pre, bias, threshold = (normal(*shape, seed=i).float() for i, shape in enumerate([(5, 2500), (2500,), (2500,)]))
    pre[3] = -99
    found = triton_ops.Above(*put(pre, threshold + 2, bias))
    rows, columns, values = (part.cpu() for part in found.listed())
    assert 500 < found.total() < 3000
    for most in (0, 1, 700, found.total(), found.total() + 9):
        starts, few, numbers = (part.cpu() for part in found.at_most(most))
        told = found.total() if found.total() <= most else 0
        assert starts.tolist() == [min(int((rows < row).sum()), told) for row in range(6)]
        assert (starts.dtype, few.dtype, len(few), len(numbers)) == (torch.int64, torch.int32, most, most)
        assert same(few[:told], columns[:told].int())
        assert same(numbers[:told], values[:told])
    assert triton_ops.Above(*put(torch.zeros(0, 7), torch.zeros(7))).at_most(3)[0].tolist() == [0]
    assert triton_ops.Above(*put(torch.zeros(2, 0), torch.zeros(0))).at_most(3)[0].tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_what_is_above_is_told_in_three_parts_that_lose_nothing():
    pre, bias = (normal(*shape, seed=i).float() for i, shape in enumerate([(3, 1100), (1100,)]))
    pre[:, :20] = 10.0 ** torch.linspace(-30, 30, 20)
    bias[:20] = 0
    pre[1, 30], pre[2, 40], bias[30:41] = torch.nan, torch.inf, 0
    threshold = torch.zeros(1100)
    threshold[500:] = (pre + bias)[1, 500:]  # ties stay below
    wanted = (pre + bias) * (pre + bias > threshold)
    views = strided(pre.to(DEVICE)), strided(bias[None].to(DEVICE))[0]
    for given in (put(pre, bias), views, (*put(pre + bias), None)):
        found = triton_ops.gated_parts(*given, *put(threshold)).cpu()
        assert (found.dtype, found.shape) == (torch.bfloat16, (9, 1100))
        told = found.view(3, 3, 1100).float().sum(0)
        assert told[1, 30].isnan()
        assert not told[2, 40].isfinite()
        told[1, 30], told[2, 40] = wanted[1, 30], wanted[2, 40]
        torch.testing.assert_close(told, wanted, rtol=0, atol=0, equal_nan=True)
    assert triton_ops.gated_parts(*put(pre[:0], bias, threshold)).shape == (0, 1100)
