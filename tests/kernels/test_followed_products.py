"""Products with gradients on a CPU where oneDNN is the quicker one: the product and the gradients of autograd."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import vmap

from sae_hooks import kernels
from sae_hooks.kernels import cpu_products, tiles

pytestmark = pytest.mark.skipif(not cpu_products.HAS_ONEDNN, reason="this build of torch has no oneDNN")
N, K, M = 40, 24, 70


@pytest.fixture
def calls(monkeypatch):
    """What was given to oneDNN, which takes whatever is as much as N tokens."""
    seen, plain = [], cpu_products.by_onednn

    def noted(*args):
        seen.append(args)
        return plain(*args)

    monkeypatch.setattr(cpu_products, "by_onednn", noted)
    monkeypatch.setattr(cpu_products, "MUCH_DECODED", N * K * M)
    monkeypatch.setattr(cpu_products, "MUCH", torch.inf)
    return seen


def parts(n=N, k=K, m=M, dtype=torch.float32):
    """x (n, k), W (k, m), bias (m)."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in ((n, k), (k, m), (m,))]


def found(product, leaves, along):
    """The product, and its gradients along a tensor."""
    out = product(*leaves)
    return out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], along)


@pytest.mark.parametrize(("n", "k", "m"), [(N, K, M), (N, M, K), (400, K, M), (M, N, K)])
@pytest.mark.parametrize("layout", ["in one piece", "transposed"])
@pytest.mark.parametrize("wanting", [(0, 1, 2), (1,), (0,), (0, 1)])
def test_it_is_the_product_with_its_gradients(calls, n, k, m, layout, wanting):
    leaves = [leaf.requires_grad_(i in wanting) for i, leaf in enumerate(parts(n, k, m))]
    along = torch.randn(n, m)
    if layout == "transposed":
        along = along.T.contiguous().T
        leaves[:2] = [t.detach().T.contiguous().T.requires_grad_(t.requires_grad) for t in leaves[:2]]
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    want = found(lambda x, W, b: x @ W + b, wide, along.double())
    for mine, theirs in zip(found(kernels.product, leaves, along), want, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-4)
    assert len(calls) == 1 + len({0, 1}.intersection(wanting))


def test_without_a_bias(calls):
    x, W, _ = parts()
    for mine, theirs in zip(found(kernels.product, [x, W], torch.ones(N, M)),
                            found(torch.mm, [x, W], torch.ones(N, M)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert len(calls) == 3


@pytest.mark.parametrize("pieces", ["expanded", "every second row"])
def test_gradients_that_lie_in_pieces_are_copied_first(calls, pieces):
    along = torch.ones(1, 1).expand(N, M) if pieces == "expanded" else torch.randn(2 * N, M)[::2]
    leaves = parts()
    for mine, theirs in zip(found(kernels.product, leaves, along), found(lambda x, W, b: x @ W + b, leaves, along),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    for matrices in calls[1:]:
        assert all(t.is_contiguous() or t.T.is_contiguous() for t in matrices[:2])


def test_second_derivatives_are_those_of_plain_products(calls):
    """And gradients that are taken several at once (is_grads_batched)."""
    found = []
    for product in (kernels.product, lambda x, W, b: x @ W + b):
        leaves = parts()
        out = product(*leaves)
        batched = torch.autograd.grad(out, leaves, torch.stack([out.detach(), out.detach() ** 2]), retain_graph=True,
                                      is_grads_batched=True)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append([*batched, *first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)
    assert len(calls) == 3, "the product, and the last backward pass, which nobody follows"


def test_backward_passes_of_what_autograd_follows_as_one_operation_are_onednns_too(calls, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_SIZE", 400)
    x, W, bias = parts()
    along = torch.randn(N, M)
    want = found(lambda x, W, b: x @ W + b, [x, W, bias], along)
    for mine, theirs in zip(found(lambda x, W, b: kernels.pre_activations(x, W.T, b), [x, W, bias], along), want,
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own forward mode
def test_several_biases_at_once_and_tangents_of_them_are_followed_plainly(calls):
    x, W, bias = parts()
    biases = torch.stack([bias, 2 * bias]).detach()
    several = vmap(lambda b: kernels.product(x, W, b))(biases)
    torch.testing.assert_close(several, torch.stack([x @ W + b for b in biases]), rtol=1e-5, atol=1e-4)
    with forward_ad.dual_level():
        out = kernels.product(x, W, forward_ad.make_dual(bias, torch.ones_like(bias)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, torch.ones(N, M))
    assert not calls


@pytest.mark.parametrize("case", ["few", "two tokens", "float64", "no gradient", "pieces", "compiled"])
def test_others_multiply_plainly(calls, case):
    x, W, bias = parts({"few": N - 1, "two tokens": 2}.get(case, N), m=M * N if case == "two tokens" else M,
                       dtype=torch.float64 if case == "float64" else torch.float32)
    if case == "no gradient":
        x, W, bias = (t.detach() for t in (x, W, bias))
    if case == "pieces":
        W = torch.stack([W, W], 1)[:, 0]
    product = torch.compile(kernels.product, backend="eager") if case == "compiled" else kernels.product
    torch.testing.assert_close(product(x, W, bias), x @ W + bias, rtol=1e-5, atol=1e-4)
    assert not calls
