"""python -m fake_hub ROOT [PORT]: serve ROOT until interrupted; prints the environment its clients need."""

import contextlib
import sys
import tempfile
import threading

from . import FakeHub

with FakeHub(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0) as hub:
    env = hub.env(tempfile.mkdtemp(prefix="hf-home-"))
    print("\n".join(f"export {k}={v}" for k, v in env.items()), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
