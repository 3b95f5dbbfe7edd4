"""The screen by bfloat16 products misses nothing and lets nothing through: what is active is decided in float32."""

import pytest
import torch

from sae_hooks import kernels
from sae_hooks.kernels import decoding, encoding, screen, segments, tiles

from .screen_cases import exact, parts_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, params=[(), ("cpu",)], ids=["PyTorch", "Triton"])
def on_cpus(request, monkeypatch):
    if request.param:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("compiled kernels take no tensors of a CPU")
    monkeypatch.setattr(screen, "SCREEN_ON", ("cpu",))
    monkeypatch.setattr(screen, "SCREEN_FROM", 1)
    monkeypatch.setattr(segments, "TRITON_ON", request.param)
    monkeypatch.setattr(decoding, "SMALL", 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_features_and_values_are_those_of_exact_products(dtype):
    x, W_rows, bias, threshold = parts_of(dtype)
    pre = exact(x, W_rows, bias)
    rows, columns, values = kernels.find_above(x, W_rows, bias, threshold)
    wanted = (pre > threshold).nonzero(as_tuple=True)
    near = (pre - threshold).abs() < 1e-6 * x.norm(dim=1)[:, None] * W_rows.float().norm(dim=1)
    assert not near[wanted].all()
    found = torch.zeros_like(pre, dtype=torch.bool)
    found[rows, columns] = True
    assert torch.equal(found | near, (pre > threshold) | near)
    torch.testing.assert_close(values.double(), pre[rows, columns], rtol=1e-4, atol=1e-5)
    assert (rows[1:] >= rows[:-1]).all()
    assert values.dtype == torch.float32


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_of_the_worst_kind_hides_no_feature(sign):
    """Numbers half-way between two of bfloat16, all rounded in one direction, and a threshold just below the sum."""
    d = 300
    x = torch.full((3, d), 1 + 2.0**-8 - sign * 2.0**-20) * torch.tensor([[1.0], [2.0**10], [2.0**-10]])
    W_rows = torch.full((5, d), 1 + 2.0**-8 - sign * 2.0**-20)
    pre = exact(x, W_rows, torch.zeros(5))
    assert ((x.bfloat16().double() @ W_rows.bfloat16().double().T - pre).abs() > 5e-3 * pre).all(), "rounding is small"
    for token in range(3):
        for factor, count in ((1 - 1e-5, 5), (1 + 1e-5, 0)):
            threshold = (factor * pre[token]).float()
            rows, _, values = kernels.find_above(x[token:token + 1], W_rows, torch.zeros(5), threshold)
            assert len(rows) == count
            torch.testing.assert_close(values.double(), pre[token][:count], rtol=1e-5, atol=0)


def test_nothing_above_and_everything():
    x, W_rows, bias, _ = parts_of()
    assert len(kernels.find_above(x, W_rows, bias, torch.full((70,), 1e9))[0]) == 0
    assert len(kernels.find_above(x, W_rows, bias, torch.full((70,), -1e9))[0]) == 24 * 70


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("crowded", [0.05, 1.0])
def test_reconstructions_are_those_without_a_screen(monkeypatch, dtype, crowded):
    x, W_rows, bias, threshold = parts_of(dtype)
    W_dec, b_dec = torch.randn(70, 20).to(dtype), torch.randn(20)
    monkeypatch.setattr(decoding, "CROWDED", crowded)
    monkeypatch.setattr(tiles, "CPU_SIZE", 400)
    ours = kernels.reconstruct(x, W_rows, bias, threshold, W_dec, b_dec)
    monkeypatch.setattr(screen, "SCREEN_ON", ())
    plain = kernels.reconstruct(x, W_rows, bias, threshold, W_dec, b_dec)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-2)


def test_where_many_are_above_none_of_them_is_computed_anew(monkeypatch):
    x, W_rows, bias, threshold = parts_of()
    W_dec, b_dec = torch.randn(70, 20), torch.randn(20)
    monkeypatch.setattr(decoding, "CROWDED", 0.05)
    monkeypatch.setattr(screen, "dots", None)
    ours = kernels.reconstruct(x, W_rows, bias, threshold, W_dec, b_dec)
    monkeypatch.setattr(screen, "SCREEN_ON", ())
    torch.testing.assert_close(ours, kernels.reconstruct(x, W_rows, bias, threshold, W_dec, b_dec))


def test_autocast_changes_nothing_and_gradients_go_around_it():
    x, W_rows, bias, threshold = parts_of()
    plain = kernels.find_above(x, W_rows, bias, threshold)
    with torch.autocast("cpu", torch.float16):
        again = kernels.find_above(x, W_rows, bias, threshold)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    wanting = x.clone().requires_grad_()
    kernels.find_above(wanting, W_rows, bias, threshold)[2].sum().backward()
    assert wanting.grad.any()


def test_halves_are_multiplied_as_they_are_on_gpus(monkeypatch):
    """Where activations and weights are of one half dtype their products need no screen: they are exact."""
    monkeypatch.setattr(tiles, "HALVES_ON", ("cpu",))
    x, W_rows, bias, threshold = parts_of(torch.bfloat16)
    low = x.bfloat16()
    monkeypatch.setattr(encoding, "screened", None)
    for ours, plain in zip(kernels.find_above(low, W_rows, bias, threshold),
                           (*(pre := exact(low, W_rows, bias)).float().gt(threshold).nonzero(as_tuple=True), None),
                           strict=True):
        assert plain is None or torch.equal(ours, plain)
    torch.testing.assert_close(kernels.linear(low, W_rows, bias).double(), pre, rtol=1e-4, atol=1e-4)
    assert kernels.linear(low, W_rows, bias).dtype == torch.float32
    assert tiles.ready(low, W_rows).dtype == torch.bfloat16
    assert tiles.ready(low, W_rows.clone().requires_grad_()).dtype == torch.float32, "gradients go the wide way"
