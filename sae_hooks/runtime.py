"""What is open on a model: the attached SAEs, the requests (edits, splices, captures), and who may open them.

The hooks (hooks.py) ask a `Runtime` what to do; `model.saes` (saes.py) opens and closes requests on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import edits, sites
from .errors import EditError, SaeAttachError
from .generation import Generation
from .sae import SAE
from .tokens import Pass, refuse_packed

MOST_GROWTHS = 3  # of the sites in compiled graphs: the first that are open, those and others, all
SINK_MULTIPLE = 10.0  # of the site's typical norm: attention sinks lie far above, ordinary tokens far below


@dataclass(eq=False)
class Slot:
    """One attached SAE: its name in model.saes, where it reads and writes, and the weights once they are loaded.

    `owned`: loaded by this library, which then moves it to where it is needed; a user's own SAE is copied instead.
    """

    name: str
    read: sites.Site
    write: sites.Site
    load: Callable[[], SAE]
    owned: bool = True
    _loaded: SAE | None = None
    _copies: dict[torch.device, SAE] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sae(self) -> SAE:
        """The SAE, loaded at first use; raises what loading raises, and stays unloaded then."""
        if self._loaded is not None:
            return self._loaded
        with self._lock:
            if self._loaded is None:
                with torch.inference_mode(False):  # what is made in inference mode can never take part in training
                    self._loaded = self.load()
            return self._loaded

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._loaded is not None

    @property
    def typical_norm(self) -> float | None:
        """Usual L2 norm of the site's activations, if it is stored with the SAE."""
        value = self.sae.metadata.get("typical_norm")
        return float(value) if value else None

    @property
    def keys(self) -> tuple[str, str]:
        """Of the places where it reads and writes."""
        return self.read.key, self.write.key

    @property
    def crosses(self) -> bool:
        """Whether it reads one place and writes another (transcoders)."""
        return self.read.key != self.write.key

    def on(self, device: torch.device) -> SAE:
        """The SAE with its weights on a device."""
        own = self.sae
        if own.device == device:
            return own
        with torch.inference_mode(False):
            if self.owned:
                return own.to(device)
            if device not in self._copies:
                tensors: dict[str, Any] = {n: p.detach().to(device) for n, p in own.named_parameters()}
                own = SAE(**tensors, k=own.k, site=own.site, site_out=own.site_out, metadata=own.metadata)
                self._copies[device] = own
            return self._copies[device]


class Tally:
    """Counts chosen positions without making an accelerator wait: masks are summed when somebody asks."""

    def __init__(self) -> None:
        self._total = 0
        self._masks: list[Tensor] = []

    def add(self, chosen: Tensor | int) -> None:
        """Count a mask, or a number."""
        if isinstance(chosen, int):
            self._total += chosen
            return
        self._masks.append(chosen)
        if len(self._masks) > 256:
            self.total()

    def total(self) -> int:
        """Positions counted so far."""
        masks, self._masks = self._masks, []
        for device in {mask.device for mask in masks}:
            self._total += int(torch.cat([mask.flatten() for mask in masks if mask.device == device]).sum())
        return self._total


@dataclass(eq=False)
class Request:
    """Something open: what it selects; the positions it has touched, and all that it was asked for."""

    slot: Slot
    tokens: str | Tensor = "all"
    special_tokens: bool = False
    open: bool = True
    touched: Tally = field(default_factory=Tally)
    asked: Tally = field(default_factory=Tally)


@dataclass(eq=False)
class EditRequest(Request):
    """An edit, with its rows kept ready for each (device, dtype)."""

    edit: edits.Edit = None  # type: ignore[assignment]
    rows: dict[tuple[torch.device, torch.dtype], edits.Rows] = field(default_factory=dict)


def reconstruct(sae: SAE, x: Tensor, target: Tensor) -> Tensor:
    """What a splice writes by default in place of target (n, d_out): x_hat of x (n, d_in), in target's dtype."""
    x_hat: Tensor = sae(x, target.dtype)
    return x_hat


@dataclass(eq=False)
class SpliceRequest(Request):
    """Write something computed from the activations in their place."""

    rebuild: Callable[[SAE, Tensor, Tensor], Tensor] = reconstruct

    @property
    def plain(self) -> bool:
        """Whether the SAE's own reconstruction is written, for which nobody reads what it stands in place of."""
        return self.rebuild is reconstruct


