"""examples/probe_domains.py on SmolLM2-135M with the SAE that is shipped, on a few short documents."""

import os
import subprocess
import sys
from pathlib import Path

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
