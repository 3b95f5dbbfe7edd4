"""`sae-hooks train`, `eval` and `push` on tiny_gemma2: what they write, how they go on, what they refuse."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sae_hooks import FeatureStatistics, attach_saes, list_saes, load_sae
from sae_hooks.cli import TEXT
from sae_hooks.training import job
from sae_hooks.training.cli import app
from sae_hooks.training.report import read_report

MODEL = Path(__file__).parents[1] / "models" / "tiny-gemma2"
SITE = "model.layers.2.output"
SMALL = ("--layer", 2, "--d-sae", 128, "--batch-size", 64, "--set", "buffer_tokens=500", "--context", 64)
SHORT = ("--tokens", 320)


def run(*arguments):
    """The command's result, with exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def done(*arguments):
    """The result of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def write_texts(folder):
    """folder/train.jsonl and folder/held-out.txt: public-domain prose, a paragraph a line."""
    paragraphs = TEXT.split("\n\n")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs[:3]))
    (folder / "held-out.txt").write_text(paragraphs[3])
    return folder / "train.jsonl", folder / "held-out.txt"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(training text, held-out text)."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def command(texts, tmp_path_factory):
    """The arguments of a training of two SAEs side by side, but for --out."""
    return ("train", MODEL, "--text", texts[0], *SMALL, "--l0", "5,20", "--tokens", 6400, "--held-out", texts[1],
            "--licence", "cc-by-4.0", "--data-licence", "public domain")


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """(folder, result) of that training."""
    out = tmp_path_factory.mktemp("trained") / "two-saes"
    return out, done(*command, "--out", out)


def weights(folder):
    return dict(load_sae(folder).named_parameters())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- all --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["train", "eval", "push"])
def test_help_shows_an_example(name):
    assert f"Example: sae-hooks {name} " in done(name, "--help").stdout


def test_the_older_commands_are_there_too_and_help_imports_nothing_heavy():
    watched = ("import sys, sae_hooks.training.cli as c; from typer.main import get_command; "
               "print(*get_command(c.app).commands); "
               "print([n for n in ('transformers', 'matplotlib', 'datasets', 'scipy') if n in sys.modules])")
    told = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True).stdout.splitlines()
    assert told[0].split() == ["list", "check", "generate", "convert", "extract", "find", "top", "train", "eval",
                               "push"]
    assert told[1] == "[]"


# --- train ------------------------------------------------------------------------------------------

def test_train_writes_a_folder_that_loads_with_report_pictures_and_card(trained, tiny_gemma2):
    out, result = trained
    assert result.stdout.splitlines()[-2:] == [str(out / "l0_5"), str(out / "l0_20")]
    assert [(e.site, e.width, e.weights.split("/")[0]) for e in list_saes(out)] == [
        (SITE, 128, "l0_20"), (SITE, 128, "l0_5")]
    attach_saes(tiny_gemma2, out, l0=5)
    assert tiny_gemma2.saes[SITE].metadata["recipe"]["objective"]["l0"] == 5
    report = read_report(out / "report.json")
    assert set(report.saes) == {"l0_5", "l0_20"}
    assert report.data["text"] == "held-out.txt"
    assert report.saes["l0_5"].facts["objective"] == "JumpReLU"
    assert {path.suffix for path in (out / "plots").iterdir()} == {".png", ".svg"}
    card = (out / "README.md").read_text()
    assert 'license: "cc-by-4.0"' in card
    assert "| its licence | public domain |" in card
    assert f"| `l0_20` | {report.saes['l0_20'].l0:.1f} |" in card


def test_what_is_known_of_a_training_stands_in_the_metadata(trained):
    found = load_sae(trained[0], l0=5).metadata
    assert found["model_name"] == "tiny-gemma2"
    assert found["dataset_path"] == "train.jsonl"
    assert (found["n_training_tokens"], found["context_size"], found["prepend_bos"]) == (6400, 64, True)
    assert found["text_epochs"] > 1
    assert found["l0"] == pytest.approx(read_report(trained[0] / "report.json").saes["l0_5"].l0, abs=1e-4)
    assert str(MODEL.parent) not in (trained[0] / "l0_5" / "cfg.json").read_text()


def test_the_same_command_after_the_end_trains_no_further(trained, command):
    out, _ = trained
    before, lines = weights(out / "l0_5"), (out / "metrics.jsonl").read_text()
    record = json.loads((out / "training.json").read_text())
    assert record.pop("dtype") == "bfloat16"
    (out / "training.json").write_text(json.dumps(record))  # as older versions wrote it
    done(*command, "--out", out)
    assert equal(weights(out / "l0_5"), before)
    assert (out / "metrics.jsonl").read_text() == lines


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits(texts, tmp_path):
    arguments = ["train", MODEL, "--text", texts[0], *SMALL, "--tokens", 64 * 400]
    done(*arguments, "--out", tmp_path / "whole")
    command = [sys.executable, "-m", "sae_hooks.training.cli", *map(str, arguments), "--out", str(tmp_path / "cut"),
               "--set", "checkpoint_every=100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "cut").glob("checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    stopped = re.search(r"stopped after step (\d+) of 400; saved in .*cut: the same command goes on", told)
    assert stopped, told
    assert int(stopped[1]) < 400
    assert not (tmp_path / "cut" / "cfg.json").exists()
    assert "Traceback" not in told
    done(*arguments, "--out", tmp_path / "cut")
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_processes_that_a_launcher_started_train_together_what_one_does(texts, tmp_path):
    arguments = ["train", MODEL, "--text", texts[0], *SMALL, "--tokens", 640, "--cache", tmp_path / "acts"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "sae_hooks.training.cli", *map(str, arguments), "--shards", "2", "--out", str(tmp_path / "two")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == [str(tmp_path / "two")]
    done(*arguments, "--out", tmp_path / "one")
    alone, together = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(alone[name], together[name], atol=1e-4) for name in alone)
    refused = run(*arguments, "--shards", 2, "--out", tmp_path / "three")
    assert "2 processes are to share the features, but 1 were launched" in refused.stderr


def test_several_sites_are_trained_from_a_cache_that_is_filled_once(texts, tmp_path):
    inner = "model.layers.1.self_attn.o_proj.input"
    arguments = ("train", MODEL, "--text", texts[0], *SMALL, *SHORT, "--site", "resid_post", "--site", "transcoder",
                 "--site", inner, "--skip", "--cache", tmp_path / "acts", "--cache-tokens", 300)
    done(*arguments, "--out", tmp_path / "one")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "acts").rglob("*.safetensors")}
    assert len(shards) == 4
    kinds = {entry.site: entry.kind for entry in list_saes(tmp_path / "one")}
    assert kinds == {SITE: "resid_post", "model.layers.2.pre_feedforward_layernorm.output": "transcoder",
                     inner: "attn_out"}
    assert load_sae(tmp_path / "one", site="transcoder", layer=2).W_skip is not None
    done(*arguments, "--seed", 0, "--out", tmp_path / "two")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert equal(weights(tmp_path / "two" / SITE), weights(tmp_path / "one" / SITE))


def test_a_cache_of_several_shards_serves_a_training_that_asks_for_less_than_one(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SHARD_TOKENS", 256)
    arguments = ("train", MODEL, "--text", texts[0], *SMALL, "--cache", tmp_path / "acts")
    done(*arguments, *SHORT, "--cache-tokens", 600, "--out", tmp_path / "long")
    assert len(list((tmp_path / "acts").rglob("*.safetensors"))) > 1
    done(*arguments, *SHORT, "--cache-tokens", 100, "--out", tmp_path / "short")
    refused = run(*arguments, *SHORT, "--cache-tokens", 100, "--text", texts[1], "--out", tmp_path / "other")
    assert "holds another harvest" in refused.stderr


@pytest.mark.parametrize("asked", [
    ("topk", "--l0", 8), ("batchtopk", "--l0", 8), ("gated", "--sparsity", 0.1), ("relu", "--sparsity", 0.1),
    ("tanh", "--sparsity", 0.01), ("jumprelu", "--sparsity", 0.001, "--recipe", "paper", "--set", "warmup=2")])
def test_every_objective_can_be_trained(asked, texts, tmp_path):
    done("train", MODEL, "--text", texts[0], *SMALL, *SHORT, "--objective", *asked, "--out", tmp_path / "out")
    sae = load_sae(tmp_path / "out")
    assert sae.d_sae == 128
    assert sae.metadata["recipe"]["objective"]["kind"].lower().removesuffix("jumprelu") in ("", asked[0])
    assert "unknown" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_of_another_training_is_left_alone(trained, command, texts):
    out, before = trained[0], weights(trained[0] / "l0_5")
    for changed, told in ((("--text", texts[1]), "text was 'train.jsonl', is 'held-out.txt'"),
                          (("--dtype", "float32"), "dtype was 'bfloat16', is 'float32'"),
                          (("--learning-rate", 0.1), "learning_rate was 0.001, is 0.1"),
                          (("--l0", "30"), "of another training")):
        result = run(*command, *changed, "--out", out)
        assert result.exit_code == 1
        assert told in result.stderr
    assert equal(weights(out / "l0_5"), before)


def test_saes_without_a_training_to_go_on_with_are_not_replaced(texts, one_sae):
    before = (one_sae / "cfg.json").read_bytes()
    result = run("train", MODEL, "--text", texts[0], *SMALL, *SHORT, "--out", one_sae)
    assert result.exit_code == 1
    assert "is there already" in result.stderr
    assert (one_sae / "cfg.json").read_bytes() == before


@pytest.mark.parametrize(("asked", "code", "told"), [
    (("--l0", "five"), 2, "is not a number"),
    (("--set", "decay"), 2, "NAME=VALUE"),
    (("--cache-tokens", 100), 2, "Invalid value for --cache-tokens"),
    (("--seed", -1), 2, "Invalid value for '--seed'"),
    (("--seed", 2**64), 2, "Invalid value for '--seed'"),
    (("--set", "buffer_tokens=-5"), 1, "Recipe: expected buffer_tokens above 0, got -5"),
    (("--sparsity", "-1"), 1, "expected sparsity of 0 or more, got -1"),
    (("--set", "objective.bandwidth=-1"), 1, "expected bandwidth above 0, got -1"),
    (("--set", "decay=3"), 1, "expected decay from 0 to 1, got 3"),
    (("--set", "decoy=1"), 1, "Recipe has no decoy; it has d_sae"),
    (("--objective", "best"), 1, "no objective 'best'; there are jumprelu"),
    (("--objective", "relu"), 1, "relu has no target: give sparsity"),
    (("--tokens", "63"), 1, "63 tokens are not one batch of 64"),
    (("--site", "nowhere"), 1, "got 'nowhere'"),
    (("--skip",), 1, "a skip is for transcoders, and none is to be trained"),
    (("--layer", "9"), 1, "has layers 0 to 3"),
    (("--text", "nothing.jsonl"), 1, "there is no file or folder nothing.jsonl"),
    (("--held-out", "nothing.txt"), 1, "there is no file or folder nothing.txt"),
    (("--epochs", "1", "--tokens", "64000"), 1, "the texts ended: "),
    (("--field", "body"), 1, "expected a text under 'body'"),
    (("--set", "buffer_tokens=10"), 1, "give a larger buffer_tokens"),
    (("--learning-rate", "1e38"), 1, "lower the learning rate"),
])
def test_what_cannot_be_trained_is_told_in_one_message(asked, code, told, texts, tmp_path):
    result = run("train", MODEL, "--text", texts[0], *SMALL, *SHORT, "--out", tmp_path / "out", *asked)
    assert result.exit_code == code
    assert told in result.stderr.replace("\n", " ").replace("│", "")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "cfg.json").exists()


def test_a_text_and_a_folder_are_needed_and_a_model_that_is_one(texts, tmp_path):
    assert run("train", MODEL, "--layer", 2).exit_code == 2
    result = run("train", tmp_path, "--text", texts[0], *SMALL, *SHORT, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot load the language model ")
    result = run("train", MODEL, "--text", texts[0], "--site", "mlp_out", "--out", tmp_path / "out")
    assert "give --layer with --site mlp_out" in result.stderr


# --- eval -------------------------------------------------------------------------------------------

def test_eval_measures_what_train_measured(trained, texts, tmp_path):
    out, _ = trained
    json_path, plots = tmp_path / "new" / "report.json", tmp_path / "plots"
    shown = done("eval", MODEL, out, "--text", texts[1], "--all", "--context", 64, "--json", json_path,
                 "--plots", plots, "--attribution")
    assert "l0_20" in shown.stdout
    assert "uniformity" in shown.stdout
    here, there = read_report(json_path), read_report(out / "report.json")
    assert here.text == there.text
    for name, sae in there.saes.items():
        assert here.saes[name].l0 == pytest.approx(sae.l0, abs=1e-3)
        assert here.saes[name].delta_loss == pytest.approx(sae.delta_loss, abs=1e-3)
        assert here.saes[name].facts["objective"] == "JumpReLU"
    assert sorted(path.name for path in plots.iterdir()) == [
        f"{kind}-{SITE}.{end}" for kind in ("frequencies", "pareto") for end in ("png", "svg")]


def test_eval_takes_one_sae_a_site_that_the_options_fit(trained, texts):
    shown = done("eval", MODEL, trained[0], "--text", texts[1], "--layer", 2, "--l0", 5, "--tokens", 32).stdout
    assert shown.count(SITE) == 1
    assert "uniformity" not in shown


def test_eval_finds_an_exact_sae_exact(fitting_sae, texts, tmp_path):
    done("eval", MODEL, fitting_sae, "--text", texts[1], "--json", tmp_path / "r.json", "--dtype", "float32")
    scalars = read_report(tmp_path / "r.json").saes[SITE].scalars
    assert scalars["fvu"] == pytest.approx(0, abs=1e-6)
    assert scalars["loss_recovered"] == pytest.approx(1, abs=1e-4)


def test_eval_measures_on_the_first_tokens_of_the_texts_shuffled_or_as_they_stand(fitting_sae, texts, tmp_path):
    (tmp_path / "one.jsonl").write_text(texts[0].read_text().splitlines()[0])
    found, few = [], ("--tokens", 16, "--context", 32, "--json", tmp_path / "r.json")
    for asked in ((texts[0],), (texts[0], "--no-shuffle"), (tmp_path / "one.jsonl",)):
        done("eval", MODEL, fitting_sae, *few, "--text", *asked)
        found.append(read_report(tmp_path / "r.json").text)
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize(("asked", "told"), [
    (("--text", "nothing.txt"), "no file or folder nothing.txt"),
    (("--layer", 1), "It offers"),
    (("--all", "--width", "16k"), "has nothing like that"),
    (("--context", 4, "--text", "EMPTY"), "holds no text at all"),
    (("--json", MODEL / "config.json" / "report.json"), "File exists"),
])
def test_what_cannot_be_evaluated_is_told_in_one_message(asked, told, trained, texts, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    asked = [tmp_path / "empty.txt" if one == "EMPTY" else one for one in asked]
    result = run("eval", MODEL, trained[0], "--text", texts[1], *asked)
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_eval_of_all_saes_and_of_one_l0_is_bad_usage(trained, texts):
    result = run("eval", MODEL, trained[0], "--text", texts[1], "--all", "--l0", 5)
    assert result.exit_code == 2
    assert "--all takes SAEs of every L0" in result.stderr


def test_without_matplotlib_eval_says_so_first_and_train_warns(trained, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("eval", MODEL, "nowhere", "--text", texts[1], "--plots", tmp_path / "plots")
    assert result.exit_code == 1
    assert "pip install 'sae-hooks[train]'" in result.stderr
    result = done("train", MODEL, "--text", texts[0], *SMALL, *SHORT, "--held-out", texts[1], "--out", tmp_path / "out")
    assert "warning: plots need matplotlib" in result.stderr
    assert (tmp_path / "out" / "report.json").exists()


# --- push -------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's LFS upload
def test_push_publishes_the_saes_with_card_and_report_but_no_checkpoints(trained, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    shown = done("push", trained[0], "alice/two-saes", "--licence", "mit")
    assert re.search(r"/alice/two-saes/commit/\w+\n$", shown.stdout)
    repo = hub.repo("alice/two-saes")
    assert {name.split("/")[0] for name in repo.files()} == {"README.md", "report.json", "plots", "l0_5", "l0_20"}
    card = (repo.dir / "README.md").read_text()
    assert 'license: "mit"' in card
    assert 'attach_saes(model, "alice/two-saes", l0=' in card
    assert 'license: "cc-by-4.0"' in (trained[0] / "README.md").read_text()
    assert equal(dict(load_sae("alice/two-saes", l0=5).named_parameters()), weights(trained[0] / "l0_5"))
    assert len(repo.commits) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_push_makes_a_card_where_there_is_none_and_a_private_repository(one_sae, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    done("push", one_sae, "alice/hidden", "--private")
    assert hub.repo("alice/hidden").private
    assert "license: unknown" in (hub.repo("alice/hidden").dir / "README.md").read_text().replace('"', "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_push_takes_the_statistics_along(random_sae, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    sae = random_sae(192, 16, SITE)
    sae.statistics = FeatureStatistics(9, *[torch.ones(16)] * 3, torch.ones(3, 16))
    done("push", sae.save_pretrained(tmp_path / "measured"), "alice/measured")
    assert load_sae("alice/measured", cache_dir=tmp_path / "cache").statistics.tokens == 9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "always::sae_hooks.errors.SaeWarning")
def test_push_leaves_the_statistics_of_other_weights_here(random_sae, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    sae = random_sae(192, 16, SITE)
    sae.statistics = FeatureStatistics(9, *[torch.ones(16)] * 3, torch.ones(3, 16))
    folder = sae.save_pretrained(tmp_path / "measured")
    other = random_sae(192, 16, SITE, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(other / "sae_weights.safetensors", folder)
    assert "statistics of other weights" in done("push", folder, "alice/replaced").stderr.replace("\n", " ")
    assert not [name for name in hub.repo("alice/replaced").files() if "statistics" in name]


def test_push_refuses_what_is_broken_foreign_or_not_allowed(one_sae, hub):
    assert "no SAE here" in run("push", MODEL, "alice/none").stderr
    denied = run("push", one_sae, "alice/none")
    assert denied.exit_code == 1
    assert "pushing to alice/none" in denied.stderr
    data = (one_sae / "sae_weights.safetensors").read_bytes()
    (one_sae / "sae_weights.safetensors").write_bytes(data[:-100])
    broken = run("push", one_sae, "alice/none")
    assert broken.exit_code == 1
    assert "sae_weights.safetensors" in broken.stderr
    assert ("model", "alice/none") not in hub.repos
