"""The screen of CPUs with instructions for bfloat16, run on any: by signs it misses nothing that is above, whatever
rounding does, and where it is not worth its while, or cannot tell, all is computed as without it."""

import pytest
import torch

from sae_hooks import SAE, kernels
from sae_hooks.kernels import decoding, segments, signs, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Screens whatever it can, in tiles of 400 pairs; what is returned gets the number of candidates of each tile, or
    None."""
    for name, value in {"HAS_BFLOAT16": True, "TOKENS": 1, "PAIRS": 0, "WIDTH": 1, "MOST": 2.0,
                        "TILE": 400}.items():
        monkeypatch.setattr(signs, name, value)
    monkeypatch.setattr(segments, "TRITON_ON", ())
    monkeypatch.setattr(decoding, "SMALL", 0)
    monkeypatch.setattr(tiles, "CPU_SIZE", 400)
    counts, candidates = [], signs.Signs.candidates

    def counted(self, *args):
        found = candidates(self, *args)
        counts.append(None if found is None else len(found[0]))
        return found

    monkeypatch.setattr(signs.Signs, "candidates", counted)
    return counts


def parts_of(dtype=torch.float32, n=40, d=33, d_sae=70):
    """x, W_rows, bias, threshold: about a tenth is active."""
    random = torch.Generator().manual_seed(0)
    x, W_rows, bias = (torch.randn(shape, generator=random) for shape in ((n, d), (d_sae, d), (d_sae,)))
    x *= torch.logspace(-2, 3, n)[:, None]  # tokens of very different norms, as a model's first one
    threshold = exact(x, W_rows.to(dtype), bias).quantile(0.9, dim=0).float()
    return x, W_rows.to(dtype), bias, threshold


def exact(x, W_rows, bias):
    return x.double() @ W_rows.double().T + bias.double()


def plainly(monkeypatch, function, *args):
    """What a function gives without the signs."""
    with monkeypatch.context() as patch:
        patch.setattr(signs, "HAS_BFLOAT16", False)
        return function(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_features_and_values_are_those_of_exact_products(used, dtype):
    x, W_rows, bias, threshold = parts_of(dtype)
    pre = exact(x, W_rows, bias)
    rows, columns, values = kernels.find_above(x, W_rows, bias, threshold)
    assert len(used) == 7
    assert None not in used
    assert len(rows) < sum(used) < len(rows) + pre.numel() / 20, "more than are above, but few"
    near = (pre - threshold).abs() < 1e-6 * x.norm(dim=1)[:, None] * W_rows.float().norm(dim=1)
    found = torch.zeros_like(pre, dtype=torch.bool)
    found[rows, columns] = True
    assert torch.equal(found | near, (pre > threshold) | near)
    torch.testing.assert_close(values.double(), pre[rows, columns], rtol=1e-4, atol=1e-5)
    places = rows * pre.shape[1] + columns
    assert (places[1:] > places[:-1]).all()
    assert values.dtype == torch.float32


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_the_worst_kind_hides_no_feature(used, sign, dtype):
    """Numbers half-way between two of bfloat16, all rounded in one direction, and a threshold just below the sum."""
    d = 300
    x = torch.full((3, d), 1 + 2.0**-8 - sign * 2.0**-20) * torch.tensor([[1.0], [2.0**10], [2.0**-10]])
    W_rows = torch.full((5, d), 1 + 2.0**-8 - sign * 2.0**-20).to(dtype)
    for bias in torch.tensor([[0.0, 1.0, -1e4, 77.7, 1e-3]]).T.expand(-1, 5):
        pre = exact(x, W_rows, bias)
        for token in range(3):
            for size, count in ((-1e-5, 5), (1e-5, 0)):
                threshold = (pre[token] + size * (pre[token].abs() + bias.abs())).float()
                rows, _, values = kernels.find_above(x[token:token + 1].repeat(81, 1), W_rows, bias, threshold)
                assert len(rows) == 81 * count
                torch.testing.assert_close(values.double(), pre[token][:count].repeat(81), rtol=1e-5, atol=1e-5)
    assert None not in used


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12])
def test_numbers_whose_squares_vanish_are_found_too(used, scale):
    x, W_rows, _, _ = parts_of()
    bias = torch.zeros(70)
    pre = exact(x * scale, W_rows, bias)
    threshold = (pre.quantile(0.9, dim=0) * (1 + 1e-4)).float()
    rows, columns, _ = kernels.find_above(x * scale, W_rows, bias, threshold)
    assert torch.equal(torch.stack([rows, columns]), (pre > threshold).nonzero().T)
    assert None not in used


def test_thresholds_without_an_end_let_through_all_or_nothing(used):
    x, W_rows, bias, threshold = parts_of()
    threshold[:20], threshold[20:40] = torch.inf, -torch.inf
    _, columns, _ = kernels.find_above(x, W_rows, bias, threshold)
    counts = torch.bincount(columns, minlength=70)
    assert (counts[:20] == 0).all()
    assert (counts[20:40] == len(x)).all()
    assert None not in used


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 1e30])
@pytest.mark.parametrize("where", ["token", "row"])
def test_what_is_not_finite_or_not_measured_is_left_to_the_exact_product(used, monkeypatch, bad, where):
    x, W_rows, bias, threshold = parts_of()
    (x if where == "token" else W_rows)[1, 2] = bad
    ours = kernels.find_above(x, W_rows, bias, threshold)
    assert None in used
    plain = plainly(monkeypatch, kernels.find_above, x, W_rows, bias, threshold)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstructions_and_codes_are_those_without_a_screen(used, monkeypatch, dtype):
    x, W_rows, bias, threshold = parts_of(dtype)
    sae = SAE(W_rows.T, bias, torch.randn(70, 20).to(dtype), torch.randn(20), threshold=threshold)
    x[3, 4] = torch.nan
    monkeypatch.setattr(tiles, "CPU_TOKENS", 10)  # the others are screened
    with torch.no_grad():
        ours, code = sae(x), sae.encode_sparse(x)
        assert any(used)
        plain, want = plainly(monkeypatch, sae, x), plainly(monkeypatch, sae.encode_sparse, x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert torch.equal(code[0], want[0])
    assert torch.equal(code[1], want[1])


def test_tiles_in_vain_are_few_and_lose_nothing(used, monkeypatch):
    x, W_rows, bias, threshold = parts_of()
    monkeypatch.setattr(signs, "MOST", 0.05)
    screen = signs.Signs(400)
    found = [screen.candidates(x, W_rows[:10], bias[:10], threshold[:10]) for _ in range(40)]
    assert found == [None] * 40
    products = []
    monkeypatch.setattr(torch, "mm", lambda *args, mm=torch.mm, **out: products.append(1) or mm(*args, **out))
    screen = signs.Signs(400)
    for _ in range(40):
        screen.candidates(x, W_rows[:10], bias[:10], threshold[:10])
    assert len(products) == 3, "the first one, and one in sixteen"
    monkeypatch.setattr(signs, "PROBED", (1, 1))  # x[0], which is small, is above nowhere
    assert torch.equal(kernels.find_above(x, W_rows, bias, threshold)[1],
                       plainly(monkeypatch, kernels.find_above, x, W_rows, bias, threshold)[1])


def test_it_is_left_alone_where_it_does_not_pay_or_may_not_be(monkeypatch):
    x, W_rows, bias, threshold = parts_of()
    assert signs.signs_for(x, W_rows, bias, threshold) is not None
    assert signs.signs_for(x.double(), W_rows.double(), bias.double(), threshold.double()) is None
    assert signs.signs_for(x.clone().requires_grad_(), W_rows, bias, threshold) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert signs.signs_for(x, W_rows, bias, threshold) is None
    for name, value in {"TOKENS": 41, "PAIRS": 40 * 70 + 1, "WIDTH": 34, "MOST": 0.15}.items():
        with monkeypatch.context() as patch:
            patch.setattr(signs, name, value)
            assert signs.signs_for(x, W_rows, bias, threshold) is None, name


def test_autocast_changes_nothing_and_gradients_go_around_it(used):
    x, W_rows, bias, threshold = parts_of()
    plain = kernels.find_above(x, W_rows, bias, threshold)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            again = kernels.find_above(x, W_rows, bias, threshold)
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert None not in used
    kernels.find_above(x, W_rows, bias, threshold.requires_grad_())
    used.clear()
    kernels.find_above(x.requires_grad_(), W_rows, bias, threshold)[2].sum().backward()
    assert x.grad.any()
    assert used == []
