"""attach_saes and detach_saes: hooks in, hooks out, all or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from . import compiling, hub, sites
from .compiling import AFTER, BEFORE
from .doors import GenerateHook, PackedHook, PassHook
from .errors import SaeAttachError, SaeMismatchError, SiteError
from .formats.hook_names import kind_of, layer_of
from .hooks import SiteHook
from .runtime import Runtime, Slot
from .sae import SAE
from .saes import Saes

MOST_TOLD = 10  # SAEs of a source that do not fit, of which a message speaks: a repository has one for each layer
Model = TypeVar("Model", bound=nn.Module)
Source = str | Path | SAE | Mapping[str, Any]


def attach_saes(model: Model, source: Source, *, layer: int | None = None, site: str | None = None,
                width: int | str | None = None, l0: float | str | None = None, revision: str | None = None,
                dtype: torch.dtype | None = None, name: str | None = None, preload: bool = False,
                token: str | None = None, cache_dir: str | Path | None = None, allow_pickle: bool = False) -> Model:
    """Hook SAEs into a model and return the same model, with `model.saes`; weights are fetched at first use of a site.

    source: a Hub repo id, a local folder or file, an SAE, or a mapping {site: SAE or any of these}, whose site is where
        an SAE is put, and of a repo, folder or file selects the one that was made for it. A repo that offers
        many gives every layer, in the smallest width, with average L0 nearest 100; layer, site, width and l0 select.
    site: an alias ("resid_post", "mlp_out", "attn_out", "transcoder") or a module path with its side. An alias given
        with an SAE, but without layer=, is of the layer that the SAE names.
    dtype: of the two matrices (thresholds and biases stay float32). name: to tell two SAEs at one site apart.
    preload: fetch all weights now. revision, token, cache_dir: as in huggingface_hub.
    allow_pickle: read weights that PyTorch pickled, too, by its weights_only loader, which runs no code of the file.

    With nothing open the model computes exactly what it did before. Nothing is attached if anything is wrong: raises
    SiteError or SaeMismatchError (the model has no such place, or of another width; all of them at once),
    SaeNotFoundError, SaeDownloadError, SaeFormatError, UnsafeFileError, SaeAttachError.
    """
    hub.weight_files.check_dtype(dtype)
    select = {"width": width, "l0": l0, "revision": revision, "token": token, "cache_dir": cache_dir,
              "allow_pickle": allow_pickle}
    offers = list(_offers(model, source, layer, site, select, dtype))
    present = _present(model)
    root = _root(model) if present is None else present._model
    slots = _slots(root, offers, name)
    _check_free(slots, present, name is not None)
    if not isinstance(getattr(root, "saes", None), (Saes, type(None))):
        raise SaeAttachError(f"{type(root).__name__} has an attribute `saes` of its own, where model.saes would stand")
    if preload:
        for slot in slots:
            slot.sae  # noqa: B018  (loads, and raises before anything is attached)
    _install(root, slots, present)
    return model


def detach_saes(model: nn.Module) -> None:
    """Take all SAEs out again; the model is as it was before the first attach. Without SAEs, does nothing."""
    saes = _present(model)
    if saes is not None:
        saes._installed.remove()
        del saes._model.__dict__["saes"]
        compiling.anew(saes._runtime, ())


@dataclass
class Installed:
    """What attaching has put into a model, and how to take it out."""

    runtime: Runtime
    hooks: dict[str, SiteHook] = field(default_factory=dict)
    doors: set[int] = field(default_factory=set)
    tables: set[compiling.Table] = field(default_factory=set)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def put(self, module: nn.Module, table: str, hook: Callable[..., Any], **how: bool) -> None:
        """Put a hook into one of a module's tables, BEFORE or AFTER."""
        register: Any = module.register_forward_hook if table == AFTER else module.register_forward_pre_hook
        self.undo.append(register(hook, **how).remove)
        self.tables.add((type(module), table))
        _order_anew(getattr(module, table))

    def remove(self) -> None:
        """Undo in reverse order; a second time does nothing."""
        self.runtime.close(self.runtime.everywhere)
        self.runtime.active = False
        while self.undo:
            self.undo.pop()()


