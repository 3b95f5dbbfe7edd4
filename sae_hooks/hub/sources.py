"""Where SAE files come from: a local folder or file, or a repository on the Hugging Face Hub at one commit."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import SaeDownloadError, SaeNotFoundError, SaeWarning, UnsafeFileError
from ..formats.entry import WEIGHTS
from .failures import hub_errors, persist, transient
from .safe_files import check_contained

MOST_FILES = 200_000
STATISTICS = "feature_statistics.safetensors"
# What goes with a weight file that is named itself.
BESIDE = ("cfg.json", "config.json", "config.yaml", "hyperparams.json", STATISTICS)
_checked: set[tuple[str, int, int]] = set()  # cached files whose hash was right: (path, size, mtime)


class Source(Protocol):
    """Files under posix paths. `name` helps to tell what they are: a repository id or a local path."""

    name: str
    local: bool

    def files(self) -> Mapping[str, int]:
        """Path -> bytes, nothing downloaded."""

    def has(self, path: str) -> bool:
        """Whether `files` has it."""

    def fetch(self, path: str) -> Path:
        """A local copy that may be read. Raises SaeNotFoundError, SaeDownloadError, UnsafeFileError."""

    def where(self, path: str = "") -> str:
        """What to call a file in messages."""

    def left_out(self) -> str:
        """What to say of links to folders elsewhere, which are not followed; "" where none are."""

    def instead(self) -> str:
        """What may have been meant where no SAE is found; "" where nothing comes to mind."""


def open_source(source: str | Path, *, revision: str | None = None, token: str | None = None,
                cache_dir: str | Path | None = None) -> Source:
    """What exists is local, and so is every Path; anything else is "owner/name", "owner/name/folder" or, a weight file,
    "owner/name/folder/file" on the Hub.

    Raises SaeNotFoundError where there is no such thing, for "", which is not taken for the current folder, and for a
    revision of what is local.
    """
    if source == "":
        raise SaeNotFoundError("the source is empty: give a folder, a file or owner/name; '.' is the current folder")
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists() or str(source).startswith((".", "/", "~")):
        if revision is not None:
            raise SaeNotFoundError(f"{path} is local and has no revision {revision!r}; leave revision out, or name a "
                                   "repository of the Hub")
        return LocalSource(path)
    if "://" in source:
        raise SaeNotFoundError(f"{source} is an address; give the repository on the Hub as owner/name, or a folder in "
                               "it as owner/name/folder")
    owner, _, rest = source.partition("/")
    name, _, folder = rest.partition("/")
    return HubSource(f"{owner}/{name}" if name else owner, folder.strip("/"), revision, token, cache_dir)


class LocalSource:
    """A folder, or one weight file with the config and the statistics beside it."""

    local = True

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise SaeNotFoundError(f"{path} does not exist")
        if not path.is_dir() and not path.is_file():
            raise SaeNotFoundError(f"{path} is neither a folder nor a regular file")
        path = Path(os.path.abspath(path))
        self.only = None if path.is_dir() else _in_its_folder(path.as_posix())
        self.root = path if self.only is None else Path(path.as_posix().removesuffix(self.only))
        self.name = self.root.as_posix()

    def files(self) -> Mapping[str, int]:
        if self.only:
            return {name: _size(self.root / name) for name in (self.only, *BESIDE) if (self.root / name).is_file()}
        found: dict[str, int] = {}
        for folder, _, names in self._folders():
            for name in sorted(names):
                path = Path(folder, name)
                found[path.relative_to(self.root).as_posix()] = _size(path)
            if len(found) > MOST_FILES:
                raise SaeNotFoundError(f"{self.root} holds more than {MOST_FILES} files; name the folder of the SAEs")
        return found

    def has(self, path: str) -> bool:
        return os.path.lexists(self.root / path)

    def fetch(self, path: str) -> Path:
        check_contained(self.root / path, self.root)
        return self.root / path

    def where(self, path: str = "") -> str:
        return str(self.root / path)

    def instead(self) -> str:
        if self.only in BESIDE:
            return f"{self.only} goes with weights; name its folder, {self.root}"
        return self.left_out()

    def left_out(self) -> str:
        root = self.root.resolve()
        inside = [] if self.only else [Path(folder, name) for folder, names, _ in self._folders() for name in names]
        links = [path.relative_to(self.root).as_posix() for path in inside
                 if path.is_symlink() and not path.resolve().is_relative_to(root)]
        told = ", ".join(links[:6]) + (f" and {len(links) - 6} more" if len(links) > 6 else "")
        return f"Links to folders are not followed; name one as the source: {told}" if links else ""

    def _folders(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Every folder, but for hidden ones, with the folders and the files in it, and links to such."""
        for folder, inside, names in os.walk(self.root):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            yield folder, inside, names


