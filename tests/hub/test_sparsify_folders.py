"""Folders and repositories of sparsify's SAEs: found, chosen, loaded, and put where they belong in a model."""

import numpy as np
import pytest
import torch
from formats.equations import D_IN, D_SAE, weights
from formats.sparsify_files import AUGUST_2024, CONFIG, PLAIN, SKIP, K, computed, write

from sae_hooks import attach_saes
from sae_hooks.errors import SaeFormatError, SaeMismatchError, SaeNotFoundError, SaeWarning, SiteError
from sae_hooks.hub import find_saes, list_saes, load_sae


def test_a_transcoder_is_told_by_its_config(tmp_path):
    write(tmp_path / "model.layers.3.mlp", weights(*PLAIN, "W_skip"), CONFIG | SKIP)
    [file] = find_saes(tmp_path, site="transcoder")
    assert (file.entry.site, file.entry.site_out) == ("model.layers.3.mlp.input", "model.layers.3.mlp.output")
    assert find_saes(tmp_path)[0].entry == file.entry
    with pytest.raises(SaeNotFoundError, match="transcoder: layers 3; widths 40"):
        find_saes(tmp_path, site="mlp_out")


@pytest.mark.parametrize("hook", ["layers.3", "layers.3.self_attn", "h.3.attn"])
def test_what_people_call_a_transcoder_is_one_of_an_mlp(hook, tmp_path, random_model):
    write(tmp_path / hook, config=CONFIG | {"transcode": True})
    with pytest.raises(SaeNotFoundError, match=rf"  {hook.replace('3', 'N')}\.input: layers 3; widths 40$"):
        find_saes(tmp_path, site="transcoder")
    assert find_saes(tmp_path, site=f"model.{hook}.input")[0].entry.site == f"{hook}.input"
    with pytest.raises(SiteError, match=f"has no module '{hook}'"):
        attach_saes(random_model("GPTNeoX" if hook != "layers.3" else "GPT2", layers=5), tmp_path)


@pytest.fixture
def published(repo):
    """Three layers as EleutherAI publishes them, MLP and residual stream, and their run's config."""
    made = repo("sae-pythia-70m-32k")
    for layer in (1, 2, 12):
        for hook in (f"layers.{layer}", f"layers.{layer}.mlp"):
            write(made.dir / hook, weights(*PLAIN, seed=layer), AUGUST_2024 | {"num_latents": D_SAE})
    (made.dir / "config.json").write_text('{"sae": {"k": 32}, "hookpoints": ["layers.1"]}')
    return made


def fetched(hub, name):
    return {line.split("/resolve/")[1].split("/", 1)[1] for line, _ in hub.seen(f"/resolve/.*{name}")}


@pytest.mark.parametrize(("asked", "path"), [
    ({"layer": 2, "site": "resid_post"}, "layers.2"), ({"layer": 12, "site": "mlp_out"}, "layers.12.mlp"),
    *[({"site": f"{model}layers.2.output"}, "layers.2")
      for model in ("", "model.", "gpt_neox.", "model.language_model.")],
    ({"site": "model.layers.2.mlp.output"}, "layers.2.mlp"), ({"site": "layers.12.output", "layer": 12}, "layers.12")],
    ids=str)
def test_the_one_that_is_meant_is_loaded_and_no_other_layer_s_config_is_asked_for(asked, path, hub, published, cache):
    sae = load_sae(published.id, cache_dir=cache, **asked)
    assert sae.site == f"{path}.output"
    assert sae.metadata["source"].endswith(f"/{path}/sae.safetensors")
    layer = path.split(".")[1]
    assert fetched(hub, "cfg.json") == {f"layers.{layer}.mlp/cfg.json", f"layers.{layer}/cfg.json"}
    assert fetched(hub, "sae.safetensors") == {f"{path}/sae.safetensors"}


