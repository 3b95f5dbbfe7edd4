"""Libraries that come with an extra of this package (pyproject.toml), imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import DataError

EXTRAS = {"scipy": "probes", "pyarrow": "probes", "datasets": "train"}


def needed(module: str) -> Any:
    """Import a module of one of these libraries. Raises DataError naming the extra if it is not installed."""
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"this needs the {library} library, which cannot be imported ({error}): "
                        f"pip install 'sae-hooks[{EXTRAS[library]}]'") from error
