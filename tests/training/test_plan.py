"""The plan of a training against arithmetic by hand: Gemma 2 9B, layer 20, 131,072 features, 8 G tokens."""

from dataclasses import replace

import pytest
import torch

from sae_hooks.errors import SiteError, TrainingError
from sae_hooks.training.plan import (
    H100,
    activation_bytes,
    describe,
    disk,
    gated_decoder_cost,
    memory,
    model_cost,
    plan,
    step_seconds,
)
from sae_hooks.training.recipes import paper, quick, variants

NINE_B = {"layers": 42, "d_model": 3584, "d_mlp": 14336, "heads": 16, "kv_heads": 8, "head_dim": 256,
          "vocabulary": 256_000, "layer": 20, "context": 1024}
WEIGHTS = 2 * 3584 * 131_072  # of the two matrices
BIASES = 2 * 131_072 + 3584


@pytest.fixture(scope="module")
def cost():
    return gated_decoder_cost(**NINE_B)


@pytest.fixture(scope="module")
def nine_b():
    """Gemma 2 9B without weights."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(num_hidden_layers=42, hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
                          num_key_value_heads=8, head_dim=256, vocab_size=256_000)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_model_is_counted_from_its_shapes_or_from_its_config_alike(cost, nine_b):
    site = "model.layers.20.output"
    assert model_cost(nine_b, [(site, site)], 1024) == cost


def test_the_language_model_by_hand(cost):
    attention, mlp = 3584 * (4096 + 2048 + 2048) + 4096 * 3584, 3 * 3584 * 14336
    assert attention + mlp == 198_180_864
    assert cost.parameters == 256_000 * 3584 + 42 * (198_180_864 + 4 * 3584) + 3584 == 9_241_705_984
    assert cost.flops == 21 * (2 * 198_180_864 + 4 * 4096 * 1024) == 8_675_917_824


def test_a_deeper_site_costs_more_and_a_transcoder_has_two_widths(nine_b):
    deep = model_cost(nine_b, [("model.layers.41.output",) * 2], 1024)
    assert deep.flops == 2 * 8_675_917_824
    inner = "model.layers.20.post_feedforward_layernorm.output"
    both = model_cost(nine_b, [("model.layers.20.self_attn.o_proj.input", inner), (inner, inner)], 1024)
    assert both.places == ((4096, 3584), (3584, 3584))
    assert both.widths == (4096, 3584)


def test_an_unknown_site_is_refused(nine_b):
    with pytest.raises(SiteError, match="layers 0 to 41"):
        model_cost(nine_b, [("model.layers.42.output",) * 2], 1024)


def test_hours_by_hand(cost):
    one = plan(paper, cost)
    assert one.recipe.steps == 8_000_000_000 // 4096 == 1_953_125
    assert one.model_hours == pytest.approx(8e9 * 8_675_917_824 / (0.4 * 989e12) / 3600)
    assert one.model_hours == pytest.approx(48.7, abs=0.05)
    assert one.sae_hours == pytest.approx(1_953_125 * one.step_ms / 1000 / 3600)
    assert one.hours == one.model_hours + one.sae_hours


def test_a_step_by_hand():
    sparse, dense = step_seconds(paper, (3584, 3584), 60.0)
    flops, bandwidth = 0.7 * 494e12, 0.8 * 3.35e12
    product = 2 * 4096 * 3584 * 131_072 / flops
    reads = 2 * 4 * 3584 * 131_072 / bandwidth  # the encoder, once for each of the 2 chunks of 2,048 tokens
    update = WEIGHTS * 16 + 8 * WEIGHTS / 2  # Adam by rows
    passes = 4 * 4096 * 131_072
    gathers = 4 * 2 * 60 * 4096 * 3584 * 4
    assert sparse == pytest.approx(max(product, reads) + (3 * passes + gathers + update) / bandwidth)
    assert dense == pytest.approx(5 * product + (20 * passes + update + WEIGHTS * 8 + 8 * WEIGHTS / 2) / bandwidth)
    assert sparse < dense
    fast = step_seconds(replace(paper, bf16=True), (3584, 3584), 60.0)[0]
    product, gathers = product * 494 / 989, gathers * (1 + 3 / 2) / 4  # three of the four in half the bytes
    assert fast == pytest.approx(max(product, reads) + (3 * passes + gathers + update) / bandwidth)


@pytest.mark.parametrize("change", [{"betas": (0.9, 0.999)}, {"clip": 3.0}])
def test_momentum_and_clipping_cost_gradients_and_passes(change):
    sparse, dense = step_seconds(paper, (3584, 3584), 60.0)
    slower, dense_too = step_seconds(replace(paper, **change), (3584, 3584), 60.0)
    more = WEIGHTS * (4 + 28) + 12 * 4 * WEIGHTS / 2 - WEIGHTS * 16
    assert slower == pytest.approx(sparse + more / (0.8 * 3.35e12))
    assert dense_too == pytest.approx(dense + (more - 8 * WEIGHTS) / (0.8 * 3.35e12))


def test_products_in_bf16_are_quicker_and_said_to_be_assumed(cost):
    fast = replace(paper, bf16=True)
    assert plan(fast, cost).dense_step_ms < plan(paper, cost).dense_step_ms
    assert "the SAE's products in bf16 at 70% of 989" in " ".join(describe([plan(fast, cost)]).split())
    assert "the SAE's products in TF32 at 70% of 494" in " ".join(describe([plan(paper, cost)]).split())


def test_gpus_that_share_the_features_exchange_rows_and_add_up_the_reconstruction(cost):
    one, eight = (step_seconds(paper, (3584, 3584), 60.0, H100, 1, shards)[0] for shards in (1, 8))
    assert eight == pytest.approx(one / 8 + 3 * 7 / 8 * 4096 * 3584 * 4 / 400e9)  # all-reduced, and gathered
    assert plan(paper, cost, gpus=8, shards=8).model_hours == pytest.approx(plan(paper, cost).model_hours / 8)
    assert plan(paper, cost, gpus=8, shards=8).host == plan(paper, cost).host


def test_gpus_that_share_the_batch_harvest_a_part_each_and_average_gradients(cost):
    sparse, dense = step_seconds(paper, (3584, 3584), 60.0, H100, 8, 1)
    reduce = 2 * 7 / 8 * 4 * WEIGHTS / 400e9
    assert reduce == pytest.approx(0.0164, abs=1e-4)
    flops, bandwidth = 0.7 * 494e12, 0.8 * 3.35e12
    update = WEIGHTS * (4 + 28) + 12 * 4 * WEIGHTS / 2 + 16 * WEIGHTS / 2
    product = 2 * 512 * 3584 * 131_072 / flops
    assert dense == pytest.approx(5 * product + (20 * 4 * 512 * 131_072 + update) / bandwidth + reduce)
    assert sparse > reduce + update / bandwidth
    assert plan(paper, cost, gpus=8).model_hours == pytest.approx(plan(paper, cost).model_hours / 8)
    assert plan(paper, cost, gpus=8).host == plan(paper, cost).host


def test_processes_that_do_not_come_out_even_are_refused(cost):
    topk = variants(paper, "topk", l0=[32])["k_32"]
    odd, torn = replace(paper, d_sae=1001), replace(paper, batch_size=1001)
    for recipe, shards in ((paper, 3), (odd, 8), (torn, 1), (topk, 8)):
        with pytest.raises(TrainingError, match=f"8 processes, of which {shards} share the features, cannot train"):
            plan(recipe, cost, gpus=8, shards=shards)
    assert plan(topk, cost, gpus=8).gpus == 8


def test_what_is_cached_is_harvested_once(cost):
    live, cached = plan(paper, cost), plan(paper, cost, cache_tokens=1_000_000_000)
    assert cached.model_hours == pytest.approx(live.model_hours / 8)
    assert cached.sae_hours == live.sae_hours


def test_memory_by_hand(cost):
    found = memory(paper, cost, 60.0)
    assert found["language model"] == 2 * 9_241_705_984
    assert found["SAE weights"] == found["gradients"] == found["Adam"] == 4 * (WEIGHTS + BIASES)
    assert found["activations"] == 6 * 4 * 4096 * 131_072 + 6 * 4 * 4096 * 2 * 3584
    assert found["temporary"] == 0
    clipped = memory(replace(paper, clip=3.0), cost, 60.0)
    assert clipped["Adam"] == 2 * found["Adam"]
    assert clipped["temporary"] == 2 * 4 * WEIGHTS / 2
    assert plan(paper, cost).fits
    shared = memory(paper, cost, 60.0, shards=8)
    assert shared["Adam"] == pytest.approx(found["Adam"] / 8, rel=1e-4)
    assert shared["language model"] == found["language model"]
    parted = memory(paper, cost, 60.0, groups=8)
    assert parted["Adam"] == 2 * found["Adam"], "gradients that are averaged must be whole"
    assert parted["activations"] == found["activations"] / 8


def test_the_sparse_form_takes_a_tile_at_a_time():
    dense, sparse = activation_bytes(paper, 60.0)
    assert dense == 6 * 4 * 4096 * 131_072
    assert sparse == 40 * 2 * 60 * 4096 + 3 * 4 * 2**26, "tiles of 64 million pairs"
    small = replace(paper, d_sae=1024)
    assert activation_bytes(small, 60.0)[1] == 40 * 2 * 60 * 4096 + 3 * 4 * 4096 * 1024


def test_disk_by_hand(cost):
    live, cached = disk(paper, cost), disk(paper, cost, 5_000_000_000)
    assert live["checkpoints, at most"] == 3 * (12 * (WEIGHTS + BIASES) + 2 * 1_000_000 * 3584)
    assert live["finished SAEs"] == 4 * (WEIGHTS + BIASES)
    assert cached["cached activations"] == 2 * 5_000_000_000 * 3584
    assert cached["checkpoints, at most"] == 3 * 12 * (WEIGHTS + BIASES)
    assert plan(paper, cost).host == 2 * 1_000_000 * 3584
    assert plan(paper, cost, cache_tokens=5_000_000_000).host == 0


def test_several_saes_side_by_side_share_the_model_and_the_buffer(cost):
    three = replace(cost, places=cost.places * 3)
    one, many = plan(paper, cost), plan(paper, three)
    assert many.model_hours == one.model_hours
    assert many.host == one.host
    assert many.sae_hours == pytest.approx(3 * one.sae_hours)
    assert many.memory["Adam"] == 3 * one.memory["Adam"]
    assert many.memory["activations"] == one.memory["activations"]


def test_what_does_not_fit_is_told(cost):
    million = replace(paper, d_sae=2**20)
    assert not plan(million, cost).fits
    assert plan(million, cost, gpus=8, shards=8).fits
    assert ": too much" in describe([plan(million, cost), plan(million, cost, gpus=8, shards=8)])


def test_the_l0_of_the_recipe_is_what_is_planned_with(cost):
    assert plan(quick, cost).l0s == (60,)
    assert plan(variants(quick, "topk", l0=[20])["k_20"], cost).l0s == (20,)
    assert plan(variants(quick, "relu", sparsity=[0.1])["sparsity_0.1"], cost).l0s == (60,)
    two = replace(cost, places=cost.places * 2)
    both, low, high = plan(quick, two, l0s=[10, 200]), plan(quick, cost, l0s=[10]), plan(quick, cost, l0s=[200])
    assert both.step_ms == pytest.approx(low.step_ms + high.step_ms)
    assert "L0 10, 200, and 2 pairs" in " ".join(describe([both]).split())


def test_the_table_says_that_it_is_arithmetic_and_what_it_assumes(cost):
    shown = describe([plan(paper, cost, gpus=gpus) for gpus in (1, 8)])
    assert "1 x H100" in shown
    assert "8 x H100" in shown
    assert "8,000,000,000 tokens in 1,953,125 steps of 4,096" in shown
    told = " ".join(shown.split())
    assert "Arithmetic, not a measurement." in told
    assert "9.24 G parameters" in told
    assert "40% of 989 TFLOP/s" in told
    assert "Steps are dense while more than 3.0% of the pairs are held" in told
    topk = " ".join(describe([plan(variants(quick, "batchtopk", l0=[20])["k_20"], cost)]).split())
    assert "Steps are dense" not in topk
    assert "TopK and BatchTopK have no dense form" in topk
    assert all(len(line) <= 110 for line in shown.splitlines())
