"""Edits: what to do to which features, as frozen values; their algebra on k rows; their JSON form.

Every operation is new = f + gain * f + shift, so the model receives x' = x + sum_k (gain_k f_k(x) + shift_k) W_dec[k]:

    clamp to v: gain -1, shift v      scale by s: gain s - 1, shift 0      add a: gain 0, shift a

k features cost k encoder rows and k decoder rows; nothing changes where the change is zero. Of many features only those
cost a decoder row that are active; and an edit of most features, with one gain in each row, copies no rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from operator import index
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .errors import EditError

OPS = ("clamp", "scale", "add")
TOKENS = ("all", "prompt", "generated")
FORMAT = "sae_hooks.edits/1"
Strength = float | Tensor
AT_ONCE = 512  # tokens times features up to which a GPU makes an edit in one launch: each token reads all rows
MANY = 2**11  # features from which it is worth finding out which are active
MOST = 0.5  # share of all features from which to compute the others, too, costs less than a copy of the rows
LARGEST = 1.8e19  # its square still fits float32, so a norm layer survives it


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One operation on some features of the SAE named `site`; made by `edit`, which checks it.

    values (rows, k) float32 on the CPU: rows is 1, or the size of the batch (NaN: this row is left untouched).
    tokens: "all", "prompt", "generated", or a boolean mask (tokens) or (batch, tokens) over the input.
    """

    op: str
    site: str
    features: tuple[int, ...]
    values: Tensor
    tokens: str | Tensor = "all"
    special_tokens: bool = False
    only_if_active: bool = False

    @property
    def gain(self) -> Tensor:
        """(rows, k): what the feature's own activation is multiplied by; zero in rows left untouched."""
        zero = torch.zeros_like(self.values)
        gain = {"clamp": zero - 1, "scale": self.values - 1, "add": zero}[self.op]
        return gain.masked_fill(self.values.isnan(), 0.0)

    @property
    def shift(self) -> Tensor:
        """(rows, k): what is added besides; zero in rows left untouched."""
        return torch.zeros_like(self.values) if self.op == "scale" else self.values.nan_to_num(0.0)

    @property
    def is_of_many(self) -> bool:
        """Whether the features are MANY or more, and change by gain * f + shift whether they are active or not."""
        return len(self.features) >= MANY and not (self.only_if_active and bool(self.shift.any()))

    @property
    def reads(self) -> bool:
        """Whether the features' present activations are needed; a plain `add` needs none."""
        return self.op != "add" or self.only_if_active

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form; NaN (row left untouched) is null, a mask is a list of booleans."""
        values = [[None if math.isnan(v) else v for v in row] for row in self.values.tolist()]
        tokens = self.tokens.tolist() if isinstance(self.tokens, Tensor) else self.tokens
        return {**vars(self), "features": list(self.features), "values": values, "tokens": tokens}


@dataclass(frozen=True)
class Edits:
    """Several edits, to be opened together and shared as a small JSON document."""

    items: tuple[Edit, ...]

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def to_json(self) -> str:
        """The document that `model.saes.apply` takes."""
        return json.dumps({"format": FORMAT, "edits": [edit.to_dict() for edit in self.items]}, allow_nan=False)

    @classmethod
    def from_json(cls, document: str) -> Edits:
        """Read what `to_json` wrote. Raises EditError naming what is wrong."""
        try:
            content = json.loads(document)
            if content["format"] != FORMAT:
                raise EditError(f"edits in format {content['format']!r}; this version reads {FORMAT!r}")
            return cls(tuple(_from_dict(item) for item in content["edits"]))
        except (ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
            if isinstance(error, EditError):
                raise
            raise EditError(f"not a document of edits ({type(error).__name__}: {error})") from error


def edit(op: str, site: str, values: Mapping[int, Strength], *, tokens: str | Tensor = "all",
         special_tokens: bool = False, only_if_active: bool = False) -> Edit:
    """Check and freeze an edit {feature: number, or tensor (batch,)}. Raises EditError for what cannot be meant."""
    if op not in OPS:
        raise EditError(f"an edit is one of {', '.join(OPS)}; got {op!r}")
    if not isinstance(values, Mapping):
        raise EditError(f"{op} takes {{feature: strength}}; got {values!r}")
    features = tuple(_feature(f) for f in values)
    if not features:
        raise EditError(f"{op} names no feature")
    return Edit(op=op, site=site, features=features, values=_table(op, values), tokens=check_tokens(tokens),
                special_tokens=bool(special_tokens), only_if_active=bool(only_if_active))


def check(edit: Edit, d_sae: int, others: Iterable[Edit] = ()) -> None:
    """Raise EditError if a feature is out of range, named twice, or edited already by one of the others."""
    outside = [f for f in edit.features if not 0 <= f < d_sae]
    if outside:
        raise EditError(f"feature {outside[0]} at {edit.site}: the SAE has features 0 to {d_sae - 1}")
    twice = {f for f, times in Counter(edit.features).items() if times > 1}
    taken = set(edit.features) & {f for other in others if other.site == edit.site for f in other.features}
    if twice or taken:
        raise EditError(
            f"feature {min(twice | taken)} at {edit.site} is edited twice; the changes would add up. "
            "Remove the open edit first, or put both into one"
        )


@dataclass(frozen=True)
class Rows:
    """An edit made ready for a device: W_enc (k, d_in), b_enc (k), threshold (k), W_dec (k, d_out), gain and shift
    (rows, 1, k).

    All in float32 (float64 for a float64 model), but the matrices of an edit of most features, which are the SAE's own:
    there k is d_sae. Without thresholds (TopK) the activations come from a full encode, of which `picked` (k) says
    which features count; then, and where nothing is read, W_enc has no rows. for_all: of many features gain
    (rows, 1, 1) and shift @ W_dec (rows, 1, d_out); where gains differ between the features of the only row, they are
    part of W_dec, and 1.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor | None
    W_dec: Tensor
    gain: Tensor
    shift: Tensor
    only_if_active: bool
    reads: bool
    for_all: tuple[Tensor, Tensor] | None = None
    picked: Tensor | None = None

    @classmethod
    def of(cls, edit: Edit, W_rows: Tensor, b_enc: Tensor, threshold: Tensor | None, W_dec: Tensor,
           device: torch.device, dtype: torch.dtype) -> Rows:
        """The edit's rows on a device in a dtype, of an SAE with these weights, W_rows (d_sae, d_in)."""
        picked = torch.tensor(edit.features, device=W_dec.device)
        gain, shift = (t.unsqueeze(1).to(device, dtype) for t in (edit.gain, edit.shift))
        W_rows, b_enc, W_dec = W_rows.detach(), b_enc.detach(), W_dec.detach()
        least, most = gain.aminmax(dim=-1, keepdim=True)
        many, by_row = edit.is_of_many and (threshold is not None or not edit.reads), torch.equal(least, most)
        as_is = W_dec.device == device and torch.promote_types(W_dec.dtype, torch.float32) == dtype
        if many and by_row and threshold is not None and as_is and len(picked) >= MOST * len(W_dec):
            # the matrices as they are, and thresholds above which what is left alone never comes
            limits = threshold.detach().to(dtype)
            threshold = torch.full_like(limits, torch.inf).index_copy(0, picked, limits[picked])
            shift = shift.new_zeros(len(shift), 1, len(limits)).index_copy(2, picked, shift)
            gain, b_enc = least.expand_as(shift), b_enc.to(dtype)
            shifted = kernels.decode(shift[:, 0], W_dec, b_enc.new_zeros(W_dec.shape[1])).unsqueeze(1)
        else:
            W_rows = W_rows[picked].to(device, dtype) if edit.reads and threshold is not None else W_rows[:0]
            b_enc, W_dec = (t[picked].to(device, dtype) for t in (b_enc, W_dec))
            threshold = None if threshold is None else threshold.detach()[picked].to(device, dtype)
            if many and not by_row and len(gain) == 1 and not shift.any():
                W_dec, gain = W_dec.mul_(gain[0, 0, :, None]), torch.ones_like(gain)
                least, by_row = gain[..., :1], True
            shifted = shift @ W_dec
        for_all = (least, shifted) if many and by_row else None
        return cls(W_rows, b_enc, threshold, W_dec, gain, shift, edit.only_if_active, edit.reads, for_all,
                   picked.to(device))

    def acts(self, x: Tensor) -> Tensor:
        """Activations (..., k) of the k features for x (..., d_in)."""
        assert self.threshold is not None
        pre = torch.nn.functional.linear(x, kernels.cast(self.W_enc, x.dtype), self.b_enc)
        return kernels.gated(pre, self.threshold)

    def topk_acts(self, x: Tensor, d_sae: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The same where TopK couples all d_sae features, which `encode` computes, of some tokens at a time."""
        assert self.picked is not None
        tokens = x.reshape(-1, x.shape[-1])
        some = list(kernels.held_together(tokens, d_sae)) or [slice(None)]
        acts = torch.cat([encode(tokens[t]).index_select(1, self.picked) for t in some])
        return acts.view(*x.shape[:-1], len(self.picked))

    def change(self, acts: Tensor | None, group: int, batch: int) -> Tensor:
        """new - old activations (batch, tokens, k), before tokens are chosen; each row is repeated `group` times."""
        gain, shift = (_spread(t, group, batch) for t in (self.gain, self.shift))
        if acts is None:
            return shift
        change = torch.addcmul(shift, gain, acts)
        return change * (acts > 0) if self.only_if_active else change

    def of_many(self, x: Tensor, group: int, batch: int) -> Tensor | None:
        """(new - old activations) @ W_dec (batch, tokens, d_out) of x (batch, tokens, d_in), of any dtype, never
        holding the activations (batch, tokens, k); (1 or batch, 1, d_out) where nothing is read. None where the edit
        has few features, or gains that differ by row and feature, or plain operations are the better way."""
        if self.for_all is None:
            return None
        gain, shift = (_spread(t, group, batch) for t in self.for_all)
        if not self.reads:
            return shift
        assert self.threshold is not None
        nothing = self.b_enc.new_zeros(shift.shape[-1])
        parts = x.reshape(-1, x.shape[-1]), self.W_enc, self.b_enc, self.threshold, self.W_dec, nothing
        if kernels.wants_gradient(x):
            x_hat = kernels.reconstruct_with_gradient(*parts)
        else:
            x_hat = kernels.reconstruct(*parts) if kernels.is_bare(x) else None
        return None if x_hat is None else torch.addcmul(shift, gain, x_hat.view(*x.shape[:-1], len(nothing)))

    def at_once(self, x: Tensor, old: Tensor, chosen: Tensor | None) -> Tensor | None:
        """old (..., d_out) as the edit leaves it where chosen (...), boolean, is True, or everywhere, in old's dtype;
        x (..., d_in): what is read. None where a GPU does not do that at once: it does for few tokens and features, of
        one strength for all."""
        if (triton := kernels.triton_for(x, old)) is None or (self.reads and self.threshold is None):
            return None
        features, d_out = self.W_dec.shape
        positions = x.numel() // x.shape[-1]
        if len(self.gain) > 1 or positions * features > AT_ONCE or old.numel() != positions * d_out:
            return None
        if not kernels.is_bare(x, old):
            return None
        edited: Tensor = triton.edit_few(x, self.W_enc if self.reads else None, self.b_enc, self.threshold, self.W_dec,
                                         self.gain, self.shift, self.only_if_active, old, chosen)
        return edited


def check_range(edit: Edit, W_dec: Tensor, dtype: torch.dtype) -> None:
    """Raise EditError if an edit (a scale: of an activation of 1) of an SAE with this W_dec (d_sae, d_out) would
    overflow the model's dtype, which greedy decoding turns into token 0."""
    strength, features = edit.gain if edit.op == "scale" else edit.shift, list(edit.features)
    few = len(features) < MANY
    low, high = (W_dec[features] if few else W_dec).detach().aminmax(dim=1)  # many without a copy
    entries = torch.maximum(-low, high).to(strength)
    largest = float((strength.abs().amax(dim=0) * (entries if few else entries[features])).max())
    limit = min(LARGEST, torch.finfo(dtype).max)
    if largest > limit:
        raise EditError(
            f"{edit.op} at {edit.site} adds up to {largest:.3g}; {dtype} activations overflow above {limit:.3g}"
        )


def _spread(table: Tensor, group: int, batch: int) -> Tensor:
    """(rows, 1, k) -> (1 or batch, 1, k)."""
    if table.shape[0] == 1:
        return table
    if table.shape[0] * group != batch:
        raise EditError(
            f"the edit has strengths for {len(table)} rows, the batch has {batch // group}; "
            "give a number, or one value for each row"
        )
    return table.repeat_interleave(group, dim=0) if group > 1 else table


def _feature(feature: Any) -> int:
    if isinstance(feature, bool):
        raise EditError(f"a feature is a number, got {feature}")
    try:
        return index(feature)
    except TypeError:
        raise EditError(f"a feature is a whole number, got {feature!r}") from None


def _table(op: str, values: Mapping[int, Strength]) -> Tensor:
    if all(isinstance(value, int | float) and abs(value) <= LARGEST for value in values.values()):
        return torch.tensor([[*values.values()]], dtype=torch.float32, device="cpu")
    columns = [_column(op, f, v) for f, v in values.items()]
    rows = {len(c) for c in columns} - {1}
    if len(rows) > 1:
        raise EditError(
            f"{op}: strengths for {' and '.join(map(str, sorted(rows)))} rows; one number a row of the batch"
        )
    return torch.stack([c.expand(max(rows, default=1)) for c in columns], dim=1)


def _column(op: str, feature: int, value: Strength) -> Tensor:
    per_row = isinstance(value, Tensor) and value.ndim > 0
    try:
        wide = torch.as_tensor(value, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        column = wide.detach().clone().reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise EditError(f"{op} of feature {feature}: expected a number or a tensor (batch,), got {value!r}") from error
    if per_row and value.ndim != 1:  # type: ignore[union-attr]
        raise EditError(f"{op} of feature {feature}: one value for each row, shape (batch,); got {tuple(value.shape)}")  # type: ignore[union-attr]
    if not len(column) or column.isinf().any() or (column.isnan().any() and not per_row):
        raise EditError(f"{op} of feature {feature}: the strength must be finite, got {value}")
    return column


def check_tokens(tokens: str | Tensor) -> str | Tensor:
    """A choice of tokens that can be meant: one of TOKENS, or a copy of a boolean mask. Raises EditError."""
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool or tokens.ndim not in (1, 2):
            raise EditError(
                f"a mask of tokens is boolean, (tokens) or (batch, tokens); got {tokens.dtype} {tuple(tokens.shape)}"
            )
        return tokens.detach().clone()
    if not isinstance(tokens, str) or tokens not in TOKENS:
        raise EditError(f"tokens must be one of {', '.join(TOKENS)}, or a boolean tensor; got {tokens!r}")
    return tokens


def _from_dict(item: Mapping[str, Any]) -> Edit:
    if unknown := set(item) - {field.name for field in fields(Edit)}:
        raise EditError(f"an edit has no field {min(unknown)!r}")
    rows = [[math.nan if v is None else float(v) for v in row] for row in item["values"]]
    features = [_feature(f) for f in item["features"]]
    if len(set(features)) != len(features) or {len(row) for row in rows} != {len(features)}:
        raise EditError("an edit needs distinct features and, in each row of values, one value a feature")
    table = torch.tensor(rows, dtype=torch.float32, device="cpu")
    by_row = len(rows) > 1 or bool(table.isnan().any())
    values: dict[int, Strength] = dict(zip(features, table.unbind(1) if by_row else rows[0], strict=True))
    tokens = item.get("tokens", "all")
    return edit(item["op"], str(item["site"]), values,
                tokens=tokens if isinstance(tokens, str) else torch.tensor(tokens, device="cpu"),
                special_tokens=item.get("special_tokens", False), only_if_active=item.get("only_if_active", False))
