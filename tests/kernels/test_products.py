"""The arithmetic on plain tensors: what is cut into tiles comes out as if it were whole."""

import numpy as np
import pytest
import torch
from core import reference

from sae_hooks import kernels
from sae_hooks.kernels import cpu_products, encoding, search, tiles, triplets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 3 tokens and 24 numbers, divisors of nothing that the tests use; all searched as large ones."""
    monkeypatch.setattr(tiles, "CPU_TOKENS", 3)
    monkeypatch.setattr(tiles, "CPU_SIZE", 24)
    monkeypatch.setattr(search, "FEW_MARKS", 0)


@pytest.fixture
def parts():
    """x (11, 16), W_rows (37, 16), bias (37), threshold (37), W_dec (37, 16), b_dec (16)."""
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (11, 16), "W_rows": (37, 16), "bias": (37,), "threshold": (37,), "W_dec": (37, 16), "b_dec": (16,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def encoded(parts, dtype=torch.float32):
    threshold = parts["threshold"].abs() * 4
    return kernels.encode_sparse(parts["x"], parts["W_rows"].to(dtype), parts["bias"], threshold), threshold


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_in_tiles_is_the_equation(small_tiles, parts, dtype):
    (indptr, indices, values), threshold = encoded(parts, dtype)
    pre = reference.array(parts["x"]) @ reference.array(parts["W_rows"].to(dtype)).T + reference.array(parts["bias"])
    rows, columns = np.nonzero(pre > reference.array(threshold))
    assert 20 < len(rows) < 300
    assert indptr.tolist() == [0, *np.bincount(rows, minlength=11).cumsum()]
    assert indices.tolist() == columns.tolist()
    np.testing.assert_allclose(values.numpy(), pre[rows, columns], rtol=1e-5)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_pre_activations_in_tiles_are_the_equation(small_tiles, parts, dtype):
    got = kernels.linear(parts["x"], parts["W_rows"].to(dtype), parts["bias"])
    want = reference.array(parts["x"]) @ reference.array(parts["W_rows"].to(dtype)).T + reference.array(parts["bias"])
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_encoding_is_linear_s_result_above_the_threshold_bit_for_bit(parts, dtype, on_cpu, tiled, request, monkeypatch):
    if tiled:
        request.getfixturevalue("small_tiles")
    monkeypatch.setattr(search, "FEW_MARKS", 0)
    if not on_cpu:
        monkeypatch.setattr(search, "on_cpu", lambda t: False)
    x, rows = parts["x"].to(torch.float64 if dtype == torch.float64 else torch.float32), parts["W_rows"].to(dtype)
    pre = kernels.linear(x, rows, parts["bias"])
    threshold = pre.quantile(0.7, dim=0, interpolation="higher").clamp(min=0)  # values that occur: not above themselves
    acts = kernels.encode(x, rows, parts["bias"], threshold)
    assert acts.dtype == pre.dtype
    assert torch.equal(acts, pre * (pre > threshold))
    assert 0.1 < (acts > 0).double().mean() < 0.4


def test_the_encoding_of_no_tokens_is_empty(parts):
    assert kernels.encode(parts["x"][:0], parts["W_rows"], parts["bias"], parts["threshold"]).shape == (0, 37)


def test_tiles_change_which_rows_are_computed_together_and_nothing_else(parts, request):
    whole, _ = encoded(parts)
    request.getfixturevalue("small_tiles")
    cut, _ = encoded(parts)
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])
    torch.testing.assert_close(whole[2], cut[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tile_holds_more_than_its_tokens_and_numbers(small_tiles, parts, monkeypatch, dtype):
    monkeypatch.setattr(tiles, "CPU_WIDENED", 3 * 16)
    sizes, places = [], []
    plain = encoding.affine

    def noted(x, rows, *rest):
        sizes.append((len(x), len(rows)))
        places.append((tile := plain(x, rows, *rest)).data_ptr())
        return tile

    monkeypatch.setattr(encoding, "affine", noted)
    encoded(parts, dtype)
    assert sum(n * f for n, f in sizes) == 11 * 37
    assert max(n for n, _ in sizes) == 3
    assert max(n * f for n, f in sizes) <= 24
    assert min(sizes) >= (2, 7), "a thin rest"
    assert len(set(places)) == 1, "fresh memory for each tile"


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 13, 14, 15, 100])
def test_slices_are_few_cover_everything_and_are_of_one_size(length):
    cut = list(tiles.slices(length, 7))
    sizes = [s.stop - s.start for s in cut]
    assert [i for s in cut for i in range(s.start, s.stop)] == list(range(length))
    assert len(cut) == -(-length // 7)
    assert not sizes or (max(sizes) <= 7 and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("n", "d_sae"), [(1, 37), (2, 37), (3, 1), (5, 9), (8, 300), (9, 300), (40, 301)])
def test_encode_sparse_finds_what_linear_is_above_the_threshold_bit_for_bit(monkeypatch, n, d_sae, dtype, few):
    monkeypatch.setattr(tiles, "CPU_TOKENS", 16)
    monkeypatch.setattr(tiles, "CPU_SIZE", 640)
    monkeypatch.setattr(cpu_products, "LARGE", 0)
    monkeypatch.setattr(cpu_products, "FEW", few)
    random = torch.Generator().manual_seed(n)
    x = torch.randn(n, 400, generator=random).to(torch.float64 if dtype == torch.float64 else torch.float32)
    rows, bias = torch.randn(d_sae, 400, generator=random).to(dtype), torch.randn(d_sae, generator=random)
    pre = kernels.linear(x, rows, bias)
    threshold = pre.quantile(0.7, dim=0, interpolation="higher")  # values that occur: equal to one, above none
    got = kernels.encode_sparse(x, rows, bias, threshold)
    want = kernels.nonzero_csr(torch.where(pre > threshold, pre, 0))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[2].dtype == pre.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = torch.nn.functional.linear(x, rows.to(x.dtype), bias.to(x.dtype))
    torch.testing.assert_close(pre, plain, rtol=0, atol=1e-4)


def test_every_device_finds_the_same(small_tiles, parts, monkeypatch):
    numpy_s, _ = encoded(parts)
    monkeypatch.setattr(search, "on_cpu", lambda t: False)  # takes the way of all other devices
    torch_s, _ = encoded(parts)
    assert all(torch.equal(a, b) for a, b in zip(numpy_s, torch_s, strict=True))


def test_the_layout_of_x_and_of_the_rows_makes_no_difference(small_tiles, parts):
    plain, _ = encoded(parts)
    wide = torch.zeros(16, 22)
    wide[:, ::2] = parts["x"].T
    strided = parts | {"x": wide.T[::2], "W_rows": parts["W_rows"].T.contiguous().T}
    assert not strided["x"].is_contiguous()
    again, _ = encoded(strided)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])
    torch.testing.assert_close(plain[2], again[2])


def test_nan_is_above_no_threshold_and_infinity_above_every(small_tiles, parts):
    parts["x"][4, 3] = float("nan")
    parts["x"][7, 2] = float("inf")
    (indptr, indices, values), _ = encoded(parts)
    counts = indptr.diff()
    assert counts[4] == 0
    assert indices[indptr[7]:indptr[8]].tolist() == (parts["W_rows"][:, 2] > 0).nonzero().flatten().tolist()
    assert values[indptr[7]:indptr[8]].isinf().all()
    assert not values.isnan().any()


def test_no_token_has_no_features_in_the_dtype_that_is_computed_in():
    for dtype, wide in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.half, torch.float32)):
        x, rows = torch.zeros(0, 4, dtype=dtype), torch.zeros(7, 4, dtype=dtype)
        csr = kernels.encode_sparse(x, rows, torch.zeros(7), torch.zeros(7))
        assert [part.tolist() for part in csr] == [[0], [], []]
        assert [part.dtype for part in csr] == [torch.int64, torch.int64, wide]
        assert kernels.linear(x, rows, torch.zeros(7)).shape == (0, 7)


def test_autocast_changes_nothing(parts):
    plain, pre = encoded(parts)[0], kernels.linear(parts["x"], parts["W_rows"], parts["bias"])
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(encoded(parts)[0], plain, strict=True))
        assert torch.equal(kernels.linear(parts["x"], parts["W_rows"], parts["bias"]), pre)


def test_values_and_pre_activations_carry_gradients(small_tiles, parts):
    x = parts["x"].requires_grad_()
    (_, _, values), threshold = encoded(parts)
    pre = kernels.linear(x, parts["W_rows"], parts["bias"])
    (sparse,) = torch.autograd.grad(values.square().sum(), x)
    (dense,) = torch.autograd.grad((pre * (pre > threshold)).square().sum(), x)
    torch.testing.assert_close(sparse, dense)
    assert dense.any()


def test_find_above_names_each_pair_by_row_then_by_column(small_tiles, parts):
    args = parts["x"], parts["W_rows"], parts["bias"], torch.zeros(37)
    rows, columns, values = kernels.find_above(*args)
    pre = kernels.linear(*args[:3])
    want = (pre > 0).nonzero(as_tuple=True)
    assert torch.equal(rows, want[0])
    assert torch.equal(columns, want[1])
    assert torch.equal(values, pre[want])


def test_a_product_made_in_bfloat16_is_added_to_and_compared_in_float32():
    x, rows, bias = torch.tensor([[1.001]]), torch.tensor([[1.0]]), torch.tensor([2.0**-12])
    _, _, values = kernels.find_above(x, rows, bias, torch.tensor([1.0]), multiply=torch.bfloat16)
    assert values.tolist() == [1 + 2.0**-12]


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("run", [0, 10**9])
def test_entries_of_tiles_are_put_in_order_by_entries_or_by_runs(monkeypatch, run, share, n):
    monkeypatch.setattr(triplets, "RUN", run)
    marks = torch.rand(n, 50, generator=torch.Generator().manual_seed(0)) < share
    marks[3:5, 20:] = False
    values = torch.arange(n * 50.0).view(n, 50)
    parts = [(*(marks[:, f].nonzero(as_tuple=True)), values[:, f][marks[:, f]]) for f in (
        slice(20), slice(20, 20), slice(20, 25), slice(25, 50))]
    parts = [triplets.moved(part, 0, first) for part, first in zip(parts, (0, 20, 20, 25), strict=True)]
    found = triplets.by_row(parts, n, values)
    for one, wanted in zip(found, (*marks.nonzero(as_tuple=True), values[marks]), strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_sums_the_rows_of_the_active_features(parts, dtype):
    csr, _ = encoded(parts)
    got = kernels.decode_sparse(*csr, parts["W_dec"].to(dtype), parts["b_dec"])
    acts = np.zeros((11, 37))
    rows = np.repeat(np.arange(11), csr[0].diff().numpy())
    acts[rows, csr[1].numpy()] = csr[2].numpy()
    want = acts @ reference.array(parts["W_dec"].to(dtype)) + reference.array(parts["b_dec"])
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=3e-5)
    assert got.dtype == torch.float32


def test_half_precision_decoding_widens_only_the_rows_that_fire(parts):
    W_dec = parts["W_dec"].to(torch.bfloat16)
    W_dec[5] = float("nan")
    csr = (torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 1]), torch.tensor([1.0, 2.0, -1.0]))
    got = kernels.decode_sparse(*csr, W_dec, parts["b_dec"])
    want = torch.stack([W_dec[1].float() + 2 * W_dec[3].float(), torch.zeros(16), -W_dec[1].float()]) + parts["b_dec"]
    torch.testing.assert_close(got, want)


def test_nothing_active_decodes_to_the_bias_in_memory_of_its_own(parts):
    none = (torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    got = kernels.decode_sparse(*none, parts["W_dec"], parts["b_dec"])
    assert torch.equal(got, parts["b_dec"].expand(3, 16))
    got.zero_()
    assert parts["b_dec"].count_nonzero() == 16


def test_nonzero_csr_is_the_csr_of_what_is_not_zero():
    acts = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    indptr, indices, values = kernels.nonzero_csr(acts)
    assert indptr.tolist() == [0, 2, 2, 3]
    assert indices.tolist() == [1, 3, 0]
    assert values.tolist() == [2.0, 1.0, 3.0]


def test_only_float64_on_both_sides_computes_in_float64():
    wide, narrow = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3)
    assert kernels.linear(wide, wide, torch.zeros(2)).dtype == torch.float64
    assert kernels.linear(wide, narrow, torch.zeros(2)).dtype == torch.float32
    assert kernels.linear(narrow, wide, torch.zeros(2)).dtype == torch.float32
    assert kernels.linear(narrow.half(), narrow.half(), torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "n", "d_sae", "tokens", "features"), [
    (torch.bfloat16, 4096, 16384, 4096, 16384), (torch.bfloat16, 4096, 131072, 512, 131072),
    (torch.bfloat16, 4096, 2**20, 512, 131072), (torch.bfloat16, 100, 131072, 100, 131072),
    (torch.float32, 4096, 131072, 4096, 16384), (torch.float32, 9000, 16384, 3000, 16384)])
def test_gpus_take_all_features_of_fewer_tokens_unless_weights_are_rounded_each_time(dtype, n, d_sae, tokens, features):
    x, rows = torch.empty(n, 8, device="meta"), torch.empty(d_sae, 8, dtype=dtype, device="meta")
    taken = [t.stop - t.start for t in tiles.token_tiles(x, rows)]
    assert (sum(taken), max(taken)) == (n, tokens)
    parts = [f.stop - f.start for f in tiles.feature_tiles(x[:max(taken)], d_sae)]
    assert (sum(parts), max(parts)) == (d_sae, features)
    assert tiles.has_all_features(x, rows) == (features == d_sae)
    assert tiles.is_one_tile(x, rows) == (features == d_sae and tokens == n)
