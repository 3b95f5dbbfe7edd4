"""What the frozen sets of numbers have in common (recipes, trainees, configs, objectives): each is checked when it is
made, so that a training does not fail at its end on what it was given at its beginning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sae_hooks.errors import TrainingError


def settle(numbers: Any) -> None:
    """Give each field of a frozen dataclass the plain Python value of its type: an int for 6.0, or for NumPy's 6.
    Raises TrainingError for what is of another type."""
    hints = get_type_hints(type(numbers))
    for name in (field.name for field in fields(numbers)):
        value = typed(f"{type(numbers).__name__}: {name}", getattr(numbers, name), hints[name])
        object.__setattr__(numbers, name, value)


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value as a plain one of the type that the hint says. Raises TrainingError, naming it, if it is of another."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(kind) is Literal:
            if plain in get_args(kind):
                return plain
        elif get_origin(kind) is tuple:
            if isinstance(plain, list | tuple):
                return tuple(typed(name, one, get_args(kind)[0]) for one in plain)
        elif kind in (int, float):
            if _is_number(plain) and (kind is float or (math.isfinite(plain) and int(plain) == plain)):
                return kind(plain)
        elif not isinstance(kind, type) or isinstance(value, kind):
            return value
        elif isinstance(plain, kind):
            return plain
    wanted = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
    raise TrainingError(f"{name} must be of type {wanted}, got {value!r}")


def expect(numbers: object, *, above_0: Sequence[str] = (), from_0: Sequence[str] = ()) -> None:
    """Raise TrainingError where one of these attributes, unless it is None, is not finite and above 0, or 0 or more."""
    for name in (*above_0, *from_0):
        value = getattr(numbers, name)
        if value is not None and not (0 < value < math.inf or (value == 0 and name in from_0)):
            least = "finite" if value == math.inf else "of 0 or more" if name in from_0 else "above 0"
            raise TrainingError(f"{type(numbers).__name__}: expected {name} {least}, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
