"""An edit of a few tokens in one launch where Triton is: on a GPU, or where there is none in its interpreter."""

import pytest
import torch
from kernels.triton_cases import DEVICE, normal, put, same, strided

from sae_hooks import attach_saes, edits
from sae_hooks.kernels import segments

triton = pytest.importorskip("triton")

from sae_hooks.kernels import triton_edit, triton_ops  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-11}


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """Let tensors on the CPU have Triton, too, if they are the ones it takes here, which takes several turns."""
    monkeypatch.setattr(segments, "TRITON_ON", (DEVICE,))
    for name in ("WRITTEN", "READ"):
        monkeypatch.setattr(triton_edit, name, 16)
    monkeypatch.setattr(triton_edit, "FEATURES", 4)
    with torch.no_grad():
        yield


def numbers(k, d_in, d_out, wide, seed=0):
    """W_enc, b_enc, threshold, W_dec, gain, shift: about half of the features are above."""
    shapes = (k, d_in), (k,), (k,), (k, d_out), (k,), (k,)
    found = [normal(*shape, seed=seed + i).to(wide) for i, shape in enumerate(shapes)]
    found[2] = found[2].abs() / 4
    return found


def changed(x, old, W_enc, b_enc, threshold, W_dec, gain, shift, only_if_active):
    """The edited activations in float64, feature by feature."""
    x, new = x.double().reshape(-1, x.shape[-1]), old.double().reshape(-1, old.shape[-1]).clone()
    for i in range(len(W_dec)):
        pre = x @ W_enc[i].double() + b_enc[i].double()
        acts = torch.where(pre > threshold[i].double(), pre, 0.0)
        change = shift[i].double() + gain[i].double() * acts
        change = torch.where(acts > 0, change, 0.0) if only_if_active else change
        new += change[:, None] * W_dec[i].double()
    return new.view(old.shape)


