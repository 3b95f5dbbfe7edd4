"""Which of the SAEs that a source offers are meant by layer=, site=, width=, l0=. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from ..errors import SaeFormatError, SaeMismatchError, SaeNotFoundError
from . import DIALECTS
from .entry import Entry, width_from_label
from .hook_names import SIDES, in_layer, kind_of, layer_of, may_mean, stack_of

CANONICAL_L0 = 100.0  # Gemma Scope's "canonical" SAE of a site is the one whose average L0 is nearest to this
MULTI_LAYER = ("crosscoder", "clt")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for. `site`: a kind ("resid_post") or a module path with its side; `layers`: None for all.
    `l0_given`: whether l0 is a number that the caller gave."""

    layers: tuple[int, ...] | None
    site: str | None
    width: int | None
    l0: float
    l0_given: bool = False

    @property
    def path(self) -> str | None:
        """The site, where a module path was given."""
        return self.site if self.site and "." in self.site else None


def wanted(layer: int | Iterable[int] | None, site: str | None, width: int | str | None,
           l0: float | str | None) -> Wanted:
    """Check the selectors as people give them. Raises SaeNotFoundError for what no SAE can be."""
    given = None if layer is None else tuple(layer) if isinstance(layer, Iterable) else (layer,)
    if any(isinstance(n, bool) or not isinstance(n, Integral) or n < 0 for n in given or ()):
        raise SaeNotFoundError(f"layer must be a whole number from 0 on, or several, got {layer!r}")
    layers = None if given is None else tuple(int(n) for n in given)
    if site is not None and "." in site and site.rpartition(".")[2] not in SIDES:
        raise SaeNotFoundError(f"a site ends in .output, .input or .normalized, got {site!r}; "
                               f"do you mean {site + '.output'!r}?")
    try:
        features = width_from_label(width) if isinstance(width, str) else width
        target = CANONICAL_L0 if l0 in (None, "canonical") else float(l0)
        if not math.isfinite(target):
            raise ValueError("not finite")
    except (TypeError, ValueError) as error:
        raise SaeNotFoundError(f"width is a number or a label such as '16k', l0 a number or 'canonical'; got "
                               f"width={width!r}, l0={l0!r}: {error}") from error
    return Wanted(layers=layers, site=site, width=features, l0=target, l0_given=l0 not in (None, "canonical"))


def may_match(entry: Entry, want: Wanted) -> bool:
    """Whether nothing that is known of the entry speaks against it; its config may not have been read yet."""
    at = (layer_of(want.path) if want.path else None) if want.layers is None else None
    layers = want.layers if want.layers is not None else (at,) if at is not None else None
    if layers is not None and entry.layer is not None and entry.layer not in layers:
        return False
    if want.path:
        return entry.site is None or same_site(entry.site, want.path)
    return want.site is None or entry.kind is None or entry.kind == want.site


def matches(entry: Entry, want: Wanted) -> bool:
    """Whether the entry is what was asked for, but for L0."""
    here = want.layers is None or entry.layer in want.layers
    named = want.site is None or (same_site(entry.site or "", want.path) if want.path else entry.kind == want.site)
    return here and named and (want.width is None or entry.width == want.width)


def placed(entry: Entry, want: Wanted) -> Entry:
    """The entry at the site that the caller names, where nothing else tells it; any other entry unchanged.

    An entry whose config gives a hook name of an unknown model goes to a path that this name may mean, and to a kind
    that it says: "blocks.3.hook_mlp_out" is never the residual stream, nor of layer 2.
    """
    if entry.site is not None or want.site is None or entry.kind in MULTI_LAYER or entry.flaw:
        return entry
    layer = entry.layer if entry.layer is not None else _only_layer(want)
    if want.path:
        if entry.hook and not may_mean(entry.hook, want.path):
            return entry
        written = entry.site_out or (None if entry.kind == "transcoder" else want.path)
        return replace(entry, site=want.path, site_out=written, layer=layer, kind=entry.kind or kind_of(want.path),
                       placed=True)
    fits = entry.kind == want.site or (entry.kind is None and entry.hook is None)
    sites = DIALECTS[entry.dialect].sites(want.site, layer) if fits else None
    if sites is None:
        return entry
    return replace(entry, site=sites[0], site_out=sites[1], layer=layer, kind=want.site, placed=True)


def _only_layer(want: Wanted) -> int | None:
    """The one layer that the caller means, or None."""
    if want.layers is not None and len(want.layers) == 1:
        return want.layers[0]
    return layer_of(want.path) if want.path else None


