"""Which tokens a forward pass computes: their ids, padding, columns, and what is prompt or generated.

Columns count from the first token of the (padded) input, so that a token has the same column with and without a KV
cache, in a chunk of the prompt or whole, in a verified guess of prompt lookup or alone. The length of the prompt
comes from the call of `generate`, never from the shape of a pass.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .errors import EditError, SaeAttachError

PACKED = (
    "continuous batching (generate_batch) packs the tokens of all requests into one row, so rows and positions cannot "
    "be told; use generate"
)
GUIDED = (
    "classifier-free guidance (guidance_scale) computes a second text beside each row, whose positions cannot be told; "
    "generate without it, or close what is open"
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
CACHES = ("past_key_values", "cache_params", "state", "mems")  # as transformers' models call them
FEW = 64  # token ids up to which a set on the CPU is quicker than tensor operations: a decoding step


@dataclass(eq=False)
class Generation:
    """One call of `generate`: rows, width of the prompt with padding, its mask (rows, width).

    embedded: the prompt came as embeddings, so the text that comes back begins after it. eos and pad: ids that end a
    row and that fill it up. beams: rows of a pass are no rows of the text. guided: a second text is computed
    beside each. encoder: id of the module that reads an encoder-decoder's input, where all is prompt; the rest is of
    the decoder's text. given: columns of the prompt in the text that comes back, fewer than width where the cache
    holds the beginning. ends (rows of the text,), once known: the column after each row's last token.

    Where passes stand: begun, tokens in the cache before the first; leader, id of the module whose every forward is a
    pass; shift, what the cache counts beside the text's columns (prefix tuning's), found in the first pass; seen,
    columns read; placed, whether columns can be told.
    """

    rows: int
    width: int
    keep: Tensor | None
    embedded: bool = False
    eos: tuple[int, ...] = ()
    pad: tuple[int, ...] = ()
    beams: bool = False
    guided: bool = False
    encoder: int | None = None
    given: int = 0
    ends: Tensor | None = None
    begun: int | Tensor | None = 0
    leader: int | None = None
    shift: int | Tensor = 0
    seen: tuple[int, int] = (0, 0)  # before the pass that runs, and after it
    placed: bool = True

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation | None:
        """Read from the arguments of a model's generate and its configs; None where the prompt cannot be told."""
        config = getattr(model, "generation_config", None)
        names = ("eos_token_id", "pad_token_id", "num_beams", "guidance_scale")
        eos, pad, beams, guidance = (_setting(name, args, kwargs, config) for name in names)
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        prompt, mask = (_decoder_prompt if decodes else _prompt)(model, args, kwargs)
        if prompt is None:
            return None
        made = cls(len(prompt), prompt.shape[1], None, prompt.ndim > 2, _numbers(eos), _numbers(pad))
        made.beams, made.guided = (beams or 1) > 1, guidance not in (None, 1)
        if isinstance(mask, Tensor):
            made.keep = mask.bool() if mask.ndim == 2 else None
        elif not decodes and not made.embedded:
            made.keep = made._inferred_mask(prompt)
        made.encoder = id(model.get_encoder()) if decodes else None
        made.given = 0 if made.embedded else made.width
        made.begun = _start(kwargs, None, None)
        made.placed = made.begun is not None
        if made.keep is not None and made.given and any(kwargs.get(name) is not None for name in CACHES):
            made.width = max(made.width, made.keep.shape[1])  # only the new ids were given, with the whole text's mask
        return made

    def column(self, owner: Any, start: int | Tensor | None, length: int, embedded: bool) -> int | Tensor | None:
        """Column of the first of the `length` tokens that `owner` reads next, where the cache counts `start` before.

        start None: the cache does not count, so what was read is counted here. embedded: the pass gets no ids.
        Returns None where it cannot be told.
        """
        if self.leader is None:
            self.leader = id(owner)
            self.placed &= not (embedded and self.given and length > self.width)  # virtual tokens before the text
            self.shift = 0 if start is None or self.begun is None else start - self.begun
        if not self.placed:
            return None
        column = self.seen[0] if start is None else start - self.shift
        if id(owner) == self.leader:
            column = self.seen[1] if start is None else column
            self.seen = (column, column + length) if isinstance(column, int) else self.seen
        return column

    def finish(self, text: Tensor) -> None:
        """Note where each row of the text (rows times samples, columns) ends: at its EOS, or where padding begins."""
        new = text[:, self.given :]
        stops = torch.isin(new, torch.tensor(self.eos, dtype=new.dtype, device=new.device))
        real = stops.cumsum(1) - stops.long() == 0
        for pad in set(self.pad) - set(self.eos):
            real &= (new == pad).flip(1).cumprod(1).flip(1) == 0
        ends = self.width + real.sum(1)
        self.ends = ends.amax(0, keepdim=True) if self.beams else ends

    def read(self, row: Tensor, column: Tensor) -> Tensor:
        """Whether plain decoding would have read the tokens at (row, column) of a pass: all but the text's last one."""
        if self.ends is None:
            return torch.ones_like(column, dtype=torch.bool)
        ends = self.ends.to(column.device)
        return column < (ends[row] if len(ends) > 1 else ends) - 1

    def _inferred_mask(self, prompt: Tensor) -> Tensor | None:
        """The mask that `generate` infers where none is given: padding by its id, unless that ends texts, too."""
        pads = set(self.pad) - set(self.eos)
        return prompt != next(iter(pads)) if pads and bool((prompt == next(iter(pads))).any()) else None


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
        self.owners: set[int] = set()  # the modules that have begun with it
        self._cached: dict[Any, Tensor | None] = {}

    def continues(self, owner: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a module that begins inside the model belongs to this pass: it gets the same ids, or embeddings."""
        ids = _ids(args, kwargs)
        return owner not in self.owners and (ids is None or ids is self.ids)

    @classmethod
    def of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generation: Generation | None) -> Pass:
        """Read from the arguments of the forward of `owner`, a model."""
        _refuse_packed(kwargs)
        ids, embeds = _ids(args, kwargs), kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        shape = (given.shape[0], given.shape[1]) if isinstance(given, Tensor) else None
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if generation is not None and shape is not None and id(owner) == generation.encoder:
            generation = Generation(*shape, None)
        if generation is not None and shape is not None and shape[0] % generation.rows:
            generation = None  # not this generation's batch: another model inside the call
        start = _start(kwargs, mask, shape)
        if generation is not None and shape is not None:
            start = generation.column(owner, start, shape[1], ids is None)
        return cls(shape, ids, mask, start, generation)

    @property
    def start(self) -> int | Tensor:
        """Column of the first token. Raises EditError where it cannot be told."""
        if self._start is None:
            raise EditError(UNPLACED)
        return self._start

    def chosen(self, tokens: str | Tensor, special: Tensor | None) -> Tensor | None:
        """Boolean (batch, tokens) of the positions to touch, or None for all; special ids (n,) and padding are left
        out.

        Pass special=None to include special tokens; padding is never included.
        """
        key = (tokens if isinstance(tokens, str) else id(tokens), special is not None)
        if key not in self._cached:
            parts = [self.keep(), self._tokens(tokens), self._ordinary(special)]
            given = [part for part in parts if part is not None]
            given = [part.to(given[-1].device) for part in given]  # a mask may stay behind where ids were moved
            self._cached[key] = reduce(torch.logical_and, given) if given else None
        return self._cached[key]

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

    def _ordinary(self, special: Tensor | None) -> Tensor | None:
        if special is None or not len(special):
            return None
        if self.ids is None:
            raise EditError(
                "this pass has no input_ids (inputs_embeds?), so special tokens cannot be told from others; "
                "pass special_tokens=True to edit every position"
            )
        few = self.ids.device.type == "cpu" and self.ids.numel() <= FEW
        if few and set(special.tolist()).isdisjoint(self.ids.flatten().tolist()):
            return None
        return torch.isin(self.ids, special, invert=True)


def _prompt(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Any]:
    """What `generate` is to continue, ids (rows, width) or embeddings (rows, width, d), and the mask given with it.

    Without a prompt that is a BOS a row, as transformers does it; None where somebody else's generate gets none.
    """
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((t for t in (*args[:1], *named) if isinstance(t, Tensor)), None)
    config = getattr(model, "generation_config", None)
    bos = _setting("bos_token_id", args, kwargs, config)
    if prompt is None and bos is not None and _is_plain(model):
        given = (v for name, v in kwargs.items() if isinstance(v, Tensor) and v.ndim and not hasattr(config, name))
        prompt = torch.full((len(next(given, [0])), 1), _numbers(bos)[0])
    return prompt, kwargs.get("attention_mask")


def _decoder_prompt(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Any]:
    """What the decoder of an encoder-decoder is to continue: the start token, and decoder_input_ids where given."""
    encoded = kwargs.get("encoder_outputs")
    main = getattr(model, "main_input_name", "input_ids")
    named = (kwargs.get(name) for name in ("inputs", main, "inputs_embeds"))
    inputs = next((t for t in (*args[:1], *named, getattr(encoded, "last_hidden_state", None)) if t is not None), None)
    config = getattr(model, "generation_config", None)
    starts = (_setting(f"{name}_token_id", args, kwargs, config) for name in ("decoder_start", "bos"))
    start = next((s for s in starts if s is not None), None)
    if not isinstance(inputs, Tensor) or start is None or not _is_plain(model):
        return None, None
    begin = torch.as_tensor(start).reshape(-1, 1).expand(len(inputs), 1)
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    if ids is None and main != "input_ids":
        ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor):
        return begin, mask
    reader = getattr(getattr(model, "config", None), "encoder", None)
    donut = any("donut" in name.lower() for name in (type(model).__name__, getattr(reader, "model_type", "")))
    if donut or not bool((ids[:, :1] != begin.to(ids)).all()):  # else transformers puts the start token before them
        return ids, mask
    mask = torch.nn.functional.pad(mask, (1, 0), value=1) if isinstance(mask, Tensor) else None
    return torch.cat([begin.to(ids), ids], dim=1), mask


def _is_plain(model: Any) -> bool:
    """Whether a model generates by transformers' own method, and not by one that may begin otherwise."""
    return getattr(getattr(type(model), "generate", None), "__qualname__", "") == "GenerationMixin.generate"


def _generating() -> bool:
    """Whether transformers' generate waits for this pass, further up in the thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return True
        frame = frame.f_back
    return False


def _setting(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> Any:
    """What `generate` takes a setting to be: its keyword, else the first config that has one: its own, the model's."""
    if name in kwargs:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), *args[1:2], config)
    return next((value for c in configs if (value := getattr(c, name, None)) is not None), None)


