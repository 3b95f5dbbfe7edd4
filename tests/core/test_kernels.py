"""The arithmetic on plain tensors: what is cut into tiles comes out as if it were whole."""

import numpy as np
import pytest
import torch
from core import reference

from sae_hooks import kernels
from sae_hooks.kernels import torch_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 features and 3 tokens, neither a divisor of what the tests use."""
    whole = torch_ops.tile
    monkeypatch.setattr(torch_ops, "FEATURES_PER_TILE", 8)
    monkeypatch.setattr(torch_ops, "TOKENS_PER_TILE", 3)
    monkeypatch.setattr(torch_ops, "tile", lambda length, size=8: whole(length, size))


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


def test_tiles_change_which_rows_are_computed_together_and_nothing_else(parts, request):
    whole, _ = encoded(parts)
    request.getfixturevalue("small_tiles")
    cut, _ = encoded(parts)
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])
    torch.testing.assert_close(whole[2], cut[2])


def test_no_tile_holds_more_than_its_tokens_and_features(small_tiles, parts, monkeypatch):
    sizes = []
    plain = torch_ops.linear

    def noted(x, W_rows, bias):
        pre = plain(x, W_rows, bias)
        sizes.append(tuple(pre.shape))
        return pre

    monkeypatch.setattr(torch_ops, "linear", noted)
    encoded(parts)
    assert len(sizes) == 4 * 5
    assert max(n for n, _ in sizes) == 3
    assert max(f for _, f in sizes) == 8


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


def test_topk_over_several_tiles_of_tokens_is_the_dense_gate_in_csr(monkeypatch):
    monkeypatch.setattr(kernels.torch_ops, "TOKENS_PER_TILE", 4)
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


def test_only_float64_on_both_sides_computes_in_float64():
    wide, narrow = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3)
    assert kernels.linear(wide, wide, torch.zeros(2)).dtype == torch.float64
    assert kernels.linear(wide, narrow, torch.zeros(2)).dtype == torch.float32
    assert kernels.linear(narrow, wide, torch.zeros(2)).dtype == torch.float32
    assert kernels.linear(narrow.half(), narrow.half(), torch.zeros(2)).dtype == torch.float32
