"""Finding SAEs in a folder or on the Hub, and reading them: the only way from files to `SAE`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import SaeDownloadError, SaeFormatError, SaeMismatchError, SaeNotFoundError, SaeWarning, UnsafeFileError
from ..formats import DIALECTS, Entry
from ..formats.config import number
from ..formats.selection import (
    Wanted,
    all_meant,
    choose,
    is_lost,
    may_match,
    placed,
    undecided,
    untold,
    wanted,
    without_pickles,
)
from ..formats.weights import sizes, warn_odd_decoder
from ..sae import SAE
from .absent import nothing_found
from .failures import located
from .parsing import read_config
from .pickles import read_pickle
from .sources import Source, open_source
from .statistics_file import beside, of_other_weights, read_statistics
from .weight_files import check_dtype, check_finite, check_held, read_shapes, read_tensors

AT_ONCE = 8  # small configs fetched at a time


@dataclass(frozen=True)
class SaeFile:
    """One SAE of a source, not read yet. `where` is "owner/name@commit/path" or a local path. `allow_pickle`: whether
    it may be read where its weights are a pickle."""

    entry: Entry
    where: str
    source: Source = field(repr=False, compare=False)
    allow_pickle: bool = field(default=False, repr=False, compare=False)

    @torch.inference_mode(False)  # what is made in inference mode can never take part in training
    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> SAE:
        """Fetch, check and read it, with its statistics if there are any. `dtype`: of the matrices; None keeps the
        file's. Warns of statistics that state that they are of other weights, and leaves them out.

        Raises SaeDownloadError, SaeFormatError, UnsafeFileError, SaeMismatchError; the message begins with `where`.
        """
        check_dtype(dtype)
        self.check_allowed()
        config = _config(self.source, self.entry.config) if self.entry.config else None
        path = self.source.fetch(self.entry.weights)
        with located(self.where):
            sae = _built(self.entry, path, config)
            warn_odd_decoder(sae.W_dec)
        self._read_statistics(sae)
        if not self.source.local:
            sae.metadata.setdefault("source", self.where)
        with located(self.where):
            check_held(dict(sae.to(dtype).named_parameters()), dtype)
        return sae.to(device)

    def check_allowed(self) -> None:
        """Raise UnsafeFileError, which names the ways out, where the weights are a pickle and may not be read."""
        if self.entry.pickled and not self.allow_pickle:
            raise UnsafeFileError(
                f"{self.where} is a pickle, which can run code when it is opened. allow_pickle=True (--allow-pickle) "
                "reads it with torch's weights_only loader, which runs no code of the file; `sae-hooks convert SOURCE "
                "FOLDER --allow-pickle` writes it as safetensors, once and for all")

    def _read_statistics(self, sae: SAE) -> None:
        name = beside(self.entry)
        if name and self.source.has(name):
            path = self.source.fetch(name)
            with located(self.source.where(name)):
                measured = read_statistics(path, sae.d_sae)
                if not of_other_weights(path, sae):
                    sae.statistics = measured
                    return
            warnings.warn(f"{self.source.where(name)} holds the statistics of other weights than {self.where}; they "
                          "are left out. Measure them anew and save them", SaeWarning, stacklevel=3)


class SaeTable(list[Entry]):
    """What a source offers; prints as a table."""

    def __repr__(self) -> str:
        head = ("site", "layer", "width", "l0", "path")
        rows = [(entry.shown, _cell(entry.layer), _cell(entry.width), _cell(entry.l0), entry.weights)
                for entry in self]
        wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip()
                         for row in (head, *rows))

    __str__ = __repr__


def find_saes(source: str | Path, *, layer: int | Iterable[int] | None = None, site: str | None = None,
              width: int | str | None = None, l0: float | str | None = None, revision: str | None = None,
              token: str | None = None, cache_dir: str | Path | None = None,
              allow_pickle: bool = False) -> list[SaeFile]:
    """The SAEs that are meant, one for each site, in the order of layers. Reads no weights.

    No selector: every layer, the smallest width, the average L0 nearest 100 ("canonical"). Without `site`, Gemma Scope
    and sparsify give no embedding, Gemma Scope 2 the residual stream alone, dictionary_learning too where folders tell
    it, Llama Scope one of the texts that it was trained on, and any other source all kinds that it has. `site`:
    "resid_post", "mlp_out", "attn_out", "transcoder", "embedding" or a module path with its side; `l0`: nearest wins,
    as names and configs have it, or, where they tell none, as dictionary_learning measured it (eval_results.json).
    `allow_pickle`: whether weights that PyTorch pickled may be read, by its weights_only loader, which runs no code of
    the file; where other files fit, they are meant. Raises SaeNotFoundError listing what there is, SaeDownloadError;
    SaeFormatError for a config that cannot be read and UnsafeFileError for a pickle that may not, if that SAE is meant
    or nothing else fits. Where all layers are meant and others fit, such SAEs are left out with a warning, and so are
    those that do not tell their site. Links to folders elsewhere are not followed, with a warning.
    """
    want = wanted(layer, site, width, l0)
    at = open_source(source, revision=revision, token=token, cache_dir=cache_dir)
    offered = _offered(at)
    possible = [entry for entry in (_meant(offered) if want.site is None else offered) if may_match(entry, want)]
    told, looked_at = [placed(entry, want) for entry in _refined(at, possible)], frozenset(possible)
    told, missed = without_pickles(told, want, allowed=allow_pickle)
    _warn_of_left("as PyTorch pickled it, which allow_pickle=True reads", [at.where(e.weights) for e in missed])
    told = _evaluated(at, told, want)
    others = [entry for entry in offered if entry not in looked_at]
    chosen = choose(told, want, at.where(), told + [e for e in others if e.kind or not _unread(e)],
                    [e for e in others if not e.kind and _unread(e)])
    for entry in chosen:
        if entry.flaw:
            _refine(at, entry, _config)  # raises it
            raise SaeFormatError(f"{at.where(entry.weights)}: {entry.flaw}")  # unless its name alone told it
    if all_meant(want):
        _warn_of_left("as its config cannot be read", [entry.flaw for entry in told if entry.flaw])
        _warn_of_left("as its site is not told", [untold(entry) for entry in told if is_lost(entry, want)])
    files = [SaeFile(_measured(at, entry), at.where(entry.weights), at, allow_pickle) for entry in chosen]
    for file in files:
        file.check_allowed()
    return files


def load_sae(source: str | Path, *, layer: int | None = None, site: str | None = None,
             width: int | str | None = None, l0: float | str | None = None, revision: str | None = None,
             token: str | None = None, cache_dir: str | Path | None = None, device: str | torch.device = "cpu",
             dtype: torch.dtype | None = None, allow_pickle: bool = False) -> SAE:
    """Load the one SAE that the selectors mean; see find_saes and SaeFile.load for what they mean and raise.

    Raises SaeMismatchError listing them if several sites fit.
    """
    found = find_saes(source, layer=layer, site=site, width=width, l0=l0, revision=revision, token=token,
                      cache_dir=cache_dir, allow_pickle=allow_pickle)
    if len(found) > 1:
        raise SaeMismatchError(f"{source} has {len(found)} SAEs that fit; give layer= or site=:\n"
                               + "\n".join(f"  {file.entry.site}  {file.entry.weights}" for file in found[:40]))
    return found[0].load(device, dtype)


def list_saes(source: str | Path, *, revision: str | None = None, token: str | None = None,
              cache_dir: str | Path | None = None) -> SaeTable:
    """Everything that a repository or folder offers, as a table, what cannot be read with its `flaw`. Reads no weights.
    """
    at = open_source(source, revision=revision, token=token, cache_dir=cache_dir)
    return SaeTable(_refined(at, _offered(at)))


def _offered(at: Source) -> list[Entry]:
    """Everything that a dialect recognises in a source. Warns of links to other folders, which are not searched.

    Raises SaeNotFoundError, or UnsafeFileError if only pickles."""
    files = at.files()
    found = [entry for dialect in DIALECTS.values() for entry in dialect.entries(files, at.name)]
    if not found:
        raise nothing_found(at, files)
    if told := at.left_out():
        warnings.warn(f"{at.where()}: {told}", SaeWarning, stacklevel=3)
    return found


def _meant(offered: list[Entry]) -> list[Entry]:
    """Those that are meant where no site is given, as each dialect has it."""
    return [entry for name, dialect in DIALECTS.items()
            for entry in dialect.default([e for e in offered if e.dialect == name])]


def _warn_of_left(why: str, left: list[str]) -> None:
    if left:
        warnings.warn(f"{len(left)} left out, {why}: {left[0]}", SaeWarning, stacklevel=3)


def _refined(at: Source, entries: list[Entry]) -> list[Entry]:
    """The entries with what their small configs say, where names and sizes do not say enough. A config that several
    share is read once."""
    configs = _configs(at, [_unread(entry) for entry in entries])
    return [_refined_or_flawed(at, entry, lambda at, name: configs[name].result()) for entry in entries]


def _evaluated(at: Source, entries: list[Entry], want: Wanted) -> list[Entry]:
    """The entries, with the L0 that was measured where it decides which is meant."""
    results = _configs(at, [entry.evaluation for entry in undecided(entries, want)])
    return [_with_l0(at, entry, results[entry.evaluation]) if entry.evaluation in results else entry
            for entry in entries]


def _with_l0(at: Source, entry: Entry, results: Future[dict[str, Any]]) -> Entry:
    """The entry with the L0 in the results of its evaluation. Results that cannot be read are told by a warning: then
    its L0 stays unknown."""
    try:
        with located(at.where(entry.evaluation or "")):
            return replace(entry, l0=number(results.result(), "l0"))
    except (SaeFormatError, SaeNotFoundError) as error:
        warnings.warn(f"{entry.weights} is of unknown L0: {error}", SaeWarning, stacklevel=4)
        return entry


def _configs(at: Source, names: Iterable[str | None]) -> dict[str, Future[dict[str, Any]]]:
    """Small configs, several at a time, and each once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        configs = {name: pool.submit(_config, at, name) for name in dict.fromkeys(names) if name}
        for one in as_completed(configs.values()):
            if isinstance(one.exception(), SaeDownloadError):
                pool.shutdown(wait=False, cancel_futures=True)  # a Hub that is down is not asked for the other hundreds
                one.result()
    return configs


