"""Dialects of SAE files: one small file each, pure (no IO).

A dialect says what a source offers from names and sizes (`entries`), what is meant where nothing is selected
(`default`), what a small config adds (`refine`), and turns tensors into an SAE (`build`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from ..sae import SAE
from . import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)
from .entry import Entry, Layout


class Dialect(Protocol):
    """What every dialect module has. `files` maps posix paths inside the source to bytes."""

    @property
    def FORMAT(self) -> str:
        """What people call it, for messages."""

    @property
    def LAYOUTS(self) -> tuple[Layout, ...]:
        """The files that it is known by."""

    @property
    def NAMES(self) -> frozenset[str]:
        """The tensor names that its files may hold."""

    def entries(self, files: Mapping[str, int], repo: str) -> list[Entry]:
        """The SAEs among these files."""

    def default(self, found: list[Entry]) -> list[Entry]:
        """Those that are meant where neither site nor layer is given."""

    def sites(self, kind: str, layer: int | None) -> tuple[str, str] | None:
        """The sites (read, written) that "resid_post" at a layer means here."""

    def refine(self, entry: Entry, config: dict[str, Any]) -> Entry:
        """The entry with what its config adds."""

    def build(self, entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
        """The SAE. The tensors are taken over: their memory becomes the SAE's, also changed in place."""


DIALECTS: dict[str, Dialect] = {
    "gemma_scope": gemma_scope, "gemma_scope_2": gemma_scope_2, "llama_scope": llama_scope, "saelens": saelens,
    "sparsify": sparsify, "circuit_tracer": circuit_tracer, "dictionary_learning": dictionary_learning,
    "qwen_scope": qwen_scope,
}

__all__ = ["DIALECTS", "Dialect", "Entry"]
