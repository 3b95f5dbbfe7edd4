"""Check an installed wheel: it imports from site-packages only, whole, and leaves no top-level `training`.

Run by .ci/run in a clean environment, outside the working tree, whose root is the argument.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

root = Path(sys.argv[1]).resolve()
for name in ("sae_hooks", "sae_hooks.training"):
    module = importlib.import_module(name)
    assert module.__file__ is not None
    place = Path(module.__file__).resolve()
    assert root not in place.parents, f"{name} was imported from the working tree: {place}"
    assert (place.parent / "py.typed").is_file(), f"{name} carries no py.typed"

files = {str(f) for f in importlib.metadata.files("sae-hooks") or []}
for folder, prefix in (("sae_hooks", "sae_hooks"), ("training", "sae_hooks/training")):
    for path in sorted((root / folder).rglob("*.py")):
        packed = f"{prefix}/{path.relative_to(root / folder).as_posix()}"
        assert packed in files, f"the wheel lacks {packed}"

assert importlib.util.find_spec("training") is None, "a top-level package named training was installed"
print(f"sae-hooks {importlib.metadata.version('sae-hooks')}: {len(files)} files, whole and in one place")