def test_everything_is_listed_and_no_weights_are_read(hub, published, cache):
    assert [(e.site, e.width, e.l0, e.d_in) for e in list_saes(published.id, cache_dir=cache)] == [
        (f"layers.{layer}{part}.output", D_SAE, K, D_IN) for layer in (1, 12, 2) for part in (".mlp", "")]
    assert [f.entry.layer for f in find_saes(published.id, site="resid_post", cache_dir=cache)] == [1, 2, 12]
    assert not hub.seen("sae.safetensors|_cdn")
    with pytest.raises(SaeNotFoundError, match=r"nothing for layer=3\. It offers:\n  layers 1-2, 12, of which "):
        find_saes(published.id, layer=3, cache_dir=cache)


def test_of_several_seeds_the_first_is_meant_and_any_can_be_named(tmp_path):
    for seed in (10, 2, 1):
        write(tmp_path / f"run/layers.3/seed{seed}", weights(*PLAIN, seed=seed))
    [file] = find_saes(tmp_path)
    assert file.entry.weights == "run/layers.3/seed1/sae.safetensors"
    sae = load_sae(tmp_path / "run/layers.3/seed10")
    assert sae.site == "layers.3.output"
    np.testing.assert_allclose(sae.W_dec.numpy(), weights(*PLAIN, seed=10)["W_dec"], rtol=1e-6)


def test_of_runs_that_differ_in_k_the_one_nearest_to_l0_is_taken(tmp_path):
    for k in (2, 5, 30):
        write(tmp_path / f"k{k}/layers.3", config=CONFIG | {"k": k})
    assert [load_sae(tmp_path, l0=l0).k for l0 in (1, 4, 29, None)] == [2, 5, 30, 30]


def test_folders_of_other_names_are_loaded_where_a_path_says_what_they_are_of(tmp_path):
    write(tmp_path / "all/layer_3")
    write(tmp_path / "all/layer_4")
    with pytest.raises(SaeFormatError, match=r"calls the site 'layer_3'.* give site= as a module path"):
        load_sae(tmp_path / "all")
    with pytest.raises(SaeNotFoundError, match=r"nothing for layer=3, site=resid_post"):
        load_sae(tmp_path / "all", layer=3, site="resid_post")
    with pytest.raises(SaeMismatchError, match=r"which of layer_3, layer_4 is model\.layers\.3\.output"):
        load_sae(tmp_path / "all", site="model.layers.3.output")
    for asked in ({"site": "layers.3.output"}, {"site": "resid_post", "layer": 3}):
        assert load_sae(tmp_path / "all/layer_3", **asked).site == "layers.3.output"


def test_a_transcoder_in_a_folder_of_another_name_does_not_say_where_it_writes(tmp_path):
    folder = write(tmp_path / "mine", config=CONFIG | {"transcode": True})
    with pytest.raises(SaeFormatError, match=r"which module's output it writes is not told"):
        load_sae(folder, site="model.layers.3.mlp.input")


def test_a_weight_file_can_be_named_itself(tmp_path):
    assert load_sae(write(tmp_path / "h.3.mlp") / "sae.safetensors").site == "h.3.mlp.output"


def test_what_cannot_be_expressed_is_listed_with_the_reason_and_takes_no_other_along(tmp_path):
    write(tmp_path / "layers.3", config=CONFIG | {"activation": "groupmax"})
    write(tmp_path / "layers.4")
    assert [(e.shown, e.layer, bool(e.flaw)) for e in list_saes(tmp_path)] == [
        ("(unreadable)", 3, True), ("layers.4.output", 4, False)]
    with pytest.warns(SaeWarning, match=r"1 left out, .*layers\.3.cfg\.json: activation is 'groupmax'"):
        assert [file.entry.layer for file in find_saes(tmp_path)] == [4]
    with pytest.raises(SaeFormatError, match="groupmax"):
        load_sae(tmp_path, layer=3)


# --- in a model -----------------------------------------------------------------------------------

