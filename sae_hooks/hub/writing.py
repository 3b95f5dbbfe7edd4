"""Saving and publishing SAEs: the only way from `SAE` to files."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import SaeFormatError
from ..formats import saelens
from ..formats.hook_names import SIDES
from ..sae import SAE
from .failures import hub_errors, located, persist
from .parsing import config_bytes
from .safe_files import write_atomically
from .sources import STATISTICS
from .statistics_file import statistics_bytes
from .weight_files import check_finite, safetensors_bytes

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


def _dumped(sae: SAE) -> tuple[dict[str, torch.Tensor], bytes]:
    """The tensors and the cfg.json of an SAE. Raises SaeFormatError for what load_sae would refuse."""
    tensors, config = saelens.dump(sae)
    with located(f"the SAE at {sae.site!r}"):
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
