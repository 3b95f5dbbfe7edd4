"""What is so little that it is computed at once: the very numbers of the long way, and only where that is so."""

import pytest
import torch

from sae_hooks import SAE, kernels
from sae_hooks.kernels import cpu_products, decoding, tiles


def parts(n, d_in=40, d_sae=70):
    """x (n, d_in), W_enc (d_in, d_sae) feature-major, bias (d_sae)."""
    random = torch.Generator().manual_seed(n)
    x, rows, bias = (torch.randn(shape, generator=random) for shape in ((n, d_in), (d_sae, d_in), (d_sae,)))
    return x, rows.T, bias


@pytest.mark.parametrize("n", [0, 1, 2, 7, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_product_of_the_long_way_bit_for_bit(n, dtype):
    x, W_enc, bias = parts(n)
    x = x.to(dtype)
    assert torch.equal(kernels.at_once(x, W_enc, bias), kernels.linear(x, W_enc.T, bias))


def test_many_multiplications_are_left_to_others(monkeypatch):
    x, W_enc, bias = parts(64)
    monkeypatch.setattr(cpu_products, "MUCH", x.shape[0] * W_enc.numel())
    assert kernels.at_once(x, W_enc, bias) is None
    assert kernels.at_once(x[1:], W_enc, bias) is not None
    acts = x.new_zeros(64, 70)
    monkeypatch.setattr(cpu_products, "MUCH_DECODED", 64 * W_enc.numel())
    assert kernels.decoded_at_once(acts, W_enc.T, bias[:40]) is None
    assert kernels.decoded_at_once(acts[1:], W_enc.T, bias[:40]) is not None


@pytest.mark.parametrize("n", [0, 1, 7])
def test_what_it_decodes_is_what_the_long_way_decodes(n):
    acts, W_dec, b_dec = parts(n)
    torch.testing.assert_close(kernels.decoded_at_once(acts.half(), W_dec, b_dec),
                               kernels.decode(acts.half(), W_dec, b_dec), rtol=0, atol=0)


def test_many_pre_activations_and_large_matrices_take_the_long_way(monkeypatch):
    x, W_enc, bias = parts(7)
    monkeypatch.setattr(tiles, "AT_ONCE", 7 * 70)
    assert kernels.at_once(x, W_enc, bias) is not None
    assert kernels.at_once(torch.cat([x, x[:1]]), W_enc, bias) is None
    monkeypatch.setattr(cpu_products, "LARGE", 40 * 70)
    assert kernels.at_once(x, W_enc, bias) is None
    monkeypatch.setattr(decoding, "SMALL", 8 * 40 * 70 + 1)  # seven tokens count as eight
    assert kernels.decoded_at_once(x, W_enc, torch.zeros(70)) is not None
    monkeypatch.setattr(decoding, "SMALL", 8 * 40 * 70)
    assert kernels.decoded_at_once(x, W_enc, torch.zeros(70)) is None


def test_a_gpu_has_a_limit_of_its_own_and_takes_large_matrices(fake_gpus, monkeypatch):
    monkeypatch.setattr(tiles, "AT_ONCE", 0)
    monkeypatch.setattr(cpu_products, "LARGE", 0)
    monkeypatch.setattr(tiles, "GPU_AT_ONCE", 7 * 70)
    monkeypatch.setattr(decoding, "SMALL", 0)
    x, W_enc, bias = (t.to("fgpu:0") for t in parts(7))
    assert torch.equal(kernels.at_once(x, W_enc, bias).cpu(), kernels.linear(x, W_enc.T, bias).cpu())
    assert kernels.at_once(torch.cat([x, x[:1]]), W_enc, bias) is None
    assert kernels.decoded_at_once(x, W_enc, torch.zeros(70, device="fgpu:0")) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("which", ["matrix", "bias"])
def test_weights_that_are_not_float32_take_the_long_way(dtype, which):
    x, matrix, bias = parts(3)
    matrix, bias = (matrix.to(dtype), bias) if which == "matrix" else (matrix, bias.to(dtype))
    assert kernels.at_once(x, matrix, bias) is None
    assert kernels.decoded_at_once(x, matrix, bias) is None


def test_autocast_and_the_compiler_take_the_long_way():
    x, matrix, bias = parts(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.at_once(x, matrix, bias) is None
        assert kernels.decoded_at_once(x, matrix, bias) is None

    found = torch.compile(lambda x: (kernels.at_once(x, matrix, bias), kernels.decoded_at_once(x, matrix, bias)),
                          backend="eager", fullgraph=True)(x)
    assert found == (None, None)


@pytest.mark.parametrize("gate", [{"threshold": torch.full((70,), 0.5)}, {"k": 5}])
def test_an_sae_takes_the_short_way_with_few_tokens_only(gate, monkeypatch):
    x, W_enc, bias = parts(4)
    sae = SAE(W_enc, bias, W_enc.T.contiguous(), torch.zeros(40), **gate)
    ways = (sae, sae.encode, sae.encode_sparse, sae.pre_activations, lambda x: sae.decode(sae.gate(x @ W_enc)))
    for name in ("pre_activations", "encode", "encode_sparse", "encode_topk", "reconstruct", "reconstruct_topk",
                 "decode"):
        monkeypatch.setattr(kernels, name, lambda *_: pytest.fail("the long way"))
    for way in ways:
        way(x)
    monkeypatch.setattr(tiles, "AT_ONCE", 0)
    monkeypatch.setattr(decoding, "SMALL", 0)
    for way in ways:
        with pytest.raises(pytest.fail.Exception, match="the long way"):
            way(x)
