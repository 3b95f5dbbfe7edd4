"""Reconstructing and decoding are one equation, whichever way each tile takes: sparse, dense, or small."""

import numpy as np
import pytest
import torch
from core import reference

from sae_hooks import kernels
from sae_hooks.kernels import decoding, search, segments, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WAYS = {  # what counts as small, and of how many tokens as few; the share from which dense products are taken
    "sparse": (0, 0, 1.0), "dense": (0, 0, -1.0), "each tile its own": (0, 0, 0.3), "small": (2**62, 0, 0.3),
    "few": (2**62, 2**62, 0.3)}


@pytest.fixture(params=[*WAYS, *(f"{way}, in Triton" for way in WAYS)])
def way(request, monkeypatch):
    """Let all tiles be decoded in a way."""
    name, _, in_triton = request.param.partition(", ")
    small, few, crowded = WAYS[name]
    if in_triton:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("compiled kernels take no tensors of a CPU")
        monkeypatch.setattr(segments, "TRITON_ON", ("cpu",))
    for name, value in (("SMALL", small), ("CROWDED", crowded), ("GPU_FEW", few), ("GPU_CROWDED", crowded)):
        monkeypatch.setattr(decoding, name, value)
    return request.param


@pytest.fixture(params=[True, False], ids=["small tiles", "one tile"])
def tiled(request, way, monkeypatch):
    if request.param:
        monkeypatch.setattr(tiles, "CPU_TOKENS", 3)
        monkeypatch.setattr(tiles, "CPU_SIZE", 24)
        monkeypatch.setattr(tiles, "TOPK_SIZE", 150)
        monkeypatch.setattr(search, "FEW_MARKS", 0)


def parts_of(dtype, n=11, d_out=19):
    """x, W_rows, bias, threshold, W_dec, b_dec; the first features are rarely active, the last often."""
    random = torch.Generator().manual_seed(0)
    x, W_rows, bias, W_dec, b_dec = (torch.randn(shape, generator=random)
                                     for shape in ((n, 16), (37, 16), (37,), (37, d_out), (d_out,)))
    threshold = torch.linspace(12, -3, 37)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(exact), W_rows.to(dtype), bias.to(exact), threshold.to(exact), W_dec.to(dtype), b_dec.to(exact)


def written_out(x, W_rows, bias, threshold, W_dec, b_dec):
    """(acts, x_hat) in float64."""
    pre = reference.array(x) @ reference.array(W_rows).T + reference.array(bias)
    acts = pre * (pre > reference.array(threshold))
    return acts, acts @ reference.array(W_dec) + reference.array(b_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_reconstruction_is_the_equation(way, tiled, dtype, on_cpu, monkeypatch):
    parts = parts_of(dtype)
    if not on_cpu:
        monkeypatch.setattr(decoding, "on_cpu", lambda t: False)
        monkeypatch.setattr(search, "on_cpu", lambda t: False)
    acts, wanted = written_out(*parts)
    shares = [(part != 0).mean() for part in np.array_split(acts, 5, axis=1)]
    assert min(shares) < 0.1
    assert max(shares) > 0.5, "no mixture of tiles"
    got = kernels.reconstruct(*parts)
    exact = dtype == torch.float64
    assert got.dtype == (torch.float64 if exact else torch.float32)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12 if exact else 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_multiplied_by_halves_where_that_is_exact(way, tiled, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "HALVES_ON", ("cpu",))
    x, *rest = parts_of(dtype)
    got = kernels.reconstruct(x.to(dtype), *rest)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), written_out(x.to(dtype), *rest)[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 4), (11, 1), (11, 9), (11, 37)])
