"""Typed access to a config that was parsed from JSON: an int is an int, `true` is not 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SaeFormatError

WIDEST, MOST = 65_536, 2**24
LIMITS = {"d_in": WIDEST, "d_model": WIDEST, "activation_dim": WIDEST, "d_out": WIDEST, "d_sae": MOST,
          "dict_size": MOST, "num_latents": MOST, "expansion_factor": MOST, "k": MOST, "top_k": MOST}


def text(config: Mapping[str, Any], key: str) -> str | None:
    """A string, or None where the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise SaeFormatError(f"{key} must be a string, got {value!r}")
    return value


def number(config: Mapping[str, Any], key: str) -> float | None:
    """A number, or None where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SaeFormatError(f"{key} must be a number, got {value!r}")
    return float(value)


def size(config: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number within sane limits, or None where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LIMITS[key]:
        raise SaeFormatError(f"{key} must be a whole number from 1 to {LIMITS[key]}, got {value!r}")
    return value


def switch(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; the default where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise SaeFormatError(f"{key} must be true or false, got {value!r}")
    return value


def section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object; empty where the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise SaeFormatError(f"{key} must be an object, got {value!r}")
    return value or {}