@pytest.mark.parametrize("only_if_active", [False, True], ids=["always", "if active"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "k", "d_in"), [((1, 1, 40), 8, 40), ((2, 3, 5), 1, 33), ((3, 20), 11, 1)])
def test_it_is_what_float64_says_and_the_rest_stays_bit_for_bit(shape, k, d_in, dtype, only_if_active):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, d_out = shape[:-1], shape[-1]
    x, old = normal(*rows, d_in, seed=7).to(dtype), normal(*shape, seed=8).to(dtype)
    of = numbers(k, d_in, d_out, wide)
    wanted = changed(x, old, *of, only_if_active)
    everywhere = triton_ops.edit_few(*put(x, *of), only_if_active, *put(old), None).cpu()
    assert (everywhere.dtype, everywhere.shape) == (dtype, old.shape)
    torch.testing.assert_close(everywhere.double(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert not same(everywhere, old)
    chosen = (torch.arange(old.numel() // d_out) % 2 == 0).view(rows)
    before = old.clone()
    found = triton_ops.edit_few(*put(x, *of), only_if_active, *put(old, chosen)).cpu()
    assert same(found[chosen], everywhere[chosen])
    assert same(found[~chosen], old[~chosen])
    assert same(old, before)


def test_it_reads_views():
    of = numbers(3, 40, 24, torch.float32)
    x, old, chosen = normal(6, 40, seed=7).float(), normal(6, 24, seed=8).float(), torch.arange(6) % 3 == 0
    wanted = triton_ops.edit_few(*put(x, *of), False, *put(old, chosen))
    W_enc, b_enc, threshold, W_dec, gain, shift = of
    columns = [torch.stack([t, t], 1)[:, 0] for t in (b_enc, threshold, gain, shift)]
    args = [strided(W_enc), *columns[:2], strided(W_dec), *columns[2:]]
    found = triton_ops.edit_few(*put(strided(x), *args), False, *put(strided(old), torch.stack([chosen] * 2, 1)[:, 0]))
    assert same(found, wanted)


def among_nan(t):
    """The same numbers, where they run, with nan on all sides: a view."""
    wide = torch.full([size + 8 for size in t.shape], torch.nan, dtype=t.dtype, device=DEVICE)
    part = wide[tuple(slice(4, 4 + size) for size in t.shape)]
    part.copy_(t)
    return part


def test_it_reads_nothing_beside_what_it_is_given():
    x, of = normal(3, 21, seed=7).float(), numbers(6, 21, 21, torch.float32)
    wanted = triton_ops.edit_few(*put(x, *of), True, *put(x), None)
    x, *of = map(among_nan, (x, *of))
    assert same(triton_ops.edit_few(x, *of, True, x, None), wanted)


def test_what_is_at_its_threshold_is_not_active():
    x = torch.tensor([[1.0, 1.0]])
    W_enc, threshold, W_dec = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([2.0, 0.5]), torch.eye(2)
    nothing = torch.zeros(2)
    found = triton_ops.edit_few(*put(x, W_enc, nothing, threshold, W_dec, torch.ones(2), nothing), False, *put(x), None)
    assert found.tolist() == [[1.0, 2.0]]


def test_without_an_encoder_nothing_is_read():
    *_, W_dec, gain, shift = numbers(3, 40, 24, torch.float32)
    x, old = torch.full((2, 40), torch.nan), normal(2, 24, seed=8).float()
    found = triton_ops.edit_few(*put(x), None, *put(shift), None, *put(W_dec, gain * 0, shift), False, *put(old), None)
    torch.testing.assert_close(found.cpu(), old + shift @ W_dec)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, the interpreter's
def test_nan_and_infinity_stay_in_their_rows_and_no_rows_are_none():
    of = numbers(3, 8, 8, torch.float32)
    x = normal(3, 8, seed=7).float()
    x[0, 3], x[1, 2] = torch.nan, torch.inf
    found = triton_ops.edit_few(*put(x, *of), False, *put(x), None).cpu()
    assert found[0].isnan().all()
    assert not found[1].isfinite().any()
    torch.testing.assert_close(found[2].double(), changed(x[2:], x[2:], *of, False)[0], rtol=1e-4, atol=1e-4)
    assert triton_ops.edit_few(*put(x[:0], *of), False, *put(x[:0]), None).shape == (0, 8)


OPEN = {
    "a clamp": lambda saes: [saes.clamp({3: 40.0, 5: 2.0})],
    "a scale": lambda saes: [saes.scale({3: 4.0, 9: 0.0}, special_tokens=True)],
    "an add": lambda saes: [saes.add({3: 4.0})],
    "an add if active": lambda saes: [saes.add({3: 4.0, 4: 4.0, 5: 4.0}, only_if_active=True)],
    "a mask": lambda saes: [saes.clamp({3: 40.0}, tokens=torch.tensor([[False, True, False, True]] * 2))],
    "two": lambda saes: [saes.clamp({3: 40.0}), saes.scale({4: 9.0})],
    "a splice beside": lambda saes: [saes.splice(), saes.clamp({3: 40.0})],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", OPEN)
def test_a_hooked_model_takes_it(what, dtype, random_model, random_sae, monkeypatch):
    model, sae = random_model("Gemma2").to(DEVICE, dtype), random_sae(32, 64, "model.layers.1.output").to(DEVICE)
    attach_saes(model, sae)
    ids = torch.tensor([[2, 5, 6, 7], [2, 2, 9, 8]], device=DEVICE)  # 2: the BOS
    took, taking = [], edits.Rows.at_once
    monkeypatch.setattr(edits.Rows, "at_once", lambda *args: took.append(taking(*args)) or took[-1])

    def run():
        took.clear()
        handles = OPEN[what](model.saes)
        logits = model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        return logits, [t is not None for t in took], [handle.positions_edited for handle in handles]

    found, fast, positions = run()
    monkeypatch.setattr(segments, "TRITON_ON", ())
    wanted, slow, same_positions = run()
    assert fast == [True] * (2 if what == "two" else 1)
    assert not any(slow)
    assert positions == same_positions
    close = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)
    assert not torch.allclose(found, model(input_ids=ids).logits, atol=2 * close)


def test_what_is_not_few_or_wants_more_goes_another_way(monkeypatch):
    W_enc, b_enc, threshold, W_dec, gain, shift = put(*numbers(8, 24, 24, torch.float32))
    x = normal(3, 24).float().to(DEVICE)

    def rows(threshold=threshold, strengths=1, **more):
        each = [t.expand(strengths, 1, 8) for t in (gain, shift)]
        return edits.Rows(W_enc, b_enc, threshold, W_dec, *each, only_if_active=False, **{"reads": True, **more})

    assert rows().at_once(x, x, None) is not None
    assert rows(None, reads=False).at_once(x, x, None) is not None
    assert rows(None).at_once(x, x, None) is None
    assert rows(strengths=3).at_once(x, x, None) is None
    most, more = normal(64, 24).float().to(DEVICE), normal(65, 24).float().to(DEVICE)
    assert rows().at_once(most, most, None) is not None
    assert rows().at_once(more, more, None) is None
    assert rows().at_once(x, x[:2], None) is None
    with torch.enable_grad():
        assert rows().at_once(x.clone().requires_grad_(), x, None) is None
        assert rows().at_once(x, x.clone().requires_grad_(), None) is None
    monkeypatch.setattr(segments, "TRITON_ON", ())
    assert rows().at_once(x, x, None) is None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own import
def test_gradients_and_their_like_go_another_way(random_model, random_sae):
    model, sae = random_model("Gemma2").to(DEVICE), random_sae(32, 64, "model.layers.1.output").to(DEVICE)
    attach_saes(model, sae)
    ids = torch.tensor([[2, 5, 6, 7]], device=DEVICE)
    with torch.enable_grad(), model.saes.clamp({3: 40.0}):
        model(input_ids=ids).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    W_enc, b_enc, threshold, W_dec, gain, shift = put(*numbers(8, 24, 24, torch.float32))
    rows = edits.Rows(W_enc, b_enc, threshold, W_dec, gain[None, None], shift[None, None], False, True)
    x = normal(3, 24).float().to(DEVICE)
    torch.func.vmap(lambda t: t if rows.at_once(t, t, None) is None else None)(x)
    torch.func.jvp(lambda t: t if rows.at_once(t, t, None) is None else None, (x,), (x,))