def _refined_or_flawed(at: Source, entry: Entry, read: Callable[[Source, str], dict[str, Any]]) -> Entry:
    """One broken config does not take the others along."""
    try:
        return _refine(at, entry, read)
    except (SaeFormatError, SaeNotFoundError) as error:
        return replace(entry, flaw=str(error))


def _refine(at: Source, entry: Entry, read: Callable[[Source, str], dict[str, Any]]) -> Entry:
    name = _unread(entry)
    if name is None:
        return entry
    config = read(at, name)
    with located(at.where(name)):
        return DIALECTS[entry.dialect].refine(entry, config)


def _unread(entry: Entry) -> str | None:
    """The config of an entry that its name and size do not tell in full, if it has one."""
    return None if entry.site is not None and entry.d_in is not None else entry.config


def _config(at: Source, name: str) -> dict[str, Any]:
    path = at.fetch(name)
    with located(at.where(name)):
        return read_config(path)


def _measured(at: Source, entry: Entry) -> Entry:
    """A local entry with the sizes that its file's header proves."""
    if not at.local or entry.pickled:
        return entry
    path = at.fetch(entry.weights)
    with located(at.where(entry.weights)):
        told = sizes(read_shapes(path))
        if told is None:
            return entry  # told in full when it is loaded
        d_in, width = told
        if entry.width not in (None, width):
            raise SaeFormatError(f"its name or config says {entry.width} features, its header {width}")
        return replace(entry, width=width, d_in=d_in)


def _built(entry: Entry, path: Path, config: dict[str, Any] | None) -> SAE:
    """The SAE in a weight file. Raises SaeFormatError where the weights are not what name or config promised (a size
    promises nothing), and where what was computed from finite values is not finite, as exp(r_mag) may be."""
    dialect = DIALECTS[entry.dialect]
    tensors = (read_pickle if entry.pickled else read_tensors)(path, dialect.NAMES)
    check_finite(tensors)
    sae = dialect.build(entry, tensors, config)
    if entry.width not in (None, sae.d_sae):
        raise SaeFormatError(f"the file is not what its name or config says: width is {sae.d_sae}, expected "
                             f"{entry.width}")
    try:
        check_finite(dict(sae.named_parameters()))
    except SaeFormatError as error:
        raise SaeFormatError(f"with its scales, norms or gains folded in, {error}") from error
    return sae


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