def test_topk_reconstructs_from_the_largest(way, tiled, dtype, n, k):
    x, W_rows, bias, _, W_dec, b_dec = parts_of(dtype, n=n)
    pre = reference.array(x) @ reference.array(W_rows).T + reference.array(bias)
    least = np.sort(pre, axis=1)[:, -k, None]
    wanted = np.where(pre >= least, pre, 0).clip(min=0) @ reference.array(W_dec) + reference.array(b_dec)
    got = kernels.reconstruct_topk(x, W_rows, bias, k, W_dec, b_dec)
    exact = dtype == torch.float64
    assert got.dtype == (torch.float64 if exact else torch.float32)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12 if exact else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_the_equation(way, tiled, dtype):
    parts = parts_of(dtype)
    acts, wanted = written_out(*parts)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    got = kernels.decode(torch.tensor(acts).to(exact), parts[4], parts[5])
    assert got.dtype == exact
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12 if exact == torch.float64 else 2e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one(way, tiled, n):
    parts = parts_of(torch.float32, n=n)
    acts, wanted = written_out(*parts)
    np.testing.assert_allclose(kernels.reconstruct(*parts).numpy(), wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(kernels.decode(torch.tensor(acts).float(), *parts[4:]).numpy(), wanted, atol=2e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter's numpy
def test_what_is_not_finite_stays_so_and_the_other_tokens_are_as_they_were(way, tiled):
    x, *rest = parts_of(torch.float32)
    topk = [*rest[:2], 5, *rest[3:]]
    spoilt = x.clone()
    spoilt[3, 2], spoilt[7, 0], spoilt[8, 1] = torch.nan, torch.inf, -torch.inf
    others = [i for i in range(11) if i not in (3, 7, 8)]
    for plain, got in ((kernels.reconstruct(x, *rest), kernels.reconstruct(spoilt, *rest)),
                       (kernels.reconstruct_topk(x, *topk), kernels.reconstruct_topk(spoilt, *topk))):
        assert got[3].isnan().all()
        assert not got[[7, 8]].isfinite().any()
        torch.testing.assert_close(got[others], plain[others])


def test_where_nothing_is_active_b_dec_is_left(way, tiled):
    x, W_rows, bias, threshold, W_dec, b_dec = parts_of(torch.float32)
    assert torch.equal(kernels.reconstruct(x, W_rows, bias, threshold + 1e6, W_dec, b_dec), b_dec.repeat(11, 1))
    assert torch.equal(kernels.decode(torch.zeros(11, 37), W_dec, b_dec), b_dec.repeat(11, 1))


def test_a_value_at_the_threshold_is_not_active(way, tiled):
    parts = [*parts_of(torch.float32)]
    parts[3] = kernels.linear(*parts[:3]).amax(0)
    assert torch.equal(kernels.reconstruct(*parts), parts[5].repeat(11, 1))


def test_it_neither_changes_nor_aliases_what_it_is_given(way, tiled):
    parts = parts_of(torch.float32)
    before = [t.clone() for t in parts]
    kernels.reconstruct(*parts).fill_(7.0)
    acts = torch.ones(11, 37)
    kernels.decode(acts, *parts[4:]).fill_(7.0)
    assert torch.equal(acts, torch.ones(11, 37))
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_autocast_changes_nothing(way, tiled):
    parts = parts_of(torch.float32)
    acts = torch.tensor(written_out(*parts)[0]).float()
    plain = kernels.reconstruct(*parts), kernels.decode(acts, *parts[4:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.reconstruct(*parts), plain[0])
        assert torch.equal(kernels.decode(acts, *parts[4:]), plain[1])


def test_only_crowded_tiles_are_decoded_by_a_dense_product(monkeypatch):
    parts, products = parts_of(torch.float32), []
    monkeypatch.setattr(decoding, "SMALL", 0)
    monkeypatch.setattr(decoding, "CROWDED", 0.3)
    monkeypatch.setattr(tiles, "CPU_SIZE", 110)  # ten features
    plain = decoding._dense
    monkeypatch.setattr(decoding, "_dense", lambda out, acts, rows: (products.append(acts), plain(out, acts, rows))[1])
    kernels.reconstruct(*parts)
    assert 0 < len(products) < 4
    assert all((acts != 0).double().mean() > 0.3 for acts in products)


def test_bfloat16_weights_are_read_as_they_are_on_gpus(monkeypatch):
    """Dense products with them take activations in three parts, and lose none of their bits."""
    products = []

    def spied(x, rows, product=tiles.half_product):
        products.append((x.dtype, rows.dtype))
        return product(x, rows)

    monkeypatch.setattr(tiles, "half_product", spied)
    monkeypatch.setattr(tiles, "HALVES_ON", ("cpu",))
    random = torch.Generator().manual_seed(0)
    acts = torch.randn(5, 24, generator=random) * 10.0 ** torch.linspace(-30, 30, 24)
    eye, nothing = torch.eye(24).bfloat16(), torch.zeros(24)
    assert torch.equal(kernels.decode(acts, eye, nothing), acts)
    assert products == [(torch.bfloat16, torch.bfloat16)]
    assert kernels.decode(acts[:0], eye, nothing).shape == (0, 24)
    assert torch.equal(kernels.linear(acts, eye, nothing), acts), "nor does an encoder's product"
    assert products == products[:1] * 3
    del products[1:]
    acts, W_dec, b_dec = (torch.randn(shape, generator=random) for shape in ((5, 24), (24, 7), (7,)))
    low = W_dec.bfloat16()
    torch.testing.assert_close(kernels.decode(acts, low, b_dec).double(), acts.double() @ low.double() + b_dec.double(),
                               rtol=1e-5, atol=1e-5)
    assert len(products) == 2
    for others in ((acts, low.half()), (acts.clone().requires_grad_(), low), (acts, W_dec)):
        kernels.decode(*others, b_dec)
    assert len(products) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.decode(acts, low, b_dec), kernels.decode(acts, low, b_dec.clone()))
    assert products[2:] == products[:1] * 2


def test_tokens_of_several_tiles_are_decided_by_the_very_products_that_linear_makes(monkeypatch):
    """Also where a GPU would take all of them together: small SAEs, whose activations it does not count."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels take no tensors of a CPU")
    monkeypatch.setattr(segments, "TRITON_ON", ("cpu",))
    monkeypatch.setattr(decoding, "SMALL", 2**62)
    monkeypatch.setattr(decoding, "GPU_FEW", 0)
    monkeypatch.setattr(tiles, "CPU_TOKENS", 4)
    parts = [*parts_of(torch.float32)]
    taken = []
    monkeypatch.setattr(decoding, "unadded", lambda x, *rest: taken.append(len(x)) or tiles.unadded(x, *rest))
    parts[3] = kernels.linear(*parts[:3]).amax(0)
    assert torch.equal(kernels.reconstruct(*parts), parts[5].repeat(11, 1))
    assert taken == [3, 4, 4]