@dataclass(frozen=True)
class Offer:
    """An SAE to attach: where it says it belongs, its width if known, and how to get it."""

    site: str | None
    site_out: str | None
    layer: int | None
    kind: str | None
    d_in: int | None
    d_out: int | None
    where: str
    load: Callable[[], SAE]
    owned: bool = True


def _offers(model: nn.Module, source: Source, layer: int | None, site: str | None, select: Mapping[str, Any],
            dtype: torch.dtype | None) -> Iterator[Offer]:
    if isinstance(source, SAE):
        yield _of_sae(model, source, layer, site, dtype)
    elif isinstance(source, Mapping):
        for where, one in source.items():
            yield from _offers(model, one, layer, where, select, dtype)
    else:
        for file in hub.find_saes(source, layer=layer, site=site, **select):
            e = file.entry
            read, write = _as_asked(e.site, e.site_out, site)
            yield Offer(read, write, e.layer, e.kind, e.d_in, None, file.where, partial(file.load, dtype=dtype))


def _as_asked(read: str | None, write: str | None, site: str | None) -> tuple[str | None, str | None]:
    """An SAE's sites (read, written), in full where it tells only the end of the one that is asked for: "layers.1" may
    be of either tower of a model."""
    if site is None or read is None or not site.endswith("." + read):
        return read, write
    return site, site.removesuffix(read) + (write or read)


def _of_sae(model: nn.Module, sae: SAE, layer: int | None, site: str | None, dtype: torch.dtype | None) -> Offer:
    read, write = sae.site, sae.site_out
    if site is not None and site not in sites.KINDS:
        read, write = site, site if write in (None, sae.site) else write
    elif layer is not None or site not in (None, kind_of(read or "", write)):
        read, write = sites.alias(model, _own_layer(sae, site) if layer is None else layer, site or "resid_post")
    if read is None:
        raise SiteError("the SAE does not say where it belongs; give layer= (and site=), or site= as a module path")
    own = sae if dtype in (None, sae.dtype) else None

    def load() -> SAE:
        if own is not None:
            return own
        cast: dict[str, Any] = {name: p.detach().to(dtype) if name.startswith("W_") else p.detach()
                                for name, p in sae.named_parameters()}
        hub.weight_files.check_held(cast, dtype)
        return SAE(**cast, k=sae.k, site=sae.site, site_out=sae.site_out, metadata=sae.metadata,
                   statistics=sae.statistics)

    return Offer(read, write, None, None, sae.d_in, sae.d_out, repr(sae), load, owned=own is None)


def _own_layer(sae: SAE, site: str | None) -> int:
    """The decoder layer that an SAE names itself. Raises SiteError where it names none, or one of another tower."""
    own = sae.site or ""
    layer = None if sites.OTHER_TOWERS.search(own) else layer_of(own)
    if layer is None:
        raise SiteError(f"{site!r} of which layer? The SAE names {sae.site or 'no place'}; give layer=, too")
    return layer


def _slots(model: nn.Module, offers: Sequence[Offer], name: str | None) -> list[Slot]:
    """Find each offer's place in the model; raise one error for all that does not fit."""
    slots: list[Slot] = []
    wrong: list[str] = []
    kinds: set[type[SaeMismatchError]] = set()
    for offer in offers:
        try:
            read, write = _places(model, offer)
            _check_fit(model, offer, read, write)
        except SaeMismatchError as error:
            wrong.append(f"{offer.where}: {error}")
            kinds.add(type(error))
            continue
        key = offer.site or str(read)
        named = key if name is None else name if len(offers) == 1 else f"{name}/{key}"
        slot = Slot(named, read, write, offer.load, offer.owned)
        if not offer.owned:
            slot.sae  # noqa: B018  (the user's own is there already)
        slots.append(slot)
    if wrong:
        more = [f"and {len(wrong) - MOST_TOLD} more"] if len(wrong) > MOST_TOLD else []
        raise (SiteError if kinds == {SiteError} else SaeMismatchError)("\n".join(wrong[:MOST_TOLD] + more))
    return slots


