"""Finding, loading, saving and publishing SAEs: the only way from files to `SAE` and back."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import (
    SaeDownloadError,
    SaeError,
    SaeFormatError,
    SaeMismatchError,
    SaeNotFoundError,
    SaeWarning,
    UnsafeFileError,
)
from ..formats import DIALECTS, Entry, saelens
from ..formats.hook_names import SIDES
from ..formats.selection import all_meant, choose, is_lost, may_match, placed, untold, wanted, without_pickles
from ..formats.weights import sizes, warn_odd_decoder
from ..sae import SAE
from .absent import nothing_found
from .failures import hub_errors, persist
from .parsing import config_bytes, read_config
from .pickles import read_pickle
from .safe_files import write_atomically
from .sources import STATISTICS, Source, open_source
from .statistics_file import beside, of_other_weights, read_statistics, statistics_bytes
from .weight_files import check_dtype, check_finite, check_held, read_shapes, read_tensors, safetensors_bytes

AT_ONCE = 8  # small configs fetched at a time
CARD = """---
library_name: sae_hooks
tags:
- sparse-autoencoder
- sae_hooks
---
# Sparse autoencoders

Saved by sae_hooks (`pip install sae-hooks`) in the SAELens format.

```python
from sae_hooks import attach_saes

model = attach_saes(model, "{repo_id}")
```
"""


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
        dialect = DIALECTS[self.entry.dialect]
        config = _config(self.source, self.entry.config) if self.entry.config else None
        path = self.source.fetch(self.entry.weights)
        with _located(self.where):
            tensors = (read_pickle if self.entry.pickled else read_tensors)(path, dialect.NAMES)
            check_finite(tensors)
            sae = dialect.build(self.entry, tensors, config)
            _check_promise(self.entry, sae)
            _check_folded(sae, tensors)
            warn_odd_decoder(sae.W_dec)
        self._read_statistics(sae)
        if not self.source.local:
            sae.metadata.setdefault("source", self.where)
        with _located(self.where):
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
            with _located(self.source.where(name)):
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
    "resid_post", "mlp_out", "attn_out", "transcoder", "embedding" or a module path with its side; `l0`: nearest wins.
    `allow_pickle`: whether weights that PyTorch pickled may be read, by its weights_only loader, which runs no code of
    the file; where other files fit, they are meant. Raises SaeNotFoundError listing what there is, SaeDownloadError;
    SaeFormatError for a config that cannot be read and UnsafeFileError for a pickle that may not, if that SAE is meant
    or nothing else fits. Where all layers are meant and others fit, such SAEs are left out with a warning, and so are
    those that do not tell their site.
    """
    want = wanted(layer, site, width, l0)
    at = open_source(source, revision=revision, token=token, cache_dir=cache_dir)
    offered = _offered(at)
    possible = [entry for entry in (_meant(offered) if want.site is None else offered) if may_match(entry, want)]
    told, looked_at = [placed(entry, want) for entry in _refined(at, possible)], frozenset(possible)
    if all_meant(want) and not allow_pickle:
        told, pickles = without_pickles(told, want)
        _warn_of_left("as PyTorch pickled it, which allow_pickle=True reads", [at.where(e.weights) for e in pickles])
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


def save_pretrained(sae: SAE | Mapping[str, SAE], folder: str | Path) -> Path:
    """Write cfg.json and sae_weights.safetensors (SAELens 6) into a folder, made if needed; returns the folder.

    Statistics, if the SAE has them, are written beside them; those of an SAE that was saved there before are removed
    before its weights are replaced. Each file is replaced whole or not at all, cfg.json last. A mapping {site: SAE}
    becomes one folder a site inside, and each SAE is written as the one of that site, wherever it says it belongs.
    Raises OSError, and SaeFormatError for what load_sae would refuse (values that are not finite, metadata that is no
    JSON, a site that is none), before anything of any SAE is written; the old files are untouched then.
    """
    folder = Path(folder)
    if isinstance(sae, Mapping):
        named = {_folder_name(site): _at(one, site) for site, one in sae.items()}
        for one in named.values():
            _dumped(one)
        for name, one in named.items():
            save_pretrained(one, folder / name)
        return folder
    tensors, config = _dumped(sae)
    files = {}
    if sae.statistics is not None:
        files[folder / STATISTICS] = statistics_bytes(sae, sae.statistics)
    files[folder / saelens.WEIGHTS] = safetensors_bytes(tensors)
    files[folder / saelens.CONFIG] = config
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(files, remove=() if sae.statistics is not None else [folder / STATISTICS])
    return folder


def push_to_hub(sae: SAE | Mapping[str, SAE], repo_id: str, *, path_in_repo: str = "", token: str | None = None,
                private: bool = False) -> str:
    """Upload what save_pretrained writes, and a model card if there is none, as one commit; returns its address.

    Statistics of an SAE that was at the same place before, where the new one has none, are deleted in it. Makes the
    repository if needed. All or nothing, and tried again after a lost answer: the same files make no second commit.
    Raises SaeNotFoundError, SaeDownloadError (no rights, Hub down) with the client's error as cause; SaeFormatError
    as save_pretrained does, and for a path_in_repo that is none.
    """
    from huggingface_hub import HfApi

    if {"", ".", ".."} & set(path_in_repo.strip("/").split("/")) and path_in_repo.strip("/"):
        raise SaeFormatError(f"{path_in_repo!r} is no folder of a repository: its names are parted by single slashes, "
                             "and none is . or ..")
    api = HfApi(token=token)
    with TemporaryDirectory(prefix="sae_hooks-") as temporary:
        root = save_pretrained(sae, temporary)
        written = sorted(path for path in root.rglob("*") if path.is_file())
        inside = path_in_repo.strip("/")
        files = {f"{inside}/{path.relative_to(root).as_posix()}".lstrip("/"): path for path in written}
        with hub_errors(f"pushing to {repo_id}", repo_id, "push"):
            persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            return persist(lambda: _commit(api, repo_id, files))


