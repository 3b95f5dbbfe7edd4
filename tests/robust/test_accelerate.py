"""Models that accelerate off-loads or spreads over devices."""

import pytest
import torch

from sae_hooks import attach_saes, detach_saes
from sae_hooks.sae import SAE

accelerate = pytest.importorskip("accelerate")
SITES = {"model.layers.0.output": 0, "model.layers.1.output": 1, "model.layers.2.output": 2, "model.layers.3.output": 3}
INSIDE = "model.layers.2.self_attn.o_proj.input"
READ, WRITE = "model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output"


@pytest.fixture
def four(random_model):
    """Gemma 2 of 4 layers."""
    return random_model("Gemma2", layers=4)


@pytest.fixture
def saes(four, ids, sae_for, random_sae):
    """SAEs for every layer's output, for an input, and a transcoder."""
    made = {site: sae_for(four, ids, layer=layer) for site, layer in SITES.items()}
    return {**made, INSIDE: random_sae(32, 64, INSIDE, norm=8.0),
            READ: random_sae(32, 64, READ, site_out=WRITE, norm=5.0)}


OPENINGS = {
    "nothing open": lambda saes: (),
    "clamps at four sites": lambda saes: [saes.clamp({3: 20.0, 5: 0.0}, site=site) for site in SITES],
    "clamp before a projection": lambda saes: [saes.clamp({3: 9.0}, site=INSIDE)],
    "clamp of a transcoder": lambda saes: [saes.clamp({3: 9.0}, site=READ)],
    "scale and add some rows": lambda saes: [saes.scale({3: torch.tensor([3.0, float("nan")])}, site=INSIDE),
                                             saes.add({4: 9.0}, layer=3, tokens="prompt")],
    "splice of a layer": lambda saes: [saes.splice(site="model.layers.1.output")],
    "splice of all and a clamp": lambda saes: [saes.splice(), saes.clamp({3: 20.0}, site="model.layers.1.output")],
}


@torch.no_grad()
def results(model, ids, mask=None):
    """Logits and text for each way of steering, on the CPU; and what a capture sees."""
    found = {}
    for name, opening in OPENINGS.items():
        handles = opening(model.saes)
        mask = torch.ones_like(ids) if mask is None else mask
        logits = model(input_ids=ids, attention_mask=mask).logits
        text = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        found[name] = logits.cpu(), text.cpu()
        for handle in handles:
            handle.remove()
    with model.saes.capture() as captured:
        model(input_ids=ids, attention_mask=mask)
    found["capture"] = [captured[name].to_dense().cpu() for name in captured], torch.zeros(1)
    return found