def all_meant(want: Wanted) -> bool:
    """Whether no SAE in particular is asked for, so that one that cannot be had is no hindrance to the others."""
    return want.layers is None and want.path is None


def is_lost(entry: Entry, want: Wanted) -> bool:
    """Whether an SAE may be what was asked for, but for its site, which nothing tells."""
    return entry.site is None and entry.kind not in MULTI_LAYER and not entry.flaw and matches(entry, want)


def without_pickles(found: list[Entry], want: Wanted, *, allowed: bool) -> tuple[list[Entry], list[Entry]]:
    """Those to choose from: no pickles of sites where another file is, nor, unless they are allowed, of other sites
    where all are meant and any file fits; and these others, which are missed then."""
    others = [entry for entry in found if not (entry.pickled or entry.placed or entry.flaw)]
    safe = {entry.site for entry in others if entry.site and matches(entry, want)}
    kept = [entry for entry in found if not entry.pickled or entry.site not in safe]
    if allowed or not all_meant(want) or not safe:
        return kept, []
    return [entry for entry in kept if not entry.pickled], [e for e in kept if e.pickled and matches(e, want)]


def choose(found: Sequence[Entry], want: Wanted, where: str, offered: Sequence[Entry],
           unread: Sequence[Entry] = ()) -> list[Entry]:
    """One of `found` for each site: smallest width, L0 nearest to what was asked for, ties to the smaller.

    One that was placed is left out where another tells its site itself; so are others where one is at exactly the path
    that was given. One with a flaw is among them only where it alone is known to be
    at its site, or where nothing else fits: what its config does not tell may be what was asked for. One whose site
    cannot be told is left out where all are meant and others tell theirs. Raises SaeNotFoundError listing what is
    `offered`, and of which layers others are whose configs are `unread`, or where an L0 was given and of several SAEs
    none is known, SaeFormatError where the site of what is left cannot be told, SaeMismatchError where several may be
    it.
    """
    fitting = _readable([entry for entry in found if matches(entry, want)])
    flawed = [entry for entry in found if entry.flaw]
    if not fitting and flawed:
        return flawed
    if not fitting:
        why = [] if want.path else [untold(entry) for entry in found if is_lost(entry, replace(want, layers=None))]
        raise SaeNotFoundError("\n".join([f"{where}: nothing for {_asked(want)}. It offers:", summary(offered, unread),
                                          *why[:1]]))
    if all(entry.kind in MULTI_LAYER for entry in fitting):
        raise SaeFormatError(f"{where}: {fitting[0].kind} SAEs span several layers; sae_hooks loads single-layer "
                             f"ones only. It offers:\n{summary(offered)}")
    fitting = [entry for entry in fitting if entry.kind not in MULTI_LAYER]
    lost = [entry for entry in fitting if entry.site is None]
    fitting = [entry for entry in fitting if entry.site is not None]
    if lost and not (fitting and all_meant(want)):
        raise SaeFormatError(f"{where}: {untold(lost[0])}")
    missing = sorted(set(want.layers or ()) - {entry.layer for entry in fitting if entry.layer is not None})
    if missing:
        raise SaeNotFoundError(f"{where}: no layer {', '.join(map(str, missing))}. It offers:\n"
                               + summary(offered, unread))
    fitting = _best_told(fitting, want, where)
    fitting = [entry for entry in fitting if want.path and entry.site == want.path] or fitting
    return sorted(_best(fitting, want, where), key=lambda e: (e.layer is None, e.layer or 0, e.site or ""))


def undecided(found: Sequence[Entry], want: Wanted) -> list[Entry]:
    """Those whose L0 only their evaluation tells, where it decides: of one site several SAEs have the smallest width.
    """
    sites: dict[tuple[str | None, str | None], list[Entry]] = {}
    for entry in found:
        if matches(entry, want) and entry.site and not entry.flaw:
            sites.setdefault((entry.site, entry.site_out), []).append(entry)
    rivals = [[entry for entry in one if _width(entry) == min(map(_width, one))] for one in sites.values()]
    return [entry for alike in rivals if len(alike) > 1 for entry in alike
            if entry.l0 is None and entry.evaluation]


