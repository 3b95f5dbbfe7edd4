"""What to say where a source holds no SAE that is known: what is there, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import SaeError, SaeNotFoundError, UnsafeFileError
from ..formats import DIALECTS, Dialect
from ..formats.entry import PICKLES
from .sources import Source

MODEL = re.compile(r"(?:^|/)(?:model|pytorch_model|adapter_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")
ITS_CONFIG = re.compile(r"(?:^|/)(?:adapter_)?config\.json$")


def nothing_found(at: Source, files: Mapping[str, int]) -> SaeError:
    """The error for a source in whose files no dialect finds an SAE: UnsafeFileError if they are pickles that no format
    is known of, else SaeNotFoundError."""
    found = f"{at.where()}: no SAE here; found {_few(files)}. "
    pickles = [path for path in files if path.endswith(PICKLES)]
    others = [path for path in files if not path.endswith(PICKLES)]
    if told := at.instead() or _lacking(others) or _language_model(files):
        return SaeNotFoundError(found + told)
    if pickles:
        pickled = [one for one in DIALECTS.values() if one.LAYOUTS[0].weights.endswith(PICKLES)]
        read = " and ".join(map(_known_by, pickled))
        why = f"; {lack}" if (lack := _lacking(pickles)) else ", of no format that is known"
        return UnsafeFileError(f"{at.where()}: {pickles[0]} is a pickle, which can run code when it is opened{why}. "
                               f"With allow_pickle=True sae_hooks reads {read}; convert others to safetensors")
    return SaeNotFoundError("\n  ".join([f"{found}Looked for, in any folder:", *map(_known_by, DIALECTS.values())]))


def _known_by(dialect: Dialect) -> str:
    """The files that a format is known by, and its name."""
    layouts = [f"{one.config} with {one.weights}" if one.config else one.weights for one in dialect.LAYOUTS]
    return f"{', '.join(layouts)} ({dialect.FORMAT})"


def _lacking(paths: Sequence[str]) -> str | None:
    """Which of these files are weights by their names, and which config they lack: what a partial download leaves, and
    two published sets of transcoders (mwhanna/qwen3-14b-transcoders)."""
    known = [(layout, one.FORMAT) for one in DIALECTS.values() for layout in one.LAYOUTS if layout.config]
    for layout, _ in known:
        if found := [path for path in paths if layout.names(path)]:
            configs = [f"{one.config} ({name})" for one, name in known if one.weights == layout.weights]
            where = "in the folder above" if "/" in layout.weights else "beside it"
            return (f"{found[0]} has no {' or '.join(configs)} {where}{layout.hint}"
                    + (f"; nor have {len(found) - 1} more" if len(found) > 1 else ""))
    return None


def _language_model(files: Mapping[str, int]) -> str | None:
    """What to say of the weights of a language model, or of an adapter for one."""
    weights = next((path for path in files if MODEL.search(path)), None)
    if weights is None or not any(ITS_CONFIG.search(path) for path in files):
        return None
    return (f"{weights} is what the weights of a language model or an adapter are called: load that as the model, and "
            "give a repository or folder of SAEs as the source")


def _few(files: Mapping[str, int]) -> str:
    names = list(files)
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "no files"
