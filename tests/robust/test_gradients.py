"""Backward through edits: equal to autograd through the written-out formulas."""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sae_hooks import SaeAttachError, attach_saes, kernels
from sae_hooks.kernels import gradients as of_active
from sae_hooks.kernels import tiles
from sae_hooks.sae import SAE

SITE, INSIDE = "model.layers.1.output", "model.layers.1.mlp.output"


@pytest.fixture(autouse=True, params=["plain operations", "through what is active"])
def followed(request, monkeypatch):
    """How autograd follows a splice: as one so small, or as a large one."""
    if request.param == "through what is active":
        for module, name, value in ((of_active, "SMALL", 0), (of_active, "CROWDED", 1.0), (tiles, "AT_ONCE", 0)):
            monkeypatch.setattr(module, name, value)
    return request.param


def dense(sae, x):
    """Pre-activations and JumpReLU, written out."""
    pre = x @ sae.W_enc + sae.b_enc
    return torch.where(pre > sae.threshold, pre, torch.zeros_like(pre))


def clamped(sae, x):
    acts = dense(sae, x)
    new = acts.clone()
    new[..., 3], new[..., 7] = 20.0, 2.0 * acts[..., 7]
    return x + (new - acts) @ sae.W_dec


def spliced(sae, x):
    return dense(sae, x) @ sae.W_dec + sae.b_dec


def open_clamp(saes):
    return saes.apply(f"""{{"format": "sae_hooks.edits/1", "edits": [
        {{"op": "clamp", "site": "{SITE}", "features": [3], "values": [[20.0]]}},
        {{"op": "scale", "site": "{SITE}", "features": [7], "values": [[2.0]]}}]}}""")


WAYS = {"clamp": (open_clamp, clamped), "splice": (lambda saes: saes.splice(), spliced)}


def gradients(model, ids, **inputs):
    """Gradients of the loss by parameter, and of inputs_embeds if they were given."""
    model.zero_grad()
    model(labels=ids, use_cache=False, **(inputs or {"input_ids": ids})).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if "inputs_embeds" in inputs:
        found["inputs_embeds"] = inputs["inputs_embeds"].grad.clone()
    return found


def hold_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_every_parameter_equal_autograd_through_the_formula(model, ids, sae, way, training):
    opening, formula = WAYS[way]
    model.train(training)
    plain = gradients(model, ids)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: formula(sae, output))
    expected = gradients(model, ids)
    handle.remove()
    attach_saes(model, sae)
    with opening(model.saes):
        hold_close(gradients(model, ids), expected)
    hold_close(gradients(model, ids), plain)
    below, above = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    assert not torch.allclose(plain[below], expected[below], rtol=1e-2)
    assert expected[above].abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in sae.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_inputs_embeds(model, ids, sae, way):
    opening, formula = WAYS[way]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: formula(sae, output))
    expected = gradients(model, ids, inputs_embeds=embeds)
    handle.remove()
    embeds.grad = None
    model.config.bos_token_id = model.config.pad_token_id = None
    model.generation_config.bos_token_id = model.generation_config.pad_token_id = None
    attach_saes(model, sae)  # no special ids, so that none need to be told apart
    with opening(model.saes):
        hold_close(gradients(model, ids, inputs_embeds=embeds), expected)


def test_a_large_splice_is_followed_through_what_is_active(model, ids, sae, followed, monkeypatch):
    taken = []
    monkeypatch.setattr(of_active, "dots", lambda *given: taken.append(given) or kernels.dots(*given))
    attach_saes(model, sae)
    with model.saes.splice():
        gradients(model, ids)
    assert len(taken) == (followed == "through what is active")


def test_positions_left_alone_pass_the_gradient_on_as_it_is(model, ids, sae):
    attach_saes(model, sae)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = torch.nn.Identity()
    layer.register_forward_hook(next(iter(model.model.layers[1]._forward_hooks.values())), with_kwargs=True)

    @torch.enable_grad()
    def run_beside(*args):
        layer(x).sum().backward()

    model.model.layers[2].register_forward_hook(run_beside)
    with model.saes.splice(tokens=torch.arange(9) >= 5), torch.no_grad():
        model(ids)  # the pass that the hook goes by
    assert torch.equal(x.grad[:, :5], torch.ones(2, 5, 32))
    assert not torch.allclose(x.grad[:, 5:], torch.ones(2, 4, 32))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_results_are_the_same_in_every_gradient_mode(model, ids, sae, mode):
    attach_saes(model, sae)
    with open_clamp(model.saes), torch.no_grad():
        expected = model(ids).logits
    with mode(), open_clamp(model.saes):
        found = model(ids).logits
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(found, expected)
    assert found.requires_grad == (mode is torch.enable_grad)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_loaded_and_made_ready_in_inference_mode_serves_a_training_step_too(model, ids, sae, way):
    opening, formula = WAYS[way]
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: formula(sae, output))
    expected = gradients(model, ids)
    handle.remove()
    attach_saes(model, sae, dtype=torch.float64)  # so that the weights are cast, at first use
    with torch.inference_mode():
        opened = opening(model.saes)
        model(ids)
    hold_close(gradients(model, ids), expected)
    opened.remove()


