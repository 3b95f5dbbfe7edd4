"""A stream of activations that the model computes as they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice

import torch
from torch import Tensor, nn

from sae_hooks.errors import CheckpointError, DataError
from sae_hooks.identity import weights_digest
from sae_hooks.sizes import whole

from .harvest import (
    NORM_WINDOWS,
    TOKENS_PER_BATCH,
    SiteInfo,
    measure_sites,
    ordinary_rows,
    padded_batches,
    site_activations,
)
from .shards import text_digests
from .stream import State, checked_epochs, checked_share
from .text import Position, Window, Windows

GROUP_BATCHES = 16  # forward passes whose windows are sorted by length together, so that little is padded

Place = tuple[int, Position]  # epoch, position in its texts


class _Reader:
    """The windows of some epochs, taken as they are needed; `place` (epoch, position) is all that it depends on."""

    def __init__(self, windows: Windows, epochs: int | None, share: tuple[int, int]) -> None:
        self.windows, self.epochs, self.share = windows, epochs, share
        self.place: Place = 0, (0, 0)
        self._opened: Iterator[tuple[Place, Window]] | None = None
        self._next: tuple[Place, Window] | None = None

    def take(self, tokens: int) -> list[Window]:
        """The next windows, of at most so many tokens; none if the next one is longer, or there is none."""
        taken = []
        while (found := self._peek()) is not None and len(found[1]) <= tokens:
            self.place, window = found
            self._next = None
            taken.append(window)
            tokens -= len(window)
        return taken

    def go(self, place: Place) -> None:
        """Read on from a place."""
        self.place, self._opened, self._next = place, None, None

    @property
    def ended(self) -> bool:
        """Whether no window is left."""
        return self._peek() is None

    def _peek(self) -> tuple[Place, Window] | None:
        if self._opened is None:
            self._opened = self._read()
        if self._next is None:
            self._next = next(self._opened, None)
        return self._next

    def _read(self) -> Iterator[tuple[Place, Window]]:
        first, start = self.place
        for epoch in count(first) if self.epochs is None else range(first, self.epochs):
            for position, window in self.windows.read(epoch, start if epoch == first else (0, 0), self.share):
                yield (epoch, position), window


class LiveStream:
    """The model's activations on text as a `Stream`, through a shuffle buffer that is refilled when it is half empty.

    The buffer takes buffer_tokens * (the sum of the sites' d_in) * 2 bytes, for its rows are bf16: 2.3 GB for a million
    tokens of 1,152 values. `repr` shows it, and `state_dict` holds what has not been read of it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str],
                 windows: Windows | Callable[[int], Iterable[Window]] | Sequence[Window], special_ids: Sequence[int], *,
                 model_name: str | None = None, buffer_tokens: int = 1_000_000,
                 tokens_per_batch: int = TOKENS_PER_BATCH, seed: int = 0, epochs: int | None = 1,
                 share: tuple[int, int] = (0, 1), norms: Mapping[str, SiteInfo] | None = None,
                 device: str | torch.device = "cpu", buffer_device: str | torch.device = "cpu") -> None:
        """Measure the norms on the first windows, or take `norms` as they are; the buffer is filled at the first batch.

        windows: `text.windows`, or a callable that opens an epoch's, or a list of them; the first are read at once, to
        tell the text again when another stream goes on. special_ids: tokens to drop.
        epochs: how often the text is read (None: without end). share (i, n): this process reads the texts i, i + n,
        ..., and its batches are of every n-th row; n of them together make up what one would read, though not in its
        order. device: where batches come out; buffer_device: where the buffer lies. Raises DataError if no token is
        ordinary, or for numbers that cannot be, SiteError for an unknown site.
        """
        opened = windows if isinstance(windows, Windows) else Windows(windows)
        config_name = getattr(getattr(model, "config", None), "_name_or_path", "")
        self.model_name = config_name if model_name is None else model_name
        self.buffer_tokens = whole("buffer_tokens", buffer_tokens)
        self._tokens_per_batch = whole("tokens_per_batch", tokens_per_batch)
        self._model, self._special_ids = model, list(special_ids)
        self._weights = weights_digest(model)
        self._share = checked_share(share)
        self._device, self._buffer_device = torch.device(device), torch.device(buffer_device)
        self._reader = _Reader(opened, checked_epochs(epochs), self._share)
        self._generator = torch.Generator().manual_seed(whole("seed", seed, least=0))
        self._buffer: dict[str, Tensor] = {}
        self._order = torch.empty(0, dtype=torch.int64)  # slots of the buffer that are still to be read
        self._seen = 0
        first = list(islice(opened(0), NORM_WINDOWS))
        self._texts = text_digests(first)
        if norms is None:
            norms = measure_sites(model, list(sites), first, self._special_ids)
        self.sites: Mapping[str, SiteInfo] = {site: norms[site] for site in sites}

    @property
    def buffer_bytes(self) -> int:
        """Memory of the full buffer."""
        return 2 * self.buffer_tokens * sum(info.d_in for info in self.sites.values())

    def __repr__(self) -> str:
        return (f"LiveStream({self.model_name!r}, {', '.join(self.sites)}; buffer of {self.buffer_tokens:,} tokens, "
                f"{self.buffer_bytes / 1e9:.2f} GB on {self._buffer_device})")

    def check_left(self, size: int) -> None:
        """Fill the buffer if it is half empty. Raises DataError when this share of `size` rows is not in it then."""
        mine = self._part(whole("size", size))
        if len(self._order) < max(mine, self.buffer_tokens // 2) and not self._reader.ended:
            self._refill()
        if len(self._order) < mine:
            self._complain(size)

    def next(self, size: int) -> dict[str, Tensor]:
        """{site: float32 (size, d_in)} on the stream's device, or this share of it; see `Stream.next`."""
        self.check_left(size)
        mine = self._part(size)
        rows, self._order = self._order[:mine].to(self._buffer_device), self._order[mine:]
        self._seen += mine
        return {site: info.normalised(self._buffer[site][rows].to(self._device).float())
                for site, info in self.sites.items()}

    def state_dict(self) -> State:
        """Its place in the text, the generator, and the unread rows of the buffer; belongs to this share alone."""
        epoch, (document, window) = self._reader.place
        state: State = {"epoch": epoch, "document": document, "window": window, "seen": self._seen,
                        "generator": self._generator.get_state(), **self._origin()}
        for site, info in self.sites.items():
            state |= {f"rms_norm.{site}": info.rms_norm, f"typical_norm.{site}": info.typical_norm}
            buffer = self._buffer.get(site, torch.empty(0, info.d_in, dtype=torch.bfloat16))
            state[f"rows.{site}"] = buffer[self._order.to(buffer.device)].cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Go on where another stream of the same sites, text, share and buffer stood; norms, and the generator that
        `seed` began, become that one's. The text may have become longer at its end."""
        other = [f"{name}: there {state[name]}, here {value}" for name, value in self._origin().items()
                 if state.get(name, value) != value  # older checkpoints have nothing but the source
                 and not (name == "text" and state[name] in self._texts)]
        if other:
            raise CheckpointError(f"the training that is to go on read something else ({'; '.join(other)}): give the "
                                  "same, or start anew. Text may only be added behind, and not where it is shuffled")
        self.sites = {site: SiteInfo(d_in=info.d_in, rms_norm=float(state[f"rms_norm.{site}"]),
                                     typical_norm=float(state[f"typical_norm.{site}"]))
                      for site, info in self.sites.items()}
        generator = state["generator"]
        assert isinstance(generator, Tensor)
        self._generator.set_state(generator)
        self._reader.go((int(state["epoch"]), (int(state["document"]), int(state["window"]))))
        self._seen, buffer = int(state["seen"]), self._room()
        for site in self.sites:
            rows = state[f"rows.{site}"]
            assert isinstance(rows, Tensor)
            buffer[site][:len(rows)] = rows
            self._order = torch.arange(len(rows))

    def _part(self, size: int) -> int:
        """How many of `size` rows are this share's."""
        return len(range(self._share[0], size, self._share[1]))

    def _refill(self) -> None:
        """Fill the buffer and shuffle what is in it. Nothing has changed if that fails."""
        place = self._reader.place
        unread = torch.ones(self.buffer_tokens, dtype=torch.bool)
        unread[self._order] = False
        try:
            new = self._harvest(unread.nonzero().flatten())
        except BaseException:
            self._reader.go(place)
            raise
        order = torch.cat([self._order, new])
        self._order = order[torch.randperm(len(order), generator=self._generator)]

    def _harvest(self, slots: Tensor) -> Tensor:
        """Write the activations of the next windows into slots (n,) of the buffer; the slots that were filled."""
        filled, first, buffer = 0, self._reader.place[0], self._room()
        while windows := self._reader.take(min(len(slots) - filled, GROUP_BATCHES * self._tokens_per_batch)):
            for ids, mask in padded_batches(windows, self._tokens_per_batch):
                rows = self._rows(ids, mask)
                n = len(next(iter(rows.values())))
                for site, x in rows.items():
                    buffer[site][slots[filled : filled + n].to(self._buffer_device)] = x.to(self._buffer_device)
                filled += n
            if not filled and self._reader.place[0] > first + 1:
                raise DataError("a whole epoch of the texts has no ordinary token: all are special ones, or sinks")
        return slots[:filled]

    def _rows(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        found = site_activations(self._model, list(self.sites), ids, mask)
        typical = {site: info.typical_norm for site, info in self.sites.items()}
        return ordinary_rows(found, ids, mask, self._special_ids, typical)

    def _room(self) -> dict[str, Tensor]:
        """The buffer; allocated when it is first needed."""
        for site, info in self.sites.items():
            if site not in self._buffer:
                self._buffer[site] = torch.empty(self.buffer_tokens, info.d_in, dtype=torch.bfloat16,
                                                 device=self._buffer_device)
        return self._buffer

    def _complain(self, size: int) -> None:
        if not self._reader.ended:
            raise DataError(f"a buffer of {self.buffer_tokens:,} tokens cannot give batches of {size:,} and take whole "
                            "windows: give a larger buffer_tokens, at best a hundred batches")
        mine = f"this process' {self._part(size):,} rows of " if self._share[1] > 1 else ""
        raise DataError(
            f"the texts ended: {self._seen:,} tokens were read in {self._reader.epochs} epochs, and the "
            f"{len(self._order):,} left do not fill {mine}a batch of {size:,}. Give more text behind it (where it is "
            "not shuffled), or read it again with epochs= (None: without end)"
        )

    def _origin(self) -> dict[str, str | int]:
        """What the rows depend on beside the state itself; the text by a digest of its first windows."""
        weights = {"model_weights": self._weights} if self._weights else {}
        return {"source": f"{self.model_name} at {', '.join(self.sites)}, share {self._share[0]} of {self._share[1]}, "
                          f"through {self.buffer_tokens:,} tokens",
                "text": self._texts[-1], "special_ids": json.dumps(sorted({int(i) for i in self._special_ids})),
                "tokens_per_batch": self._tokens_per_batch, **weights}
