"""Language models and tokenizers that a command cannot work with, or has to go easy on."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

PROMPT = ("--prompt", "In the beginning God", "--max-new-tokens", 4)


@pytest.fixture
def copy(model, tmp_path):
    """A copy of tiny_gemma2's folder, to be spoilt."""
    return shutil.copytree(model, tmp_path / "copy")


def changed(path, **what):
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


# --- what cannot be loaded ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "generate", "extract"])
def test_a_model_without_a_tokenizer_is_a_problem(run, copy, one_sae, command, tmp_path):
    """transformers makes one that knows nothing but five special tokens."""
    for path in copy.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "text.txt").write_text("And God said, Let there be light.")
    more = {"check": (), "generate": PROMPT, "extract": ("--text", tmp_path / "text.txt", "--out", tmp_path / "out")}
    done = run(command, copy, one_sae, *more[command])
    assert done.exit_code == 1
    assert f"there is no tokenizer in {copy}" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("check", "SAE"), ("train", "--plan", "--layer", 2)])
def test_code_of_a_repository_is_never_run_nor_asked_about(run, copy, one_sae, tmp_path, command):
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    changed(copy / "config.json", model_type="unheard-of", auto_map=auto_map)
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = run(command[0], copy, *(one_sae if one == "SAE" else one for one in command[1:]))
    assert done.exit_code == 1
    assert "needs code of its own repository, which sae-hooks never runs" in done.stderr
    assert "y/N" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def truncated(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1000])


SPOILT = {
    "a library that is missing": lambda copy: changed(
        copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "weights cut short": truncated,
    "a tokenizer of nothing": lambda copy: (copy / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("flaw", SPOILT)
def test_whatever_stops_a_model_from_loading_is_a_readable_problem(run, copy, one_sae, flaw):
    SPOILT[flaw](copy)
    done = run("check", copy, one_sae)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: cannot load the language model ")


def test_a_device_without_values_is_bad_usage(run, model, one_sae):
    done = run("generate", model, one_sae, *PROMPT, "--device", "meta")
    assert done.exit_code == 2
    assert "meta holds no values" in done.stderr


def test_a_tokenizer_without_padding_and_end_does_for_a_check(run, copy, fitting_sae):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(copy)
    done = run("check", copy, fitting_sae, "--dtype", "float32")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "model.layers.2.output: fits\n" in done.stdout


# --- how much a model takes -----------------------------------------------------------------------


@pytest.fixture
def gpt2(random_model, tiny_tokenizer, random_sae, tmp_path):
    """(folder, folder of an SAE): a GPT-2 of 128 learned positions."""
    random_model("GPT2", vocab_size=4096).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", random_sae(32, 64, "transformer.h.1.output").save_pretrained(tmp_path / "sae")


@pytest.mark.parametrize("long", [False, True])
def test_check_reads_of_a_paragraph_what_the_model_takes(run, gpt2, long, tmp_path):
    (tmp_path / "long.txt").write_text("And it came to pass. " * 200)
    done = run("check", *gpt2, "--tokens", 1000, *(("--text", tmp_path / "long.txt") if long else ()))
    assert done.exception is None or isinstance(done.exception, SystemExit)
    tokens = int(done.stdout.split("transformer.h.1.output")[1].split()[0])
    assert tokens < 128 if long else tokens > 128


def test_a_text_that_would_outgrow_learned_positions_is_refused_before_anything_is_written(run, gpt2, tmp_path):
    edits = tmp_path / "edits.json"
    for prompt, new in (("In the beginning", 300), ("And it came to pass. " * 200, 1)):
        done = run("generate", *gpt2, "--prompt", prompt, "--max-new-tokens", new, "--save-edits", edits)
        assert done.exit_code == 1
        assert "GPT2LMHeadModel takes 128 at most; give a shorter --prompt" in done.stderr
        assert not edits.exists()


def test_learned_positions_may_be_used_to_the_last(run, gpt2, tiny_tokenizer):
    prompt = "In the beginning"
    new = 129 - len(tiny_tokenizer(prompt)["input_ids"])  # the last token is not read
    assert run("generate", *gpt2, "--prompt", prompt, "--max-new-tokens", new).exit_code == 0
    assert run("generate", *gpt2, "--prompt", prompt, "--max-new-tokens", new + 1).exit_code == 1


def test_rotary_positions_go_on(run, model, one_sae):
    done = run("generate", model, one_sae, "--prompt", "And it came to pass. " * 60, "--max-new-tokens", 2)
    assert done.exit_code == 0, done.stderr
