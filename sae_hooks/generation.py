"""What a `generate` tells of its text: the prompt, how it ends, and where in it each forward pass stands.

transformers takes settings from keywords, from a config that is given, and from the model's; begins without a prompt
with a BOS, and a decoder beside an encoder with a start token; and counts in its caches what a text has no column for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GUIDED = (
    "classifier-free guidance (guidance_scale) computes a second text beside each row, whose positions cannot be told; "
    "generate without it, or close what is open"
)
CACHES = ("past_key_values", "past_buckets_states", "cache_params", "state", "mems")  # as models call them


@dataclass(eq=False)
class Generation:
    """One call of `generate`: rows, width of the prompt with padding, its mask (rows, width).

    embedded: the prompt came as embeddings, so the text that comes back begins after it. eos and pad: ids that end a
    row and that fill it up. beams: rows of a pass are no rows of the text. guided: a second text is computed
    beside each. encoder: id of the module that reads an encoder-decoder's input, where all is prompt; the rest is of
    the decoder's text. guesses: another one asks it what may come next (assistant_early_exit); its rows are no text of
    their own. given: columns of the prompt in the text that comes back, fewer than width where the cache holds the
    beginning. ends (rows of the text,), once known: the column after each row's last token.

    Where passes stand: begun, tokens in the cache before the first; leader, id of the module whose every forward is a
    pass; shift, what the cache counts beside the text's columns (prefix tuning's), found in the first pass or, where
    that was not noted, what PEFT says: virtual; seen, columns read; placed, whether columns can be told; opening, that
    of the runtime since which all passes were noted; missed, whether some before were not.
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
    guesses: bool = False
    given: int = 0
    ends: Tensor | None = None
    begun: int | Tensor | None = 0
    leader: int | None = None
    shift: int | Tensor = 0
    seen: tuple[int, int] = (0, 0)  # before the pass that runs, and after it
    placed: bool = True
    virtual: int = 0
    opening: int | None = None
    missed: bool = False

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
        made.begun = cached(kwargs, None, None)
        made.placed, made.virtual = made.begun is not None, _virtual_tokens(model)
        if made.keep is not None and made.given and any(kwargs.get(name) is not None for name in CACHES):
            made.width = max(made.width, made.keep.shape[1])  # only the new ids were given, with the whole text's mask
        return made

    def guess_for(self, outer: Generation) -> None:
        """Take part in the text of another generation: what that has generated so far is no prompt here either."""
        self.guesses, self.width = True, outer.width

    def column(self, owner: Any, start: int | Tensor | None, length: int, embedded: bool) -> int | Tensor | None:
        """Column of the first of the `length` tokens that `owner` reads next, where the cache counts `start` before.

        start None: the cache does not count, so what was read is counted here. embedded: the pass gets no ids.
        Returns None where it cannot be told.
        """
        if self.leader is None:
            self.leader = id(owner)
            self.placed &= not (embedded and self.given and length > self.width)  # virtual tokens before the text
            beside = 0 if start is None or self.begun is None else start - self.begun
            self.shift = self.virtual if self.missed else beside
        if not self.placed or (start is None and self.missed):
            return None
        column = self.seen[0] if start is None else start - self.shift
        if id(owner) == self.leader:
            column = self.seen[1] if start is None else column
            self.seen = (column, column + length) if isinstance(column, int) else self.seen
        return column

    def finish(self, text: Tensor) -> None:
        """Note where each row of the text (rows times samples, columns) ends: at its EOS, or where padding begins, but
        not before the first new token, which was generated even if it is the token for padding."""
        new = text[:, self.given :]
        stops = torch.isin(new, torch.tensor(self.eos, dtype=new.dtype, device=new.device))
        real = stops.cumsum(1) - stops.long() == 0
        for pad in set(self.pad) - set(self.eos):
            real &= (new == pad).flip(1).cumprod(1).flip(1) == 0
        ends = self.width + real.sum(1).clamp(min=min(new.shape[1], 1))
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
        prompt = torch.full((len(next(given, [0])), 1), _numbers(bos)[0], device="cpu")
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


def _virtual_tokens(model: Any) -> int:
    """How many tokens PEFT puts before a text; while it generates it prepares the model's inputs."""
    peft = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    return getattr(getattr(peft, "active_peft_config", None), "num_virtual_tokens", None) or 0


def _is_plain(model: Any) -> bool:
    """Whether a model generates by transformers' own method, and not by one that may begin otherwise."""
    return getattr(getattr(type(model), "generate", None), "__qualname__", "") == "GenerationMixin.generate"


def _setting(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> Any:
    """What `generate` takes a setting to be: its keyword, else the first config that has one: its own, the model's."""
    if name in kwargs:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), *args[1:2], config)
    return next((value for c in configs if (value := getattr(c, name, None)) is not None), None)


def is_assistant(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a generate is called to guess for another one."""
    return bool(_setting("is_assistant", args, kwargs, None))


def _numbers(value: Any) -> tuple[int, ...]:
    """Token ids in a setting that is a number, several, a tensor, or None."""
    if value is None:
        return ()
    listed = value.tolist() if isinstance(value, Tensor) else value
    return tuple(listed) if isinstance(listed, (list, tuple)) else (listed,)


def cached(kwargs: dict[str, Any], mask: Tensor | None, shape: tuple[int, int] | None) -> int | Tensor | None:
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
