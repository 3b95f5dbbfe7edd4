"""Attached with nothing open, the model computes what it did before, to the last bit."""

import pytest
import torch

from sae_hooks import SaeWarning, attach_saes, detach_saes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARCHITECTURES = ("Gemma2", "Gemma3Text", "Llama", "Qwen3", "GPT2", "GPTNeoX", "Bloom")


@torch.no_grad()
def results(model, ids):
    """Logits, hidden states, loss and text."""
    out = model(ids, output_hidden_states=True, labels=ids)
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=2)
    return [out.logits, *out.hidden_states, out.loss, text, sampled]


def all_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sites_of(model, random_sae):
    from sae_hooks import sites

    found = {sites.alias(model, layer, kind)[0] for layer in range(3) for kind in ("resid_post", "mlp_out", "attn_out")}
    return {site: random_sae(32, 64, site) for site in sorted(found)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attached_everywhere_with_nothing_open_every_bit_is_the_bare_models(random_model, ids, random_sae, architecture,
                                                                           dtype):
    model = random_model(architecture).to(dtype)
    bare = results(model, ids)
    assert all_equal(results(model, ids), bare)
    attach_saes(model, sites_of(model, random_sae))
    assert all_equal(results(model, ids), bare)
    with model.saes.clamp({3: 40.0}, layer=1, site="resid_post"):
        assert not torch.equal(model(ids).logits, bare[0])
    assert all_equal(results(model, ids), bare)
    detach_saes(model)
    assert all_equal(results(model, ids), bare)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_watching_and_edits_that_change_nothing_leave_every_bit(random_model, ids, sae, dtype):
    model = random_model("Gemma2").to(dtype)
    bare = results(model, ids)
    attach_saes(model, sae)
    with model.saes.capture(), model.saes.scale({3: 1.0}), model.saes.add({4: 0.0}), model.saes.splice(keep_error=True):
        assert all_equal(results(model, ids), bare)
    nobody = model.saes.clamp({5: 40.0}, tokens=torch.zeros(9, dtype=torch.bool))
    assert all_equal(results(model, ids), bare)
    with pytest.warns(SaeWarning, match="no position"):
        nobody.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_positions_left_alone_keep_every_bit(random_model, ids, sae, dtype):
    model = random_model("Gemma2").to(dtype)
    layer, seen = model.model.layers[1], []
    attach_saes(model, sae)
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = torch.tensor([False] * 4 + [True] + [False] * 4)
    with torch.no_grad():
        model(ids)
        with model.saes.clamp({3: torch.tensor([40.0, float("nan")]), 7: 9.0}, tokens=tokens):
            model(ids)
    changed = (seen[0] != seen[1]).any(-1)
    assert changed.tolist() == [[False] * 4 + [True] + [False] * 4] * 2
    with torch.no_grad(), model.saes.clamp({3: torch.tensor([40.0, float("nan")])}):
        model(ids)
    assert (seen[0] != seen[2]).any(-1).tolist() == [[True] * 9, [False] * 9]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, importing its compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_attached_with_nothing_open_every_bit_is_the_compiled_bare_models(random_model, random_sae, ids,
                                                                                      dtype):
    """The compiler torch.compile uses by default (C++ here); test_compile.py has the rest, with a quick one."""
    model = random_model("Llama", layers=1).to(dtype)
    compiled = torch.compile(model)
    with torch.no_grad():
        bare = compiled(ids, use_cache=False).logits
        assert torch.equal(compiled(ids, use_cache=False).logits, bare)
        attach_saes(compiled, random_sae(32, 64, "model.layers.0.output"))
        assert torch.equal(compiled(ids, use_cache=False).logits, bare)
