"""What the Hugging Face client raises, as our errors with the reason in them; and which requests are tried again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .errors import SaeDownloadError, SaeError, SaeNotFoundError

WAITS = (0.5, 1.0)  # seconds between three tries
PATIENCE = 10.0  # seconds after which no further try begins; the client itself waits up to 23 s in some cases
T = TypeVar("T")


@contextlib.contextmanager
def hub_errors(where: str, repo_id: str) -> Iterator[None]:
    """What the client raises, as SaeNotFoundError or SaeDownloadError with the reason; the original is its cause."""
    from huggingface_hub import errors as hf

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
                               "`hf auth login`, or pass token=; and no such local path") from error
    except hf.HFValidationError as error:
        raise SaeNotFoundError(f"{where!r} is neither a local path nor a Hub repository: {error}") from error
    except hf.RemoteEntryNotFoundError as error:
        raise SaeNotFoundError(f"{where}: no such file in the repository at this commit") from error
    except Exception as error:
        raise SaeDownloadError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong, in a line; the client hides it in the cause of "check your connection"."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or _offline():
        return "not cached, and the client is offline (HF_HUB_OFFLINE)"
    deepest = next((e for e in chain if _status(e)), error if type(error).__module__ == "builtins" else chain[-1])
    status = _status(deepest)
    if status in (401, 403):
        return f"the Hub refused access ({status}); wrong token, no right, or a disabled repository: {deepest}"
    text = str(deepest).strip() or type(deepest).__name__
    return f"could not be fetched whole, and no cached copy is there ({type(deepest).__name__}): {text}"


def persist(action: Callable[[], T]) -> T:
    """Up to three tries, for what the client itself does not try again: resets, cut bodies, 5xx answers to GET."""
    began = time.monotonic()
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not _transient(error) or time.monotonic() - began > PATIENCE:
                raise
        time.sleep(wait)
    return action()


def _transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later, and the client has not retried it for long already."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return False
    status = _status(error)
    if status:
        return status >= 500 or status in (408, 412, 429)
    if type(error).__module__.startswith(("httpx", "httpcore")):  # 1.x has httpx, 2.x httpx2: neither is imported here
        return True
    cut = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return cut or (isinstance(error, RuntimeError) and error.__cause__ is not None and _transient(error.__cause__))


def _status(error: BaseException) -> int:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status if isinstance(status, int) else 0


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
