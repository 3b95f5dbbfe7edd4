"""Errors told with their place; what the Hugging Face client raises, as ours with the reason; what is tried again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from ..errors import SaeDownloadError, SaeError, SaeNotFoundError

WAITS = (0.5, 1.0)  # seconds between three tries
PATIENCE = 10.0  # seconds after which no further try begins; the client itself waits up to 23 s in some cases
T = TypeVar("T")
Doing = Literal["open", "read", "push"]  # what a name that may be a local path stands for; its files; writing


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place before the message of what a pure function raised."""
    try:
        yield
    except SaeError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from (error.__cause__ or error)


@contextlib.contextmanager
def hub_errors(where: str, repo_id: str, doing: Doing = "read") -> Iterator[None]:
    """What the client raises, as SaeNotFoundError or SaeDownloadError with the reason; the original is its cause."""
    from huggingface_hub import errors as hf

    nor_local = "; and there is no local path of that name" if doing == "open" else ""
    try:
        yield
    except SaeError:
        raise
    except hf.GatedRepoError as error:  # a RepositoryNotFoundError, too: so it comes first
        raise SaeDownloadError(f"{where}: access is gated: ask for it on the page of {repo_id} on the Hub, then run "
                               "`hf auth login` or pass token=") from error
    except hf.RevisionNotFoundError as error:
        raise SaeNotFoundError(f"{where}: {repo_id} has no such revision (branch, tag or commit)") from error
    except hf.RepositoryNotFoundError as error:
        raise SaeNotFoundError(f"{where}: no such repository on the Hub, or a private one: check the name, or run "
                               f"`hf auth login`, or pass token={nor_local}") from error
    except hf.HFValidationError as error:
        kind = "neither a local path nor" if doing == "open" else "not"
        raise SaeNotFoundError(f"{repo_id!r} is {kind} the name of a Hub repository: {error}") from error
    except hf.RemoteEntryNotFoundError as error:
        raise SaeNotFoundError(f"{where}: no such file in the repository at this commit") from error
    except Exception as error:
        raise SaeDownloadError(f"{where}: {_reason(error, doing)}{nor_local}") from error


def _reason(error: Exception, doing: Doing) -> str:
    """What went wrong, in a line; the client hides it in the cause of "check your connection"."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__) and below not in chain:
        chain.append(below)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        offline = "the client is offline (HF_HUB_OFFLINE)"
        return offline if doing == "push" else f"not cached, and {offline}; load it once with a connection"
    answered = next((e for e in chain if _status(e)), None)
    if answered is not None and _status(answered) in (401, 403):
        return f"the Hub refused access ({_status(answered)}): wrong token, no right, or disabled: {answered}"
    local = next((e for e in chain if isinstance(e, OSError) and e.errno and not isinstance(e, ConnectionError)), None)
    if local is not None and answered is None:
        return f"the file system refused: {local}; is there room and permission in the cache (HF_HOME or cache_dir=)?"
    told = answered or chain[-1]
    nor_cached = "" if doing == "push" else ", and no cached copy is there"
    return (f"the Hub could not be reached or broke off{nor_cached}; try again later "
            f"({type(told).__name__}: {str(told).strip() or 'no details'})")


def persist(action: Callable[[], T]) -> T:
    """Up to three tries, for what the client itself does not try again: resets, cut bodies, 5xx answers to GET."""
    began = time.monotonic()
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not transient(error) or time.monotonic() - began > PATIENCE:
                raise
        time.sleep(wait)
    return action()


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    from huggingface_hub import errors as hf

    status = _status(error)
    if status:
        return status >= 500 or status in (408, 412, 429)
    if isinstance(error, hf.OfflineModeIsEnabled):
        return False
    if type(error).__module__.startswith(("httpx", "httpcore")):  # 1.x has httpx, 2.x httpx2: neither is imported here
        return True
    if isinstance(error, (hf.LocalEntryNotFoundError, hf.RevisionResolutionError, RuntimeError)):  # wrappers
        return error.__cause__ is not None and transient(error.__cause__)
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _status(error: BaseException) -> int:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status if isinstance(status, int) else 0
