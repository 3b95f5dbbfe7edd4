"""What the tests of exports share: rows of all kinds, what a folder holds, a refusal that leaves it as it was, and an
export in a process of its own."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_hooks.errors import DataError

WORKER = Path(__file__).with_name("export_worker.py")
SITE, LOWER = "model.layers.2.output", "model.layers.1.output"
ROWS = [{"text": "In the beginning God created the heaven and the earth.", "label": "bible", "n": 1},
        {"text": "", "label": "empty"}, {"text": "def f(x):\n    return x + 1", "label": "python"},
        {"text": "Add the butter and stir until smooth. " * 12, "label": "recipe"},
        {"text": "If the file is empty, return an error.", "label": "manual"}]


def contents(folder):
    """{name: digest} of every file."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(export, folder, message, **changes):
    before = contents(folder)
    with pytest.raises(DataError, match=message):
        export(folder, **changes)
    assert contents(folder) == before


def worker(folder, *arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, *launcher, str(WORKER), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
