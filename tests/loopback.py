"""The one Hub of a test run: importing this starts it and points huggingface_hub at it.

huggingface_hub reads its environment once, when it is imported, so the root conftest imports this first. The
tests and the subprocesses that they start can therefore reach neither the real Hub nor the user's cache.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from fake_hub import FakeHub

if "huggingface_hub" in sys.modules:
    raise RuntimeError("import tests/loopback.py before huggingface_hub, which reads HF_ENDPOINT once")

FOLDER = Path(tempfile.mkdtemp(prefix="sae-hooks-hub-"))
HUB = FakeHub(FOLDER / "repos", tokens={"hf_alice": "alice", "hf_bob": "bob"})
TIMEOUTS = {"HF_HUB_DOWNLOAD_TIMEOUT": "3", "HF_HUB_ETAG_TIMEOUT": "3"}  # seconds; 1 fails on a busy machine
os.environ.update(HUB.env(FOLDER / "home"), **TIMEOUTS)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
HUB.__enter__()


def stop() -> None:
    """Stop the Hub and remove what it kept."""
    HUB.__exit__()
    shutil.rmtree(FOLDER, ignore_errors=True)
