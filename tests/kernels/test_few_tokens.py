"""Products on a CPU, of few tokens above all: whoever multiplies, and from whichever side, it is the product; and rows
of half precision are widened some at a time."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from sae_hooks import kernels
from sae_hooks.kernels import cpu_products, tiles

needs_onednn = pytest.mark.skipif(not cpu_products.HAS_ONEDNN, reason="this build of torch has no oneDNN")
needs_mkl = pytest.mark.skipif(not cpu_products.MKL, reason="this build of torch has no MKL")
BY_ONEDNN, BY_MKL = (9, 16, 64), (1, 2, 3, 4, 5, 65, 128, 129)
RANGES = {"AVX2": {"THIN": range(5, 65), "THIN_WIDENED": range(0), "THINNER": range(0), "FEWEST": range(1, 4),
                   "FEWEST_OF": math.inf},
          "AVX-512": {"THIN": range(8, 65), "THIN_WIDENED": range(16, 65), "THINNER": range(4, 8),
                      "FEWEST": range(1, 5), "FEWEST_OF": 4 * 48},
          "Zen 5": {"THIN": range(8, 65), "THIN_WIDENED": range(16, 65), "THINNER": range(3, 8),
                    "FEWEST": range(1, 3), "FEWEST_OF": math.inf}}
FEATURES = (70, 72)  # the second can be read from four places


@pytest.fixture(params=RANGES)
def calls(monkeypatch, request):
    """What was given to oneDNN, which takes whatever has as few tokens; of the ranges that CPUs have."""
    seen, plain = [], cpu_products.by_onednn

    def noted(*args):
        seen.append(args)
        return plain(*args)

    limit(monkeypatch, LARGE=0, MUCH=math.inf, MUCH_OF_TWO=math.inf, by_onednn=noted, **RANGES[request.param])
    return seen


def limit(monkeypatch, **values):
    """Set constants of whichever module has them."""
    for name, value in values.items():
        monkeypatch.setattr(cpu_products if hasattr(cpu_products, name) else tiles, name, value)


def parts(n, dtype=torch.float32, m=70):
    """x (n, 48), rows (m, 48), bias (m)."""
    random = torch.Generator().manual_seed(n)
    return tuple(torch.randn(shape, generator=random).to(dtype) for shape in ((n, 48), (m, 48), (m,)))


def is_read_from_places(n):
    return n in cpu_products.FEWEST and n * 48 < cpu_products.FEWEST_OF


def is_for_onednn(n):
    return n in cpu_products.THIN or n in cpu_products.THINNER


def product(x, rows, bias):
    return (x.double() @ rows.double().T + bias.double()).to(torch.float32)


@pytest.fixture
def places(monkeypatch):
    """What was given to the product that reads from several places."""
    seen, plain = [], cpu_products.affine_from_places

    def noted(x, rows, bias):
        seen.append((x, rows, bias))
        return plain(x, rows, bias)

    monkeypatch.setattr(cpu_products, "affine_from_places", noted)
    return seen


@needs_onednn
@needs_mkl
@pytest.mark.parametrize("m", FEATURES)
@pytest.mark.parametrize("n", BY_ONEDNN + BY_MKL)
def test_it_is_the_product_whoever_makes_it(calls, places, n, m):
    got = kernels.linear(*parts(n, m=m))
    torch.testing.assert_close(got, product(*parts(n, m=m)), rtol=0, atol=2e-5)
    assert got.is_contiguous()
    assert len(calls) == is_for_onednn(n)
    assert len(places) == (is_read_from_places(n) and m == 72)


@needs_onednn
@needs_mkl
def test_small_rows_are_multiplied_plainly(calls, places, monkeypatch):
    monkeypatch.setattr(cpu_products, "LARGE", 72 * 48 + 1)
    for n in (1, 5, 9):
        kernels.linear(*parts(n, m=72))
    assert not calls
    assert not places
    monkeypatch.setattr(cpu_products, "LARGE", 72 * 48)
    for n in (1, 5, 9):
        kernels.linear(*parts(n, m=72))
    assert len(calls) == 2
    assert [len(x) for x, *_ in places] == [1]


@pytest.mark.parametrize("n", BY_ONEDNN + BY_MKL)
@pytest.mark.parametrize("m", FEATURES)
@pytest.mark.parametrize("much", [math.inf, 0])
def test_layouts_make_no_difference(calls, places, n, m, much, monkeypatch):
    """And no product is given what it takes hundreds of times as long for."""
    limit(monkeypatch, MUCH=much, MUCH_OF_TWO=much, AT_ONCE=0)
    x, rows, bias = parts(n, m=m)
    wide = torch.zeros(48, 2 * n)
    wide[:, ::2] = x.T
    biases = torch.stack([bias] * 2, dim=1)[:, 0]
    for tokens in (wide.T[::2], x.T.contiguous().T, torch.stack([x] * 3, dim=1)[:, -1]):
        for laid_out in (rows, rows.T.contiguous().T, torch.cat([rows] * 2)[::2].copy_(rows)):
            got = kernels.linear(tokens, laid_out, biases)
            torch.testing.assert_close(got, product(x, rows, bias), rtol=0, atol=2e-5)
    assert all(left.is_contiguous() for left, _, _ in calls + places)
    assert all(right.is_contiguous() for _, right, _ in calls)


@needs_onednn
@pytest.mark.parametrize("n", [3, 130, 200])
def test_many_multiplications_are_left_to_onednn_where_it_is_the_quicker_one(calls, n, monkeypatch):
    x, rows, bias = parts(n)
    limit(monkeypatch, MUCH=n * 70 * 48, LARGE=math.inf)
    assert kernels.at_once(x, rows.T, bias) is None
    torch.testing.assert_close(kernels.linear(x, rows, bias), product(x, rows, bias), rtol=0, atol=2e-5)
    (given,) = calls
    assert all(mine is theirs for mine, theirs in zip(given, (x, rows, bias), strict=True))
    with monkeypatch.context() as less:
        limit(less, MUCH=n * 70 * 48 + 1)
        assert kernels.at_once(x, rows.T, bias) is not None
        kernels.linear(x, rows, bias)
    kernels.linear(x.requires_grad_(), rows, bias)
    kernels.linear(x.detach().double(), rows.double(), bias.double())
    assert len(calls) == 1


@needs_onednn
def test_one_or_two_tokens_are_only_if_they_are_more_yet(calls, monkeypatch):
    limit(monkeypatch, MUCH=0, LARGE=math.inf)
    for n in (1, 2):
        kernels.linear(*parts(n))
        assert not calls
    limit(monkeypatch, MUCH_OF_TWO=0)
    for n in (1, 2):
        got = kernels.linear(*parts(n))
        torch.testing.assert_close(got, product(*parts(n)), rtol=0, atol=2e-5)
        assert len(calls.pop()[0]) == n


@needs_onednn
@pytest.mark.parametrize("n", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_so_are_dense_decodings(calls, n, dtype, monkeypatch):
    """Also of rows of half precision, and of activations that do not lie in one piece."""
    acts, (_, W_dec, _), b_dec = torch.randn(n, 70), parts(1, dtype), torch.randn(48)
    limit(monkeypatch, MUCH_DECODED=n * 70 * 48)
    want = product(acts, W_dec.T, b_dec)
    for laid_out in (acts, acts.T.contiguous().T):
        torch.testing.assert_close(kernels.decode(laid_out, W_dec, b_dec), want, rtol=0, atol=5e-5)
    x, rows, bias = parts(n)
    threshold = torch.full((70,), -1.0)
    x_hat = kernels.reconstruct(x, rows, bias, threshold, W_dec, b_dec)
    pre = kernels.linear(x, rows, bias)
    torch.testing.assert_close(x_hat, product(pre * (pre > threshold), W_dec.T, b_dec), rtol=0, atol=2e-4)
    mine = [given for given in calls if not given[1].is_contiguous()]
    assert [(len(left), right.T.is_contiguous()) for left, right, _ in mine] == [(n, True)] * 3
    assert all(left.is_contiguous() for left, _, _ in mine)
    calls.clear()
    with monkeypatch.context() as more:
        limit(more, MUCH_DECODED=n * 70 * 48 + 1)
        kernels.decode(acts, W_dec, b_dec)
    kernels.decode(acts.double(), W_dec.double(), b_dec.double())
    kernels.decode(acts, W_dec.T.contiguous().T, b_dec)
    limit(monkeypatch, MUCH_DECODED=0)
    kernels.decode(acts[:2], W_dec, b_dec)
    assert not calls


@pytest.mark.parametrize("n", [1, 9, 200])
def test_gpus_multiply_plainly(calls, places, fake_gpus, n, monkeypatch):
    monkeypatch.setattr(cpu_products, "MUCH", 0)
    x, rows, bias = parts(n, m=72)
    got = kernels.linear(x.to("fgpu:0"), rows.to("fgpu:0"), bias.to("fgpu:0"))
    torch.testing.assert_close(got.cpu(), product(x, rows, bias), rtol=0, atol=2e-5)
    assert not calls
    assert not places


@needs_onednn
def test_sides_are_swapped_for_large_rows_only(calls, monkeypatch):
    x, rows, bias = parts(9)
    limit(monkeypatch, MUCH=0, AT_ONCE=0)
    for large, left in ((70 * 48, 70), (70 * 48 + 1, 9)):
        monkeypatch.setattr(cpu_products, "LARGE", large)
        torch.testing.assert_close(kernels.linear(x, rows, bias), product(x, rows, bias), rtol=0, atol=2e-5)
        assert len(calls.pop()[0]) == left


@pytest.mark.parametrize("n", [2, 3, 5, 16, 64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(calls, n, bad):
    x, rows, bias = parts(n, m=72)
    x[1, 7] = bad
    got, others = kernels.linear(x, rows, bias), torch.arange(n) != 1
    torch.testing.assert_close(got[others], product(x, rows, bias)[others], rtol=0, atol=2e-5)
    assert not got[1].isfinite().any()


@pytest.mark.parametrize("n", BY_ONEDNN + BY_MKL)
@pytest.mark.parametrize("wanting", range(3))
def test_gradients_are_those_of_the_product(calls, places, n, wanting):
    """Of x, of the rows, of the bias."""
    ours, plain = list(parts(n, m=72)), list(parts(n, m=72))
    ours[wanting].requires_grad_()
    plain[wanting].requires_grad_()
    (got,) = torch.autograd.grad(kernels.linear(*ours).square().sum(), ours[wanting])
    (want,) = torch.autograd.grad(torch.nn.functional.linear(*plain).square().sum(), plain[wanting])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert not calls
    assert not places
    with torch.no_grad():
        kernels.linear(*ours)
    assert len(calls) == (is_for_onednn(n) and cpu_products.HAS_ONEDNN)
    assert len(places) == (is_read_from_places(n) and cpu_products.MKL)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own import
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("moved", range(3))
def test_tangents_are_those_of_the_product(calls, moved, n):
    """Of x, of the rows, of the bias."""
    at, fixed = parts(n, m=72)[moved], parts(n, m=72)  # what is made within jvp carries tangents itself
    along = torch.randn(at.shape, generator=torch.Generator().manual_seed(9))

    def of(function):
        return lambda t: function(*(t if i == moved else part for i, part in enumerate(fixed)))

    got, want = (jvp(of(function), (at,), (along,))[1] for function in (kernels.linear, torch.nn.functional.linear))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert want.any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own import
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("moved", range(3))
def test_tangents_that_tensors_carry_themselves_are_kept(calls, places, n, moved):
    """Of x, of the rows, of the bias: outside of torch.func nothing but the tangent tells."""
    given = list(parts(n, m=72))
    along = torch.randn(given[moved].shape, generator=torch.Generator().manual_seed(9))
    with forward_ad.dual_level():
        given[moved] = forward_ad.make_dual(given[moved], along)
        got, want = (forward_ad.unpack_dual(function(*given)).tangent
                     for function in (kernels.linear, torch.nn.functional.linear))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not calls
    assert not places


@pytest.mark.parametrize("n", [2, 8])
def test_vmap_over_tokens_and_over_saes_is_the_product_of_each(calls, n):
    x, rows, bias = (torch.stack([part] * 3) for part in parts(n, m=72))
    rows[1] *= 2
    x[2] += 1
    got = vmap(kernels.linear)(x, rows, bias)
    torch.testing.assert_close(got, torch.stack([product(*one) for one in zip(x, rows, bias, strict=True)]), rtol=0,
                               atol=5e-5)
    got = vmap(kernels.linear, in_dims=(None, 0, 0))(x[0], rows, bias)
    torch.testing.assert_close(got[1], product(x[0], rows[1], bias[1]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("n", [1, 8])
def test_compiled_it_is_the_product(calls, n):
    compiled = torch.compile(kernels.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*parts(n, m=72)), product(*parts(n, m=72)), rtol=0, atol=2e-5)
    assert not calls


@pytest.mark.parametrize("n", [1, 3])
def test_without_mkl_it_is_the_product(calls, places, n, monkeypatch):
    monkeypatch.setattr(cpu_products, "MKL", False)
    torch.testing.assert_close(kernels.linear(*parts(n, m=72)), product(*parts(n, m=72)), rtol=0, atol=2e-5)
    assert not places


@pytest.mark.parametrize("n", BY_ONEDNN)
def test_without_onednn_or_where_it_is_turned_off_it_is_the_product(calls, n, monkeypatch):
    with monkeypatch.context() as turned_off:
        turned_off.setattr(torch.backends.mkldnn, "enabled", False)
        torch.testing.assert_close(kernels.linear(*parts(n)), product(*parts(n)), rtol=0, atol=2e-5)
    monkeypatch.setattr(cpu_products, "HAS_ONEDNN", False)
    torch.testing.assert_close(kernels.linear(*parts(n)), product(*parts(n)), rtol=0, atol=2e-5)
    assert not calls


@pytest.mark.parametrize("n", [*BY_ONEDNN, 1, 3])
def test_float64_stays_float64(calls, n):
    x, rows, bias = parts(n, torch.float64, m=72)
    torch.testing.assert_close(kernels.linear(x, rows, bias), x @ rows.T + bias, rtol=0, atol=1e-12)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 3, 8, 40])
def test_rows_of_half_precision_are_widened_some_at_a_time_into_the_same_memory(monkeypatch, dtype, n):
    widened, plain = [], torch.addmm

    def noted(bias, x, other, **out):
        if x.dtype == other.dtype == torch.float32 and x.shape[0] == n:
            widened.append((other.shape[1], other.data_ptr()))
        return plain(bias, x, other, **out)

    monkeypatch.setattr(cpu_products, "THIN_WIDENED", range(0))
    monkeypatch.setattr(tiles, "CPU_WIDENED", 10 * 48 + 5)
    monkeypatch.setattr(tiles, "CPU_SIZE", 40 * n)  # two tiles of 35 features, each of them four times 9 or 8
    monkeypatch.setattr(torch, "addmm", noted)
    x, rows, bias = parts(n)
    rows, threshold = rows.to(dtype), torch.full((70,), 5.0)
    found = kernels.encode_sparse(x, rows, bias, threshold)
    assert [size for size, _ in widened] == [8, 9, 9, 9] * 2
    assert len({place for _, place in widened[:4]}) == 1
    pre = kernels.linear(x, rows, bias)
    torch.testing.assert_close(pre, product(x, rows, bias), rtol=0, atol=2e-5)
    acts = pre * (pre > threshold)
    assert all(torch.equal(a, b) for a, b in zip(found, kernels.nonzero_csr(acts), strict=True))
    x_hat = kernels.reconstruct(x, rows, bias, threshold, rows, torch.zeros(48))
    torch.testing.assert_close(x_hat, acts @ rows.float(), rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_were_widened_are_left_to_onednn_as_others_are(calls, dtype, monkeypatch):
    x, rows, bias = parts(200)
    limit(monkeypatch, MUCH=200 * 9 * 48, CPU_WIDENED=10 * 48, LARGE=math.inf)
    for tokens in (x, x.T.contiguous().T):
        got = kernels.linear(tokens, rows.to(dtype), bias)
        torch.testing.assert_close(got, product(x, rows.to(dtype), bias), rtol=0, atol=2e-5)
    assert [len(given[1]) for given in calls] == [10] * 14
    assert all(t.is_contiguous() for given in calls for t in given)


@needs_onednn
@pytest.mark.parametrize("n", [15, 16, 64, 65])
def test_of_few_tokens_they_are_with_the_sides_swapped(calls, n, monkeypatch):
    limit(monkeypatch, CPU_WIDENED=10 * 48, LARGE=math.inf)
    x, rows, bias = parts(n)
    kernels.linear(x, rows, bias)  # not widened
    assert not calls
    got = kernels.linear(x, rows.half(), bias)
    torch.testing.assert_close(got, product(x, rows.half(), bias), rtol=0, atol=2e-5)
    times = 7 if n in cpu_products.THIN_WIDENED else 0
    assert [(len(left), len(right)) for left, right, _ in calls] == [(10, n)] * times


@pytest.mark.parametrize("wanting", range(3))
def test_gradients_pass_through_rows_of_half_precision(monkeypatch, wanting):
    """Of x, of the rows, of the bias."""
    monkeypatch.setattr(tiles, "CPU_WIDENED", 10 * 48)
    x, rows, bias = parts(8)
    ours, plain = [x, rows.half(), bias], [x.clone(), rows.half(), bias.clone()]
    ours[wanting].requires_grad_()
    plain[wanting].requires_grad_()
    (got,) = torch.autograd.grad(kernels.linear(*ours).square().sum(), ours[wanting])
    want = torch.nn.functional.linear(plain[0], plain[1].float(), plain[2])
    (want,) = torch.autograd.grad(want.square().sum(), plain[wanting])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert want.any()