def _best(fitting: list[Entry], want: Wanted, where: str) -> list[Entry]:
    """The first by rank for each site. Raises SaeNotFoundError where an L0 was given and of several none is known."""
    best: dict[tuple[str | None, str | None], Entry] = {}
    for entry in sorted(fitting, key=lambda entry: _rank(entry, want)):
        best.setdefault((entry.site, entry.site_out), entry)
    for one in (entry for entry in best.values() if want.l0_given and entry.l0 is None):
        alike = [e.weights for e in fitting if (e.site, e.site_out, e.width) == (one.site, one.site_out, one.width)]
        if len(alike) > 1:
            raise SaeNotFoundError(f"{where}: l0={want.l0:g} chooses none of several SAEs of {one.site}, for no L0 of "
                                   f"them is known; name the folder of one: {', '.join(alike)}")
    return list(best.values())


def _readable(fitting: list[Entry]) -> list[Entry]:
    """Without those of unreadable configs, but for one that is alone at the site that its folder's name tells."""
    sound = {entry.site for entry in fitting if not entry.flaw}
    return [entry for entry in fitting if not entry.flaw or (entry.site and entry.site not in sound)]


def _best_told(fitting: list[Entry], want: Wanted, where: str) -> list[Entry]:
    """Without what was placed where others tell that site themselves. Raises SaeMismatchError where hooks differ."""
    told = {entry.layer for entry in fitting if not entry.placed}
    fitting = [entry for entry in fitting if not entry.placed or entry.layer not in told]
    hooks = sorted({entry.hook for entry in fitting if entry.placed and entry.hook})
    if len(hooks) > 1:
        raise SaeMismatchError(f"{where}: which of {', '.join(hooks)} is {want.site} cannot be told; name the folder "
                               "of the one that is meant")
    return fitting


def untold(entry: Entry) -> str:
    """Why an entry has no site, and what to do."""
    how = "give site= as a module path with its side, 'model.layers.2.output'"
    if entry.hook:
        return f"{entry.config} calls the site {entry.hook!r}, and which module that is depends on the model; {how}"
    return (f"neither its name nor a config tells which site {entry.weights} was trained on; {how}, or a kind and "
            "layer=")


def same_site(one: str, other: str) -> bool:
    """Whether two paths mean the same place: equal, one the end of the other, or equal from the layer on.

    The last is for multimodal models, which keep "model.layers.7" as "model.language_model.layers.7"; what stands
    before the layer may differ by such wrappers alone: an encoder's layer is not the decoder's.
    """
    return one == other or one.endswith("." + other) or other.endswith("." + one) or (
        layer_of(one) is not None and in_layer(one) == in_layer(other) and stack_of(one) == stack_of(other))


def summary(found: Sequence[Entry], unread: Sequence[Entry] = ()) -> str:
    """What a source offers, a line for each kind, and which layers those have whose configs are `unread`."""
    lines = []
    called = [_called(entry) for entry in found]
    for kind in dict.fromkeys(called):
        of_kind = [entry for entry, told in zip(found, called, strict=True) if told == kind]
        widths = sorted({entry.width for entry in of_kind if entry.width is not None})
        told = [f"layers {layers}"] if (layers := _layers(of_kind)) else []
        told += [f"widths {', '.join(map(str, widths))}"] if widths else []
        told += ["not supported"] if kind in MULTI_LAYER else []
        lines.append(f"  {kind}" + (f": {'; '.join(told)}" if told else ""))
    if unread:
        which = f"layers {_layers(unread)}" if _layers(unread) else "others"
        lines.append(f"  {which}, of which `sae-hooks list` or list_saes tells more")
    return "\n".join(lines) or "  nothing"


def _called(entry: Entry) -> str:
    """What a summary calls the kind of an entry, or where that has no name its site: "h.N.input"."""
    if entry.flaw or entry.kind or not entry.site:
        return "unreadable" if entry.flaw else entry.kind or "unknown site"
    return re.sub(r"\.\d+\.", ".N.", in_layer(entry.site), count=1)


def _layers(found: Sequence[Entry]) -> str:
    return spans(sorted({entry.layer for entry in found if entry.layer is not None}))


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: "0-25, 30"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rank(entry: Entry, want: Wanted) -> tuple[float, float, float, int, str]:
    distance = abs(entry.l0 - want.l0) if entry.l0 is not None else math.inf
    return _width(entry), distance, entry.l0 or 0.0, len(entry.weights), entry.weights


def _width(entry: Entry) -> float:
    return math.inf if entry.width is None else entry.width


def _asked(want: Wanted) -> str:
    asked = {"layer": want.layers and ", ".join(map(str, want.layers)), "site": want.site, "width": want.width}
    return ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None) or "these selectors"