def _places(model: nn.Module, offer: Offer) -> tuple[sites.Site, sites.Site]:
    if offer.site is not None:
        try:
            return sites.resolve(model, offer.site), sites.resolve(model, offer.site_out or offer.site)
        except SiteError:
            if offer.layer is None or offer.kind not in sites.KINDS:
                raise
    if offer.layer is None or offer.kind is None:
        raise SiteError(f"{offer.where} does not say where it belongs; give layer= and site=")
    try:
        read, write = sites.alias(model, offer.layer, offer.kind)
    except SiteError:
        if offer.site is not None:  # the site's own path makes the better message
            sites.resolve(model, offer.site)
        raise
    return sites.resolve(model, read), sites.resolve(model, write)


def _check_fit(model: nn.Module, offer: Offer, read: sites.Site, write: sites.Site) -> None:
    """Raise SaeMismatchError for what shapes and sides alone prove wrong."""
    wrong = []
    for verb, d, place in (("reads", offer.d_in, read), ("writes", offer.d_out, write)):
        have = sites.width(model, place)
        if d is not None and have is not None and d != have:
            wrong.append(f"it {verb} {d} values, {place} of {type(model).__name__} has {have}")
    if write.side == "normalized":
        wrong.append(f"{write} can be read, but not written")
    if read.side == "input" and _is_split(model, read):
        wrong.append(f"{read} is split over processes by tensor parallelism, so features cannot be computed there")
    if wrong:
        raise SaeMismatchError("; ".join(wrong) + ": made for another model?")


def _is_split(model: nn.Module, place: sites.Site) -> bool:
    """Whether tensor parallelism splits a module's parameters over processes, and so its input. FSDP2 alone, which
    splits each once, does not: they are whole while the module runs."""
    kinds = [kind for module in (*sites.ancestors(model, place.path), place.module) for kind in type(module).__mro__]
    by_fsdp = any(kind.__name__ == "FSDPModule" for kind in kinds)
    parameters: list[Any] = [p for p in place.module.parameters(recurse=False) if type(p).__name__ == "DTensor"]
    return any(sum(not part.is_replicate() for part in p.placements) > by_fsdp for p in parameters)


def _check_free(slots: Sequence[Slot], present: Saes | None, named: bool) -> None:
    """Raise SaeAttachError if a name is taken, or if a slot without one reads where another SAE reads already."""
    taken = list(present._slots.values()) if present else []
    for slot in slots:
        at_site = [other.name for other in taken if not named and other.read.key == slot.read.key]
        if at_site or any(slot.name == other.name for other in taken):
            raise SaeAttachError(
                f"an SAE named {(at_site or [slot.name])[0]!r} is attached at {slot.read} already; give name= to "
                "attach a second one there, or detach_saes(model) first"
            )
        taken.append(slot)


def _install(model: nn.Module, slots: Sequence[Slot], present: Saes | None) -> None:
    """Put hooks in; on any failure take out what this call has put in."""
    if present is None:
        runtime = Runtime(_special_ids(model))
        saes = Saes(model, runtime, Installed(runtime), detach_saes)
    else:
        saes = present
    installed: Installed = saes._installed
    before = len(installed.undo)
    try:
        for slot in slots:
            _hook(model, installed, slot)
    except BaseException:
        while len(installed.undo) > before:
            installed.undo.pop()()
        raise
    saes._slots.update({slot.name: slot for slot in slots})
    model.__dict__["saes"] = saes
    compiling.anew(installed.runtime, installed.tables)


