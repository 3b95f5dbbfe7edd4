"""The screen that finds the k largest by products in bfloat16, run on any CPU: whatever rounding does and however bad
its guesses are, the features are those of exact products; where it is not worth its while, all is computed."""

import pytest
import torch

from sae_hooks import SAE, kernels
from sae_hooks.kernels import decoding, signs, tiles, topk_screen

from .screen_cases import exact, parts_of

K = 6


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Screens whatever it can, ten tokens at once, in tiles of 300 products; what is returned gets the number of
    candidates of each ten, or None."""
    for name, value in {"HAS_BFLOAT16": True, "TOKENS": 1, "PAIRS": 0, "WIDTH": 1}.items():
        monkeypatch.setattr(signs, name, value)
    for name, value in {"MOST": 2.0, "HELD": 0, "FEWEST": 10, "TILE": 300}.items():
        monkeypatch.setattr(topk_screen, name, value)
    monkeypatch.setattr(decoding, "SMALL", 0)
    monkeypatch.setattr(tiles, "AT_ONCE", 0)
    counts, decided, largest = [], topk_screen.TopkScreen._decided, topk_screen.TopkScreen.largest

    def counted(self, x, candidates, guess):
        counts.append(len(candidates[0]))
        return decided(self, x, candidates, guess)

    def told(self, x):
        if (found := largest(self, x)) is None:
            counts.append(None)
        return found

    monkeypatch.setattr(topk_screen.TopkScreen, "_decided", counted)
    monkeypatch.setattr(topk_screen.TopkScreen, "largest", told)
    return counts


def agrees(found, x, W_rows, bias, k=K):
    """Whether these are the k largest positive features of every token, but for such as differ by rounding alone, in
    order, with their activations."""
    rows, columns, values = found
    pre = exact(x, W_rows, bias)
    least = pre.topk(k, dim=1).values[:, -1:].clamp(min=0)
    near = 1e-6 * (x.norm(dim=1)[:, None] * W_rows.float().norm(dim=1) + bias.abs())
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen[rows, columns] = True
    places = rows * pre.shape[1] + columns
    assert (places[1:] > places[:-1]).all()
    assert chosen[pre > least + near].all()
    assert not chosen[pre < least - near].any()
    assert torch.equal(chosen.sum(1), (pre > 0).sum(1).clamp(max=k))
    torch.testing.assert_close(values.double(), pre[rows, columns], rtol=1e-4, atol=1e-5)
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, K, 30])
def test_the_features_and_values_are_those_of_exact_products(used, dtype, k):
    x, W_rows, bias, _ = parts_of(dtype, n=40)
    found = kernels.find_largest(x, W_rows, bias, k)
    assert agrees(found, x, W_rows, bias, k)
    assert found[2].dtype == torch.float32
    assert len(used) == 4
    assert None not in used
    assert len(found[0]) <= sum(used) < len(found[0]) + 40 * 70 / 10, "more than are kept, but few"


@pytest.mark.parametrize("tile", [10, 70, 10_000])
def test_tiles_of_any_size_and_several_tokens_at_a_time_find_the_same(used, monkeypatch, tile):
    x, W_rows, bias, _ = parts_of(n=43)
    monkeypatch.setattr(topk_screen, "TILE", tile)
    assert agrees(kernels.find_largest(x, W_rows, bias, K), x, W_rows, bias)
    assert len(used) == 5
    monkeypatch.setattr(topk_screen, "HELD", 70 * 22)
    used.clear()
    assert agrees(kernels.find_largest(x, W_rows, bias, K), x, W_rows, bias)
    assert len(used) == 2


def test_tokens_with_fewer_positive_features_give_those(used):
    x, W_rows, bias, _ = parts_of(n=40)
    x, bias = x / x.norm(dim=1, keepdim=True), bias - 1.5
    found = kernels.find_largest(x, W_rows, bias, K)
    assert agrees(found, x, W_rows, bias)
    counts = torch.bincount(found[0], minlength=40)
    assert counts.min() < counts.max() == K
    assert None not in used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("x_scale", "scale"), [(1, 1), (2.0**10, 1), (1, 2.0**-10)])
@pytest.mark.parametrize("part", [0.0, -0.5, 1.0, 1000.0])
def test_rounding_of_the_worst_kind_hides_no_feature(used, dtype, x_scale, scale, part):
    """The largest feature's numbers are all rounded down, those of the others up, which makes its product the least."""
    for d in range(2, 60):
        x = torch.full((1, d), (1 + 2.0**-8 - 2.0**-20) * x_scale)
        rows = torch.full((70, d), (1 - 2.0**-8 + 2.0**-18) * scale)
        rows[11] = (1 + 2.0**-8 - 2.0**-20) * scale
        rows, bias = rows.to(dtype), torch.full((70,), part * d * x_scale * scale)
        pre = exact(x, rows, bias)[0]
        if part < 1000:  # there float32 cannot tell them apart
            assert kernels.find_largest(x, rows, bias, 1)[1].tolist() == [int(pre.argmax())]
        assert 11 in kernels.find_largest(x, rows, bias, 70)[1]
    assert None not in used


