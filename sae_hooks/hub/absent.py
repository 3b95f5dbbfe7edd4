"""What to say where a source holds no SAE that is known: what is there, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import SaeError, SaeNotFoundError, UnsafeFileError
from ..formats import DIALECTS
from ..formats.entry import PICKLES
from ..formats.incomplete import lacking
from .sources import Source

MODEL = re.compile(r"(?:^|/)(?:model|pytorch_model|adapter_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")
ITS_CONFIG = re.compile(r"(?:^|/)(?:adapter_)?config\.json$")


def nothing_found(at: Source, files: Mapping[str, int]) -> SaeError:
    """The error for a source in whose files no dialect finds an SAE: UnsafeFileError if they are pickles that no format
    is known of, else SaeNotFoundError."""
    found = f"{at.where()}: no SAE here; found {_few(files)}. "
    pickles = [path for path in files if path.endswith(PICKLES)]
    if told := at.instead() or lacking(path for path in files if not path.endswith(PICKLES)) or _language_model(files):
        return SaeNotFoundError(found + told)
    if pickles:
        read = " and ".join(dialect.LOOKS_FOR for dialect in DIALECTS.values() if ".pt" in dialect.LOOKS_FOR)
        why = f"; {lack}" if (lack := lacking(pickles)) else ", of no format that is known"
        return UnsafeFileError(f"{at.where()}: {pickles[0]} is a pickle, which can run code when it is opened{why}. "
                               f"With allow_pickle=True sae_hooks reads {read}; convert others to safetensors")
    known = "".join(f"\n  {dialect.LOOKS_FOR}" for dialect in DIALECTS.values())
    return SaeNotFoundError(f"{found}Looked for, in any folder:{known}")


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
