"""How often a pass makes a GPU wait for the CPU: once for each SAE of a model would cost a decoding step more than the
arithmetic does. Counted on a fake one."""

from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, StaticCache

from sae_hooks import SAE, attach_saes
from sae_hooks.kernels import decoding

aten = torch.ops.aten
ASKING = (aten.nonzero.default, aten._local_scalar_dense.default, aten.masked_select.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def waits(func, args, kwargs):
    """Whether the CPU must know numbers of its tensors before it can go on."""
    if func in INDEXING:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if func is aten.copy_.default:
        return args[0].device.type == "cpu"
    return func in ASKING or (func is aten._to_copy.default and str(kwargs.get("device")).startswith("cpu"))


@pytest.fixture
def waited(fake_gpus, monkeypatch):
    """How often each operation made the fake GPU wait."""
    found, run = Counter(), fake_gpus.run

    def counted(func, args, kwargs):
        there = any(isinstance(t, fake_gpus.FakeTensor) for t in pytree.tree_leaves((args, kwargs)))
        if there and waits(func, args, kwargs):
            found[str(func)] += 1
        return run(func, args, kwargs)

    def read(name):
        def asking(tensor):
            found[name] += 1
            return getattr(tensor.raw, name)()
        return asking

    monkeypatch.setattr(fake_gpus, "run", counted)
    for name in ("item", "tolist"):
        monkeypatch.setattr(fake_gpus.FakeTensor, name, read(name))
    with torch.no_grad():
        yield found


@pytest.fixture
def on_gpu(model, ids, sae_for, waited):
    """The model on a fake GPU with an SAE, and ids there."""
    sae = sae_for(model, ids)
    sae.metadata["typical_norm"] = 100.0
    return attach_saes(model.to("fgpu:0"), sae), ids.to("fgpu:0")


OPEN = {"a clamp": lambda saes: [saes.clamp({1: 5.0})], "a scale": lambda saes: [saes.scale({1: 5.0, 2: 0.0})],
        "a splice": lambda saes: [saes.splice()], "a capture": lambda saes: [saes.capture()],
        "a splice and an ablation": lambda saes: [saes.splice(), saes.ablate([1])]}
OFTEN = {"a capture": 2}  # where the tokens are, and which features they have


@pytest.mark.parametrize("static", [False, True], ids=["cache", "static cache"])
@pytest.mark.parametrize("what", OPEN)
def test_a_decoding_step_waits_for_nothing_but_the_features_of_a_capture(on_gpu, waited, what, static):
    model, ids = on_gpu

    def step():
        cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache()
        model(input_ids=ids[:, :5], past_key_values=cache)
        waited.clear()
        model(input_ids=ids[:, 5:6], past_key_values=cache)
        return dict(waited)

    assert step() == {}
    handles = OPEN[what](model.saes)
    found = step()
    assert sum(found.values()) == OFTEN.get(what, 0), found
    for handle in handles:
        handle.remove()


def not_few(monkeypatch):
    """Let a GPU take any tokens for many."""
    for name in ("GPU_FEW", "GPU_SMALL"):
        monkeypatch.setattr(decoding, name, 0)


def test_a_splice_of_many_tokens_asks_once_where_they_are(on_gpu, waited, monkeypatch):
    model, ids = on_gpu
    not_few(monkeypatch)
    with model.saes.splice():
        model(input_ids=ids)
        waited.clear()
        model(input_ids=ids)
        of_the_sae = 1  # how many features are active: many here
        assert sum(waited.values()) == 1 + of_the_sae, dict(waited)


def test_splices_of_one_pass_ask_once_where_the_tokens_are(random_model, random_sae, waited, monkeypatch):
    model, ids = random_model("Gemma2").to("fgpu:0"), torch.arange(3, 23).view(2, 10).to("fgpu:0")
    saes = [random_sae(32, 64, f"model.layers.{i}.output", seed=i) for i in range(3)]
    for sae in saes:
        del sae.metadata["typical_norm"]  # which makes each site's choice its own
    attach_saes(model, {sae.site: sae for sae in saes})
    not_few(monkeypatch)
    with model.saes.splice():
        model(input_ids=ids)
        waited.clear()
        model(input_ids=ids)
        assert sum(waited.values()) == 1 + len(saes), dict(waited)


def test_how_many_features_topk_finds_is_known_before(model, ids, sae_for, waited, monkeypatch):
    sae = sae_for(model, ids)
    topk = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k=3, site=sae.site)
    model, ids = attach_saes(model.to("fgpu:0"), topk), ids.to("fgpu:0")
    not_few(monkeypatch)
    with model.saes.splice():
        model(input_ids=ids)
        waited.clear()
        model(input_ids=ids)
        assert sum(waited.values()) == 1, dict(waited)  # where the tokens are
