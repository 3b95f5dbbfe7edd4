"""Harvested activations on disk: folder/site/harvest.json and shard-NNNNN.safetensors, one bf16 tensor "x" (n, d_in)
each. Shard N holds the same tokens at every site of the folder; its metadata say of which windows, "FIRST:END".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_hooks.errors import DataError, SaeWarning
from sae_hooks.identity import weights_digest
from sae_hooks.processes import launched_share
from sae_hooks.sizes import whole

from .harvest import NORM_WINDOWS, TOKENS_PER_BATCH, SiteInfo, harvest, measure_sites
from .text import Window, check_rereadable

UNSTATED: Mapping[str, Any] = {  # as older harvests leave them
    "sites": (), "windows_per_shard": 0, "text": "", "special_ids": (), "model_weights": ""}


@dataclass(frozen=True, kw_only=True)
class HarvestInfo:
    """What a folder of shards says of itself.

    typical_norm and rms_norm: median and root mean square of the L2 norms of ordinary tokens, in the model's units.
    window: tokens of context. The others say what `write_shards` was given, and are empty in a harvest from before
    they were stored: all sites of the folder, the windows of a shard, a digest of the first shard's windows, of which
    there may be more by now, the ids of tokens that were left out, and the model's `weights_digest`, which is also
    empty for one that was partly off-loaded.
    """

    site: str
    model_name: str
    typical_norm: float
    rms_norm: float
    d_in: int
    window: int
    seed: int
    sites: tuple[str, ...] = ()
    windows_per_shard: int = 0
    text: str = ""
    special_ids: tuple[int, ...] = ()
    model_weights: str = ""

    @property
    def measured(self) -> SiteInfo:
        """The width and norms."""
        return SiteInfo(d_in=self.d_in, rms_norm=self.rms_norm, typical_norm=self.typical_norm)


def harvest_infos(model: nn.Module, folder: Path, sites: Sequence[str], windows: Iterable[Window],
                  special_ids: Sequence[int], *, model_name: str, window: int, seed: int,
                  windows_per_shard: int, text: Iterable[Window] | None = None) -> list[HarvestInfo]:
    """Claim folder for a harvest of sites: what it says of each, or, where it is empty, what is measured on the first
    windows and stored there. Of several processes that measure at once, the first one's norms count for all.

    text: all windows there are, where those to harvest are the first of them: so few might not tell it from others.
    Raises DataError if folder holds another harvest, if windows has no ordinary token, or is an iterator, which can be
    read only once.
    """
    check_rereadable(windows)
    windows_per_shard = whole("windows_per_shard", windows_per_shard)
    stated: dict[str, Any] = {"model_name": model_name, "window": window, "seed": seed, "sites": tuple(sorted(sites)),
              "windows_per_shard": windows_per_shard, **_read_with(model, special_ids),
              "text": _text(folder, sites, windows if text is None else text, windows_per_shard)}
    for site in sites:
        _check_same(folder / site, stated)
    if not all((folder / site / "harvest.json").exists() for site in sites):
        first = list(islice(windows, NORM_WINDOWS))
        for site, measured in measure_sites(model, sites, first, special_ids).items():
            _claim(folder / site, HarvestInfo(site=site, **stated, **asdict(measured)))
            _check_same(folder / site, stated)
    return [read_info(folder / site) for site in sites]


def write_shards(model: nn.Module, folder: Path, infos: Sequence[HarvestInfo], windows: Iterable[Window],
                 special_ids: Sequence[int], *, windows_per_shard: int, worker: int | None = None,
                 workers: int | None = None, tokens_per_batch: int = TOKENS_PER_BATCH,
                 text: Iterable[Window] | None = None) -> Iterator[int]:
    """Write every shard N = worker (mod workers) that is not there yet, for all sites; yield the tokens of each.

    A shard holds the windows_per_shard windows after the one before, or what is left of them, and is seen whole or not
    at all, so that a harvest that was cut off goes on where it stopped. windows must be the same at each reading: a
    list, or `text.windows`; there may be more of them later, which go into further shards, after the last one as it is.
    text is `harvest_infos`'; worker and workers are those of `accelerate launch` by default. A shard that cannot be
    read is written anew, with a SaeWarning. Raises DataError if folder holds another harvest, or a last shard that is
    not full and does not say where it ends, as older versions wrote it; or if a shard cannot be written (a full disk):
    the shards before are kept, and nothing of that one.
    """
    check_rereadable(windows)
    windows_per_shard = whole("windows_per_shard", windows_per_shard)
    tokens_per_batch = whole("tokens_per_batch", tokens_per_batch)
    share = launched_share() if worker is None or workers is None else (worker, workers)
    stated: dict[str, Any] = {"sites": tuple(sorted(i.site for i in infos)), "windows_per_shard": windows_per_shard,
              **_read_with(model, special_ids),
              "text": _text(folder, [i.site for i in infos], windows if text is None else text, windows_per_shard)}
    for info in infos:
        _check_same(folder / info.site, asdict(info) | stated)
    for info in infos:
        _claim(folder / info.site, HarvestInfo(**asdict(info) | stated))
    typical = {info.site: info.typical_norm for info in infos}
    places = [folder / info.site for info in infos]
    for n, first, mine in _groups(windows, windows_per_shard, share, places):
        paths = {info.site: _path(folder / info.site, n) for info in infos}
        harvested = partial(harvest, model, typical, mine, special_ids, tokens=tokens_per_batch)
        if all(_is_whole(paths[info.site], info.d_in) for info in infos):
            if _span(places, n) is None and not _path(places[0], n + 1).exists():
                _check_full(paths[infos[0].site], infos[0].d_in, mine, special_ids, harvested)
            continue
        found = harvested()
        for site, x in found.items():  # all of them, so that their rows are surely of the same tokens
            _save(x, paths[site], f"{first}:{first + len(mine)}")
        yield max(map(len, found.values()))


def read_info(folder: Path) -> HarvestInfo:
    """The harvest.json of a site's folder. Raises DataError if it is missing or not what it should be."""
    path = folder / "harvest.json"
    try:
        facts = json.loads(path.read_text())
        return HarvestInfo(**{**facts, **{name: tuple(facts.get(name, ())) for name in ("sites", "special_ids")}})
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no harvest.json, so it is no site of a harvest; harvest first") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not what a harvest writes ({error}); harvest into a new folder") from error