class HubSource:
    """A repository at one commit, resolved once: config and weights always fit, whatever happens to the branch.

    Asks the Hub nothing that the cache can answer; with the Hub down or HF_HUB_OFFLINE set, the cache is used alone.
    """

    local = False

    def __init__(self, repo_id: str, folder: str, revision: str | None, token: str | None,
                 cache_dir: str | Path | None) -> None:
        self.repo, self.folder, self.token, self.cache = repo_id, folder, token, cache_dir
        self.only: str | None = None
        asked = f"{repo_id}@{revision}" if revision else repo_id
        with hub_errors(asked, repo_id, "open"):
            self.commit = self._resolve(revision)
        if folder.endswith(WEIGHTS) and folder in self._everything():  # a folder may be named so, too
            self.only = _in_its_folder(folder)
            self.folder = folder.removesuffix(self.only).rstrip("/")
        self.name = f"{repo_id}/{self.folder}".rstrip("/")

    def files(self) -> Mapping[str, int]:
        inside = self.folder + "/" if self.folder else ""
        found = {p.removeprefix(inside): size for p, size in self._everything().items() if p.startswith(inside)}
        return {name: found[name] for name in (self.only, *BESIDE) if name in found} if self.only else found

    def _everything(self) -> Mapping[str, int]:
        """Every file of the repository, whatever was named of it."""
        with hub_errors(f"{self.repo}@{self.commit}", self.repo):
            listing = self._listing()
        _refuse_hostile(listing, f"{self.repo}@{self.commit}")
        return listing

    def has(self, path: str) -> bool:
        return path in self.files()

    def fetch(self, path: str) -> Path:
        full = f"{self.folder}/{path}" if self.folder else path
        cached = self._cached(full)
        if cached and not _wrong_hash(cached):
            return cached
        fresh = self._download(full, path, damaged=cached is not None)
        if wrong := _wrong_hash(fresh):
            raise SaeDownloadError(
                f"{self.where(path)}: damaged on its way: {wrong}. The cached copy will not be used; load again to "
                f"download it anew, or run `hf download {self.repo} {full} --revision {self.commit} --force-download`")
        return fresh

    def where(self, path: str = "") -> str:
        return "/".join(part for part in (f"{self.repo}@{self.commit}", self.folder, path) if part)

    def left_out(self) -> str:
        return ""

    def instead(self) -> str:
        above, paths = self.folder, self._everything()
        if not above or self.files():
            return ""
        while above and not any(path.startswith(above + "/") for path in paths):
            above = above.rpartition("/")[0]
        there = list(dict.fromkeys(path.removeprefix(above).lstrip("/").partition("/")[0] for path in paths
                                   if path.startswith(above)))
        more = f" and {len(there) - 12} more" if len(there) > 12 else ""
        return (f"There is no such folder or weight file; {self.repo}{'/' * bool(above)}{above} has "
                f"{', '.join(there[:12])}{more}")

    def _resolve(self, revision: str | None) -> str:
        """The commit that a branch or tag is at now; with the Hub down, the one that is cached."""
        api = _impatient_api(self.token)

        def ask(*, cached: bool = False) -> str:
            resolved = api.resolve_revision(self.repo, revision=revision, cache_dir=self.cache, local_files_only=cached)
            return str(resolved.resolved)

        try:
            return persist(ask)
        except Exception as error:
            if transient(error):  # 429, which the client takes for a final answer
                with contextlib.suppress(Exception):
                    return ask(cached=True)
            raise

    def _cached(self, full: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, full, cache_dir=self.cache, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _download(self, full: str, path: str, *, damaged: bool) -> Path:
        from huggingface_hub import hf_hub_download

        where = self.where(path) + (" (the cached copy is damaged and was not used; force_download)" if damaged else "")
        with hub_errors(where, self.repo):
            return Path(persist(lambda: hf_hub_download(
                self.repo, full, revision=self.commit, token=self.token, cache_dir=self.cache, force_download=damaged)))

    def _listing(self) -> dict[str, int]:
        """Path -> bytes at the commit: from the cache, else from the Hub (and then the client keeps it there)."""
        from huggingface_hub.errors import GatedRepoError

        with contextlib.suppress(LookupError):
            return self._cached_listing()
        try:
            persist(self._list_on_hub)
            return self._cached_listing()
        except GatedRepoError:
            raise
        except Exception as error:
            with contextlib.suppress(LookupError):
                return self._cached_listing()  # the listing came, README.md did not
            return self._listing_without_cache(error)

    def _listing_without_cache(self, error: Exception) -> dict[str, int]:
        """The listing where the cache cannot be written; where the Hub is down, what is cached of this commit."""
        from huggingface_hub import HfApi, RepoFile

        if not transient(error):
            with contextlib.suppress(Exception):
                tree = HfApi(token=self.token).list_repo_tree(self.repo, recursive=True, revision=self.commit)
                return {file.path: file.size for file in tree if isinstance(file, RepoFile)}
        partial = self._snapshot()
        if not partial:
            raise error
        warnings.warn(f"{self.where()}: the Hub gives no listing; choosing among the {len(partial)} files that are "
                      "cached", SaeWarning, stacklevel=2)
        return partial

    def _list_on_hub(self) -> None:
        """Have the client list the repository into its cache; README.md is the least that it can be asked to fetch."""
        from huggingface_hub import snapshot_download

        with _unsaid("No files matched"):
            snapshot_download(self.repo, revision=self.commit, token=self.token, cache_dir=self.cache,
                              allow_patterns=["README.md"], tqdm_class=_silent())

    def _cached_listing(self) -> dict[str, int]:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            listed = get_cached_repo_tree(self.repo, revision=self.commit, cache_dir=self.cache)
        except CachedRepoTreeNotFoundError as error:
            raise LookupError(str(error)) from error
        return {file.path: file.size for file in listed}

    def _snapshot(self) -> dict[str, int]:
        """What is cached of this commit, where its listing is not."""
        from huggingface_hub import snapshot_download

        try:
            root = snapshot_download(self.repo, revision=self.commit, cache_dir=self.cache, local_files_only=True)
        except Exception:
            return {}
        return dict(LocalSource(Path(root)).files())


def _in_its_folder(path: str) -> str:
    """The name of a weight file in the folder of its SAE, where its config is: with Llama Scope's of 2024 one above."""
    names = path.split("/")
    return "/".join(names[-2 if names[-2:] == ["checkpoints", "final.safetensors"] else -1:])


def _wrong_hash(path: Path) -> str:
    """What is wrong with a cached file, by the name of its blob (sha256, or git's sha1); "" if nothing is known to be.

    Over HTTP the client checks the length only. A file is hashed once in a process: 0.5 s for 300 MB.
    """
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob):
        return ""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _checked:
        digest: Any = hashlib.sha256() if len(blob) == 64 else hashlib.sha1(b"blob %d\0" % stat.st_size)
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        if digest.hexdigest() != blob:
            return f"its {digest.name} is {digest.hexdigest()[:16]}..., expected {blob[:16]}..."
        _checked.add(key)
    return ""


def _refuse_hostile(listing: Mapping[str, int], where: str) -> None:
    for path in listing:
        if path.startswith("/") or "\\" in path or "\0" in path or {"..", ".", ""} & set(path.split("/")):
            raise UnsafeFileError(f"{where}: the listing has a path that leads out of the repository: {path!r}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing or to itself: told when it is fetched
        return 0


@contextlib.contextmanager
def _unsaid(text: str) -> Iterator[None]:
    """Keep one warning of the client, which means nothing to our users, out of the log."""
    log = logging.getLogger("huggingface_hub._snapshot_download")

    def passes(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)


def _impatient_api(token: str | None) -> Any:
    """The client, waiting HF_HUB_ETAG_TIMEOUT (10 s) for an answer about a revision, where it would wait for ever."""
    from huggingface_hub import HfApi, constants

    class Impatient(HfApi):
        def repo_info(self, *args: Any, **kwargs: Any) -> Any:
            return super().repo_info(*args, **{"timeout": constants.HF_HUB_ETAG_TIMEOUT, **kwargs})

    return Impatient(token=token)


def _silent() -> type:
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
