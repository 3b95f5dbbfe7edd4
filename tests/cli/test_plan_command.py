"""`sae-hooks train --plan`: the arithmetic of a training, from a model's config alone."""

import json
import re

import pytest


def test_plan_reads_the_config_alone_and_trains_nothing(run, model, tmp_path):
    (tmp_path / "9b").mkdir()
    config = json.loads((model / "config.json").read_text()) | {
        "num_hidden_layers": 42, "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256_000, "max_position_embeddings": 8192}
    (tmp_path / "9b" / "config.json").write_text(json.dumps(config | {"layer_types": None}))
    shown = run("train", tmp_path / "9b", "--recipe", "paper", "--layer", 20, "--plan").stdout
    told = " ".join(shown.split())
    assert "1 x 131,072 features for 3,584 values; 8,000,000,000 tokens" in shown
    assert "9.24 G parameters in bf16, 8.68 GFLOP a token" in told
    assert re.search(r"language model, to the deepest site +48.7( +6.1){3}\n", shown)
    more = run("train", tmp_path / "9b", "--recipe", "paper", "--layer", 20, "--l0", "30,60", "--cache", "x",
                "--cache-tokens", 4_000_000_000, "--d-sae", 131_074, "--plan")
    assert "2 x 131,074 features" in more.stdout
    assert "L0 30, 60, and 2 pairs" in " ".join(more.stdout.split())
    assert re.search(r"--shards +1 +1 +2\n", more.stdout)  # not 8
    assert re.search(r"cached activations ( +28,672.0){3}\n", more.stdout)
    assert re.search(r"language model, to the deepest site +24.4( +3.0){2}\n", more.stdout)


@pytest.mark.parametrize(("asked", "told"), [
    (("--layer", 44), "has layers 0 to 3"), (("--layer", 2, "--l0", "-3"), "L0 above 0"), ((), "give --layer"),
    (("--layer", 2, "--objective", "topk", "--l0", "30,64", "--d-sae", 32), "a k of 64 is above the 32 features"),
    (("--layer", 2, "--set", "context=0"), "expected context above 0")])
def test_a_plan_of_what_cannot_be_is_refused(run, model, asked, told):
    result = run("train", model, "--plan", *asked)
    assert result.exit_code == 1
    assert told in result.stderr


def test_a_plan_of_a_model_that_is_none_is_refused(run, model, tmp_path):
    result = run("train", tmp_path, "--layer", 2, "--plan")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot load the language model ")
