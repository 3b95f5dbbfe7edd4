"""Recipes: the published numbers, what a user may change, and what is refused."""

import json
from dataclasses import replace

import pytest

from sae_hooks.errors import TrainingError
from sae_hooks.training import TanhJumpReLU, TopK, TrainConfig, Trainee
from sae_hooks.training.objectives import OBJECTIVES, BatchTopK, Gated, JumpReLU
from sae_hooks.training.recipes import changed, paper, quick, variants

SITE, OTHER = "model.layers.20.output", "model.layers.20.mlp.output"


def test_paper_has_the_numbers_of_the_paper_and_of_gemma_scope():
    trainee, config = paper.trainee("a", SITE), paper.config()
    assert trainee.d_sae == 131_072
    assert (trainee.learning_rate, trainee.betas, trainee.adam_eps) == (7e-5, (0.0, 0.999), 1e-8)
    assert (trainee.log_threshold, trainee.centre) == (True, False)
    assert trainee.objective == JumpReLU(sparsity=6e-4, warmup=10_000, bandwidth=0.001, threshold=0.001, pre_bias=True)
    assert (config.steps, config.batch_size, config.warmup, config.decay) == (1_953_125, 4096, 1000, 0.0)
    assert paper.buffer_tokens == 1_000_000


def test_quick_aims_at_an_l0_and_starts_its_thresholds_there():
    objective = quick.trainee("a", SITE).objective
    assert objective.l0 == 60
    assert objective.threshold is None
    assert quick.config().steps == quick.tokens // quick.batch_size


def test_a_recipe_is_changed_by_dataclasses_replace():
    mine = replace(quick, d_sae=4096, objective=replace(quick.objective, l0=30.0), tokens=2048)
    assert (mine.trainee("a", SITE).d_sae, mine.trainee("a", SITE).objective.l0) == (4096, 30.0)
    assert mine.config().steps == 2


def test_a_transcoder_has_no_pre_encoder_bias_and_may_have_a_skip():
    trainee = paper.trainee("a", SITE, OTHER, skip=True, seed=3)
    assert trainee.objective == replace(paper.objective, pre_bias=False)
    assert (trainee.site, trainee.site_out, trainee.skip, trainee.seed) == (SITE, OTHER, True, 3)
    assert paper.trainee("a", SITE, SITE).objective.pre_bias


def test_fewer_tokens_than_a_batch_are_refused():
    with pytest.raises(TrainingError, match="1,023 tokens are not one batch of 1,024"):
        replace(quick, tokens=1023).config()


# --- variants -------------------------------------------------------------------------------------

def test_several_targets_are_several_recipes_with_the_same_rest():
    made = variants(quick, "jumprelu", l0=[30, 60.5])
    assert {name: recipe.objective.l0 for name, recipe in made.items()} == {"l0_30": 30, "l0_60.5": 60.5}
    assert all(replace(recipe, objective=quick.objective) == quick for recipe in made.values())


def test_a_coefficient_alone_takes_the_target_away():
    made = variants(quick, "jumprelu", sparsity=[0.001])
    assert made["sparsity_0.001"].objective == replace(quick.objective, l0=None, sparsity=0.001)


def test_a_target_for_the_paper_brings_its_own_coefficient():
    aimed = variants(paper, "jumprelu", l0=[100])["l0_100"].objective
    assert (aimed.l0, aimed.sparsity, aimed.warmup, aimed.pre_bias) == (100, 2.0, 10_000, True)
    assert variants(paper, "jumprelu", l0=[100], sparsity=[5.0])["l0_100"].objective.sparsity == 5.0


def test_without_numbers_it_is_the_recipe_itself():
    assert variants(quick) == {"l0_60": quick}
    assert variants(paper) == {"sparsity_0.0006": paper}


def test_every_objective_can_be_had():
    assert variants(quick, "batchtopk", l0=[32])["k_32"].objective == BatchTopK(k=32, dead_after=200_000)
    gated = variants(paper, "gated", sparsity=[0.01])["sparsity_0.01"].objective
    assert gated == Gated(sparsity=0.01, warmup=10_000, pre_bias=True)
    for kind, numbers in {"relu": {"sparsity": [0.1]}, "tanh": {"sparsity": [0.1]}, "topk": {"l0": [8]}}.items():
        (recipe,) = variants(quick, kind, **numbers).values()
        assert type(recipe.objective) is OBJECTIVES[kind]
    assert variants(quick, "tanh", sparsity=[0.1])["sparsity_0.1"].objective.warmup == quick.steps


@pytest.mark.parametrize(("kind", "numbers", "told"), [
    ("nonsense", {}, "no objective 'nonsense'; there are jumprelu"),
    ("topk", {}, "topk takes l0"),
    ("topk", {"l0": [2.5]}, "whole numbers"),
    ("topk", {"l0": [5], "sparsity": [1.0]}, "no sparsity"),
    ("relu", {}, "relu has no target: give sparsity"),
    ("gated", {"l0": [5]}, "gated has no target"),
    ("jumprelu", {"l0": [-1]}, "L0 above 0"),
    ("topk", {"l0": [float("inf")]}, "L0 above 0"),
    ("jumprelu", {"l0": [30], "sparsity": [1.0, 2.0]}, "at most one sparsity"),
    ("jumprelu", {"l0": [5, 30, 5.0]}, "give each L0 or sparsity once: of 5, 30, 5"),
    ("batchtopk", {"l0": [5, 5]}, "2 SAEs cannot have names of their own"),
    ("relu", {"sparsity": [0.1, 0.10000001]}, "give each L0 or sparsity once"),
])
def test_numbers_that_an_objective_cannot_take_are_refused(kind, numbers, told):
    with pytest.raises(TrainingError, match=told):
        variants(quick, kind, **numbers)


