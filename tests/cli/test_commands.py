"""`sae-hooks`: what each command prints, writes and refuses, and its exit codes: 1 a problem, 2 bad usage."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sae_hooks import FeatureStatistics, load_sae

PROMPT = ("--prompt", "In the beginning God", "--max-new-tokens", 8)


def heading(text):
    return f"--- {text}\n"


def after(output, label):
    """The text under a heading."""
    return output.split(heading(label))[1].split("\n--- ")[0].rstrip("\n")


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "check", "generate", "convert"])
def test_help_shows_an_example(run, command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"Example: sae-hooks {command} " in shown.stdout


def test_a_problem_is_one_message_on_stderr_without_a_traceback(run, tmp_path):
    done = run("list", tmp_path)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: no SAE here; found no files. ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["list"], ["check", "model"], ["generate", "model", "source"],
                                       ["list", ".", "--layer", "two"]])
def test_bad_usage_is_exit_code_2(run, arguments):
    assert run(*arguments).exit_code == 2


def test_the_program_runs_and_help_imports_nothing_heavy():
    watched = "import sys, sae_hooks.cli; print([n for n in ('transformers', 'scipy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True).stdout == "[]\n"
    done = subprocess.run([sys.executable, "-m", "sae_hooks.cli", "list", "./nothing"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: nothing does not exist\n"


IN_A_GROUP = """
import sys, time
import torch
import torch.distributed as dist
from sae_hooks.cli import app
sleep = time.sleep
time.sleep = lambda seconds: (print("waited", dist.is_initialized()), sleep(seconds))

@app.command("sum")
def add():
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
    dist.all_reduce(torch.ones(3))

