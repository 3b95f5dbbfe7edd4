"""A folder of SAEs onto the Hub: weights, configs, card, report and pictures in one commit; no checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_hooks.errors import DataError, SaeFormatError
from sae_hooks.hub import SaeFile, list_saes, stale_statistics
from sae_hooks.hub.failures import hub_errors, persist
from sae_hooks.hub.safe_files import check_contained
from sae_hooks.hub.sources import open_source
from sae_hooks.hub.statistics_file import beside

from .card import CARD, REPORT, make_card

PLOTS = "plots"
PICTURES = (".png", ".svg")


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, licence: str | None = None,
                token: str | None = None) -> str:
    """Upload the SAEs in folder and below it, as one commit; returns its address. Makes the repository if needed.

    Every SAE is read and checked first, and nothing goes up that is a link out of the folder. Statistics of an SAE that
    was at the same place before, where the new one has none, are deleted. The card is folder/README.md if there is one,
    with repo_id in its usage lines and, if given, the licence in its header; else it is made. All or nothing, and tried
    again after a lost answer.
    Raises SaeNotFoundError, SaeFormatError for an SAE of another format than ours, UnsafeFileError for such a link,
    DataError for a README.md that is not UTF-8, SaeDownloadError (no rights, Hub down) with the client's error as
    cause.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in _published(folder)}
    card = _card(folder, repo_id, licence)
    api = HfApi(token=token)
    with hub_errors(f"pushing to {repo_id}", repo_id, "push"):
        persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        return persist(lambda: _commit(api, repo_id, files, card))


def _published(folder: Path) -> list[Path]:
    """The files that go up; each SAE has been loaded once."""
    found, source = [], open_source(folder)
    for entry in list_saes(folder):
        where = folder / entry.weights
        if entry.dialect != "saelens" or entry.config is None:
            raise SaeFormatError(f"{where} is in the format of {entry.dialect}; write it as ours first: sae-hooks "
                                 f"convert {folder} NEW-FOLDER")
        measured = SaeFile(entry, str(where), source).load().statistics
        found += [where, folder / entry.config, *([folder / str(beside(entry))] if measured is not None else [])]
    pictures = [path for path in (folder / PLOTS).glob("*") if path.suffix in PICTURES]
    found += [*(path for path in (folder / REPORT,) if path.exists()), *sorted(pictures)]
    for path in found:
        check_contained(path, folder)
    return found


def _card(folder: Path, repo_id: str, licence: str | None) -> str:
    if not (folder / CARD).exists():
        return make_card(folder, source=repo_id, licence=licence)
    check_contained(folder / CARD, folder)
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / CARD} is not UTF-8 text: {error}; save it as such, or delete it to have a card "
                        "made") from error
    here, there = (f"attach_saes(model, {json.dumps(name)[:-1]}" for name in (folder.resolve().name, repo_id))
    for end in ('"', "/"):  # of the folder, or of one inside it
        text = text.replace(here + end, there + end)
    return text if licence is None else _licensed(text, licence)


def _licensed(card: str, licence: str) -> str:
    """A card with this licence in its header, in place of another if there is one."""
    line = f"license: {json.dumps(licence)}\n"
    header = re.match(r"---\n((?:(?!---).*\n)*)---(?:\n|$)", card)
    if header is None:
        return f"---\n{line}---\n\n{card}"
    others = re.sub(r"^license:.*\n(?:[ -].*\n)*", "", header[1], flags=re.MULTILINE)
    return f"---\n{others}{line}{card[header.end(1):]}"


def _commit(api: Any, repo_id: str, files: Mapping[str, Path], card: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                             for name, path in files.items()]
    operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale_statistics(api, repo_id, files)]
    return str(api.create_commit(repo_id, operations, commit_message="Upload SAEs with sae_hooks").commit_url)
