"""examples/probe_domains.py on SmolLM2-135M with the SAE that is shipped, on a few short documents."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.real
@pytest.mark.slow
def test_probes_on_features_and_activations_tell_domains_apart(tmp_path):
    command = [sys.executable, ROOT / "examples/probe_domains.py", "--per-domain", "9", "--characters", "150",
               "--out", tmp_path / "probe"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "default"})
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "probe" / "probe.md").read_text()
    assert page.strip() == done.stdout.strip()
    *_, features, activations, _ = next(line for line in page.splitlines() if line.startswith("| all")).split("|")
    assert min(float(features), float(activations)) > 4 / 9  # four times what guessing gives
    assert page.count("«") == page.count("»") >= 9
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {
        "probe.md", "confusion.png", "confusion.svg", "train", "test"}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("probe_domains", ROOT / "examples/probe_domains.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_feature_that_tells_perfectly_comes_first(example):
    random, domains = np.random.default_rng(0), np.repeat(list("abcd"), 30)
    x = random.random((120, 50))
    x[:, 7] = np.where(domains == "b", 5.0, 0.0)  # no variance on either side
    scores = example.best_of_each(x, domains)
    assert scores.argmax() == 7
    assert len(np.unique(scores)) == 50, "no ties among the others"


def test_a_line_of_the_documents_ends_where_json_lines_do(example, tmp_path):
    texts = ["one\u2028two", "a\u0085b"]
    lines = [json.dumps({"text": text, "domain": "x"}, ensure_ascii=False) for text in texts]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    asked = example.arguments().parse_args([])
    assert [row["text"] for row in example.labelled(tmp_path / "d.jsonl", asked)] == texts