def read_shard(path: Path, d_in: int) -> Tensor:
    """The rows (n, d_in) of a shard, mapped, not read. Raises DataError that names it if it is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            x: Tensor = file.get_tensor("x")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is broken ({error}). Harvest again into this folder: only that shard is "
                        "written anew") from error
    if x.ndim != 2 or x.shape[1] != d_in or not x.is_floating_point():
        raise DataError(f"{path} is of another harvest: expected rows of {d_in}, got {tuple(x.shape)} {x.dtype}")
    return x


class Shards:
    """The activations in one site's folder, read shuffled; `len(shards)` tokens, memory-mapped."""

    def __init__(self, folder: Path, max_tokens: int | None = None) -> None:
        """Map the shards that are there, in order, until max_tokens are reached. DataError if there are none, or if
        one is broken, or max_tokens is no whole number above 0."""
        most = None if max_tokens is None else whole("max_tokens", max_tokens)
        self.info = read_info(folder)
        self.names: list[str] = []
        self.parts: list[Tensor] = []
        for path in sorted(folder.glob("shard-*.safetensors")):
            if most is None or len(self) < most:
                self.names.append(path.name)
                self.parts.append(read_shard(path, self.info.d_in))
        if not len(self):
            raise DataError(f"{folder} holds no activations (no shard-*.safetensors with rows); harvest first")

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def _path(folder: Path, n: int) -> Path:
    return folder / f"shard-{n:05d}.safetensors"


def _groups(windows: Iterable[Window], size: int, share: tuple[int, int],
            places: Sequence[Path]) -> Iterator[tuple[int, int, list[Window]]]:
    """(n, number of the first window, windows of shard n) for each n of this share. Each has `size` windows, where the
    shards that are there say nothing else. places: the sites' folders."""
    opened, n, first = iter(windows), 0, 0
    while mine := list(islice(opened, (end := _end(places, n, first, size)) - first)):
        if n % share[1] == share[0]:
            yield n, first, mine
        n, first = n + 1, end


def _end(places: Sequence[Path], n: int, first: int, size: int) -> int:
    """The number of the first window after shard n, which begins with window `first`."""
    here, following = _span(places, n), _span(places, n + 1)
    end = here[1] if here else following[0] if following else first + size
    if end <= first or (here and here[0] != first):
        raise DataError(f"{places[0]}: the shards do not follow each other: expected shard {n} to begin with window "
                        f"{first}, and they say {here or following}; harvest into a new folder")
    return end


def _span(places: Sequence[Path], n: int) -> tuple[int, int] | None:
    """(first, end) of the windows of shard n, as one of the sites' says; None if none does: missing, broken, or old."""
    for place in places:
        try:
            with safe_open(_path(place, n), framework="pt") as file:
                said = re.fullmatch(r"(\d+):(\d+)", (file.metadata() or {}).get("windows", ""))
        except (OSError, SafetensorError):
            continue
        if said:
            return int(said[1]), int(said[2])
    return None


