"""`sae-hooks extract`, `find` and `top`: what they write and print, and what they refuse."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sae_hooks.features_cli import app, how_many
from sae_hooks.store import open_features

ROWS = [{"text": "In the beginning God created the heaven and the earth.", "domain": "bible"},
        {"text": "def f(x):\n    return x + 1", "domain": "python"}, {"text": "", "domain": "nothing"},
        {"text": "Add the butter and stir until smooth.", "domain": "recipes"}]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def extract(run, model, one_sae, texts, tmp_path):
    return lambda *more: run("extract", model, one_sae, "--text", texts, "--out", tmp_path / "features", *more)


@pytest.mark.parametrize("command", ["extract", "find", "top"])
def test_help_shows_an_example(run, command):
    assert f"Example: sae-hooks {command} " in run(command, "--help").stdout


def test_extract_writes_a_store_and_tells_what_it_holds(extract, tmp_path):
    done = extract("--activations", "--window", 16)
    assert done.exit_code == 0, done.stderr
    store = open_features(tmp_path / "features")
    assert done.stdout.strip() == repr(store)
    assert store.labels("domain") == [row["domain"] for row in ROWS]
    assert store.activations().shape == (len(store), 192)


def test_extract_goes_on_only_when_it_is_told_to(extract, tmp_path):
    assert extract("--limit", 2).exit_code == 0
    again = extract("--limit", 2)
    assert again.exit_code == 1
    assert "say resume" in again.stderr
    assert extract("--limit", 2, "--resume").exit_code == 0
    assert open_features(tmp_path / "features").documents == 2
    assert "other documents" in extract("--resume").stderr


def test_what_comes_after_the_last_document_is_not_read(extract, texts, tmp_path):
    texts.write_bytes(texts.read_bytes() + b'{"text": \n\xff\n')
    assert extract("--limit", len(ROWS)).exit_code == 0
    assert open_features(tmp_path / "features").documents == len(ROWS)
    assert f"{texts}, line 5: expected a JSON object" in extract("--limit", len(ROWS) + 1, "--resume").stderr


def test_a_mistyped_text_is_told_before_a_model_is_loaded_and_the_folder_stays_free(run, one_sae, extract, tmp_path):
    missing = run("extract", tmp_path / "no-model", one_sae, "--text", "nope.jsonl", "--out", tmp_path / "features")
    assert missing.exit_code == 1
    assert "there is no file or folder nope.jsonl" in missing.stderr
    assert "expected 'body'" in extract("--field", "body").stderr
    assert extract().exit_code == 0


def test_top_shows_the_strongest_contexts(run, extract, tmp_path):
    extract()
    store = open_features(tmp_path / "features")
    feature = int(store.shards().__next__().indices.bincount().argmax())
    best = store.top(feature, 3)
    shown = run("top", tmp_path / "features", feature, "-n", 3)
    assert f"{best[0].activation:.2f}" in shown.stdout
    found = json.loads(run("top", tmp_path / "features", feature, "-n", 3, "--json").stdout)
    assert [one["row"] for one in found] == [one.row for one in best]
    refused = run("top", tmp_path / "features", 4096)
    assert refused.exit_code == 2
    assert "there is no feature 4096" in refused.stderr


def test_top_shows_texts_as_they_are_written(run, model, one_sae, tmp_path):
    """What a table or a terminal would take for a command: markup, names of signs, control characters."""
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "x[i] = a[b] :smile: [/red] \x1b[31m \x85 end"}))
    assert run("extract", model, one_sae, "--text", tmp_path / "odd.jsonl", "--out", tmp_path / "odd").exit_code == 0
    store = open_features(tmp_path / "odd")
    (feature,) = store.rows(len(store) - 1).indices[:1].tolist()
    shown = run("top", tmp_path / "odd", feature, "-n", 1, "--context", 99)
    assert shown.exit_code == 0, shown.exception
    text = "".join(shown.stdout.replace("«", "").replace("»", "").split())
    assert "x[i]=a[b]:smile:[/red]\\x1b[31m\\x85" in text


def test_top_writes_what_the_terminal_cannot_encode_as_python_does(extract, tmp_path):
    extract()
    store = open_features(tmp_path / "features")
    feature = str(int(next(iter(store.shards())).indices[0]))
    shown = CliRunner(charset="ascii").invoke(app, ["top", str(tmp_path / "features"), feature])
    assert shown.exit_code == 0, shown.exception
    assert r"\xab" in shown.stdout


def test_find_ranks_features_by_texts_and_files(run, model, one_sae, texts, tmp_path):
    (tmp_path / "code.txt").write_text("import os\nprint(os.getcwd())")
    asked = ("find", model, one_sae, "--positive", ROWS[0]["text"], "--positive", "And God said, Let there be light.",
             "--negative", tmp_path / "code.txt", "--negative", ROWS[3]["text"], "-n", 5)
    done = run(*asked)
    assert done.exit_code == 0, done.stderr
    found = json.loads(run(*asked, "--json").stdout)
    assert len(found) == 5
    assert str(found[0]["feature"]) in done.stdout
    assert found[0]["auroc"] >= found[-1]["auroc"] >= 0.5
    assert run(*asked, "--positive", "The weather is fine today. " * 12).exit_code == 0, "longer than a file's name"
    sentence = "The weather is fine today. " * 12 + "More of it in README.md"
    assert run(*asked, "--positive", sentence).exit_code == 0, "longer, and ends as a file's name does"


def test_a_field_is_of_rows_and_leaves_texts_and_text_files_alone(run, model, one_sae, texts, tmp_path):
    (tmp_path / "code.txt").write_text("import os\nprint(os.getcwd())")
    texts.write_text(texts.read_text().replace('"text"', '"body"'))
    asked = ("find", model, one_sae, "--positive", texts, "--negative", tmp_path / "code.txt", "--negative", "x = 1")
    assert run(*asked, "--field", "body").exit_code == 0
    missing = run(*asked, "--field", "title")
    assert missing.exit_code == 1
    assert f"{texts}, line 1: expected 'title', got an object with body, domain" in " ".join(missing.stderr.split())


def test_a_text_that_is_too_long_to_be_a_files_name_is_counted_as_none():
    assert how_many("The weather is fine today. " * 12, "train", 5) == 5


def test_a_file_that_is_not_there_is_no_text(run, model, one_sae):
    done = run("find", model, one_sae, "--positive", "german.txt", "--negative", "The weather is fine.")
    assert done.exit_code == 1
    assert "there is no file german.txt" in done.stderr


@pytest.mark.slow
def test_extract_under_torchrun_prints_once(model, one_sae, texts, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "sae_hooks.training.cli", "extract", model, one_sae, "--text", texts, "--out", tmp_path / "features"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("FeatureStore(") == 1