app(["sum"], standalone_mode=False)
"""


def test_a_command_that_is_done_ends_its_process_group_and_lets_its_threads_finish(tmp_path):
    """Else they may abort the interpreter while it ends."""
    done = subprocess.run([sys.executable, "-c", IN_A_GROUP, tmp_path / "store"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "waited False\n"), done.stderr


# --- list -----------------------------------------------------------------------------------------


def test_list_shows_a_line_for_each_sae(run, three_saes):
    shown = run("list", three_saes)
    assert shown.exit_code == 0
    for layer in range(3):
        assert f"model.layers.{layer}.output/sae_weights.safetensors" in shown.stdout


def test_list_selects_by_layer_site_and_width(run, three_saes):
    assert run("list", three_saes, "--layer", 1).stdout.count("safetensors") == 1
    assert run("list", three_saes, "--site", "model.layers.2.output").stdout.count("safetensors") == 1
    assert run("list", three_saes, "--site", "resid_post", "--width", 256).stdout.count("safetensors") == 3


@pytest.mark.parametrize("selector", [("--layer", 7), ("--width", "16k"), ("--site", "mlp_out")])
def test_list_says_what_there_is_when_nothing_matches(run, three_saes, selector):
    done = run("list", three_saes, *selector)
    assert done.exit_code == 1
    assert "resid_post: layers 0-2; widths 256" in done.stderr


@pytest.mark.parametrize("selector", [("--width", "wide"), ("--site", "model.layers.2")])
def test_a_selector_that_no_sae_can_match_is_explained(run, three_saes, selector):
    done = run("list", three_saes, *selector)
    assert done.exit_code == 1
    assert "such as '16k'" in done.stderr or "model.layers.2.output" in done.stderr


def test_list_prints_json_for_programs(run, three_saes):
    listed = json.loads(run("list", three_saes, "--json", "--layer", 2).stdout)
    assert [(one["site"], one["layer"], one["width"], one["d_in"]) for one in listed] == [
        ("model.layers.2.output", 2, 256, 192)]


def test_list_reads_a_repository_of_the_hub(run, hub, three_saes):
    repo = hub.repo("cli/saes")
    for path in three_saes.rglob("*.*"):
        if path.is_file():
            target = repo.dir / path.relative_to(three_saes)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    shown = run("list", "cli/saes")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("sae_weights.safetensors") == 3
    assert not hub.seen("sae_weights")


# --- check ----------------------------------------------------------------------------------------


def test_check_says_that_an_sae_fits(run, model, fitting_sae):
    done = run("check", model, fitting_sae)
    assert done.exit_code == 0, done.stderr
    assert "model.layers.2.output: fits\n" in done.stdout
    assert " 1.000 " in done.stdout  # recovered


def test_check_fails_where_one_does_not_fit(run, model, three_saes):
    done = run("check", model, three_saes, "--tokens", 64)
    assert done.exit_code == 1
    assert done.stdout.count("does not explain this site") == 3


def test_check_measures_on_the_text_that_is_given(run, model, fitting_sae, tmp_path):
    (tmp_path / "text.txt").write_text("In the beginning.\n\n\n\nAnd then, after some time, the end of it all.\n")
    short = run("check", model, fitting_sae, "--text", tmp_path / "text.txt", "--dtype", "float32")
    assert short.exit_code == 0, short.stderr
    assert int(short.stdout.split("model.layers.2.output")[1].split()[0]) < 40


@pytest.mark.parametrize("text", ["", "\n\n \n"])
def test_check_needs_a_text_to_measure_on(run, model, fitting_sae, tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    done = run("check", model, fitting_sae, "--text", tmp_path / "empty.txt")
    assert done.exit_code == 1
    assert "two tokens" in done.stderr


def test_an_sae_of_another_width_is_refused(run, model, tmp_path, random_sae):
    source = random_sae(64, 256, "model.layers.2.output").save_pretrained(tmp_path / "wide")
    done = run("check", model, source)
    assert done.exit_code == 1
    assert "reads 64 values" in done.stderr


def test_a_model_that_is_none_is_a_readable_problem(run, tmp_path, one_sae):
    done = run("check", tmp_path, one_sae)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: cannot load the language model ")


# --- generate -------------------------------------------------------------------------------------


def test_generate_without_edits_prints_the_plain_text(run, model, one_sae):
    done = run("generate", model, one_sae, *PROMPT)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("In the beginning God")
    assert "---" not in done.stdout


def test_each_strength_is_a_row_of_its_own(run, model, one_sae):
    done = run("generate", model, one_sae, *PROMPT, "--clamp", "5=10,300,plain", "--compare")
    assert done.exit_code == 0, done.stderr
    plain = done.stdout.split(heading("plain"))
    assert plain[1].split("---")[0] == plain[2]
    assert after(done.stdout, "clamp 5=300") != after(done.stdout, "clamp 5=10")
    assert run("generate", model, one_sae, *PROMPT, "--clamp", "5=300").stdout.rstrip("\n") == after(
        done.stdout, "clamp 5=300")


def test_edits_of_all_kinds_may_be_combined_saved_and_applied_again(run, model, one_sae, tmp_path):
    file = tmp_path / "edits.json"
    asked = ["--clamp", "5=100", "--clamp", "6=50", "--scale", "7=2", "--add", "8=-40", "--ablate", "9",
             "--tokens", "generated"]
    first = run("generate", model, one_sae, *PROMPT, *asked, "--save-edits", file)
    assert first.exit_code == 0, first.stderr
    saved = json.loads(file.read_text())["edits"]
    assert [(one["op"], one["features"], one["tokens"]) for one in saved] == [
        ("clamp", [5, 6], "generated"), ("scale", [7], "generated"), ("add", [8], "generated"),
        ("clamp", [9], "generated")]
    assert run("generate", model, one_sae, *PROMPT, "--edits", file).stdout == first.stdout


def test_sampling_is_decided_by_the_seed(run, model, one_sae):
    asked = ["generate", model, one_sae, *PROMPT, "--sample", "--ablate", 5]
    assert run(*asked, "--seed", 1).stdout == run(*asked, "--seed", 1).stdout
    assert run(*asked, "--seed", 1).stdout != run(*asked, "--seed", 2).stdout


@pytest.mark.parametrize("given", ["5", "5=", "x=3", "5=3;4", "5=a", "=3"])
def test_a_strength_that_cannot_be_read_is_bad_usage(run, model, one_sae, given):
    done = run("generate", model, one_sae, *PROMPT, "--clamp", given)
    assert done.exit_code == 2
    assert "FEATURE=VALUE" in done.stderr


def test_a_feature_given_twice_is_bad_usage(run, model, one_sae):
    assert run("generate", model, one_sae, *PROMPT, "--clamp", "5=1", "--clamp", "5=2").exit_code == 2


@pytest.mark.parametrize(("asked", "told"), [
    (["--clamp", "1024=3"], "features 0 to 1023"),
    (["--clamp", "5=inf"], "must be finite"),
    (["--clamp", "5=3", "--scale", "5=2"], "edited twice"),
    (["--clamp", "5=1,2", "--add", "6=1,2,3"], "strengths for 2 rows"),
])
def test_an_edit_that_cannot_be_is_a_problem_and_nothing_is_printed(run, model, one_sae, asked, told):
    done = run("generate", model, one_sae, *PROMPT, *asked)
    assert done.exit_code == 1
    assert told in done.stderr
    assert done.stdout == ""


def test_with_several_saes_the_layer_must_be_told(run, model, three_saes):
    done = run("generate", model, three_saes, *PROMPT, "--clamp", "5=3")
    assert done.exit_code == 1
    assert "model.layers.1.output" in done.stderr
    assert run("generate", model, three_saes, *PROMPT, "--clamp", "5=3", "--layer", 1).exit_code == 0


def test_saved_edits_that_are_none_are_a_problem(run, model, one_sae, tmp_path):
    (tmp_path / "edits.json").write_text('{"format": "other"}')
    done = run("generate", model, one_sae, *PROMPT, "--edits", tmp_path / "edits.json")
    assert done.exit_code == 1
    assert "sae_hooks.edits/1" in done.stderr


@pytest.mark.parametrize(("command", "option"), [("check", "--text"), ("generate", "--edits")])
def test_a_file_that_is_not_utf_8_is_a_problem(run, model, one_sae, tmp_path, command, option):
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    done = run(command, model, one_sae, option, tmp_path / "latin", *(PROMPT if command == "generate" else ()))
    assert done.exit_code == 1
    assert "latin is not UTF-8 text" in done.stderr


def test_a_chat_without_a_template_is_bad_usage(run, model, one_sae):
    done = run("generate", model, one_sae, *PROMPT, "--chat")
    assert done.exit_code == 2
    assert "no chat template" in done.stderr


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_none_is_bad_usage(run, model, one_sae, seed):
    assert run("generate", model, one_sae, *PROMPT, "--seed", seed).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_a_problem(run, model, one_sae):
    done = run("generate", model, one_sae, *PROMPT, "--device", "cuda")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: cannot load the language model")


# --- convert --------------------------------------------------------------------------------------


@pytest.fixture
def gemma_scope(tmp_path):
    """A copy of a Gemma Scope repository: layers 3 and 4, 4,096 features of width 8."""
    draw = np.random.default_rng(0)
    root = tmp_path / "gemma-scope-2b-pt-res"
    for layer in (3, 4):
        path = root / f"layer_{layer}/width_4k/average_l0_80/params.npz"
        path.parent.mkdir(parents=True)
        shapes = {"W_enc": (8, 4096), "W_dec": (4096, 8), "b_enc": 4096, "b_dec": 8, "threshold": 4096}
        np.savez(path, **{name: np.abs(draw.standard_normal(shape)).astype(np.float32)
                          for name, shape in shapes.items()})
    return root


def same(one, other):
    names = dict(one.named_parameters())
    return names.keys() == dict(other.named_parameters()).keys() and all(
        torch.equal(p.float(), dict(other.named_parameters())[name].float()) for name, p in names.items())


def test_one_sae_becomes_the_folder_itself(run, gemma_scope, tmp_path):
    done = run("convert", gemma_scope, tmp_path / "new" / "out", "--layer", 4)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'new' / 'out'}\n"
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert same(load_sae(tmp_path / "new" / "out"), load_sae(gemma_scope, layer=4))


def test_several_saes_become_a_folder_each(run, gemma_scope, tmp_path):
    done = run("convert", gemma_scope, tmp_path / "out", "--layer", 3, "--layer", 4, "--dtype", "float16")
    assert done.exit_code == 0, done.stderr
    written = load_sae(tmp_path / "out", layer=3)
    assert written.dtype == torch.float16
    assert written.b_enc.dtype == torch.float32
    assert torch.equal(written.W_dec, load_sae(gemma_scope, layer=3).W_dec.half())
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_what_is_there_is_replaced_only_by_force(run, gemma_scope, one_sae):
    before = (one_sae / "cfg.json").read_bytes()
    done = run("convert", gemma_scope, one_sae, "--layer", 4)
    assert done.exit_code == 1
    assert "--force" in done.stderr
    assert (one_sae / "cfg.json").read_bytes() == before
    assert run("convert", gemma_scope, one_sae, "--layer", 4, "--force").exit_code == 0
    assert same(load_sae(one_sae), load_sae(gemma_scope, layer=4))


def test_statistics_are_converted_along_and_never_stay_beside_another_sae(run, gemma_scope, random_sae, tmp_path):
    sae = random_sae(192, 16, "model.layers.2.output")
    some = torch.ones(16)
    sae.statistics = FeatureStatistics(9, some, some, some, torch.ones(3, 16))
    source = sae.save_pretrained(tmp_path / "measured")
    assert run("convert", source, tmp_path / "out").exit_code == 0
    assert load_sae(tmp_path / "out").statistics.tokens == 9
    assert run("convert", gemma_scope, tmp_path / "out", "--layer", 4, "--force").exit_code == 0
    assert load_sae(tmp_path / "out").statistics is None


def test_two_saes_that_read_at_one_site_are_not_written_over_each_other(run, random_sae, tmp_path):
    sae = random_sae(8, 16, "model.layers.2.mlp.input")
    sae.save_pretrained(tmp_path / "two" / "sae")
    sae.site_out = "model.layers.2.mlp.output"
    sae.save_pretrained(tmp_path / "two" / "transcoder")
    done = run("convert", tmp_path / "two", tmp_path / "out")
    assert done.exit_code == 1
    assert "both read at model.layers.2.mlp.input" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]
    for name in ("sae", "transcoder"):
        assert run("convert", tmp_path / "two" / name, tmp_path / "out" / name).exit_code == 0
        assert load_sae(tmp_path / "out" / name).site_out == load_sae(tmp_path / "two" / name).site_out


def test_a_source_that_breaks_half_way_leaves_nothing_behind(run, gemma_scope, tmp_path):
    broken = gemma_scope / "layer_4/width_4k/average_l0_80/params.npz"
    broken.write_bytes(broken.read_bytes()[:-5000])
    before = sorted(tmp_path.iterdir())
    done = run("convert", gemma_scope, tmp_path / "out")
    assert done.exit_code == 1
    assert "layer_4" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


KILLED = """
import os, signal
from sae_hooks.cli import SaeFile, app
SaeFile.load = lambda *args, **named: os.kill(os.getpid(), signal.SIGKILL)
app()
"""


def test_what_a_killed_convert_left_is_cleared_away_by_the_next(run, gemma_scope, tmp_path):
    before = set(tmp_path.iterdir())
    killed = subprocess.Popen([sys.executable, "-c", KILLED, "convert", gemma_scope, tmp_path / "out"])
    killed.wait()
    [left] = set(tmp_path.iterdir()) - before
    at_work = left.with_name(left.name.replace(str(killed.pid), str(os.getppid())))
    at_work.mkdir()
    assert run("convert", gemma_scope, tmp_path / "out").exit_code == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out", at_work}


def test_a_folder_that_cannot_be_written_is_a_problem(run, gemma_scope, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run("convert", gemma_scope, tmp_path / "file" / "out", "--layer", 4)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
