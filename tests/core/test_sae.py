"""The SAE: one equation, two gates, against a float64 reference written from the equations (reference.py)."""

import copy
import io

import numpy as np
import pytest
import torch
from core import reference
from torch.autograd import forward_ad

from sae_hooks import SAE, SaeMismatchError
from sae_hooks.kernels import cpu_products, decoding, search, tiles

HALVES = (torch.bfloat16, torch.float16)
KINDS = {
    "jumprelu": {},
    "relu": {"relu": True},
    "topk": {"k": 7},
    "skip": {"skip": True},
    "transcoder": {"d_out": 12},
    "transcoder with skip": {"d_out": 12, "skip": True},
    "topk transcoder": {"k": 5, "d_out": 40},
}


@pytest.fixture(params=[False, True], ids=["small", "large"], autouse=True)
def large(request, monkeypatch):
    """Both ways: all at once, as few tokens and features are taken; in tiles, by the features that are active."""
    if request.param:
        monkeypatch.setattr(tiles, "AT_ONCE", 0)
        monkeypatch.setattr(tiles, "CPU_SIZE", 64)
        monkeypatch.setattr(cpu_products, "LARGE", 0)
        monkeypatch.setattr(search, "FEW_MARKS", 0)
        monkeypatch.setattr(decoding, "SMALL", 0)


@pytest.fixture(params=KINDS)
def sae(request, random_sae):
    settings = dict(KINDS[request.param])
    relu = settings.pop("relu", False)
    made = random_sae(20, 90, seed=3, **settings)
    if relu:
        made.threshold.zero_()
    return made


@pytest.fixture
def x():
    return torch.randn(3, 11, 20, generator=torch.Generator().manual_seed(1))


def close(got, want):
    """Equal to 1e-6 of the largest value."""
    np.testing.assert_allclose(reference.array(got), want, rtol=0, atol=1e-6 * max(np.abs(want).max(), 1))


def dense(sae, csr):
    indptr, indices, values = csr
    out = torch.zeros(len(indptr) - 1, sae.d_sae, dtype=values.dtype)
    for row in range(len(indptr) - 1):
        at = slice(int(indptr[row]), int(indptr[row + 1]))
        out[row, indices[at]] = values[at]
    return out


def test_encode_is_the_equation_in_float64(sae, x):
    got = sae.encode(x)
    want = reference.encode(sae, reference.array(x))
    assert 0 < (want > 0).mean() < 0.6
    close(got, want)
    assert got.dtype == torch.float32


def test_encode_sparse_is_encode(sae, x):
    indptr, indices, values = sae.encode_sparse(x)
    want = reference.encode(sae, reference.array(x)).reshape(33, -1)
    assert indptr.tolist() == [0, *np.count_nonzero(want, axis=1).cumsum()]
    assert indices.tolist() == np.nonzero(want)[1].tolist()
    close(values, want[np.nonzero(want)])


def test_decode_and_forward_are_the_equation_in_float64(sae, x):
    acts = sae.encode(x)
    close(sae.decode(acts), reference.decode(sae, reference.array(acts)))
    close(sae(x), reference.reconstruct(sae, reference.array(x)))
    assert sae(x).shape == (3, 11, sae.d_out)


def test_float64_weights_and_input_compute_in_float64(sae, x):
    sae, x = sae.double(), x.double()
    want = reference.encode(sae, x.numpy())
    np.testing.assert_allclose(sae.encode(x).numpy(), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sae(x).numpy(), reference.reconstruct(sae, x.numpy()), rtol=1e-12, atol=1e-12)
    assert sae.encode(x).dtype == sae(x).dtype == torch.float64


def test_forward_with_gradients_is_forward_without(sae, x):
    with torch.no_grad():
        quick = sae(x)
    watched = x.clone().requires_grad_()
    slow = sae(watched)
    torch.testing.assert_close(slow.detach(), quick, rtol=0, atol=2e-6)
    slow.square().sum().backward()
    assert watched.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in sae.parameters())


