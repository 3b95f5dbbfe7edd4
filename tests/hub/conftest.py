"""Repositories on the loopback Hub, and what watches over a test."""

import contextlib
import itertools
import sys
import tracemalloc
from time import perf_counter

import pytest
from hub.files import write_npz

import sae_hooks.hub.sources

NUMBERS = itertools.count()


@pytest.fixture
def cache(tmp_path):
    """An empty Hub cache of the test's own."""
    return tmp_path / "cache"


@pytest.fixture
def repo(hub):
    """repo(name, **options): a fresh repository ORG/name on the loopback Hub, where the name is what dialects go by."""
    def make(name="gemma-scope-2b-pt-res", **options):
        return hub.repo(f"org{next(NUMBERS)}/{name}", **options)
    return make


@pytest.fixture
def gemma_repo(repo):
    """A Gemma Scope repository: layers 0 and 1, width 4k, average L0 22, 82 and 176; with a README."""
    made = repo()
    (made.dir / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    for layer in (0, 1):
        for l0 in (22, 82, 176):
            path = made.dir / f"layer_{layer}/width_4k/average_l0_{l0}/params.npz"
            write_npz(path, d_sae=4096, seed=100 * layer + l0)
    return made


@pytest.fixture
def naps(monkeypatch):
    """Every sleep between retries, the client's and ours, taken note of instead of slept."""
    import huggingface_hub.file_download as fd
    import huggingface_hub.utils._http as http

    import sae_hooks.hub.failures as ours

    slept = []

    class Clock:
        def __getattr__(self, name):
            import time
            return getattr(time, name)

        def monotonic(self):
            import time
            return time.monotonic() + sum(slept)

        def sleep(self, seconds):
            slept.append(seconds)

    for module in (http, fd, ours):
        monkeypatch.setattr(module, "time", Clock())
    return slept


@pytest.fixture(autouse=True)
def forget_what_was_checked():
    sae_hooks.hub.sources._checked.clear()


OPENED: list[str] = []
_watching = False


def _audit(event, args):
    if _watching and event in ("open", "os.open", "exec", "import", "os.system", "subprocess.Popen"):
        OPENED.append(f"{event} {args[0]}")


@pytest.fixture
def watched():
    """watched(): a context in which every open, exec and import of the interpreter is written down in a list."""
    if not getattr(sys, "_sae_hooks_audit", False):
        sys.addaudithook(_audit)
        sys._sae_hooks_audit = True

    @contextlib.contextmanager
    def watch():
        global _watching
        OPENED.clear()
        _watching = True
        try:
            yield OPENED
        finally:
            _watching = False
    return watch


@pytest.fixture
def cheap():
    """cheap(): a context that fails if what happens in it takes 5 s (under tracemalloc: 1 s without), or 50 MB."""
    @contextlib.contextmanager
    def measure(seconds=5.0, megabytes=50):
        tracemalloc.start()
        began = perf_counter()
        try:
            yield
        finally:
            took, peak = perf_counter() - began, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert took < seconds, f"{took:.2f} s"
        assert peak < megabytes * 2**20, f"{peak / 2**20:.0f} MB"
    return measure