def _check_full(path: Path, d_in: int, windows: Sequence[Window], special_ids: Sequence[int],
                harvested: Callable[[], Mapping[str, Tensor]]) -> None:
    """Raise DataError if a shard that does not say where it ends lacks the last of its windows. They are harvested to
    tell, if it has no more rows than there are tokens in the others."""
    rows, special = len(read_shard(path, d_in)), list(special_ids)
    if rows > sum(int((~np.isin(window, special)).sum()) for window in windows[:-1]):
        return
    expected = max(map(len, harvested().values()))
    if rows < expected - len(windows[-1]) / 2:  # another device may find a sink more or less
        raise DataError(
            f"{path} has {rows:,} of the {expected:,} tokens of its {len(windows):,} windows: a shorter harvest ended "
            "there, before shards said where they end. Harvest into a new folder; or remove this shard at every site, "
            "to have it written anew, if no training is to go on that has read it")


def _is_whole(path: Path, d_in: int) -> bool:
    if not path.exists():
        return False
    try:
        read_shard(path, d_in)
    except DataError as error:
        warnings.warn(f"a shard is written anew: {error}", SaeWarning, stacklevel=3)
        return False
    return True


def _save(x: Tensor, path: Path, windows: str) -> None:
    for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        left.unlink(missing_ok=True)
    try:
        content, said = {"x": x.contiguous()}, {"windows": windows}
        _write_whole(path, lambda scratch: save_file(content, scratch, said), os.replace)
    except (OSError, SafetensorError) as error:
        kept = len(list(path.parent.glob("shard-*.safetensors")))
        raise DataError(
            f"{path} could not be written ({error}). The {kept} shards that are there are whole, and nothing is left "
            f"of this one, of {x.nbytes / 1e6:,.1f} MB. Make room, and start the same harvest again: it goes on there"
        ) from error


def _write_whole(path: Path, write: Callable[[Path], object], appear: Callable[[Path, Path], object]) -> None:
    """Have `write` fill a scratch file, and `appear` move it to path; nothing else is ever left."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        _sync(scratch, os.O_RDWR)
        appear(scratch, path)
        _sync(path.parent, os.O_RDONLY)
    finally:
        scratch.unlink(missing_ok=True)


def _first_wins(scratch: Path, path: Path) -> None:
    """Move scratch to path unless there is a file."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(scratch, path)


def _sync(path: Path, flags: int) -> None:
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _claim(folder: Path, info: HarvestInfo) -> None:
    """Write folder/harvest.json, unless there is one. Two processes at once: the first one's stays."""
    stated = {name: value for name, value in asdict(info).items() if value != UNSTATED.get(name)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "harvest.json").exists():
            text = json.dumps(stated, indent=1)
            _write_whole(folder / "harvest.json", lambda scratch: scratch.write_text(text), _first_wins)
    except OSError as error:
        raise DataError(f"{folder} cannot hold a harvest: {error}") from error


def _check_same(folder: Path, asked: Mapping[str, Any]) -> None:
    """Compare what harvest.json, if there is one, and `asked` both state."""
    if not (folder / "harvest.json").exists():
        return
    there = asdict(read_info(folder))
    other = [f"{name}: there {there[name]!r}, here {here!r}" for name, here in asked.items()
             if here != there[name] and UNSTATED.get(name) not in (here, there[name])]
    if other:
        raise DataError(f"{folder} holds another harvest; take a new folder ({'; '.join(other)})")


def _read_with(model: nn.Module, special_ids: Sequence[int]) -> dict[str, Any]:
    """What decides which rows there are, and what stands in them, beside the text."""
    return {"special_ids": tuple(sorted({int(i) for i in special_ids})), "model_weights": weights_digest(model)}


def _text(folder: Path, sites: Sequence[str], windows: Iterable[Window], most: int) -> str:
    """The digest of the text that folder has, if the first windows, `most` of them, begin with those it is of; else
    that of these."""
    digests = text_digests(islice(windows, most))
    there = {read_info(folder / site).text for site in sites if (folder / site / "harvest.json").exists()}
    return next((digest for digest in digests if digest in there), (digests or [""])[-1])


def text_digests(windows: Iterable[Window]) -> list[str]:
    """Of the first window's ids and length, of the first two windows', and so on, so that the digest of a text that
    became longer at its end is among them."""
    state, found = hashlib.sha256(), []
    for window in windows:
        state.update(len(window).to_bytes(4, "little") + window.tobytes())
        found.append(state.hexdigest()[:16])
    return found
