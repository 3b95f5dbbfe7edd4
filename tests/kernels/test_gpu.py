"""On a GPU the kernels compute what they do on the CPU: screened, in halves, in Triton, in a compiled model."""

import pytest
import torch

from sae_hooks import SAE, kernels
from sae_hooks.kernels import gradients, screen, tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sae_of(dtype, d=72, d_sae=3000):
    """An SAE of which about a fiftieth is active, on the GPU, and the same in float64 on the CPU."""
    random = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(d, d_sae, generator=random) / d**0.5, torch.randn(d_sae, d, generator=random)
    b_enc, b_dec = 0.1 * torch.randn(d_sae, generator=random), torch.randn(d, generator=random)
    sae = SAE(W_enc.to(dtype), b_enc, W_dec.to(dtype), b_dec, threshold=torch.full((d_sae,), 2.0))
    wide = SAE(*(t.detach().double() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)),
               threshold=sae.threshold.detach().double())
    return sae.to("cuda"), wide


def x_of(n, dtype):
    return torch.randn(n, 72, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, screen.SCREEN_FROM, 2500])
@pytest.mark.parametrize("tiled", [False, True], ids=["one tile", "tiles"])
@torch.no_grad()
def test_encoding_and_reconstructing(dtype, x_dtype, n, tiled, monkeypatch):
    if tiled:  # of which each is counted while the next is multiplied
        monkeypatch.setattr(tiles, "GPU_SIZE", 700 * n)
    (sae, wide), x = sae_of(dtype), x_of(n, x_dtype)
    pre = wide.pre_activations(x.double())
    near = (pre - 2).abs() < 1e-5
    indptr, indices, values = (t.cpu() for t in sae.encode_sparse(x.cuda()))
    rows = torch.repeat_interleave(torch.arange(n), indptr.diff())
    found = torch.zeros_like(pre, dtype=torch.bool)
    found[rows, indices] = True
    assert torch.equal(found | near, (pre > 2) | near)
    torch.testing.assert_close(values.double(), pre[rows, indices], rtol=1e-4, atol=1e-4)
    acts = torch.zeros_like(pre).index_put((rows, indices), values.double())
    for decoded in (sae(x.float().cuda()), sae(x.cuda(), torch.float32), sae.decode(acts.float().cuda())):
        sure = ~near.any(1)  # two ways of summing may lie on two sides of a threshold
        torch.testing.assert_close(decoded.cpu().double()[sure], wide.decode(acts)[sure], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 300])
def test_gradients_through_what_is_active(dtype, x_dtype, n, monkeypatch):
    for module, name in ((gradients, "GPU_SMALL"), (tiles, "GPU_AT_ONCE")):
        monkeypatch.setattr(module, name, 0)
    (sae, wide), x = sae_of(dtype), x_of(n, x_dtype)
    far = ((wide.pre_activations(x.double()) - 2).abs() > 1e-5).all(1)
    ours, exact = x[far].cuda().requires_grad_(), x[far].double().requires_grad_()
    x_hat, wanted = sae(ours, torch.float32), wide(exact)
    assert "_Sums" in str(x_hat.grad_fn)
    torch.testing.assert_close(x_hat.detach().cpu().double(), wanted.detach(), rtol=1e-3, atol=1e-3)
    along = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(x_hat, ours, along.cuda())
    (gradient,) = torch.autograd.grad(wanted, exact, along.double())
    assert found.dtype == x_dtype
    close = {"rtol": 1e-2, "atol": 1e-2 * float(gradient.abs().max())}
    torch.testing.assert_close(found.cpu().double(), gradient, **close)


@pytest.mark.parametrize("threshold", [-1.0, 0.3])
@torch.no_grad()
def test_where_many_features_are_active(threshold):
    (sae, wide), x = sae_of(torch.float32), x_of(300, torch.float32)
    for each in (sae, wide):
        each.threshold.fill_(threshold)
    torch.testing.assert_close(sae(x.cuda()).cpu().double(), wide(x.double()), rtol=1e-2, atol=0.1)


def test_the_kernels_are_tritons_where_it_is_there():
    pytest.importorskip("triton")
    assert kernels.segments.triton_for(torch.zeros(1, device="cuda")) is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor's own import
@torch.no_grad()
def test_a_compiled_sae():
    sae, x = sae_of(torch.bfloat16)[0], x_of(40, torch.float32).cuda()
    torch.testing.assert_close(torch.compile(sae, fullgraph=True)(x), sae(x))