def spliced(model, module, w, *, transcode, subtract):
    """Logits with a module's output replaced by what the equations make of its output, or its input."""
    def replace(module, args, kwargs, out):
        y = out if isinstance(out, torch.Tensor) else out[0]
        x = (args[0] if args else kwargs["hidden_states"]) if transcode else y
        _, x_hat = computed(w, x.double().flatten(0, 1).numpy(), subtract=subtract)
        new = torch.from_numpy(x_hat).to(y.dtype).reshape(y.shape)
        return new if isinstance(out, torch.Tensor) else (new, *out[1:])

    handle = module.register_forward_hook(replace, with_kwargs=True)
    try:
        return model(IDS).logits
    finally:
        handle.remove()


IDS = torch.arange(3, 27).reshape(2, 12)
WIDE = {"d_in": 32, "num_latents": D_SAE}


@pytest.mark.parametrize(("architecture", "hook", "full", "more"), [
    ("Llama", "layers.1", "model.layers.1", {}), ("Llama", "layers.1", "model.layers.1", {"transcode": True}),
    ("Llama", "model.layers.1.mlp", "model.layers.1.mlp", SKIP), ("GPTNeoX", "layers.1", "gpt_neox.layers.1", {}),
    ("GPTNeoX", "layers.1.attention", "gpt_neox.layers.1.attention", {}),
    ("GPT2", "h.1.attn", "transformer.h.1.attn", {}), ("Gemma2", "layers.1.mlp", "model.layers.1.mlp", {}),
    ("Gemma2", "layers.1.mlp", "model.layers.1.mlp", SKIP)], ids=str)
@torch.no_grad()
def test_in_a_model_it_is_at_the_module_of_its_folder(architecture, hook, full, more, random_model, tmp_path):
    w = weights(*PLAIN, *(["W_skip"] if more == SKIP else []), d_in=32, d_out=32)
    write(tmp_path / hook, w, CONFIG | WIDE | more)
    model = random_model(architecture)
    clean = model(IDS).logits
    expected = spliced(model, model.get_submodule(full), w, transcode=bool(more), subtract=not more)
    attach_saes(model, tmp_path, layer=1)
    assert torch.equal(model(IDS).logits, clean)
    with model.saes.splice():
        found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, clean, atol=1e-2)
    assert model.saes[f"{full}.{'input' if more else 'output'}"] is next(iter(model.saes.values()))


@pytest.mark.parametrize(("stack", "d_in"), [("language_model", 32), ("vision_tower.encoder", 16)])
def test_a_full_path_says_which_of_a_model_s_stacks_of_layers_is_meant(stack, d_in, random_model, tmp_path):
    model = random_model("Gemma3")
    for hook, more in (("layers.0", {}), ("layers.0.mlp", {"transcode": True})):
        write(tmp_path / hook, weights(*PLAIN, d_in=d_in, d_out=d_in), CONFIG | WIDE | {"d_in": d_in} | more)
    attach_saes(model, tmp_path, site=f"model.{stack}.layers.0.output")
    attach_saes(model, tmp_path, site=f"model.{stack}.layers.0.mlp.input")
    assert [(name, slot.write.key) for name, slot in model.saes._slots.items()] == [
        (f"model.{stack}.layers.0.output",) * 2,
        (f"model.{stack}.layers.0.mlp.input", f"model.{stack}.layers.0.mlp.output")]


def test_a_model_that_lacks_the_module_or_has_another_width_is_told_at_once(random_model, tmp_path):
    write(tmp_path / "a/layers.7", config=CONFIG | WIDE)
    write(tmp_path / "b/layers.1")
    with pytest.raises(SiteError, match="has layers 0 to 2; the SAE is for layer 7"):
        attach_saes(random_model("Llama"), tmp_path / "a")
    with pytest.raises(SaeMismatchError, match=r"it reads 6 values, model\.layers\.1\.output of .* has 32"):
        attach_saes(random_model("Llama"), tmp_path / "b")