# --- settings as text -----------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "text", "value"), [
    ("decay", "0.2", 0.2), ("decay", "0", 0.0), ("tokens", "1e6", 1_000_000), ("bf16", "true", True),
    ("betas", "[0, 0.99]", (0, 0.99)), ("objective.threshold", "0.03", 0.03), ("objective.l0", "null", None),
    ("objective.kernel", "gaussian", "gaussian"), ("objective.prefixes", "[64, 128]", (64, 128))])
def test_every_number_can_be_set_by_its_name(name, text, value):
    recipe = changed(quick, {name: text})
    inner = recipe.objective if name.startswith("objective.") else recipe
    found = getattr(inner, name.removeprefix("objective."))
    assert found == value
    assert json.dumps(found) == json.dumps(value) or isinstance(value, tuple)
    assert changed(quick, {}) == quick


@pytest.mark.parametrize(("name", "text", "told"), [
    ("d_sea", "5", "Recipe has no d_sea; it has d_sae"),
    ("objective", "topk", "Recipe has no objective"),
    ("objective.kernel", "square", "kernel must be of type Literal"),
    ("objective.k", "5", "JumpReLU has no k"),
    ("tokens", "1.5", "tokens must be of type int, got 1.5"),
    ("decay", "much", "decay must be of type float"),
    ("centre", "1", "centre must be of type bool"),
    ("betas", "[true, 0.9]", "betas must be of type float, got True"),
    ("betas", "0.9", r"betas must be of type tuple\[float, float\], got 0.9"),
    ("tokens", "NaN", "tokens must be of type int, got nan"),
    ("tokens", "1e999", "tokens must be of type int, got inf"),
])
def test_a_setting_that_cannot_be_is_explained(name, text, told):
    with pytest.raises(TrainingError, match=told):
        changed(quick, {name: text})


@pytest.mark.parametrize(("made", "told"), [
    (lambda: JumpReLU(sparsity=-1), "JumpReLU: expected sparsity of 0 or more, got -1"),
    (lambda: JumpReLU(sparsity=float("inf")), "JumpReLU: expected sparsity finite, got inf"),
    (lambda: Trainee(name="a", site="b", d_sae=100, clip=float("inf")), "expected clip finite, got inf"),
    (lambda: JumpReLU(bandwidth=0.0), "expected bandwidth above 0, got 0.0"),
    (lambda: JumpReLU(l0=float("nan")), "expected l0 above 0, got nan"),
    (lambda: JumpReLU(prefixes=(8, 4)), "prefixes must ascend"),
    (lambda: replace(quick.objective, threshold=-0.1), "expected threshold of 0 or more"),
    (lambda: Gated(sparsity=-0.1), "Gated: expected sparsity of 0 or more"),
    (lambda: Gated(warmup=-1), "expected warmup of 0 or more"),
    (lambda: TanhJumpReLU(scale=0), "expected scale above 0"),
    (lambda: TopK(k=-1), "TopK: expected k above 0, got -1"),
    (lambda: BatchTopK(k=0), "BatchTopK: expected k above 0, got 0"),
    (lambda: BatchTopK(k=1, aux_k=-1), "expected aux_k of 0 or more"),
    (lambda: BatchTopK(k=1, forget=0), "expected forget above 0"),
    (lambda: BatchTopK(k=1, forget=1.5), "BatchTopK: expected forget of at most 1, got 1.5"),
    (lambda: Trainee(name="a", site="b", d_sae=0), "Trainee: expected d_sae above 0, got 0"),
    (lambda: Trainee(name="a", site="b", d_sae=100, learning_rate=-1), "expected learning_rate of 0 or more"),
    (lambda: Trainee(name="a", site="b", d_sae=100, betas=(0.0, 1.0)), r"two betas .* got \(0.0, 1.0\)"),
    (lambda: replace(quick, d_sae=0), "Recipe: expected d_sae above 0, got 0"),
    (lambda: replace(quick, tokens=-1), "Recipe: expected tokens above 0, got -1"),
    (lambda: replace(quick, batch_size=0), "Recipe: expected batch_size above 0, got 0"),
    (lambda: replace(quick, context=0), "Recipe: expected context above 0, got 0"),
    (lambda: replace(quick, buffer_tokens=0), "Recipe: expected buffer_tokens above 0, got 0"),
    (lambda: replace(quick, checkpoint_every=0), "Recipe: expected checkpoint_every above 0, got 0"),
    (lambda: replace(quick, warmup=-1), "Recipe: expected warmup of 0 or more, got -1"),
    (lambda: replace(quick, d_sae=60).check(), "l0 of 60 is not below the 60 features"),
    (lambda: replace(quick, betas=(2.0, 3.0)).check(), "two betas"),
    (lambda: replace(quick, tokens=1000).check(), "1,000 tokens are not one batch of 1,024"),
    (lambda: TrainConfig(steps=1, decay=1.1), "expected decay from 0 to 1, got 1.1"),
    (lambda: TrainConfig(steps=1, decay=-0.1), "expected decay from 0 to 1"),
    (lambda: TrainConfig(steps=1, warmup=-1), "TrainConfig: expected warmup of 0 or more, got -1"),
])
def test_numbers_that_cannot_be_are_refused_by_name(made, told):
    with pytest.raises(TrainingError, match=told):
        made()