@pytest.mark.parametrize("name", ["CLOSE", "LONG"])
def test_guesses_that_are_too_high_cost_time_and_no_feature(used, monkeypatch, name):
    x, W_rows, bias, _ = parts_of(n=40)
    monkeypatch.setattr(topk_screen, name, {"CLOSE": 1.5, "LONG": -100.0}[name])
    assert agrees(kernels.find_largest(x, W_rows, bias, K), x, W_rows, bias)
    assert used[1:] == [None] * 3, "no more guesses where most of the first were wrong"


def test_one_token_in_many_with_a_guess_too_high_is_computed_whole(used, monkeypatch):
    x, W_rows, bias, _ = parts_of(n=40)
    guess = topk_screen.TopkScreen._guess

    def one_too_high(self, *args):
        found = guess(self, *args)
        found[3] = 0x7F00  # 1.7e38
        return found

    monkeypatch.setattr(topk_screen.TopkScreen, "_guess", one_too_high)
    assert agrees(kernels.find_largest(x, W_rows, bias, K), x, W_rows, bias)
    assert len(used) == 4
    assert None not in used


def test_activations_of_zero_are_none(used):
    x, W_rows, bias, _ = parts_of(n=10)
    x[3] = 0
    found = kernels.find_largest(x, W_rows, bias * 0, K)
    assert torch.bincount(found[0], minlength=10).tolist() == [K, K, K, 0, *[K] * 6]
    assert None not in used


def test_what_is_as_large_as_the_guess_is_a_candidate(monkeypatch):
    """256.9 rounds to 256, the guess; 256.5 has so long a row that it might be more than 257."""
    x, rows = torch.ones(1, 33), torch.zeros(2, 33)
    rows[0, :2] = torch.tensor([256.0, 115 / 128])
    rows[1, :2] = torch.tensor([1000.3, 256.5 - 1000.3])
    code = torch.tensor([[256.0]]).bfloat16().view(torch.int16)
    monkeypatch.setattr(topk_screen.TopkScreen, "_guess", lambda *_: code)
    assert kernels.find_largest(x, rows, torch.zeros(2), 1)[1].tolist() == [0]


def test_too_many_candidates_are_left_to_the_exact_product(used, monkeypatch):
    x, W_rows, bias, _ = parts_of(n=40)
    monkeypatch.setattr(topk_screen, "MOST", 0.2)
    monkeypatch.setattr(topk_screen, "LONG", 1e4)
    assert agrees(kernels.find_largest(x, W_rows, bias, K), x, W_rows, bias)
    assert used == [None] * 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38])
@pytest.mark.parametrize("where", ["token", "row", "bias"])
def test_what_is_not_finite_or_not_measured_is_left_to_the_exact_product(used, monkeypatch, bad, where):
    x, W_rows, bias, _ = parts_of(n=20)
    {"token": x[1], "row": W_rows[1], "bias": bias}[where][2] = bad
    ours = kernels.find_largest(x, W_rows, bias, K)
    assert None in used
    monkeypatch.setattr(signs, "HAS_BFLOAT16", False)
    plain = kernels.find_largest(x, W_rows, bias, K)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstructions_and_codes_are_those_without_a_screen(used, monkeypatch, dtype):
    x, W_rows, bias, _ = parts_of(dtype, n=40)
    sae = SAE(W_rows.T, bias, torch.randn(70, 20).to(dtype), torch.randn(20), k=K)
    x[3, 4] = torch.nan
    with torch.no_grad():
        ours, code = sae(x), sae.encode_sparse(x)
        assert used[0] is None
        assert None not in used[1:4]
        assert len(used) == 8
        monkeypatch.setattr(signs, "HAS_BFLOAT16", False)
        plain, want = sae(x), sae.encode_sparse(x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert torch.equal(code[0], want[0])
    assert torch.equal(code[1], want[1])


def test_torchs_default_device_makes_no_difference(used):
    x, W_rows, bias, _ = parts_of(n=40)
    with torch.device("meta"):
        found = kernels.find_largest(x, W_rows, bias, K)
    assert agrees(found, x, W_rows, bias)
    assert None not in used


def test_it_is_left_alone_where_it_does_not_pay_or_may_not_be(monkeypatch):
    x, W_rows, bias, _ = parts_of(n=40)
    assert topk_screen.topk_screen_for(x, W_rows, bias, 35) is not None
    monkeypatch.setattr(topk_screen, "MOST", 1.0)
    assert topk_screen.topk_screen_for(x, W_rows, bias, 35) is not None
    assert topk_screen.topk_screen_for(x, W_rows, bias, 36) is None
    assert topk_screen.topk_screen_for(x.requires_grad_(), W_rows, bias, 6) is None
    with torch.no_grad():
        assert topk_screen.topk_screen_for(x.double(), W_rows.double(), bias.double(), 6) is None
        for name, value in {"HAS_BFLOAT16": False, "TOKENS": 41, "PAIRS": 40 * 70 + 1, "WIDTH": 34}.items():
            with monkeypatch.context() as patch:
                patch.setattr(signs, name, value)
                assert topk_screen.topk_screen_for(x, W_rows, bias, 6) is None, name
