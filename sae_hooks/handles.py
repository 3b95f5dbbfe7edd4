"""Handles: what opening an edit, a splice or a capture gives."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from warnings import warn

from .capture import Captured
from .edits import Edits
from .errors import SaeWarning
from .runtime import EditRequest, Request, Runtime


class Handle:
    """Something open on a model: ends with the `with` block, or by `remove()`. Opened when it is made.

    `edits` is what it does, as values that can be shared; `positions_edited` and `positions_skipped` count, over all
    forward passes so far, the tokens that were touched and those that were asked for but left alone (special tokens,
    sinks). A token counts as touched also where its row's strength is NaN, or where only_if_active finds nothing.
    """

    def __init__(self, runtime: Runtime, requests: Sequence[Request], scope: str) -> None:
        self._runtime, self._requests = runtime, requests
        runtime.open(requests, scope)

    @property
    def edits(self) -> Edits:
        """The edits of this handle; none for a splice or capture."""
        return Edits(tuple(r.edit for r in self._requests if isinstance(r, EditRequest)))

    def to_json(self) -> str:
        """The edits as the document that `model.saes.apply` takes."""
        return self.edits.to_json()

    @property
    def positions_edited(self) -> int:
        """Positions touched so far, over all passes and sites."""
        return sum(r.touched.total() for r in self._requests)

    @property
    def positions_skipped(self) -> int:
        """Positions asked for, but left alone: special tokens and attention sinks."""
        return sum(r.asked.total() for r in self._requests) - self.positions_edited

    def remove(self) -> None:
        """End it; a second time does nothing. Warns (SaeWarning) if no position was ever touched."""
        if not any(r.open for r in self._requests):
            return
        self._runtime.close(self._requests)
        if not self.positions_edited:
            warn(
                f"{self!r} touched no position: no forward pass ran inside it, or none had a token that it selects "
                f"({self.positions_skipped} special tokens or attention sinks were left alone)",
                SaeWarning,
                stacklevel=3,
            )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._runtime.close(self._requests)
        self.remove()

    def __repr__(self) -> str:
        what = [
            f"{r.edit.op} {len(r.edit.features)} features at {r.edit.site}"
            if isinstance(r, EditRequest)
            else f"{type(r).__name__.removesuffix('Request').lower()} at {r.slot.name}"
            for r in self._requests
        ]
        return f"<{'; '.join(what)}; {'open' if any(r.open for r in self._requests) else 'closed'}>"


class CaptureHandle(Handle):
    """A capture that is open; entering it gives the `Captured` features."""

    def __init__(self, runtime: Runtime, requests: Sequence[Request], scope: str, captured: Captured) -> None:
        super().__init__(runtime, requests, scope)
        self.captured = captured

    def __enter__(self) -> Captured:  # type: ignore[override]
        return self.captured