def test_capture_leaves_gradients_as_they_are_and_holds_no_graph(model, ids, sae):
    plain = gradients(model, ids)
    attach_saes(model, sae)
    with model.saes.capture() as captured:
        hold_close(gradients(model, ids), plain)
    assert not captured[SITE].values.requires_grad


@pytest.mark.parametrize("fails", [False, True], ids=["a whole pass", "a pass that fails"])
@pytest.mark.parametrize("opening", ["clamp", "splice"])
def test_a_transcoder_keeps_no_graph_once_its_block_or_its_part_of_the_pass_has_ended(model, ids, random_sae, opening,
                                                                                      fails):
    sae = random_sae(32, 64, "model.layers.1.pre_feedforward_layernorm.output",
                     site_out="model.layers.1.post_feedforward_layernorm.output")
    attach_saes(model, sae)
    below, alive = [], []
    model.model.layers[0].register_forward_hook(lambda module, args, output: below.append(weakref.ref(output)))
    if fails:
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 1 / 0)
    handle = model.saes.splice() if opening == "splice" else model.saes.clamp({3: 9.0})
    with contextlib.suppress(ZeroDivisionError), handle:
        model(ids)
        gc.collect()
        alive += [ref() is not None for ref in below]
    gc.collect()
    assert alive == ([] if fails else [False])
    assert [ref() for ref in below] == [None]


def test_an_sae_that_is_being_trained_gets_its_own_gradients_through_a_splice(model, ids, sae):
    sae.requires_grad_(True)
    attach_saes(model, sae)
    with model.saes.splice():
        gradients(model, ids)
    assert sae.W_dec.grad.abs().max() > 0
    assert sae.W_enc.grad.abs().max() > 0


# --- gradient checkpointing computes layers twice


def checkpointed(model):
    model.train()
    new_name = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("way", WAYS)
def test_edits_of_layer_outputs_have_the_same_gradients_with_checkpointing(model, random_model, ids, sae, way):
    opening, _ = WAYS[way]
    attach_saes(model.train(), sae)
    with opening(model.saes):
        expected = gradients(model, ids)
    again = attach_saes(checkpointed(random_model("Gemma2")), sae)
    calls = []
    again.model.layers[1].mlp.register_forward_hook(lambda module, args, output: calls.append(1))
    with opening(again.saes) as handle:
        loss = again(ids, labels=ids, use_cache=False).loss
    loss.backward()  # after the edit has ended
    assert len(calls) == 2  # checkpointing was at work
    assert handle.positions_edited % ids.numel() == 0
    hold_close({name: p.grad for name, p in again.named_parameters()}, expected)


@pytest.mark.parametrize("opening", ["clamp", "splice", "capture"])
def test_inside_a_layer_that_is_computed_twice_edits_are_refused(model, ids, random_sae, opening):
    attach_saes(checkpointed(model), random_sae(32, 64, INSIDE, norm=8.0))
    plain = gradients(model, ids)
    openings = {"clamp": lambda: model.saes.clamp({3: 9.0}), "splice": model.saes.splice, "capture": model.saes.capture}
    with pytest.raises(SaeAttachError, match="checkpointing"):
        openings[opening]()
    hold_close(gradients(model, ids), plain)
    model.eval()  # nothing is computed twice here
    with openings[opening](), torch.no_grad():
        model(ids)


@pytest.mark.parametrize("opening", ["clamp", "splice", "capture"])
def test_a_layer_that_is_computed_twice_with_its_hooks_is_refused_too(model, ids, sae, opening):
    layer = model.model.layers[1]

    class HooksTwice(type(layer)):
        """As transformers before 5.23 had it: what is checkpointed is the call, not forward."""

        def __call__(self, *args, **kwargs):
            call = functools.partial(super().__call__, **kwargs)
            return checkpoint(call, *args, use_reentrant=False) if self.training else call(*args)

    layer.__class__ = HooksTwice
    attach_saes(model, sae)
    openings = {"clamp": lambda: model.saes.clamp({3: 9.0}), "splice": model.saes.splice, "capture": model.saes.capture}
    with openings[opening](), torch.no_grad():
        model(ids)
    checkpointed(model)
    with pytest.raises(SaeAttachError, match=rf"{SITE} is of a layer .* checkpointing.*transformers 5\.23"):
        openings[opening]()
    gradients(model, ids)


def test_a_layer_that_somebody_else_has_computed_twice_is_edited_at_the_same_tokens_again(model, ids, random_sae):
    attach_saes(model, random_sae(32, 64, INSIDE, norm=8.0))
    layer, ids = model.model.layers[1], torch.cat([ids.new_full((2, 1), 2), ids], dim=1)
    with model.saes.clamp({3: 9.0}) as once:
        expected = gradients(model, ids)
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    with model.saes.clamp({3: 9.0}) as twice:
        hold_close(gradients(model, ids), expected)
    assert once.positions_edited == 18  # but the BOS of each row
    assert twice.positions_edited == 36


def test_an_sae_in_float64_edits_a_float64_model_in_float64(random_model, ids, sae):
    model = random_model("Gemma2").double()
    wide = SAE(**{name: p.double() for name, p in sae.named_parameters()}, site=SITE, metadata=sae.metadata)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: clamped(wide, output))
    expected = gradients(model, ids)
    handle.remove()
    attach_saes(model, wide)
    with open_clamp(model.saes):
        found = gradients(model, ids)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
