"""PEFT loaded, merged and unloaded around attached SAEs."""

import pytest
import torch
from robust.as_found import unchanged

from sae_hooks import SaeAttachError, attach_saes, detach_saes

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
OUTPUT, INSIDE = "model.layers.1.output", "model.layers.1.self_attn.o_proj.input"
ARCHITECTURES = ("Gemma2", "Llama")


def with_lora(model, seed=3):
    """Wrap in a LoRA of every attention projection whose two halves are not zero."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return wrapped


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@torch.no_grad()
def text(model, ids):
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)


@pytest.fixture(params=ARCHITECTURES)
def base(request, random_model):
    return random_model(request.param)


@pytest.fixture
def saes(base, ids, sae_for, random_sae):
    return {OUTPUT: sae_for(base, ids), INSIDE: random_sae(32, 64, INSIDE, norm=8.0)}


def reference(model, ids, saes, **values):
    """Logits and text with the output of layer 1 clamped, by a plain hook: full encode, edit, decode the difference."""
    sae = saes[OUTPUT]

    def clamp(module, args, output):
        acts = sae.encode(output)
        new = acts.clone()
        for feature, value in ((3, 40.0), (7, 0.0)):
            new[..., feature] = value
        return output + (new - acts) @ sae.W_dec

    layer = next(module for name, module in model.named_modules() if name.endswith("model.layers.1"))
    handle = layer.register_forward_hook(clamp)
    found = logits(model, ids), text(model, ids)
    handle.remove()
    return found


def clamp(model):
    return model.saes.clamp({3: 40.0, 7: 0.0}, site=OUTPUT)


def test_edits_on_a_wrapped_model_are_the_reference_in_forward_and_generate(base, ids, saes):
    wrapped = with_lora(base)
    bare, expected = (logits(wrapped, ids), text(wrapped, ids)), reference(wrapped, ids, saes)
    with unchanged(wrapped):
        attach_saes(wrapped, saes)
        assert set(wrapped.saes) == set(saes)
        assert torch.equal(logits(wrapped, ids), bare[0])
        with clamp(wrapped) as edit:
            torch.testing.assert_close(logits(wrapped, ids), expected[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(text(wrapped, ids), expected[1])
            assert edit.positions_edited == 2 * 9 + 2 * (9 + 5)
        with wrapped.saes.clamp({3: 8.0}, site=INSIDE):
            assert not torch.equal(logits(wrapped, ids), bare[0])
        detach_saes(wrapped)
    assert torch.equal(text(wrapped, ids), bare[1])


def test_prompt_and_generated_are_told_apart_through_the_wrapper(base, ids, saes):
    wrapped = with_lora(base)
    attach_saes(wrapped, saes)
    for tokens, count in (("prompt", 2 * 9), ("generated", 2 * 5)):
        with wrapped.saes.clamp({3: 40.0}, site=OUTPUT, tokens=tokens, special_tokens=True) as edit:
            text(wrapped, ids)
            assert edit.positions_edited == count


def test_a_model_wrapped_after_attaching_goes_on_being_edited_at_layer_outputs(base, ids, saes):
    attach_saes(base, saes)
    wrapped = with_lora(base)
    expected = reference(wrapped, ids, saes)
    with clamp(wrapped):
        torch.testing.assert_close(logits(wrapped, ids), expected[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(text(wrapped, ids), expected[1])
    assert wrapped.saes is base.saes


@pytest.mark.parametrize("opening", ["clamp", "splice", "capture", "all at once"])
def test_a_module_wrapped_after_attaching_refuses_edits_instead_of_losing_them(base, ids, saes, opening):
    attach_saes(base, saes)
    wrapped = with_lora(base)
    plain = logits(wrapped, ids)
    openings = {"clamp": lambda: wrapped.saes.clamp({3: 1.0}, site=INSIDE),
                "splice": lambda: wrapped.saes.splice(site=INSIDE),
                "capture": lambda: wrapped.saes.capture(site=INSIDE),
                "all at once": wrapped.saes.splice}
    with pytest.raises(SaeAttachError, match="replaced"):
        openings[opening]()
    assert torch.equal(logits(wrapped, ids), plain)


def test_what_was_attached_before_wrapping_is_detached_through_the_wrapper(base, ids, saes):
    attach_saes(base, saes)
    wrapped = with_lora(base)
    detach_saes(wrapped)
    assert not hasattr(wrapped, "saes")
    assert not hasattr(base, "saes")
    assert "generate" not in base.__dict__
    hooks = [hook for module in wrapped.modules() for table in (module._forward_hooks, module._forward_pre_hooks)
             for hook in table.values()]
    assert not [hook for hook in hooks if type(getattr(hook, "__self__", None)).__module__.startswith("sae_hooks")]


def test_attaching_through_the_wrapper_joins_what_was_attached_before_it(base, ids, saes):
    attach_saes(base, {OUTPUT: saes[OUTPUT]})
    wrapped = with_lora(base)
    attach_saes(wrapped, saes[OUTPUT], name="second")
    assert list(wrapped.saes) == [OUTPUT, "second"]
    detach_saes(wrapped)
    assert not hasattr(base, "saes")


def test_unloading_while_attached_gives_the_plain_model_and_edits_still_reach_it(base, ids, saes):
    plain, expected = logits(base, ids), reference(base, ids, saes)
    wrapped = attach_saes(with_lora(base), {OUTPUT: saes[OUTPUT]})
    unloaded = wrapped.unload()
    assert torch.equal(logits(unloaded, ids), plain)
    with clamp(wrapped):
        torch.testing.assert_close(logits(unloaded, ids), expected[0], rtol=1e-4, atol=1e-4)
    detach_saes(wrapped)
    assert torch.equal(logits(unloaded, ids), plain)
    assert torch.equal(text(unloaded, ids), text(base, ids))


def test_merging_while_attached_keeps_outputs_edited_and_refuses_what_it_replaced(base, ids, saes):
    wrapped = attach_saes(with_lora(base), saes)
    adapted = logits(wrapped, ids)
    with clamp(wrapped):
        steered = logits(wrapped, ids)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-3, atol=1e-3)
    with clamp(wrapped):
        torch.testing.assert_close(logits(merged, ids), steered, rtol=1e-3, atol=1e-3)
    with pytest.raises(SaeAttachError, match="replaced"):
        wrapped.saes.clamp({3: 8.0}, site=INSIDE)
    detach_saes(wrapped)
    torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-3, atol=1e-3)
    attach_saes(merged, saes)
    with merged.saes.clamp({3: 8.0}, site=INSIDE):
        assert not torch.allclose(logits(merged, ids), adapted, atol=1e-3)


def test_switching_the_adapter_off_and_on_while_attached_is_seen_at_once(base, ids, saes):
    plain = logits(base, ids)
    wrapped = attach_saes(with_lora(base), saes)
    adapted = logits(wrapped, ids)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, ids), plain)
        with clamp(wrapped):
            assert not torch.equal(logits(wrapped, ids), plain)
    assert torch.equal(logits(wrapped, ids), adapted)
