"""What README.md and examples/ show works: the README's Python runs as printed, the examples start.

Every ```python block of README.md is run, in order, in one namespace and in an empty folder, with the names
of `prepared` there already. A block that cannot run here (another model, a GPU) is compiled only, if the line
above it says why: <!-- not run: needs Gemma 2 9B -->
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*?) -->\s*\Z")

# How each example is started here; None: compiled only, because another starts it or .ci/run runs it in full.
EXAMPLES = {
    "demo.py": None,
    "demo_card.py": None,
    "probe_domains.py": ["--help"],
    "smollm2.py": None,
    "train_demo_sae.py": ["--help"],
}


def python_blocks(markdown):
    """[(first line's number, code, reason not to run it or None)] of the ```python blocks of a document."""
    blocks = []
    for fence in FENCE.finditer(markdown):
        if fence["language"] == "python":
            before = markdown[: fence.start()]
            excuse = NOT_RUN.search(before)
            blocks.append((before.count("\n") + 2, fence["code"], excuse and excuse["reason"]))
    return blocks


def run_blocks(blocks, namespace):
    """Run in order; a traceback shows README.md's own line numbers."""
    for line, code, excuse in blocks:
        compiled = compile("\n" * (line - 1) + code, str(README), "exec")
        if excuse is None:
            exec(compiled, namespace)


@pytest.fixture
def prepared(tiny_gemma2, tiny_tokenizer, random_sae, tmp_path, monkeypatch):
    """The names that README.md may take for granted; the working folder is empty and thrown away."""
    monkeypatch.chdir(tmp_path)
    inputs = tiny_tokenizer("In the beginning God created the heaven and the earth.", return_tensors="pt")
    sae = random_sae(192, 1024, "model.layers.2.output", norm=34.0)
    names = {"model": tiny_gemma2, "tokenizer": tiny_tokenizer, "inputs": inputs, "sae": sae}
    return {"__name__": "readme", **names}


def test_the_python_of_the_readme_runs(prepared):
    blocks = python_blocks(README.read_text()) if README.exists() else []
    if not blocks:
        pytest.skip("README.md has no ```python block")
    assert any(excuse is None for _, _, excuse in blocks), "no block of README.md is run"
    run_blocks(blocks, prepared)


def test_blocks_are_found_with_their_line_and_their_excuse():
    run, excused = "```python\na = 1\n```\n", "<!-- not run: needs a GPU -->\n```python\nb\n```\n"
    markdown = f"# x\n\n{run}\n{excused}\n```sh\nls\n```\n"
    assert python_blocks(markdown) == [(4, "a = 1\n", None), (9, "b\n", "needs a GPU")]


def test_an_excused_block_must_still_be_python():
    with pytest.raises(SyntaxError):
        run_blocks([(3, "def (:\n", "needs a GPU")], {})


def test_blocks_share_a_namespace_and_fail_with_their_line():
    with pytest.raises(ZeroDivisionError) as raised:
        run_blocks([(4, "a = 1\n", None), (9, "b\n", "excused"), (12, "\na / 0\n", None)], {})
    assert raised.traceback[-1].lineno + 1 == 13


def test_every_example_is_listed():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_compiles_and_says_how_to_run_it(name):
    source = (ROOT / "examples" / name).read_text()
    compile(source, name, "exec")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    is_script = '__name__ == "__main__"' in source
    assert docstring
    assert not is_script or f"python examples/{name}" in docstring or "make demo" in docstring


@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name] is not None])
def test_an_example_starts(name, tmp_path):
    command = [sys.executable, ROOT / "examples" / name, *EXAMPLES[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
