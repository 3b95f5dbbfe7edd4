"""What a module at a site calls: one permanent hook.

While nothing is open a hook returns None after one attribute test, which torch.compile traces as a guard; while
something is open the work runs outside of what is compiled: in an operator that the compiler cannot look into
(traced.py), or, where gradients are wanted, between two graphs. So what was compiled before never decides what is
edited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import edits, kernels, sites, traced
from .errors import EditError, SaeAttachError, SaeMismatchError
from .generation import Generation
from .runtime import EditRequest, Request, Runtime, Slot, SpliceRequest, WatchRequest, laid_out
from .sae import SAE
from .tokens import Pass
from .traced import untraced


class SiteHook:
    """The permanent hook of one module and side: what the model calls. Copies and pickles of it do nothing."""

    def __init__(self, runtime: Runtime, site: sites.Site) -> None:
        self.runtime, self.site = runtime, site
        self.name = traced.enter(self)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: the module's output with the open requests applied, or None for as it is."""
        if not self.runtime.active or self._idle():
            return None
        if self._in_graph():
            new = traced.at_site(sites.read(output, self.site.key), self.name)
            return sites.write(output, new, self.site.key)
        return self._after(output)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: (args, kwargs) with the open requests applied, or None for as they are."""
        if not self.runtime.active or self._idle():
            return None
        if self._in_graph():
            place = sites.find_input(args, kwargs, self.site.key)
            new = traced.at_site(sites.input_at(args, kwargs, place), self.name)
            return sites.replace_input(args, kwargs, place, new)
        return self._before(module, args, kwargs)

    def _idle(self) -> bool:
        """Whether nothing is open at this site; of a graph, whether it never looks here. Those are not to be compiled
        anew for each set of sites."""
        if torch.compiler.is_compiling():
            return self.runtime.traced is not None and self.site.key not in self.runtime.traced
        return self.site.key not in self.runtime.busy

    def _in_graph(self) -> bool:
        """Whether a graph is being made in which the site may be an operator: that has no gradients, and is left out of
        the graph where nobody needs its result, as where normalized activations are only read."""
        return torch.compiler.is_compiling() and not torch.is_grad_enabled() and self.site.side != "normalized"

    def applied(self, x: Tensor) -> Tensor:
        """x (..., d) with the open requests applied, or x itself."""
        requests = self._requests()
        return self._apply(x, requests) if requests else x

    @untraced
    def _after(self, output: Any) -> Any:
        requests = self._requests()
        if not requests:
            return None
        x = sites.read(output, self.site.key)
        new = self._apply(x, requests)
        return None if new is x else sites.write(output, new, self.site.key)

    @untraced
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        requests = self._requests()
        if not requests:
            return None
        place = sites.find_input(args, kwargs, self.site.key)
        x = sites.input_at(args, kwargs, place)
        new = self._apply(sites.normalize(x, module) if self.site.side == "normalized" else x, requests)
        if new is x or self.site.side == "normalized":
            return None
        return sites.replace_input(args, kwargs, place, new)

    def _requests(self) -> Sequence[Request]:
        generation: Generation | None = getattr(self.runtime.local, "generation", None)
        if generation is not None and generation.opening != self.runtime.openings:
            return ()  # opened in the middle of a pass, whose tokens were not noted: it begins with the next one
        return self.runtime.requests_at(self.site.key)

    def _apply(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        """x (..., d) with what is asked for done, in float32 also under torch.autocast, or x itself."""
        if kernels.autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return self._apply(x, requests)
        here, local = self.site.key, self.runtime.local
        for request in requests:
            slot = request.slot
            if slot.read.key != here:
                continue
            if x.shape[-1] != slot.sae.d_in:
                raise SaeMismatchError(
                    f"the SAE {slot.name!r} reads {slot.sae.d_in} values, {here} gives {x.shape[-1]}"
                )
            if isinstance(request, WatchRequest):
                chosen = self.runtime.select(request, x, here)
                request.sink(x, everything(x) if chosen is None else chosen, self.runtime.current())
            elif slot.crosses:
                local.__dict__.setdefault("stash", {})[slot] = x
        writing = [r for r in requests if not isinstance(r, WatchRequest) and r.slot.write.key == here]
        if not writing:
            return x
        new = self._rewrite(x, writing)
        self.runtime.forget(writing)
        return new

    def _rewrite(self, x: Tensor, requests: list[Request]) -> Tensor:
        """x (..., d_out) with splices and edits applied at the chosen positions; all read the same activations.

        Where there is more to come than a reconstruction, all goes through float32 and back, which changes no bit of
        untouched positions.
        """
        alone = len(requests) == 1 and not _is_custom(requests[0])
        new = x if alone else kernels.cast(x, torch.promote_types(x.dtype, torch.float32))
        for request in sorted(requests, key=_reconstructions_first) if len(requests) > 1 else requests:
            source = self._source(request.slot, x)
            chosen = self.runtime.select(request, source, self.site.key)
            if isinstance(request, EditRequest):
                new = self._edit(new, request, _rows(request, x), source, chosen)
            else:
                new = self._splice(new, request, source, chosen)
        if x.dtype == torch.float16 and _overflows(new.detach(), x.detach()):
            raise EditError(
                f"{self.site}: the edited activations overflow float16; use a smaller strength, or bfloat16"
            )
        return kernels.cast(new, x.dtype)

    def _splice(self, new: Tensor, request: Request, source: Tensor, chosen: Tensor | None) -> Tensor:
        """Put what is rebuilt from source[chosen] in place of new[chosen]; None: of all. Returns a new tensor."""
        assert isinstance(request, SpliceRequest)
        sae = request.slot.on(new.device)
        if request.plain and (spliced := _spliced_at_once(sae, source, new, chosen)) is not None:
            return spliced
        old = new.flatten(0, -2)
        if chosen is None and request.plain:
            rebuilt: Tensor = sae(source, new.dtype)
            return rebuilt.reshape(new.shape)
        few = not torch.is_grad_enabled() and kernels.is_little(old, sae.W_dec)
        if few and request.plain and chosen is not None:  # to ask a GPU where they lie would take longer
            return torch.where(chosen.unsqueeze(-1), sae(source, new.dtype), new)
        at = self.runtime.current().places(everything(new) if chosen is None else chosen)
        read = source.flatten(0, -2).index_select(0, at)
        target = old if request.plain else old.index_select(0, at)
        return old.index_copy(0, at, request.rebuild(sae, read, target).to(new.dtype)).view_as(new)

    def _edit(
        self, new: Tensor, request: EditRequest, rows: edits.Rows, source: Tensor, chosen: Tensor | None
    ) -> Tensor:
        """Add what an edit of the features of `source` changes to new[chosen]; None: to all. Returns a new tensor."""
        if (edited := rows.at_once(source, new, chosen)) is not None:
            return edited
        wide, now = kernels.cast(new, rows.gain.dtype), self.runtime.current()
        batch = 1 if len(rows.gain) == 1 else _batch(new, now, self.site.key)
        as_is = new.ndim == source.ndim == 3
        read = source if as_is else source.reshape(batch, -1, source.shape[-1])
        if (change := rows.of_many(read, now.group, batch)) is None:
            acts = None
            if rows.reads:
                read = wide if source is new and as_is else kernels.cast(read, wide.dtype)
                acts = rows.acts(read) if rows.threshold is not None else _topk_acts(rows, request, read)
            change = rows.change(acts, now.group, batch) @ kernels.cast(rows.W_dec, wide.dtype)
        if not as_is:
            change = change.expand(batch, new[..., 0].numel() // batch, -1).reshape(new.shape)
        return wide + change if chosen is None else torch.where(chosen.unsqueeze(-1), wide + change, wide)

    def _source(self, slot: Slot, x: Tensor) -> Tensor:
        """What the slot's SAE reads: x itself, or what its other hook saw earlier in this pass, in the layout of x."""
        if not slot.crosses:
            return x
        stash: dict[Slot, Tensor] = self.runtime.local.__dict__.get("stash", {})
        if slot not in stash:
            raise SaeAttachError(f"{slot.write} ran before {slot.read}, which the SAE {slot.name!r} reads")
        return laid_out(stash[slot].to(x.device), x, slot)

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteHook:
        return _inert()

    def __reduce__(self) -> Any:
        return _inert, ()