def _numbers(value: Any) -> tuple[int, ...]:
    """Token ids in a setting that is a number, several, a tensor, or None."""
    if value is None:
        return ()
    listed = value.tolist() if isinstance(value, Tensor) else value
    return tuple(listed) if isinstance(listed, (list, tuple)) else (listed,)


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    for value in (kwargs.get("input_ids"), *args[:1]):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value
    return None


def _start(kwargs: dict[str, Any], mask: Tensor | None, shape: tuple[int, int] | None) -> int | Tensor | None:
    """Tokens already in the cache: the column of the first token of this pass; None where nothing tells."""
    caches = [cache for name in CACHES if (cache := kwargs.get(name)) is not None]
    for cache in caches:
        length = _length(cache)
        if length is not None:
            return length
    before = max(mask.shape[1] - shape[1], 0) if mask is not None and shape is not None else 0
    return before if before or not caches else None


def _length(cache: Any) -> int | Tensor | None:
    """Tokens in a cache; None where it does not count them, as recurrent states do not once they hold something."""
    try:
        length: int | Tensor = cache.get_seq_length()
        return length.clone() if isinstance(length, Tensor) else length
    except (AttributeError, ValueError):
        held = getattr(cache, "has_previous_state", True)
        return None if (held() if callable(held) else held) else 0


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    if any(type(kwargs.get(name)).__name__.startswith("Paged") for name in ("past_key_values", "cache")):
        raise SaeAttachError(PACKED)