def _commit(api: Any, repo_id: str, files: Mapping[str, Path]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                             for name, path in files.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale_statistics(api, repo_id, files)]
    if not api.file_exists(repo_id, "README.md"):
        card = CARD.format(repo_id=repo_id).encode()
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card))
    return str(api.create_commit(repo_id, operations, commit_message="Upload SAE with sae_hooks").commit_url)


def stale_statistics(api: Any, repo_id: str, files: Mapping[str, Path]) -> list[str]:
    """Statistics in the repository beside weights that are pushed now without any."""
    places = {name.removesuffix(saelens.WEIGHTS) + STATISTICS for name in files if name.endswith(saelens.WEIGHTS)}
    bare = sorted(places - set(files))
    return [file.path for file in api.get_paths_info(repo_id, bare)] if bare else []


def _offered(at: Source) -> list[Entry]:
    """Everything that a dialect recognises in a source. Raises SaeNotFoundError, or UnsafeFileError if only pickles."""
    files = at.files()
    found = [entry for dialect in DIALECTS.values() for entry in dialect.entries(files, at.name)]
    if found:
        return found
    raise nothing_found(at, files)


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
    with ThreadPoolExecutor(AT_ONCE) as pool:
        configs = {name: pool.submit(_config, at, name) for name in dict.fromkeys(_unread(e) for e in entries) if name}
        for one in as_completed(configs.values()):
            if isinstance(one.exception(), SaeDownloadError):
                pool.shutdown(wait=False, cancel_futures=True)  # a Hub that is down is not asked for the other hundreds
                one.result()
    return [_refined_or_flawed(at, entry, lambda at, name: configs[name].result()) for entry in entries]


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
    with _located(at.where(name)):
        return DIALECTS[entry.dialect].refine(entry, config)


def _unread(entry: Entry) -> str | None:
    """The config of an entry that its name and size do not tell in full, if it has one."""
    return None if entry.site is not None and entry.d_in is not None else entry.config


def _config(at: Source, name: str) -> dict[str, Any]:
    path = at.fetch(name)
    with _located(at.where(name)):
        return read_config(path)


def _measured(at: Source, entry: Entry) -> Entry:
    """A local entry with the sizes that its file's header proves."""
    if not at.local or entry.pickled:
        return entry
    path = at.fetch(entry.weights)
    with _located(at.where(entry.weights)):
        told = sizes(read_shapes(path))
        if told is None:
            return entry  # told in full when it is loaded
        d_in, width = told
        if entry.width not in (None, width):
            raise SaeFormatError(f"its name or config says {entry.width} features, its header {width}")
        return replace(entry, width=width, d_in=d_in)


def _check_promise(entry: Entry, sae: SAE) -> None:
    """Raise SaeFormatError where the weights are not what name or config promised; a size promises nothing."""
    if entry.width not in (None, sae.d_sae):
        raise SaeFormatError(f"the file is not what its name or config says: width is {sae.d_sae}, expected "
                             f"{entry.width}")


def _check_folded(sae: SAE, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise SaeFormatError where what was computed from a file's finite values is not finite, as exp(r_mag) may be."""
    read = {tensor.data_ptr() for tensor in tensors.values()}
    try:
        check_finite({name: p for name, p in sae.named_parameters() if p.data_ptr() not in read})
    except SaeFormatError as error:
        raise SaeFormatError(f"with its scales, norms or gains folded in, {error}") from error


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the place before the message of what a pure function raised."""
    try:
        yield
    except SaeError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from (error.__cause__ or error)


def _dumped(sae: SAE) -> tuple[dict[str, torch.Tensor], bytes]:
    """The tensors and the cfg.json of an SAE. Raises SaeFormatError for what load_sae would refuse."""
    tensors, config = saelens.dump(sae)
    with _located(f"the SAE at {sae.site!r}"):
        check_finite(tensors)
        return tensors, config_bytes(config)


def _at(sae: SAE, site: str) -> SAE:
    """The SAE, on the same memory, as the one of the site under which it is saved; a name that is no site changes
    nothing."""
    if site == sae.site or site.rpartition(".")[2] not in SIDES:
        return sae
    one = copy.copy(sae)
    one.site, one.site_out = site, site if sae.site_out in (None, sae.site) else sae.site_out
    return one


def _folder_name(site: str) -> str:
    """A site as a folder name. Raises SaeFormatError for anything but a module path."""
    if not re.fullmatch(r"[\w-]+(?:\.[\w-]+)*", site):
        raise SaeFormatError(f"{site!r} is not a site: a module path with its side, such as 'model.layers.20.output'")
    return site


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