def hold_same(found, expected):
    for name, (logits, text) in expected.items():
        torch.testing.assert_close(found[name][0], logits, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(found[name][1], text), name
    plain = expected["nothing open"][0]
    assert all(name in ("nothing open", "capture") or not torch.equal(logits, plain)
               for name, (logits, _) in expected.items())


@pytest.fixture
def expected(random_model, ids, saes):
    """What the model gives in one piece."""
    return results(attach_saes(random_model("Gemma2", layers=4), saes), ids)


def off_load(model, how, folder):
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu"}
    return accelerate.dispatch_model(model, places, offload_dir=folder)


@pytest.mark.parametrize("order", ["attached after", "attached before"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model to cpu and disk"])
def test_an_off_loaded_model_gives_what_it_gives_in_one_piece(four, ids, saes, expected, tmp_path, how, order):
    if order == "attached before":
        attach_saes(four, saes)
    model = off_load(four, how, str(tmp_path / "weights"))
    assert any(p.device.type == "meta" for p in model.parameters())
    if order == "attached after":
        attach_saes(model, saes)
    hold_same(results(model, ids), expected)
    assert any(p.device.type == "meta" for p in model.parameters())
    detach_saes(model)
    assert torch.equal(model(ids).logits, expected["nothing open"][0])


def test_taking_accelerates_hooks_off_leaves_ours(four, ids, saes, expected, tmp_path):
    model = attach_saes(off_load(four, "disk_offload", str(tmp_path / "weights")), saes)
    accelerate.hooks.remove_hook_from_submodules(model)
    hold_same(results(model, ids), expected)


# --- several devices: fake ones, with real values and CUDA's errors across devices


def spread(model, folder, third="disk"):
    """Layer 0 and the ends on fgpu:0, layers 1 and 3 on fgpu:1, layer 2 elsewhere."""
    ends = ("model.embed_tokens", "lm_head", "model.rotary_emb", "model.norm", "model.layers.0")
    places = dict.fromkeys(ends, "fgpu:0")
    places |= {"model.layers.1": "fgpu:1", "model.layers.2": third, "model.layers.3": "fgpu:1"}
    return accelerate.dispatch_model(
        model, places, offload_dir=folder, main_device="fgpu:0", skip_keys=model._skip_keys_device_placement)


@pytest.mark.parametrize(("third", "order"), [
    ("disk", "attached after"), ("disk", "attached before"), ("cpu", "attached after"), ("fgpu:2", "attached after")])
def test_a_model_on_several_devices_gives_what_it_gives_in_one_piece(four, ids, saes, expected, tmp_path, fake_gpus,
                                                                     third, order):
    if order == "attached before":
        attach_saes(four, saes)
    model = spread(four, str(tmp_path / "weights"), third)
    if order == "attached after":
        attach_saes(model, saes)
    hold_same(results(model, ids), expected)
    assert all(sae.device.type == "cpu" for sae in saes.values())  # the user's own are never moved


def test_left_padding_is_left_alone_on_several_devices_too(four, random_model, ids, saes, tmp_path, fake_gpus):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = attach_saes(random_model("Gemma2", layers=4), saes)
    expected = results(whole, ids, mask)
    hold_same(results(attach_saes(spread(four, str(tmp_path / "weights")), saes), ids, mask), expected)


def test_weights_lie_where_the_activations_are(four, ids, saes, tmp_path, fake_gpus):
    model = attach_saes(spread(four, str(tmp_path / "weights")), saes)
    where = {}
    for layer, place in enumerate(("fgpu:0", "fgpu:1", "fgpu:0", "fgpu:1")):
        model.model.layers[layer].register_forward_hook(
            lambda module, args, output, layer=layer: where.update({layer: str(output.device)}))
        with torch.no_grad(), model.saes.clamp({3: 9.0}, site=f"model.layers.{layer}.output") as clamp, \
                model.saes.splice(site=f"model.layers.{layer}.output"):
            model(ids)
        request = clamp._requests[0]
        assert where[layer] == place
        assert [str(device) for device, _ in request.rows] == [place]
        assert str(request.slot.on(torch.device(place)).W_enc.device) == place


def test_an_sae_of_a_repository_is_moved_to_its_site_and_not_kept_twice(four, ids, saes, tmp_path, fake_gpus):
    site = "model.layers.1.output"
    made = saes[site]
    model = attach_saes(spread(four, str(tmp_path / "weights")), made)
    slot = model.saes._slots[site]
    slot.owned = True  # as if it had come from a repository
    slot.load = lambda: SAE(**{name: p.detach().clone() for name, p in made.named_parameters()}, site=site)
    with torch.no_grad(), model.saes.splice():
        model(ids)
    assert str(slot.sae.device) == "fgpu:1"
    assert not slot._copies


def test_detaching_on_several_devices_gives_the_plain_logits_again(four, ids, saes, expected, tmp_path, fake_gpus):
    model = spread(four, str(tmp_path / "weights"))
    with torch.no_grad():
        plain = model(ids).logits.cpu()
        attach_saes(model, saes)
        clamps = [model.saes.clamp({3: 20.0}, site=site) for site in SITES]
        model(ids)
        detach_saes(model)
        assert not any(clamp._runtime.active for clamp in clamps)
        assert torch.equal(model(ids).logits.cpu(), plain)
    torch.testing.assert_close(plain, expected["nothing open"][0], rtol=1e-5, atol=1e-5)