def _inert() -> SiteHook:
    hook = SiteHook.__new__(SiteHook)
    hook.runtime = Runtime(frozenset())
    return hook


def everything(x: Tensor) -> Tensor:
    """The selection of every position of x (..., d)."""
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def _overflows(new: Tensor, x: Tensor) -> bool:
    """Whether new (..., d) is beyond what x's dtype holds, at a position where x (..., d) had no infinity before."""
    size, most = new.abs(), torch.finfo(x.dtype).max
    return float(size.max()) > most and bool(((size.amax(-1) > most) & ~x.isinf().any(-1)).any())


def _spliced_at_once(sae: SAE, x: Tensor, old: Tensor, chosen: Tensor | None) -> Tensor | None:
    """old (..., d_out) with the reconstruction of x (..., d_in) in its place where chosen (...), boolean, is True, or
    everywhere, in old's dtype. None where a GPU does not do all that at once: it does for few tokens."""
    if kernels.triton_for(old) is None:
        return None
    own: Mapping[str, Any] = sae._parameters  # read as attributes they take a microsecond each
    if (threshold := own.get("threshold")) is None or own.get("W_skip") is not None:
        return None
    return kernels.splice_few(x, own["W_enc"].T, own["b_enc"], threshold, own["W_dec"], own["b_dec"], old, chosen)


def _batch(x: Tensor, now: Pass, where: str) -> int:
    """How many rows of the batch x (batch, ..., d) or (batch * tokens, d) holds, one after the other. Raises
    SaeAttachError where that cannot be told: x may be of streams, (streams, batch, tokens, d)."""
    if now.shape is None:
        return x.shape[0]
    rows_first = x.shape[:2] == now.shape != x.shape[1:3] if x.ndim > 3 else x.shape[0] == now.shape[0]
    if not rows_first and (x.ndim > 2 or x.shape[0] != math.prod(now.shape)):
        raise SaeAttachError(
            f"{where} gives activations {tuple(x.shape)} for tokens {now.shape}; the rows of the batch cannot be told "
            "there, so one strength for each cannot be given. Give one number for all rows"
        )
    return now.shape[0]


def _is_custom(request: Request) -> bool:
    return isinstance(request, SpliceRequest) and not request.plain


def _reconstructions_first(request: Request) -> bool:
    return isinstance(request, EditRequest)


def _topk_acts(rows: edits.Rows, request: EditRequest, x: Tensor) -> Tensor:
    sae = request.slot.on(x.device)
    return rows.topk_acts(x, sae.d_sae, sae.encode)


def _rows(request: EditRequest, x: Tensor) -> edits.Rows:
    """The edit's rows on x's device, made once; outside of inference mode, since training may use them later. Raises
    EditError if x's dtype overflows."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    key = (x.device, x.dtype)
    if key not in request.rows:
        sae, edit = request.slot.sae, request.edit
        edits.check_range(edit, sae.W_dec, x.dtype)
        with torch.inference_mode(False):
            weights = sae.W_enc.T, sae.b_enc, sae.threshold, sae.W_dec
            request.rows[key] = edits.Rows.of(edit, *weights, x.device, dtype)
    return request.rows[key]
