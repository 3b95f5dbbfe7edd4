"""Which tokens a forward pass computes: their ids, padding, columns, and what is prompt or generated.

Columns count from the first token of the (padded) input, so that a token has the same column with and without a KV
cache, in a chunk of the prompt or whole, in a verified guess of prompt lookup or alone. The length of the prompt
comes from the call of `generate`, never from the shape of a pass.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import EditError, SaeAttachError
from .generation import Generation, cached

PACKED = (
    "continuous batching (generate_batch) packs the tokens of all requests into one row, so rows and positions cannot "
    "be told; use generate"
)
UNKNOWN = (
    "generate is running, but where its prompt ends cannot be told here: it was called on a model that the SAEs were "
    "not attached to, or does not begin as transformers' own does. Attach the SAEs to the model whose generate is "
    'called, or use tokens="all"'
)
UNPLACED = (
    "the positions of this pass cannot be told: it goes on from a state that does not say how much it has read "
    "(Mamba's), or begins with virtual tokens that stand for no text (prompt tuning). Give the whole text to generate, "
    'or edit with tokens="all"; a capture needs positions'
)
FEW = 64  # token ids up to which a set on the CPU is quicker than tensor operations: a decoding step


class Pass:
    """One forward pass of the model.

    shape (batch, tokens) or None where the model was given neither ids nor embeddings; ids (batch, tokens) or None;
    mask (batch, columns) of what is not padding, from the first column on, or None; start, the column of the first
    token, or None where it cannot be told: mask is then of this pass's tokens alone.
    """

    def __init__(
        self,
        shape: tuple[int, int] | None,
        ids: Tensor | None,
        mask: Tensor | None,
        start: int | Tensor | None,
        generation: Generation | None,
    ) -> None:
        self.shape, self.ids, self._start, self.generation = shape, ids, start, generation
        self.group = shape[0] // generation.rows if shape and generation else 1  # beams, or return sequences
        known = generation.keep if generation is not None and start is not None else None
        if known is not None:
            self.mask: Tensor | None = known if self.group == 1 else known.repeat_interleave(self.group, dim=0)
        else:
            self.mask = None if mask is None else mask.bool()
        self.given = ids  # what the modules inside get that are of this pass
        self.outermost = 0  # id of the module with which it ends
        self.ended = False
        self.owners: set[int] = set()  # the modules that have begun with it
        self._cached: dict[Any, Tensor | None] = {}
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def reaches(self, owner: int, outer: frozenset[int]) -> bool:
        """Whether this pass has begun in a module around `owner`, and not come to that yet."""
        return owner not in self.owners and not outer.isdisjoint(self.owners)

    def continues(self, owner: int, outer: frozenset[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether `owner`, which begins inside those around it, belongs to this pass: it gets the same ids, or
        embeddings."""
        return self.reaches(owner, outer) and ((ids := ids_of(args, kwargs)) is None or ids is self.given)

    def gives(self, x: Tensor) -> bool:
        """Whether x, ids or embeddings, which a graph may have copied, is what a module inside gets."""
        ids = self.given
        if ids is None or x.is_floating_point():
            return x.shape[:2] == self.shape
        return x.shape == ids.shape and (x.data_ptr() == ids.data_ptr() or torch.equal(x, ids.to(x)))

    @classmethod
    def of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generation: Generation | None) -> Pass:
        """Read from the arguments of the forward of `owner`, a model."""
        ids, embeds = ids_of(args, kwargs), kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        shape = (given.shape[0], given.shape[1]) if isinstance(given, Tensor) else None
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if generation is not None and shape is not None and id(owner) == generation.encoder:
            generation = Generation(*shape, None)
        if generation is not None and shape is not None and shape[0] % generation.rows:
            generation = None  # not this generation's batch: another model inside the call
        start = cached(kwargs, mask, shape)
        if generation is not None and shape is not None:
            start = generation.column(owner, start, shape[1], ids is None)
        return cls(shape, ids, mask, start, generation)

    @property
    def start(self) -> int | Tensor:
        """Column of the first token. Raises EditError where it cannot be told."""
        if self._start is None:
            raise EditError(UNPLACED)
        return self._start

    def chosen(self, tokens: str | Tensor, special: frozenset[int] = frozenset()) -> Tensor | None:
        """Boolean (batch, tokens) of the positions to touch, or None for all; special ids and padding are left out."""
        key = (tokens if isinstance(tokens, str) else id(tokens), special)
        if key not in self._cached:
            parts = (self.chosen(tokens), self._ordinary(special)) if special else (self.keep(), self._tokens(tokens))
            self._cached[key] = _both(*parts)
        return self._cached[key]

    def places(self, chosen: Tensor) -> Tensor:
        """Numbers (n) of the positions that are chosen (...), row by row. A GPU is waited for, but once in a pass for
        all sites where the choice is the pass's own, as `chosen` gave it."""
        if (found := self._places.get(id(chosen))) is not None:
            return found[1]
        at = chosen.reshape(-1).nonzero().view(-1)
        if any(chosen is own for own in self._cached.values()):
            self._places[id(chosen)] = chosen, at
        return at

    def columns(self, device: torch.device) -> Tensor:
        """Column (tokens,) of each position, counted from the first token of the padded input."""
        assert self.shape is not None
        start = self.start.to(device) if isinstance(self.start, Tensor) else self.start
        return torch.arange(self.shape[1], device=device) + start

    def positions(self, device: torch.device) -> Tensor:
        """Place (batch, tokens) of each token among the real tokens of its row; padding gets that of the next token."""
        assert self.shape is not None
        columns = self.columns(device).expand(self.shape)
        if self.mask is None:
            return columns
        padding_before = torch.nn.functional.pad((~self.mask).cumsum(1), (1, 0)).to(device)
        return columns - padding_before.gather(1, columns.clamp(max=self.mask.shape[1]))

    def keep(self) -> Tensor | None:
        """(batch, tokens) of what is not padding, or None where nothing is."""
        if self.mask is None or self.shape is None:
            return None
        if self._start is None:
            return self.mask if self.mask.shape == self.shape else None
        known = self.mask.shape[1]
        if isinstance(self.start, int) and self.start >= known:
            return None
        columns = self.columns(self.mask.device)
        return self.mask[:, columns.clamp(max=known - 1)] | (columns >= known)

    def _tokens(self, tokens: str | Tensor) -> Tensor | None:
        if isinstance(tokens, Tensor):
            return self._mask(tokens)
        if tokens == "all":
            return None
        if self.generation is None and _generating():
            raise EditError(UNKNOWN)
        if self.generation is None and tokens == "prompt":
            return None
        if self.shape is None:
            raise EditError(f'tokens="{tokens}" needs the model\'s input_ids or inputs_embeds; this pass has neither')
        width = self.generation.width if self.generation is not None else None
        if width is not None and isinstance(self.start, int):  # a pass on one side of the border needs no tensor
            side = "generated" if self.start >= width else "prompt" if self.start + self.shape[1] <= width else None
            if side == tokens:
                return None
        device = self.ids.device if self.ids is not None else torch.device("cpu")
        if width is None:
            return torch.zeros(self.shape[1], dtype=torch.bool, device=device).expand(self.shape)
        generated = (self.columns(device) >= width).expand(self.shape)
        return generated if tokens == "generated" else ~generated

    def _mask(self, mask: Tensor) -> Tensor:
        if self.shape is None:
            raise EditError("a mask of tokens needs the model's input_ids or inputs_embeds; this pass has neither")
        batch, length = self.shape
        rows = mask if mask.ndim == 2 else mask[None]
        first = isinstance(self.start, int) and self.start == 0
        whole = self.generation.width if self.generation else length if first else rows.shape[1]
        if rows.shape[1] != whole or len(rows) not in (1, batch // self.group):
            raise EditError(
                f"the mask of tokens is {tuple(mask.shape)}, the input has {batch // self.group} rows of {whole} tokens"
            )
        rows = rows if self.ids is None else rows.to(self.ids.device)
        columns = self.columns(rows.device)
        chosen = rows[:, columns.clamp(max=whole - 1)] & (columns < whole)
        return chosen.expand(batch, length) if len(chosen) == 1 else chosen.repeat_interleave(self.group, dim=0)

    def _ordinary(self, special: frozenset[int]) -> Tensor | None:
        if self.ids is None:
            raise EditError(
                "this pass has no input_ids (inputs_embeds? a layer called by itself?), so special tokens cannot be "
                "told from others; pass special_tokens=True to edit every position"
            )
        if self.ids.is_cpu and self.ids.numel() <= FEW and special.isdisjoint(self.ids.flatten().tolist()):
            return None
        return torch.isin(self.ids, _on(self.ids.device, special), invert=True)


@lru_cache(maxsize=64)
def _on(device: torch.device, special: frozenset[int]) -> Tensor:
    """Special ids (n,) on a device: to move them there takes longer than to compare with them."""
    with torch.inference_mode(False):
        return torch.tensor(sorted(special), dtype=torch.int64, device=device)


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where both are true; None is true everywhere."""
    if one is None or other is None:
        return other if one is None else one
    return one.to(other.device) & other  # a mask may stay behind where ids were moved


def _generating() -> bool:
    """Whether transformers' generate waits for this pass, further up in the thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return True
        frame = frame.f_back
    return False


def ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids (batch, tokens) among the arguments of a model's forward, if there are any."""
    for value in (kwargs.get("input_ids"), *args[:1]):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value
    return None


def refuse_packed(kwargs: dict[str, Any]) -> None:
    """Raise SaeAttachError if these are the arguments of a pass of continuous batching."""
    for name in ("past_key_values", "cache"):
        if type(kwargs.get(name)).__name__.startswith("Paged"):
            raise SaeAttachError(PACKED)
