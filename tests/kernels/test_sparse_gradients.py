"""Gradients of what an SAE reads, at the cost of what is active: those of dense autograd, of any order."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sae_hooks import SAE, kernels
from sae_hooks.kernels import gradients, segments, signs, tiles

N, D_IN, D_SAE, D_OUT = 11, 16, 37, 19
GATES = ("jumprelu", "topk")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def nothing_is_little(monkeypatch):
    for module, name in ((gradients, "SMALL"), (tiles, "AT_ONCE")):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(gradients, "CROWDED", 1.0)


@pytest.fixture(params=["PyTorch", "Triton"])
def by(request, monkeypatch):
    """Whose kernels run."""
    if request.param == "Triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("compiled kernels take no tensors of a CPU")
        monkeypatch.setattr(segments, "TRITON_ON", ("cpu",))


@pytest.fixture(params=[True, False], ids=["small tiles", "one tile"])
def tiled(request, monkeypatch):
    if request.param:
        for name, value in (("CPU_TOKENS", 3), ("CPU_SIZE", 24), ("TOPK_SIZE", 150)):
            monkeypatch.setattr(tiles, name, value)


def make(gate="jumprelu", dtype=torch.float64):
    """An SAE whose first features are rarely active, the last often."""
    random = torch.Generator().manual_seed(0)
    W_enc, b_enc, W_dec, b_dec = (torch.randn(shape, generator=random).double()
                                  for shape in ((D_IN, D_SAE), (D_SAE,), (D_SAE, D_OUT), (D_OUT,)))
    gates = {"jumprelu": {"threshold": torch.linspace(9, 0, D_SAE).double()}, "topk": {"k": 5}}
    return SAE(W_enc, b_enc, W_dec, b_dec, **gates[gate], site="a", site_out="b").to(dtype)


def some(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def written_out(sae, x):
    """(acts, x_hat) in float64, by dense operations."""
    W_enc, b_enc, W_dec, b_dec = (t.detach().double() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    pre = x.double() @ W_enc + b_enc
    least = sae.threshold if sae.k is None else pre.relu().topk(sae.k + 1).values[..., -1:]
    acts = torch.where(pre > least.detach().double(), pre, torch.zeros_like(pre))
    return acts, acts @ W_dec + b_dec


def hold_close(found, wanted, dtype, of_x=torch.float64):
    """To what the dtype computed in can keep, and that of x: also of a gradient of x in it."""
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(of_x, 1e-10 if dtype == torch.float64 else 1e-5)
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def is_sparse(result):
    return "_Sums" in str(result.grad_fn)


def recorded():
    """(what to enter, the tensors that autograd keeps meanwhile)."""
    kept = []
    return saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("of_x", [torch.float64, torch.float32, None], ids=["float64", "float32", "as weights"])
def test_reconstruction_and_its_gradient_are_those_of_dense_autograd(by, tiled, gate, dtype, of_x):
    sae, x, along = make(gate, dtype), some(N, D_IN, dtype=of_x or dtype), some(N, D_OUT, seed=2).detach()
    computed = torch.float64 if x.dtype == dtype == torch.float64 else torch.float32
    x_hat = sae(x, computed)
    assert is_sparse(x_hat)
    acts, wanted = written_out(sae, x)
    assert 0 < (acts != 0).double().mean() < 0.6
    hold_close(x_hat.detach(), wanted.detach(), computed)
    (found,) = grad(x_hat, x, along.to(computed))
    assert found.dtype == x.dtype
    hold_close(found, grad(wanted, x, along)[0].double(), computed, x.dtype)
    assert found.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_sparse_features_and_their_gradient_are_those_of_dense_autograd(by, tiled, gate, dtype):
    sae, x = make(gate, dtype), some(N, D_IN, dtype=dtype)
    indptr, indices, values = sae.encode_sparse(x)
    acts = written_out(sae, x)[0]
    with torch.no_grad():
        plain = sae.encode_sparse(x)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip((indptr, indices, values), plain, strict=True))
    rows, columns = acts.nonzero(as_tuple=True)
    assert torch.equal(indices, columns)
    along = some(len(values), seed=3).detach()
    (found,) = grad(values, x, along.to(values.dtype))
    hold_close(found, grad(acts[rows, columns], x, along)[0].double(), values.dtype, dtype)


@pytest.mark.parametrize("gate", GATES)
def test_derivatives_of_higher_orders_are_right(gate):
    sae, x = make(gate), some(3, D_IN)
    assert gradcheck(sae, x)
    assert gradgradcheck(sae, x)
    assert gradgradcheck(lambda x: sae.encode_sparse(x)[2], x)
    dense = torch.autograd.functional.hessian(lambda x: written_out(sae, x)[1].square().sum(), x)
    hold_close(torch.autograd.functional.hessian(lambda x: sae(x).square().sum(), x), dense, torch.float64)
    assert dense.any()


@pytest.mark.parametrize("gate", GATES)
def test_many_gradients_at_once_are_those_of_each(by, gate):
    sae, x, along = make(gate), some(3, D_IN), some(4, 3, D_OUT, seed=2).detach()
    x_hat = sae(x)
    (found,) = grad(x_hat, x, along, is_grads_batched=True, retain_graph=True)
    each = torch.stack([grad(x_hat, x, one, retain_graph=True)[0] for one in along])
    torch.testing.assert_close(found, each)
    assert found.any()
    assert is_sparse(x_hat)
    torch.testing.assert_close(jacobian(sae, x, vectorize=True), jacobian(sae, x))
    ours, wanted = (jacobian(lambda x, of=of: grad(of(x).square().sum(), x, create_graph=True)[0], x, vectorize=True)
                    for of in (sae, lambda x: written_out(sae, x)[1]))
    hold_close(ours, wanted, torch.float64)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own import
def test_torch_func_goes_another_way_to_the_same_gradients(gate):
    sae, x = make(gate), some(N, D_IN)
    wanted = grad(sae(x).square().sum(), x)[0]
    hold_close(torch.func.grad(lambda x: sae(x).square().sum())(x.detach()), wanted, torch.float64)
    each = torch.func.vmap(torch.func.grad(lambda x: sae(x[None]).square().sum()))(x.detach())
    hold_close(each, wanted, torch.float64)


@pytest.mark.parametrize("gate", GATES)
def test_tokens_of_any_shape_and_layout(by, gate):
    sae, x = make(gate), some(N, D_IN)
    x_hat = sae(x)
    (wanted,) = grad(x_hat.square().sum(), x)
    wide = torch.stack([x.detach()] * 3, dim=1)
    for given in (wide[:, -1], x.detach().T.contiguous().T, x.detach()[None, :, None]):
        given.requires_grad_()
        again = sae(given)
        torch.testing.assert_close(again.reshape(N, D_OUT), x_hat)
        torch.testing.assert_close(grad(again.square().sum(), given)[0].reshape(N, D_IN), wanted)
    (found,) = grad(sae(x).sum(), x)  # whose gradient is an expanded number
    hold_close(found, grad(written_out(sae, x)[1].sum(), x)[0], torch.float64)


@pytest.mark.parametrize("gate", GATES)
def test_no_token_and_nothing_active(by, gate):
    sae, none = make(gate), some(0, D_IN)
    assert sae(none).shape == (0, D_OUT)
    assert grad(sae(none).sum(), none)[0].shape == (0, D_IN)
    sae.b_enc.fill_(-1e3)
    x = some(N, D_IN)
    x_hat = sae(x)
    assert torch.equal(x_hat, sae.b_dec.expand(N, D_OUT))
    assert not grad(x_hat.square().sum(), x)[0].any()
    assert [part.tolist() for part in sae.encode_sparse(x)] == [[0] * (N + 1), [], []]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter's numpy
@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_finite_stays_with_its_token(by, gate):
    sae, x = make(gate), some(N, D_IN)
    (wanted,) = grad(sae(x).square().sum(), x)
    spoilt = x.detach().clone()
    spoilt[3, 2], spoilt[7, 0] = torch.nan, torch.inf
    spoilt.requires_grad_()
    x_hat, others = sae(spoilt), [i for i in range(N) if i not in (3, 7)]
    assert x_hat[3].isnan().all()
    assert not x_hat[7].isfinite().any()
    torch.testing.assert_close(grad(x_hat.square().sum(), spoilt)[0][others], wanted[others])


@pytest.mark.parametrize("gate", GATES)
def test_autocast_changes_nothing_in_either_pass(by, gate, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TOKENS", 3)
    sae, x = make(gate, torch.float32), some(N, D_IN, dtype=torch.float32)
    for function in (sae, sae.encode):
        out = function(x)
        (wanted,) = grad(out.square().sum(), x)
        with torch.autocast("cpu", torch.bfloat16):
            again = function(x)
            (found,) = grad(again.square().sum(), x)
        assert torch.equal(again, out)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("gate", GATES)
def test_checkpointing_computes_the_same_anew(by, gate):
    sae, x = make(gate), some(N, D_IN)
    (wanted,) = grad(sae(x).square().sum(), x)
    assert torch.equal(grad(checkpoint(sae, x, use_reentrant=False).square().sum(), x)[0], wanted)


def test_weights_that_change_before_the_backward_pass_are_an_error_as_in_autograd(by):
    sae, x = make(), some(N, D_IN)
    for name in ("W_enc", "W_dec"):
        x_hat = sae(x)
        getattr(sae, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x_hat.sum().backward()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_which_features_are_active(by, tiled, gate, dtype):
    sae, x = make(gate, dtype), some(N, D_IN, dtype=torch.float32)
    keeping, kept = recorded()
    with keeping:
        sae(x)
        sae.encode_sparse(x)
    own = {sae.W_enc.data_ptr(), sae.W_dec.data_ptr()}
    assert own == {t.data_ptr() for t in kept if t.is_floating_point()}
    most = int((written_out(sae, x)[0] != 0).sum())
    assert all(len(t) <= max(most, N + 1) and t.dtype == torch.int32 for t in kept if not t.is_floating_point())


# --- where plain operations are taken


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("gate", GATES)
def test_weights_that_want_gradients_get_them(tiled, gate, name):
    sae, x = make(gate), some(N, D_IN)
    getattr(sae, name).requires_grad_()
    x_hat = sae(x)
    assert not is_sparse(x_hat)
    acts = sae.encode(x)
    found = grad(x_hat.square().sum() + acts.square().sum(), (x, getattr(sae, name)))
    parts = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters() if n != "threshold"}
    pre = x @ parts["W_enc"] + parts["b_enc"]
    plain = pre * (acts != 0)
    wanted = plain @ parts["W_dec"] + parts["b_dec"]
    for ours, dense in zip(found, grad(wanted.square().sum() + plain.square().sum(), (x, parts[name])), strict=True):
        hold_close(ours, dense, torch.float64)


def test_crowded_features_are_left_to_dense_products(monkeypatch):
    sae, x = make(), some(256, D_IN)
    share = float((written_out(sae, x)[0] != 0).double().mean())
    for k, most, sparse in ((None, share * 1.3, True), (None, share / 1.3, False), (5, 5 / D_SAE, True),
                            (5, 4.9 / D_SAE, False)):
        monkeypatch.setattr(gradients, "CROWDED", most)
        given = sae if k is None else make("topk")
        x_hat = given(x)
        assert is_sparse(x_hat) == sparse
        assert (given.encode_sparse(x)[2].grad_fn.name() == "_ActiveBackward") == sparse
        hold_close(grad(x_hat.square().sum(), x)[0], grad(written_out(given, x)[1].square().sum(), x)[0], torch.float64)


def test_small_products_and_devices_that_were_not_tried_are_left_to_plain_operations(monkeypatch):
    sae, x = make(), some(N, D_IN)
    for n, name, value, sparse in ((N, "SMALL", N * D_IN * D_SAE - 1, True), (N, "SMALL", N * D_IN * D_SAE, False),
                                   (1, "SMALL", 8 * D_IN * D_SAE - 1, True), (1, "SMALL", 8 * D_IN * D_SAE, False),
                                   (N, "FOLLOWED_ON", ("mps",), False)):
        with monkeypatch.context() as limits:
            limits.setattr(gradients, name, value)
            assert is_sparse(sae(x[:n])) == sparse


@pytest.mark.parametrize("gate", GATES)
def test_a_compiled_sae_takes_plain_operations(gate, nothing_compiled, backend):
    sae, x = make(gate), some(N, D_IN)
    compiled = torch.compile(lambda x: sae(x).square().sum(), backend=backend, fullgraph=True)
    hold_close(grad(compiled(x), x)[0], grad(sae(x).square().sum(), x)[0], torch.float64)


# --- pre-activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_activations_are_the_same_bits_and_one_operation_to_autograd(tiled, dtype):
    sae, x = make(dtype=dtype), some(N, D_IN, dtype=torch.float32)
    keeping, kept = recorded()
    with keeping:
        pre = sae.pre_activations(x)
    with torch.no_grad():
        assert torch.equal(pre, sae.pre_activations(x))
    assert {t.data_ptr() for t in kept} <= {sae.W_enc.data_ptr(), x.data_ptr()}, "rows are kept widened"
    torch.testing.assert_close(grad(pre.square().sum(), x)[0], 2 * pre.detach() @ sae.W_enc.T.float())
    if dtype == torch.bfloat16 or tiles.CPU_TOKENS == 3:
        assert "_Linear" in str(pre.grad_fn)
        assert [t.data_ptr() for t in kept] == [sae.W_enc.data_ptr()]


def test_pre_activations_have_derivatives_of_higher_orders(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TOKENS", 2)
    x, rows, bias = some(3, 4), some(5, 4, seed=2), some(5, seed=3)
    assert gradcheck(kernels.pre_activations, (x, rows, bias))
    assert gradgradcheck(kernels.pre_activations, (x, rows, bias))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own import
def test_torch_func_sees_their_plain_operations(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TOKENS", 2)
    x, rows, bias = some(3, 4), some(5, 4, seed=2), some(5, seed=3)
    each = torch.func.vmap(kernels.pre_activations, in_dims=(0, None, None))(torch.stack([x, 2 * x]), rows, bias)
    torch.testing.assert_close(each[1], 2 * x @ rows.T + bias)
    _, tangent = torch.func.jvp(lambda x: kernels.pre_activations(x, rows, bias), (x,), (x,))
    torch.testing.assert_close(tangent, x @ rows.T)


# --- how many are active


@pytest.mark.parametrize(("n", "m"), [(0, 5), (1, 1), (200, 3000)])
def test_the_share_that_is_above_is_that_of_pairs_that_lie_evenly_apart(n, m, monkeypatch):
    taken = []
    monkeypatch.setattr(signs, "affine", lambda x, *to: taken.append(len(x) * len(to[0])) or tiles.affine(x, *to))
    x, rows = torch.ones(n, 1), torch.arange(m).float()[:, None]
    found = signs.share_above(x, rows, torch.zeros(m), torch.full((m,), m * 0.75), (8, 128))
    assert found == pytest.approx(0.25 if n == 200 else 0.0, abs=0.02)
    assert sum(taken) <= 2 * 8 * 2 * 128
