"""The forms of a batch's features: when a GPU is asked which to take, and what gradients are summed from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_hooks.kernels import signs, starts_of, tiles
from sae_hooks.training import codes
from sae_hooks.training.codes import DenseCode, Encoder, Held, Pairs, SparseCode, encode


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many features each search, or probe, looked at."""
    found: list[int] = []
    plain = codes.above

    def noted(x: Tensor, encoder: Encoder, floor: Tensor, which: slice = slice(None)) -> Any:
        found.append(len(floor[which]))
        return plain(x, encoder, floor, which)

    monkeypatch.setattr(codes, "above", noted)
    monkeypatch.setattr(codes, "PROBED", 26)
    return found


def layer(device: str) -> tuple[Tensor, Encoder]:
    """Tokens, and an encoder of 130 features that keeps account of what is held."""
    torch.manual_seed(0)
    x, W_enc = torch.randn(40, 6, device=device), torch.randn(6, 130, device=device)
    return x, Encoder(W_enc, torch.zeros(130, device=device), held=Held())


def test_a_gpu_is_asked_which_form_to_take_until_few_pairs_are_held(fake_gpus: Any, searches: list[int]) -> None:
    x, encoder = layer("fgpu:0")
    assert encoder.held is not None
    few, many = torch.full((130,), 9.0, device="fgpu:0"), torch.zeros(130, device="fgpu:0")

    assert isinstance(encode(x, encoder, many), DenseCode)
    assert (encoder.held.share, searches) == (1.0, [26])
    assert isinstance(encode(x, encoder, few), SparseCode)
    assert searches[1:] == [26, 130]
    assert encoder.held.share < codes.GPU_DENSE_FROM / 2
    assert isinstance(encode(x, encoder, few), SparseCode)
    assert searches[3:] == [130], "no probe"
    assert isinstance(encode(x, encoder, many), SparseCode), "for once"
    assert encoder.held.share > codes.GPU_DENSE_FROM
    assert isinstance(encode(x, encoder, many), DenseCode)


def test_on_a_cpu_the_form_depends_on_this_step_alone(searches: list[int]) -> None:
    x, encoder = layer("cpu")

    for _ in range(2):
        assert isinstance(encode(x, encoder, torch.full((130,), 9.0)), SparseCode)

    assert searches == [26, 130] * 2


def test_gradients_are_summed_from_narrow_rows_where_they_are_read_so() -> None:
    x, encoder = layer("cpu")
    W_dec, target = torch.randn(130, 6), torch.randn(40, 6)

    def gradients(narrow: torch.dtype | None, x: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (encoder.W_enc, encoder.b_enc, W_dec)]
        rows, features, pre = codes.above(x, encoder, torch.full((130,), 3.0))
        pairs = Pairs(starts_of(rows, 40), rows.int(), features.int(), pre, 130, None, narrow)
        code = SparseCode(codes._Pre.apply(x, leaves[0], leaves[1], None, pairs), pairs)  # type: ignore[no-untyped-call]
        (code.decode(code.pre, leaves[2]) * target).sum().backward()  # type: ignore[no-untyped-call]
        return [t.grad for t in leaves if t.grad is not None]

    wide, narrow = gradients(None, x), gradients(torch.bfloat16, x)

    for one, other in zip(wide, narrow, strict=True):
        assert other.dtype == torch.float32
        assert 1e-4 < (one - other).norm() / one.norm() < 5e-3


def test_a_step_with_a_screen_is_the_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKENS": 1, "PAIRS": 0, "WIDTH": 1, "MOST": 2.0, "TILE": 400}.items():
        monkeypatch.setattr(signs, name, value)
    monkeypatch.setattr(tiles, "CPU_SIZE", 400)
    tried: list[int] = []
    candidates = signs.Signs.candidates
    monkeypatch.setattr(signs.Signs, "candidates", lambda *args: tried.append(1) or candidates(*args))
    results = []
    for on in (True, False):
        monkeypatch.setattr(signs, "HAS_BFLOAT16", on)
        x, encoder = layer("cpu")
        weights = [encoder.W_enc.requires_grad_(), encoder.b_enc.requires_grad_()]
        code = encode(x, encoder, torch.full((130,), 2.0), "sparse")
        assert isinstance(code, SparseCode)
        code.pre.square().sum().backward()
        results.append([code.pairs.features, code.pairs.rows, code.pre.detach(), *(w.grad for w in weights)])
        assert len(tried) == 13, "in tiles of ten features"
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
