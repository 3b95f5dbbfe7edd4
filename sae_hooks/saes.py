"""`model.saes`: the attached SAEs as a mapping, and what can be asked of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import check, edits, sites
from .capture import Captured
from .edits import Edit, Edits, Strength
from .errors import EditError, SaeAttachError
from .handles import CaptureHandle, Handle
from .runtime import EditRequest, Runtime, Slot, SpliceRequest, WatchRequest
from .sae import SAE

UNITS = ("activation", "max")  # of a clamp's or an add's strength


class Saes(Mapping[str, SAE]):
    """The SAEs attached to one model, by name (their site, unless another name was given); weights load at first use.

    They may be copied then, so detach and attach again after changing the weights of an SAE of your own.
    Edits return a `Handle`: a context manager, also removed by `.remove()`. Keywords that they share:

    layer, site, name: which SAE; needed where several are attached. `site` is a path with its side, or an alias.
    tokens: "all", "prompt" (what `generate` was given, or begins with; outside of it, all), "generated", or a boolean
        mask (tokens) or (batch, tokens). A pass raises EditError where a generate runs whose prompt cannot be told.
    special_tokens: False leaves alone BOS and EOS (by token id; padding, by attention mask, is in any case) and
        attention sinks (norm above 10 times the `typical_norm` stored with the SAE). `model.saes.special_ids` holds
        the ids and may be set.
    only_if_active: touch a feature only where it fires.
    scope: "model", seen by every thread, or "context", seen by the code that opened it (ContextVar).

    A strength is a number or a tensor (batch,), one for each row; NaN leaves a row untouched. Its unit, for clamp and
    add, is "activation", the feature's own scale, or "max": the largest activation in the statistics kept with the SAE
    (`SAE.statistics`). It is worked out when the edit is opened: `handle.edits` and its JSON are in activations.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, installed: Any, detach: Callable[[nn.Module], None]) -> None:
        self._model, self._runtime, self._installed, self._detach = model, runtime, installed, detach
        self._slots: dict[str, Slot] = {}

    def __getitem__(self, name: str) -> SAE:
        return self._pick(name=name).sae

    def get(self, name: str, default: Any = None) -> Any:
        """The SAE of that name, or the default."""
        slot = self._slots.get(name)
        return default if slot is None else slot.sae

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        lines = [f"  {name}: {slot.sae.extra_repr() if slot.loaded else 'not loaded yet'}"
                 for name, slot in self._slots.items()]
        return "\n".join([f"{len(self)} SAEs attached to {type(self._model).__name__}", *lines])

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that edits leave alone: BOS, EOS and padding of the model's configs, unless set otherwise."""
        return self._runtime.special_ids

    @special_ids.setter
    def special_ids(self, ids: Iterable[int]) -> None:
        self._runtime.special_ids = frozenset(int(i) for i in ids)

    def clamp(self, values: Mapping[int, Strength], *, unit: str = "activation", **where: Any) -> Handle:
        """Set each feature's activation to its value, whether or not it fired; unit="max": times the feature's maximum.

        Raises EditError before anything changes.
        """
        return self._edit("clamp", values, unit, **where)

    def scale(self, factors: Mapping[int, Strength], **where: Any) -> Handle:
        """Multiply each feature's activation by its factor."""
        return self._edit("scale", factors, "activation", **where)

    def add(self, amounts: Mapping[int, Strength], *, unit: str = "activation", **where: Any) -> Handle:
        """Add amount times the feature's decoder row, whatever the feature does; costs no encoding.

        unit="max": amount times the feature's maximum times the row.
        """
        return self._edit("add", amounts, unit, **where)

    def ablate(self, features: Iterable[int], **where: Any) -> Handle:
        """Set features to 0: what does the model lose without them?"""
        try:
            listed = list(features)
            zeros = dict.fromkeys(listed, 0.0)
        except TypeError:
            raise EditError(f"ablate takes features, such as [3, 5]; got {features!r}") from None
        if len(zeros) != len(listed):
            raise EditError(f"ablate names a feature twice: {listed}")
        return self._edit("clamp", zeros, "activation", **where)

    def apply(self, document: str | Edits, *, scope: str = "model") -> Handle:
        """Open edits that were shared (`handle.edits`, or its JSON); all of them or, on any error, none."""
        shared = Edits.from_json(document) if isinstance(document, str) else document
        if not isinstance(shared, Edits):
            raise EditError(f"apply takes handle.edits, or its JSON text; got {type(document).__name__}")
        return Handle(self._runtime, [self._request(e, self._pick(name=e.site)) for e in shared], scope)

    def splice(self, *, layer: int | None = None, site: str | None = None, name: str | None = None,
               keep_error: bool = False, tokens: str | Tensor = "all", special_tokens: bool = False,
               scope: str = "model") -> Handle:
        """Put the reconstruction x_hat in place of x, at all attached sites or the one named.

        Edits that are open apply to the features before they are decoded. keep_error=True keeps the reconstruction
        error, so that without edits nothing changes at all.
        """
        found = self._matching(layer, site, name)
        slots = [] if keep_error else [self._ready(slot) for slot in found]
        chosen = edits.check_tokens(tokens)
        return Handle(self._runtime, [SpliceRequest(s, chosen, special_tokens) for s in slots], scope)

    def capture(self, *, layer: int | None = None, site: str | None = None, name: str | None = None,
                special_tokens: bool = False, scope: str = "model") -> CaptureHandle:
        """Collect the features of every forward pass inside the block: `with model.saes.capture() as features`.

        `features[name]` is a SparseFeatures with a row for each token computed; see `Captured`. Features are those of
        the activations that reach the site, before edits at that site.
        """
        slots = self._several(layer, site, name)
        captured = Captured({s.name: s.on for s in slots})
        requests = [WatchRequest(s, special_tokens=special_tokens, sink=captured.sink(s.name)) for s in slots]
        return CaptureHandle(self._runtime, requests, scope, captured)

    def check(
        self, inputs: Any, *, layer: int | None = None, site: str | None = None, name: str | None = None
    ) -> check.Report:
        """Judge the fit of SAE and model on `inputs`: FVU, L0, dead share, loss clean, spliced and zero-ablated, a
        verdict.

        inputs: token ids (batch, tokens), or a mapping with input_ids and attention_mask. Measures in eval mode;
        changes nothing.
        """
        return check.check(self._model, self._runtime, self._several(layer, site, name), inputs)

    def detach(self) -> None:
        """Take all hooks out again; the model is as it was before the first attach."""
        self._detach(self._model)

    def _edit(self, op: str, values: Mapping[int, Strength], unit: str, /, *, layer: int | None = None,
              site: str | None = None, name: str | None = None, scope: str = "model", **how: Any) -> Handle:
        if unit not in UNITS:
            raise EditError(f"a strength's unit is one of {', '.join(UNITS)}; got {unit!r}")
        slot = self._pick(layer, site, name)
        made = edits.edit(op, slot.name, values, **how)
        if unit == "max":
            made = _times_max(made, self._ready(slot).sae)
        return Handle(self._runtime, [self._request(made, slot)], scope)

    def _request(self, made: Edit, slot: Slot) -> EditRequest:
        sae = self._ready(slot).sae
        edits.check(made, sae.d_sae)
        edits.check_range(made, sae.W_dec, torch.float32)
        return EditRequest(slot, made.tokens, made.special_tokens, edit=made)

    def _several(self, layer: int | None, site: str | None, name: str | None) -> list[Slot]:
        return [self._ready(slot) for slot in self._matching(layer, site, name)]

    def _pick(self, layer: int | None = None, site: str | None = None, name: str | None = None) -> Slot:
        found = self._matching(layer, site, name)
        if len(found) > 1:
            names = ", ".join(slot.name for slot in found)
            raise EditError(f"{len(found)} SAEs are attached; say which, by layer=, site= or name=: {names}")
        return found[0]

    def _matching(self, layer: int | None, site: str | None, name: str | None) -> list[Slot]:
        exact = self._slots.get(name or "")
        found = [s for s in ([exact] if exact else self._slots.values())
                 if (name is None or _named(s, name)) and (layer is None or _layer(s) == layer)
                 and (site is None or self._at(s, site))]
        if not found:
            given = {"layer": layer, "site": site, "name": name}
            asked = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
            there = ", ".join(s.name if s.name == s.read.key else f"{s.name} at {s.read.key}"
                              for s in self._slots.values())
            raise EditError(f"no SAE with {asked or 'any name'}{self._meaning(layer, site)} is attached; there are: "
                            f"{there or 'none'}")
        return found

    def _meaning(self, layer: int | None, site: str | None) -> str:
        """What an alias means in this model, which may be another place than in one with other norms."""
        layers = [n for s in self._slots.values() if (n := _layer(s)) is not None and layer in (None, n)]
        return f" (here {sites.alias(self._model, layers[0], site)[0]})" if layers and site in sites.KINDS else ""

    def _at(self, slot: Slot, site: str) -> bool:
        layer = _layer(slot)
        if site in sites.KINDS and layer is not None:
            return sites.resolve(self._model, sites.alias(self._model, layer, site)[0]).key == slot.read.key
        return _named(slot, site) or slot.read.key.endswith(f".{site}")

    def _ready(self, slot: Slot) -> Slot:
        """The slot with its weights loaded, after making sure that its hooks still stand in the model's way."""
        for place in (slot.read, slot.write):
            _check_in_place(self._model, place)
            if self._model.training and _checkpoints(self._model):
                _check_computed_once(place)
        slot.sae  # noqa: B018  (loads)
        return slot

    def __deepcopy__(self, memo: dict[int, Any]) -> Saes:
        return _copy()

    def __reduce__(self) -> Any:
        return _copy, ()


