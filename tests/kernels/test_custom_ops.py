"""A compiled model can contain an SAE: one graph, the same numbers, whatever is active."""

import pytest
import torch

from sae_hooks import SAE, kernels
from sae_hooks.kernels import encoding

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture
def sae(random_sae):
    return random_sae(16, 300, "model.layers.0.output")


def x_of(n, seed=0):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def topk(sae):
    return SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k=7, site=sae.site)


ARGUMENTS = {
    "encode_sparse": lambda sae, x: (x, sae.W_enc.T, sae.b_enc, sae.threshold),
    "encode_topk": lambda sae, x: (x, sae.W_enc.T, sae.b_enc, 7),
    "reconstruct": lambda sae, x: (x, sae.W_enc.T, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec),
    "reconstruct_topk": lambda sae, x: (x, sae.W_enc.T, sae.b_enc, 7, sae.W_dec, sae.b_dec),
    "decode": lambda sae, x: (sae.encode(x), sae.W_dec, sae.b_dec),
    "decode_sparse": lambda sae, x: (*sae.encode_sparse(x), sae.W_dec, sae.b_dec),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operators_and_their_fake_kernels_agree(sae, name, dtype):
    """PyTorch's own check: schema, shapes and types of the fake kernel."""
    operator = getattr(torch.ops.sae_hooks, name).default
    x = x_of(5).double() if dtype == torch.float64 else x_of(5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others trip over fakegpu's devices
    torch.library.opcheck(operator, ARGUMENTS[name](sae.to(dtype), x), test_utils=checks)


@pytest.mark.parametrize("way", ["splice", "encode_sparse", "decode", "topk", "half"])
@torch.no_grad()
def test_an_sae_is_compiled_whole_and_computes_what_it_did(sae, way, backend, graphs):
    sae = topk(sae) if way == "topk" else sae.to(torch.bfloat16) if way == "half" else sae

    def run(x):
        if way == "encode_sparse":
            return sae.encode_sparse(2 * x)
        return (sae.decode(2 * sae.encode(x)) if way == "decode" else sae(2 * x) + 1,)

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for n in (40, 3, 200):
        for ours, plain in zip(compiled(x_of(n)), run(x_of(n)), strict=True):
            assert torch.equal(ours, plain)
    assert len(graphs) == 1, "compiled anew for another number of tokens or of active features"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor's own import
def test_inductor_runs_what_it_compiled(sae):
    """The real compiler, once: generated code around the operator."""
    with torch.no_grad():
        compiled = torch.compile(lambda x: sae(x.sin()) * 2, fullgraph=True)
        torch.testing.assert_close(compiled(x_of(50)), sae(x_of(50).sin()) * 2)


def test_gradients_flow_through_a_compiled_sae(sae, backend):
    x, plain = (x_of(9).requires_grad_() for _ in range(2))
    torch.compile(sae, backend=backend, fullgraph=True)(x).square().sum().backward()
    sae(plain).square().sum().backward()
    assert x.grad.abs().max() > 0
    torch.testing.assert_close(x.grad, plain.grad)


def test_eager_code_calls_the_function_itself(sae, monkeypatch):
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)
    operator = torch.ops.sae_hooks.encode_sparse
    assert len(kernels.encode_sparse(*ARGUMENTS["encode_sparse"](sae, x_of(4)))) == 3
    with pytest.raises(TypeError):
        operator.default(*ARGUMENTS["encode_sparse"](sae, x_of(4)))
    assert encoding.encode_sparse is kernels.encode_sparse