def test_autocast_changes_nothing_with_gradients_or_without(sae, x):
    for gradients in (False, True):
        x.requires_grad_(gradients)
        plain = sae(x), sae.encode(x), sae.decode(sae.encode(x)), sae.skip(x)
        with torch.autocast("cpu", torch.bfloat16):
            under = sae(x), sae.encode(x), sae.decode(sae.encode(x)), sae.skip(x)
        for got, want in zip(under, plain, strict=True):
            close(torch.as_tensor(got), reference.array(torch.as_tensor(want)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("move", ["to", "half"])
def test_biases_and_thresholds_keep_every_bit_when_the_sae_goes_to_half(sae, dtype, move):
    before = {name: getattr(sae, name).clone() for name in ("b_enc", "b_dec")}
    threshold = None if sae.threshold is None else sae.threshold.clone()
    moved = sae.to(dtype) if move == "to" else sae.half() if dtype == torch.float16 else sae.bfloat16()
    assert moved is sae
    assert sae.dtype == sae.W_dec.dtype == dtype
    for name, value in before.items():
        assert torch.equal(getattr(sae, name), value)
    assert sae.threshold is None if threshold is None else torch.equal(sae.threshold, threshold)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_weights_encode_as_their_rounded_values_do_in_float32(sae, x, dtype):
    half = copy.deepcopy(sae).to(dtype)
    rounded = copy.deepcopy(half).float()
    assert torch.equal(half.encode(x), rounded.encode(x))
    for got, want in zip(half.encode_sparse(x), rounded.encode_sparse(x), strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(half(x), rounded(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half.decode(half.encode(x)), rounded.decode(rounded.encode(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_activations_are_encoded_in_float32_and_reconstructed_in_their_own_dtype(sae, x, dtype):
    acts = sae.encode(x.to(dtype))
    assert acts.dtype == torch.float32
    assert torch.equal(acts, sae.encode(x.to(dtype).float()))
    assert sae(x.to(dtype)).dtype == dtype
    assert torch.equal(sae(x.to(dtype)), sae(x.to(dtype).float()).to(dtype))


def exact(threshold=None, k=None):
    """An SAE of four features that read one value each, so that pre-activations are exact."""
    return SAE(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), threshold=threshold, k=k)


def test_a_pre_activation_at_its_threshold_does_not_fire():
    sae = exact(torch.tensor([0.5, 0.5, 0.0, 2.0]))
    x = torch.tensor([[0.5, 0.5000001, 0.0, 1.9999999]])
    assert sae.encode(x).tolist() == [[0.0, x[0, 1].item(), 0.0, 0.0]]
    assert sae.encode_sparse(x)[1].tolist() == [1]


def test_a_threshold_that_half_precision_would_move_still_decides():
    fine = torch.tensor([1.001, 1.001, 1.001, 1.001])  # bfloat16 has 1.0 and 1.0078
    sae = exact(fine).to(torch.bfloat16)
    assert sae.encode(torch.full((1, 4), 1.0009)).count_nonzero() == 0
    assert sae.encode(torch.full((1, 4), 1.0011)).count_nonzero() == 4


def test_topk_keeps_exactly_k_and_never_a_negative_one():
    sae = exact(k=3)
    acts = sae.encode(torch.tensor([[4.0, 3.0, 2.0, 1.0], [-1.0, 5.0, -2.0, -3.0], [2.0, 2.0, 2.0, 2.0]]))
    assert acts[0].tolist() == [4.0, 3.0, 2.0, 0.0]
    assert acts[1].tolist() == [0.0, 5.0, 0.0, 0.0]
    assert acts[2].count_nonzero() == 3


def test_no_token_and_no_active_feature_are_no_special_case(sae, x):
    for shape in ((0, 20), (2, 0, 20)):
        none = torch.zeros(shape)
        assert sae.encode(none).shape == (*shape[:-1], 90)
        assert sae(none).shape == (*shape[:-1], sae.d_out)
        indptr, indices, values = sae.encode_sparse(none)
        assert (indptr.tolist(), len(indices), len(values)) == ([0], 0, 0)
    silent = SAE(sae.W_enc, torch.full((90,), -1e6), sae.W_dec, sae.b_dec, threshold=torch.zeros(90))
    torch.testing.assert_close(silent(x), sae.b_dec.expand(3, 11, -1))
    assert silent.encode_sparse(x)[0].tolist() == [0] * 34


def test_every_dimension_before_the_last_is_kept(sae, x):
    assert sae.encode(x[0, 0]).shape == (90,)
    assert torch.equal(sae.encode(x[0, 0]), sae.encode(x)[0, 0]) or reference.relative(
        sae.encode(x[0, 0]), sae.encode(x)[0, 0]) < 1e-6
    assert sae(x[None]).shape == (1, 3, 11, sae.d_out)
    assert sae(x[0, 0]).shape == (sae.d_out,)


def test_all_shapes_that_do_not_fit_are_told_at_once():
    with pytest.raises(SaeMismatchError) as error:
        SAE(torch.zeros(4, 9), torch.zeros(8), torch.zeros(8, 4), torch.zeros(5), threshold=torch.zeros(3),
            W_skip=torch.zeros(4, 5))
    for part in ("W_enc (4, 9)", "W_dec is (8, 4), expected (9, 4)", "b_enc is (8,), expected (9,)",
                 "b_dec is (5,), expected (4,)", "threshold is (3,), expected (9,)",
                 "W_skip is (4, 5), expected (4, 4)"):
        assert part in str(error.value)


@pytest.mark.parametrize("gate", [{}, {"threshold": torch.zeros(9), "k": 2}])
def test_exactly_one_gate_must_be_given(gate):
    with pytest.raises(SaeMismatchError, match="exactly one gate"):
        SAE(torch.zeros(4, 9), torch.zeros(9), torch.zeros(9, 4), torch.zeros(4), **gate)


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_lies_between_one_and_d_sae(k):
    with pytest.raises(SaeMismatchError, match=f"between 1 and 9, got {k}"):
        SAE(torch.zeros(4, 9), torch.zeros(9), torch.zeros(9, 4), torch.zeros(4), k=k)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_a_threshold_below_zero_or_nan_is_refused_and_named(bad):
    threshold = torch.zeros(9)
    threshold[5] = bad
    with pytest.raises(SaeMismatchError, match="feature 5 has"):
        SAE(torch.zeros(4, 9), torch.zeros(9), torch.zeros(9, 4), torch.zeros(4), threshold=threshold)


def test_matrices_that_are_no_matrices_are_refused():
    with pytest.raises(SaeMismatchError, match="must be matrices"):
        SAE(torch.zeros(9), torch.zeros(9), torch.zeros(9, 4), torch.zeros(4), k=1)


@pytest.mark.parametrize("method", ["encode", "encode_sparse", "pre_activations", "__call__", "decode"])
def test_an_input_of_another_width_is_told_with_both_numbers(sae, method):
    width = 90 if method == "decode" else 20
    with pytest.raises(SaeMismatchError, match=rf"of width {width}, got \(2, 13\)"):
        getattr(sae, method)(torch.zeros(2, 13))


def feature_major(sae):
    return sae.W_enc.shape == (20, 90) and sae.W_enc.T.is_contiguous()


def test_each_feature_is_one_contiguous_row_whatever_is_done_to_the_sae(sae, random_sae):
    state = copy.deepcopy(sae.state_dict())
    other = random_sae(20, 90, seed=8, k=sae.k, d_out=sae.d_out, skip=sae.W_skip is not None)
    other.load_state_dict(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    again = random_sae(20, 90, seed=9, k=sae.k, d_out=sae.d_out, skip=sae.W_skip is not None)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assigned = random_sae(20, 90, seed=9, k=sae.k, d_out=sae.d_out, skip=sae.W_skip is not None)
    assigned.load_state_dict(state, assign=True)
    for made in (sae, copy.deepcopy(sae), other, again, assigned, copy.deepcopy(sae).to(torch.bfloat16),
                 copy.deepcopy(sae).double(), copy.deepcopy(sae).to(torch.bfloat16).float()):
        assert feature_major(made)
    assert torch.equal(other.W_enc, sae.W_enc)


def test_an_encoder_that_lies_feature_major_is_taken_over_without_a_copy():
    rows = torch.randn(9, 4)
    sae = SAE(rows.T, torch.zeros(9), torch.zeros(9, 4), torch.zeros(4), k=1)
    assert sae.W_enc.data_ptr() == rows.data_ptr()


def test_a_deep_copy_shares_no_memory_and_keeps_what_the_sae_says_of_itself(sae):
    sae.metadata["model_name"] = "tiny"
    copied = copy.deepcopy(sae)
    copied.W_enc.zero_()
    copied.metadata["model_name"] = "other"
    assert sae.W_enc.count_nonzero() > 0
    assert sae.metadata["model_name"] == "tiny"
    assert (copied.k, copied.site, copied.site_out) == (sae.k, sae.site, sae.site_out)


def test_the_repr_tells_sizes_gate_and_site(random_sae):
    assert "20 -> 90 -> 20, jumprelu, site='model.layers.1.output', torch.float32" in repr(random_sae(20, 90))
    assert "20 -> 90 -> 20, top 4" in repr(random_sae(20, 90, k=4))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own import
@pytest.mark.parametrize("k", [None, 9])
@pytest.mark.parametrize("way", ["encode", "forward"])
def test_forward_mode_derivatives_are_those_of_the_backward_mode(random_sae, way, k):
    function = getattr(random_sae(20, 90, k=k), way)
    g = torch.Generator().manual_seed(4)
    x, along = torch.randn(6, 20, generator=g), torch.randn(6, 20, generator=g)
    jacobian = torch.autograd.functional.jacobian(function, x)
    wanted = (jacobian * along).sum((-2, -1))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(torch.func.jvp(function, (x,), (along,))[1], wanted)
    with forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, along)))
    torch.testing.assert_close(tangent, wanted)


@pytest.mark.parametrize("k", [None, 9])
@pytest.mark.parametrize("way", ["encode", "forward", "pre_activations"])
def test_vmap_gives_what_the_rows_give(random_sae, way, k):
    function = getattr(random_sae(20, 90, k=k), way)
    x = torch.randn(5, 6, 20, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(torch.func.vmap(function)(x), function(x))
