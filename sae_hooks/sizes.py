"""Whole numbers that people give: of tokens, documents, features."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .errors import DataError


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of any type, such as NumPy's, as a plain int. Raises DataError, naming it, for what is none, as
    True and 8.0 are, and for less than the least."""
    is_other = isinstance(value, bool) or (isinstance(value, Tensor) and (value.ndim > 0 or value.dtype is torch.bool))
    try:
        number = least - 1 if is_other else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise DataError(f"{name} must be a whole number, {least} or more; got {value!r}")
    return number