@dataclass(eq=False)
class WatchRequest(Request):
    """Hand the activations of each pass to `sink`: (x as read, boolean selection shaped like x[..., 0], the pass)."""

    sink: Callable[[Tensor, Tensor, Pass], None] = None  # type: ignore[assignment]


class Runtime:
    """The open requests of one model, and the forward pass that each thread is in."""

    def __init__(self, special_ids: frozenset[int]) -> None:
        self.active = False
        self.traced: frozenset[str] | None = frozenset()  # sites that compiled graphs look at; None: all
        self._growths = 0  # of it, at each of which models are compiled anew
        self.openings = 0  # how often it became so: passes before were not noted
        self.busy: frozenset[str] = frozenset()  # sites that any open request touches, in whatever context
        self.special_ids = special_ids
        self.everywhere: tuple[Request, ...] = ()
        self._everywhere_at: dict[str, tuple[Request, ...]] = {}  # the same, by the key of the places that they touch
        self.in_context: ContextVar[tuple[Request, ...]] = ContextVar("sae_hooks", default=())
        self.local = threading.local()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._contexts: dict[Request, int] = {}  # open in some context: the thread that opened it

    def open(self, requests: Sequence[Request], scope: str) -> None:
        """Make requests effective. Raises EditError or SaeAttachError, and then none of them is."""
        if scope not in ("model", "context"):
            raise EditError(f'scope must be "model" or "context", got {scope!r}')
        with self._lock:
            if scope == "model":
                self._check_thread()
            self._check_edits(self.requests(), requests)
            if scope == "model":
                self.everywhere, self._owner = (*self.everywhere, *requests), threading.get_ident()
            else:
                self.in_context.set((*(r for r in self.in_context.get() if r.open), *requests))
                self._contexts.update(dict.fromkeys(requests, threading.get_ident()))
            self._refresh()

    def close(self, requests: Sequence[Request]) -> None:
        """End requests; those that have ended already are let be."""
        closing = [r for r in requests if r.open]
        with self._lock:
            for request in closing:
                request.open = False
                self._contexts.pop(request, None)
            self.everywhere = tuple(r for r in self.everywhere if r.open)
            self.in_context.set(tuple(r for r in self.in_context.get() if r.open))
            self._refresh()
            still = {r.slot for r in (*self.everywhere, *self._contexts)}
            self.forget([r for r in closing if r.slot not in still])

    def forget(self, requests: Sequence[Request]) -> None:
        """Drop what the requests' transcoders have read in this thread's pass: its whole autograd graph hangs on it."""
        stash: dict[Slot, Tensor] = self.local.__dict__.get("stash", {})
        for request in requests if stash else ():
            stash.pop(request.slot, None)

    def _refresh(self) -> None:
        requests = (*self.everywhere, *self._contexts)
        self.busy = frozenset(key for r in requests for key in r.slot.keys)
        self._everywhere_at = {key: tuple(r for r in self.everywhere if key in r.slot.keys) for key in self.busy}
        if self.traced is not None and not self.busy <= self.traced:
            self._growths += 1
            self.traced = self.traced | self.busy if self._growths < MOST_GROWTHS else None
        self.openings += bool(requests) and not self.active
        self.active = bool(requests)

    def requests(self) -> tuple[Request, ...]:
        """What is open for the code that runs here and now."""
        here = self.in_context.get()
        return (*self.everywhere, *(r for r in here if r.open)) if here else self.everywhere

    def requests_at(self, key: str) -> tuple[Request, ...]:
        """The same, at one place."""
        found, here = self._everywhere_at.get(key, ()), self.in_context.get()
        return (*found, *(r for r in here if r.open and key in r.slot.keys)) if here else found

    def begin(
        self, owner: nn.Module, outer: frozenset[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note the tokens of the forward pass that begins in `owner`; nested owners of one pass share it. outer: the
        ids of those around it. Raises SaeAttachError for a packed pass, unless all that is open is other contexts'."""
        current = self.begun()
        if current is None or not current.continues(id(owner), outer, args, kwargs):
            if self.requests():
                refuse_packed(kwargs)
            generation: Generation | None = getattr(self.local, "generation", None)
            if generation is not None and generation.opening != self.openings:
                generation.opening, generation.missed = self.openings, True
            outermost = current.outermost if current is not None and current.outermost in outer else id(owner)
            current = self.local.current = Pass.of(owner, args, kwargs, generation)
            current.outermost = outermost
            self.local.stash = {}
        current.owners.add(id(owner))

    def end(self, owner: int) -> None:
        """Note that a module, of this id, has come to its end, and with the outermost the pass."""
        now = self.begun()
        if now is not None and now.outermost == owner:
            now.ended = True

    def begun(self) -> Pass | None:
        """The pass that this thread is in, or, in a backward pass, which may compute it again, the last one."""
        found: Pass | None = getattr(self.local, "current", None)
        if found is None or not found.ended or torch._C._current_graph_task_id() >= 0:
            return found
        return None

    def current(self) -> Pass:
        """The pass that this thread is in."""
        found = self.begun()
        if found is None or found.shape is None:
            return Pass(None, None, None, 0, None)
        return found

    def select(self, request: Request, x: Tensor, where: str) -> Tensor | None:
        """The positions that a request touches, boolean and shaped like x without its last dimension, or None for
        all."""
        now = self.current()
        asked = now.chosen(request.tokens)
        chosen = asked if request.special_tokens else now.chosen(request.tokens, self.special_ids)
        chosen = None if chosen is None else fit(chosen, now, x, where)
        typical = None if request.special_tokens else request.slot.typical_norm
        if typical is not None:
            norm = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
            ordinary = norm <= SINK_MULTIPLE * typical
            if ordinary.device.type != "cpu" or not bool(ordinary.all()):  # asking an accelerator would make it wait
                chosen = ordinary if chosen is None else chosen & ordinary
        positions = x.numel() // max(x.shape[-1], 1)
        request.asked.add(positions if asked is None else asked if now.shape is None else asked.expand(now.shape))
        request.touched.add(positions if chosen is None else chosen)
        return chosen

    def _check_thread(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        others = {self._owner} if self.everywhere else set()
        others |= alive & set(self._contexts.values())
        if others - {threading.get_ident()}:
            raise SaeAttachError(
                "another thread has an edit, splice or capture open on this model, and both would reach every "
                "pass. Either run the requests as rows of one batch, with a tensor of strengths (one value "
                'a row), or open each with scope="context" in the thread that calls the model'
            )

    def _check_edits(self, present: Sequence[Request], new: Sequence[Request]) -> None:
        seen = [r.edit for r in present if isinstance(r, EditRequest)]
        spliced = {r.slot.write.key for r in present if isinstance(r, SpliceRequest)}
        for request in new:
            if isinstance(request, EditRequest):
                edits.check(request.edit, request.slot.sae.d_sae, seen)
                seen.append(request.edit)
            if isinstance(request, SpliceRequest):
                if request.slot.write.key in spliced:
                    raise EditError(f"{request.slot.write} is spliced already; only one reconstruction can stand there")
                spliced.add(request.slot.write.key)


def laid_out(source: Tensor, x: Tensor, slot: Slot) -> Tensor:
    """What a transcoder reads, in the layout of x, where it writes: one of both may be (batch * tokens, d), as experts
    get it, and the other (batch, tokens, d)."""
    if source.shape[:-1] == x.shape[:-1]:
        return source
    if 2 in (source.ndim, x.ndim) and source.shape[:-1].numel() == x.shape[:-1].numel():
        return source.reshape(*x.shape[:-1], source.shape[-1])
    raise SaeAttachError(
        f"the SAE {slot.name!r} reads activations {tuple(source.shape)} at {slot.read} and writes {tuple(x.shape)} at "
        f"{slot.write}; which belong together cannot be told. Attach it where both have the same tokens"
    )


def fit(chosen: Tensor, now: Pass, x: Tensor, where: str) -> Tensor:
    """A selection (batch, tokens) in the layout of x: (batch, tokens, d), or (batch * tokens, d)."""
    leading = x.shape[:-1]
    whole = chosen if chosen.device == x.device else chosen.to(x.device)
    if leading == whole.shape:
        return whole
    whole = whole if now.shape is None else whole.expand(now.shape)
    if leading == whole.shape:
        return whole
    if leading == (whole.numel(),):
        return whole.flatten()
    raise SaeAttachError(
        f"{where} gives activations {tuple(x.shape)} for tokens {tuple(whole.shape)}; positions cannot be told "
        "there. Attach inside the module, where each token has one activation, or edit without padding and with "
        'special_tokens=True and tokens="all", which touches all of them'
    )