def _hook(model: nn.Module, installed: Installed, slot: Slot) -> None:
    for place in dict.fromkeys((slot.read, slot.write)):
        if place.key not in installed.hooks:
            hook = installed.hooks[place.key] = SiteHook(installed.runtime, place)
            installed.undo.append(partial(installed.hooks.pop, place.key))  # type: ignore[arg-type]
            if place.side == "output":
                installed.put(place.module, AFTER, hook.after, with_kwargs=True, prepend=True)
            else:
                installed.put(place.module, BEFORE, hook.before, with_kwargs=True)
    doors = _doors(model, slot.read.path)
    alike = not any(getattr(getattr(door, "config", None), "is_encoder_decoder", False) for door in doors)
    for n, door in enumerate(doors):
        if id(door) not in installed.doors:
            installed.doors.add(id(door))
            installed.undo.append(partial(installed.doors.discard, id(door)))
            noting = PassHook(installed.runtime, _positional(door), id(door), map(id, doors[:n]), alike)
            installed.put(door, BEFORE, noting.before, with_kwargs=True, prepend=True)
            installed.put(door, AFTER, noting.after, always_call=True)
    _hook_generate(model, installed, slot.read.path)


def _order_anew(hooks: dict[int, Any]) -> None:
    """Make the order of hooks, an OrderedDict, that of the dict beneath it, too, which moving one to the front leaves:
    torch.compile of PyTorch 2.11 counts hooks there, and failed."""
    for key in list(hooks):
        hooks[key] = hooks.pop(key)


def _doors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the way to a site that take token ids by name; the model itself where none does.

    A wrapper that hands on `*args` does not say which of them is the mask; the model inside it does.
    """
    found = [m for m in sites.ancestors(model, path) if "input_ids" in inspect.signature(m.forward).parameters]
    return list(dict.fromkeys(found)) or [model]


def _positional(module: nn.Module) -> list[str]:
    """Names of the arguments that a module's forward takes by position, in order."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _hook_generate(model: nn.Module, installed: Installed, path: str) -> None:
    """Stand before `generate` of every model on the way to a site: not all wrappers call the inner one's."""
    for maker in (m for m in sites.ancestors(model, path) if hasattr(type(m), "generate")):
        before = maker.__dict__.get("generate")
        if isinstance(before, GenerateHook):
            if before.runtime is not installed.runtime:
                raise SaeAttachError(
                    "SAEs are attached already, through another wrapper of this model; use that or detach"
                )
            continue
        for kind in (GenerateHook, PackedHook):
            if hasattr(maker, kind.name):
                _stand_before(maker, kind, installed)


def _stand_before(maker: nn.Module, kind: type[GenerateHook], installed: Installed) -> None:
    """Put a hook over a method of one model."""
    before = maker.__dict__.get(kind.name)
    ours = maker.__dict__[kind.name] = kind(installed.runtime, maker, getattr(maker, kind.name))

    def undo() -> None:
        if maker.__dict__.get(kind.name) is ours:  # else somebody has put his own over it since
            del maker.__dict__[kind.name]
            if before is not None:
                maker.__dict__[kind.name] = before

    installed.undo.append(undo)


def _present(model: nn.Module) -> Saes | None:
    """The SAEs attached to this model, also when it was wrapped since; not those of the model it was copied from."""
    saes = getattr(_root(model), "saes", None)
    return saes if isinstance(saes, Saes) and any(m is saes._model for m in _root(model).modules()) else None


def _root(model: nn.Module) -> nn.Module:
    """The module that a torch.compile wrapper wraps, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _special_ids(model: nn.Module) -> frozenset[int]:
    """BOS, EOS and padding ids that the model's configs name."""
    found: set[int] = set()
    for source in (getattr(model, "config", None), sites.text_config(model), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(i for i in found if isinstance(i, int))
