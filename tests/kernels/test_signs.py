"""The screen of CPUs with instructions for bfloat16, run on any: by signs it misses nothing that is above, whatever
rounding does, and where it is not worth its while, or cannot tell, all is computed as without it."""

import pytest
import torch

from sae_hooks import SAE, kernels
from sae_hooks.kernels import decoding, screen, segments, signs, tiles

from .screen_cases import exact, parts_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Screens whatever it can, in tiles of 400 pairs; what is returned gets the number of candidates of each tile, or
    None."""
    for name, value in {"HAS_BFLOAT16": True, "TOKENS": 1, "PAIRS": 0, "WIDTH": 1, "MOST": 2.0, "TILE": 400}.items():
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


def plainly(monkeypatch, function, *args):
    """What a function gives without the signs."""
    with monkeypatch.context() as patch:
        patch.setattr(signs, "HAS_BFLOAT16", False)
        return function(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_features_and_values_are_those_of_exact_products(used, dtype):
    x, W_rows, bias, threshold = parts_of(dtype, n=40)
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


def test_as_many_tokens_are_taken_together_as_it_says(used, monkeypatch):
    monkeypatch.setattr(signs, "TOGETHER", 10)
    parts = parts_of(n=40)
    kernels.find_above(*parts)
    assert len(used) == 4 * 2
    monkeypatch.setattr(signs, "ROWS", 3 * parts[0].shape[1])
    assert signs.signs_for(*parts).most == (10, 10 * 3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("x_scale", "scale"), [(1, 1), (2.0**10, 1), (1, 2.0**-10), (2.0**-90, 1), (1, 2.0**-90)])
def test_rounding_of_the_worst_kind_hides_no_feature(used, sign, dtype, x_scale, scale):
    """Numbers half-way between two of bfloat16, all rounded in one direction, also such as have no squares in float32,
    and a threshold just below the sum."""
    number = 1 + 2.0**-8 - sign * 2.0**-20
    for d in range(2, 80):  # each with a norm that rounds otherwise
        x, rows = torch.full((1, d), number * x_scale), torch.full((1, d), number * scale).to(dtype)
        for part in (0.0, 1.0, -1.0, 0.3):
            bias = torch.tensor([part * d * x_scale * scale])
            pre = exact(x, rows, bias)[0]
            near = 1e-6 * (pre.abs() + bias.abs())
            for threshold, count in ((pre - near, 1), (pre + near, 0)):
                found = signs.Signs(tiles.Most(40, 400)).candidates(x, rows, bias, threshold.float())
                assert len(screen.decided(found, threshold.float())[0]) == count
                assert ((found[2].double() - pre).abs() <= near).all()


def test_what_sums_in_float32_lose_hides_no_feature():
    """Ones that vanish beside a large number, which goes again; all of them numbers of bfloat16."""
    x, rows, bias = torch.ones(1, 302), torch.ones(1, 302), torch.zeros(1)
    x[0, 0], x[0, -1] = 2.0**24, -(2.0**24)
    found = signs.Signs(tiles.Most(40, 400)).candidates(x, rows, bias, torch.tensor([299.5]))
    assert len(found[0]) == 1


def test_torchs_default_device_makes_no_difference():
    x, W_rows, bias, threshold = parts_of(n=40)
    want = signs.Signs(tiles.Most(40, 400)).candidates(x, W_rows, bias, threshold)
    with torch.device("meta"):
        found = signs.Signs(tiles.Most(40, 400)).candidates(x, W_rows, bias, threshold)
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


def test_thresholds_without_an_end_let_through_all_or_nothing(used):
    x, W_rows, bias, threshold = parts_of(n=40)
    threshold[:20], threshold[20:40] = torch.inf, -torch.inf
    _, columns, _ = kernels.find_above(x, W_rows, bias, threshold)
    counts = torch.bincount(columns, minlength=70)
    assert (counts[:20] == 0).all()
    assert (counts[20:40] == len(x)).all()
    assert None not in used


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 1e30])
@pytest.mark.parametrize("where", ["token", "row"])
def test_what_is_not_finite_or_not_measured_is_left_to_the_exact_product(used, monkeypatch, bad, where):
    x, W_rows, bias, threshold = parts_of(n=40)
    (x if where == "token" else W_rows)[1, 2] = bad
    ours = kernels.find_above(x, W_rows, bias, threshold)
    assert None in used
    plain = plainly(monkeypatch, kernels.find_above, x, W_rows, bias, threshold)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstructions_and_codes_are_those_without_a_screen(used, monkeypatch, dtype):
    x, W_rows, bias, threshold = parts_of(dtype, n=40)
    sae = SAE(W_rows.T, bias, torch.randn(70, 20).to(dtype), torch.randn(20), threshold=threshold)
    x[3, 4] = torch.nan
    monkeypatch.setattr(tiles, "CPU_TOKENS", 10)  # the others are screened
    monkeypatch.setattr(signs, "TOGETHER", 10)
    with torch.no_grad():
        ours, code = sae(x), sae.encode_sparse(x)
        assert any(used)
        plain, want = plainly(monkeypatch, sae, x), plainly(monkeypatch, sae.encode_sparse, x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert torch.equal(code[0], want[0])
    assert torch.equal(code[1], want[1])


def test_tiles_in_vain_are_few_and_lose_nothing(used, monkeypatch):
    x, W_rows, bias, threshold = parts_of(n=40)
    monkeypatch.setattr(signs, "MOST", 0.05)
    search = signs.Signs(tiles.Most(40, 400))
    found = [search.candidates(x, W_rows[:10], bias[:10], threshold[:10]) for _ in range(40)]
    assert found == [None] * 40
    products = []
    monkeypatch.setattr(torch, "mm", lambda *args, mm=torch.mm, **out: products.append(1) or mm(*args, **out))
    search = signs.Signs(tiles.Most(40, 400))
    for _ in range(40):
        search.candidates(x, W_rows[:10], bias[:10], threshold[:10])
    assert len(products) == 3, "the first one, and one in sixteen"
    monkeypatch.setattr(signs, "PROBED", (1, 1))  # x[0], which is small, is above nowhere
    assert torch.equal(kernels.find_above(x, W_rows, bias, threshold)[1],
                       plainly(monkeypatch, kernels.find_above, x, W_rows, bias, threshold)[1])


def test_it_is_left_alone_where_it_does_not_pay_or_may_not_be(monkeypatch):
    x, W_rows, bias, threshold = parts_of(n=40)
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
    x, W_rows, bias, threshold = parts_of(n=40)
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