def _times_max(made: Edit, sae: SAE) -> Edit:
    """The edit with each strength times its feature's largest activation. Raises EditError where that is not known."""
    edits.check(made, sae.d_sae)
    if sae.statistics is None:
        raise EditError(
            f'unit="max" needs the statistics of {made.site}, and none are kept with this SAE: write the features of '
            "many texts with export_features, then sae.statistics = open_features(folder).statistics(); "
            "save_pretrained keeps them"
        )
    largest = sae.statistics.max[list(made.features)]
    silent = [feature for feature, most in zip(made.features, largest.tolist(), strict=True) if not most]
    if silent:
        raise EditError(
            f"feature {silent[0]} at {made.site} never fired in the {sae.statistics.tokens} tokens of its statistics, "
            "so that it has no maximum; give its strength in activations, or measure more text"
        )
    values = made.values * largest
    if values.isinf().any():
        raise EditError(f"{made.op} at {made.site}: a strength times the feature's maximum is too large for float32")
    return replace(made, values=values)


def _copy() -> Saes:
    """What a copy or pickle of a model carries in place of its SAEs: nothing attached."""
    return Saes(nn.Module(), Runtime(frozenset()), None, lambda model: None)


def _check_in_place(model: nn.Module, place: sites.Site) -> None:
    """Raise SaeAttachError if the hooked module is no longer part of the model."""
    try:
        present = model.get_submodule(place.path) is place.module
    except AttributeError:
        present = False
    if not present:
        raise SaeAttachError(
            f"the module {place.path} was replaced since the SAE was attached (PEFT, quantisation?); "
            "detach and attach again"
        )


def _checkpoints(model: nn.Module) -> bool:
    """Whether gradient (activation) checkpointing is on, in transformers' models of any version."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _check_computed_once(place: sites.Site) -> None:
    """Raise SaeAttachError if gradient checkpointing runs the hooks at a place twice."""
    layer = place.side == "output" and re.search(r"\.\d+$", place.path)
    kind = type(place.module)
    if not layer:
        where, way_out = "lies inside a layer that", "edit a layer's output"
    elif hasattr(kind, "gradient_checkpointing") and kind.__call__ is not nn.Module.__call__:
        where, way_out = "is of a layer that, with its hooks,", "take transformers 5.23, where hooks run once"
    else:
        return
    raise SaeAttachError(
        f"{place} {where} gradient checkpointing computes twice, the second time perhaps after the edit has ended; "
        f"turn checkpointing off, or {way_out}"
    )


def _named(slot: Slot, name: str) -> bool:
    return name in (slot.name, slot.read.key)


def _layer(slot: Slot) -> int | None:
    found = re.search(rf"(?:^|\.)(?:{'|'.join(sites.LAYER_LISTS)})\.(\d+)(?:\.|$)", slot.read.path)
    return int(found[1]) if found else None
