"""Documents to features: length-bucketed batches, cut at the deepest site, encoded to sparse rows as they come.

The text is taken in parts of some ten thousand tokens. Within a part windows of like length go together, so that little
is padded; its rows come out in the order of the documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .documents import Document, Window, tokenised, windows
from .errors import DataError, SaeAttachError
from .forward import DeepEnoughError, eval_mode, input_device, reads_text, uncompiled
from .runtime import Slot, WatchRequest
from .saes import Saes
from .sites import context_length, runs_again
from .sizes import whole
from .sparse import SparseFeatures
from .tokens import Pass

WINDOW = 1024  # tokens
TOKENS_PER_PART = 32_768
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Extracted:
    """The features of a part of the documents, on the CPU.

    features: by name of the SAE, a row for each token, the same tokens at all of them; special tokens and attention
    sinks have empty rows. ordinary: by name, (rows) bool, False for those. activations: by name, x (rows, d_in) in the
    model's dtype, if they were asked for. documents: those that begin in this part, also empty ones.
    """

    features: dict[str, SparseFeatures]
    ordinary: dict[str, Tensor]
    activations: dict[str, Tensor]
    documents: list[Document]

    def __len__(self) -> int:
        """Rows."""
        return len(next(iter(self.features.values())))


@dataclass(eq=False)
class Part:
    """Consecutive windows, and the documents that begin with them. first_row: rows of all parts before."""

    number: int
    first_row: int
    documents: list[Document] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    rows: int = 0

    def add(self, window: Window) -> None:
        """Take one more window."""
        self.windows.append(window)
        self.rows += _rows(window)

    def origins(self) -> tuple[Tensor, Tensor, Tensor]:
        """doc_id, position and token_id (rows) of the tokens that get a row, int64."""
        found = [(w.document, w.position, w.ids[w.first:], w.wanted) for w in self.windows]
        columns = [np.stack([np.full(len(ids), document), np.arange(len(ids)) + position, ids])[:, _all(wanted)]
                   for document, position, ids, wanted in found]
        joined = np.concatenate(columns, axis=1) if columns else np.zeros((3, 0))
        doc_id, position, token_id = torch.from_numpy(joined.astype(np.int64))
        return doc_id, position, token_id


def extract_features(model: nn.Module, documents: Any, *, tokenizer: Any = None, sites: Sequence[str] | None = None,
                     activations: bool = False, special_tokens: bool = False, window: int | None = None,
                     overlap: int = 0, tokens_per_part: int = TOKENS_PER_PART,
                     tokens_per_batch: int = TOKENS_PER_BATCH, **reading: Any) -> Iterator[Extracted]:
    """Yield the features of all tokens of documents, in their order, some tens of thousands of tokens at a time.

    model has SAEs attached and takes input_ids by name; sites names some of the SAEs (default: all). documents: texts,
    rows with "text", "messages" or "input_ids", files, data sets (`documents.tokenised`, which also takes the rest:
    field, roles, limit, split, add_special_tokens). window: tokens that the model reads at once, by default 1024, or as
    many as its config says that it takes if that is less; longer documents are cut, and the last `overlap` tokens of a
    window are read again as the context of the next. activations: give x beside the features. special_tokens: encode
    special tokens and attention sinks, too.

    The model runs in eval mode, only as deep as the deepest site, and is left as it was. What is open on it, such as an
    edit at another site, has its effect; features at an edited site are those of before the edit. Memory beside the
    model: one pass of tokens_per_batch positions, and tokens_per_part rows of about 24 bytes a non-zero, and twice
    their activations if asked for. Raises DataError for a row that cannot be read or tokenised, a token id that the
    model has not, a window longer than it takes, and what is no number of tokens; EditError for a site without an SAE,
    SaeAttachError without SAEs or input_ids.
    """
    extractor = Extractor(model, sites, activations=activations, special_tokens=special_tokens, window=window,
                          overlap=overlap, tokens_per_part=tokens_per_part, tokens_per_batch=tokens_per_batch)
    return (extractor.run(part) for part in extractor.parts(documents, tokenizer, **reading))


class Extractor:
    """A model with attached SAEs, which of them to encode with, and how a text is cut for it."""

    def __init__(self, model: nn.Module, sites: Sequence[str] | None = None, *, activations: bool = False,
                 special_tokens: bool = False, window: int | None = None, overlap: int = 0,
                 tokens_per_part: int = TOKENS_PER_PART, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        """Raises SaeAttachError if model has no SAEs or takes no input_ids, or a site is of a decoder beside an
        encoder or of a layer that a pass runs several times, EditError if sites names an SAE that it has not, DataError
        for what is no number of tokens, or a window longer than model takes."""
        self.saes, self.takes = _attached(model), _taken(model)
        self.model, self.slots = model, _slots(self.saes, sites)
        if other := [str(slot.read) for slot in self.slots if not reads_text(model, slot.read.module)]:
            raise SaeAttachError(f"extraction gives {type(model).__name__} input_ids alone, which its encoder reads; "
                                 f"{', '.join(other)} reads a text of its own. Capture it in a call with both")
        for slot in self.slots:
            if runs_again(model, slot.read):
                raise SaeAttachError(_several_runs(slot))
        self.activations, self.special_tokens = bool(activations), bool(special_tokens)
        self.window, self.overlap = _window_length(model, window), whole("overlap", overlap, 0)
        self.tokens_per_part = whole("tokens_per_part", tokens_per_part)
        self.tokens_per_batch = whole("tokens_per_batch", tokens_per_batch)

    def parts(self, documents: Any, tokenizer: Any, **reading: Any) -> Iterator[Part]:
        """The text in parts of tokens_per_part rows, or at most one window more, as they are needed. Takes, and raises,
        what `documents.tokenised` does."""
        read = tokenised(documents, tokenizer, special_ids=self.saes.special_ids, **reading)
        return _parts(read, self.window, self.overlap, self.tokens_per_part)

    @torch.no_grad()
    def run(self, part: Part) -> Extracted:
        """The features of a part's windows. Raises DataError for a token id beyond the model's embeddings."""
        _check_ids(part.windows, self.model)
        origins = part.origins()
        collectors = {slot.name: _Collector(slot, self.activations) for slot in self.slots}
        with eval_mode(self.model), uncompiled(), self._open(list(collectors.values())) as batch_of:
            for batch in batches(part.windows, self.tokens_per_batch, padded="attention_mask" in self.takes):
                batch_of(batch)
                self._forward(batch)
                _check_met(collectors)
        features = {name: c.features(*origins) for name, c in collectors.items()}
        return Extracted(features, {name: c.ordinary() for name, c in collectors.items()},
                         {name: c.activations() for name, c in collectors.items() if self.activations}, part.documents)

    def _forward(self, batch: Batch) -> None:
        where = input_device(self.model, batch.ids.device)
        inputs = {"attention_mask": batch.mask.to(where), "use_cache": False}
        with suppress(DeepEnoughError):
            self.model(input_ids=batch.ids.to(where), **{name: inputs[name] for name in self.takes})

    @contextmanager
    def _open(self, collectors: list[_Collector]) -> Iterator[Any]:
        """Watch the sites; gives what tells the collectors the batch that comes next."""
        runtime = self.saes._runtime
        met: set[str] = set()

        def watched(collector: _Collector) -> WatchRequest:
            def take(x: Tensor, chosen: Tensor, now: Pass) -> None:
                collector.take(x, chosen)
                met.add(collector.slot.name)
                if len(met) == len(collectors):
                    raise DeepEnoughError
            return WatchRequest(collector.slot, special_tokens=self.special_tokens, sink=take)

        def next_batch(batch: Batch) -> None:
            met.clear()
            for collector in collectors:
                collector.batch = batch

        requests = [watched(collector) for collector in collectors]
        runtime.open(requests, "model")
        try:
            yield next_batch
        finally:
            runtime.close(requests)


def _window_length(model: nn.Module, window: int | None) -> int:
    """Tokens that the model is to read at once; None: the default. Raises DataError if it does not take as many."""
    if window is None:
        return context_length(model, WINDOW)
    window = whole("window", window)
    if (limit := context_length(model, window)) < window:
        raise DataError(f"window={window}, but {type(model).__name__} takes {limit} tokens at most, by its config; "
                        "give no more, or leave window out")
    return window


def _parts(documents: Iterable[Document], window: int, overlap: int, tokens: int) -> Iterator[Part]:
    """Cut documents into windows, and those into parts."""
    part = Part(0, 0)
    for document in documents:
        if part.rows >= tokens:
            yield part
            part = Part(part.number + 1, part.first_row + part.rows)
        part.documents.append(document)
        for one in windows(document, window, overlap):
            if part.rows >= tokens:
                yield part
                part = Part(part.number + 1, part.first_row + part.rows)
            part.add(one)
    if part.documents or part.windows:
        yield part


def _attached(model: nn.Module) -> Saes:
    saes = getattr(model, "saes", None)
    if not isinstance(saes, Saes) or not len(saes):
        raise SaeAttachError(f"no SAE is attached to this {type(model).__name__}; attach_saes(model, source) first")
    return saes


def _taken(model: nn.Module) -> list[str]:
    """Which of attention_mask and use_cache the model takes beside input_ids. A wrapper that hands on **kwargs does not
    say; the model inside it does. Raises SaeAttachError for one that takes no input_ids."""
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        if not _takes_all(takes):
            raise SaeAttachError(f"extraction calls {type(model).__name__}(input_ids=..., attention_mask=...), whose "
                                 f"forward takes {', '.join(takes) or 'nothing'}; wrap it in a module that takes these")
        inner = (inspect.signature(module.forward).parameters for module in model.modules())
        takes = next((found for found in inner if "input_ids" in found), takes)
    return [name for name in ("attention_mask", "use_cache") if name in takes or _takes_all(takes)]


def _takes_all(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _slots(saes: Saes, sites: Sequence[str] | None) -> list[Slot]:
    """The slots of the SAEs that are asked for, their weights loaded."""
    names = [sites] if isinstance(sites, str) else list(saes) if sites is None else list(sites)
    slots = {slot.name: slot for name in names for slot in saes._several(None, None, name)}
    if not slots:
        raise SaeAttachError(f"sites= names none of the attached SAEs: {', '.join(saes)}")
    return list(slots.values())


def _check_ids(some: Sequence[Window], model: nn.Module) -> None:
    """Raise DataError for an id without an embedding, which is an IndexError, and on a GPU the end of the process."""
    embedding = None
    with suppress(NotImplementedError, AttributeError):
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    number = getattr(getattr(embedding, "base_layer", embedding), "num_embeddings", None)
    if not isinstance(number, int):
        return
    for window in some:
        if len(window.ids) and (most := int(window.ids.max())) >= number:
            raise DataError(f"document {window.document} has the token id {most}, {type(model).__name__} has ids 0 to "
                            f"{number - 1}; was it tokenised for another model?")


# --- batches ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Batch:
    """ids and mask (batch, length), padded on the right; rows (batch, length) bool: positions that get a row; places
    (rows of the batch): which row of the part each is."""

    ids: Tensor
    mask: Tensor
    rows: Tensor
    places: Tensor


def batches(all_windows: Sequence[Window], tokens: int, padded: bool = True) -> Iterator[Batch]:
    """Batches of at most `tokens` positions or one window, longest first; windows without a row are passed over.

    padded: windows of several lengths may go together; a model without an attention mask could not tell their ends.
    """
    starts = np.cumsum([0, *(_rows(w) for w in all_windows)])
    order = sorted((i for i, w in enumerate(all_windows) if _rows(w)), key=lambda i: (-len(all_windows[i].ids), i))
    while order:
        longest = len(all_windows[order[0]].ids)
        size = max(1, tokens // longest)
        if not padded:
            size = sum(len(all_windows[i].ids) == longest for i in order[:size])
        mine, order = order[:size], order[size:]
        yield _padded([all_windows[i] for i in mine], [int(starts[i]) for i in mine])


def _padded(some: Sequence[Window], starts: Sequence[int]) -> Batch:
    length = max(len(w.ids) for w in some)
    ids, mask, rows = torch.zeros(3, len(some), length, dtype=torch.int64, device="cpu")
    for i, w in enumerate(some):
        ids[i, :len(w.ids)], mask[i, :len(w.ids)] = torch.from_numpy(w.ids), 1
        rows[i, w.first:len(w.ids)] = 1 if w.wanted is None else torch.from_numpy(w.wanted).long()
    places = [torch.arange(_rows(w), device="cpu") + start for w, start in zip(some, starts, strict=True)]
    return Batch(ids, mask, rows.bool(), torch.cat(places))


def _rows(window: Window) -> int:
    return len(window.ids) - window.first if window.wanted is None else int(window.wanted.sum())


def _all(wanted: np.ndarray[Any, Any] | None) -> Any:
    return slice(None) if wanted is None else wanted


def _check_met(collectors: Mapping[str, _Collector]) -> None:
    if missed := [name for name, c in collectors.items() if c.batch is not None]:
        raise SaeAttachError(f"a forward pass on text never reaches {', '.join(missed)}")


def _several_runs(slot: Slot) -> str:
    return (f"a forward pass runs {slot.read} more than once; which run an extraction should take cannot be told. "
            "Capture it: a capture has the last one")


class _Collector:
    """Gathers the rows of one SAE, batch by batch."""

    def __init__(self, slot: Slot, with_activations: bool) -> None:
        self.slot, self.with_activations = slot, with_activations
        self.batch: Batch | None = None
        self._places: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._entries: list[tuple[Tensor, Tensor]] = []
        self._ordinary: list[Tensor] = []
        self._x: list[Tensor] = []

    def take(self, x: Tensor, chosen: Tensor) -> None:
        """Encode what is chosen of the rows of x (..., d_in). Raises SaeAttachError for a second x of a batch."""
        if self.batch is None:
            raise SaeAttachError(_several_runs(self.slot))
        rows = self.batch.rows.to(x.device).flatten()
        mine, ordinary = x.flatten(0, -2)[rows], chosen.flatten()[rows]
        if not bool(mine.sum(dtype=torch.float64).isfinite()):
            raise DataError(f"{self.slot.name} gave activations that are not finite; load the model in bfloat16 or "
                            "float32")
        indptr, indices, values = self.slot.on(x.device).encode_sparse(mine[ordinary])
        counts = torch.zeros(len(ordinary), dtype=indptr.dtype, device=x.device)
        counts[ordinary] = indptr.diff()
        self._counts.append(counts.cpu())
        self._entries.append((indices.int().cpu(), values.cpu()))
        self._ordinary.append(ordinary.cpu())
        self._places.append(self.batch.places)
        if self.with_activations:
            self._x.append(mine.cpu())
        self.batch = None

    def features(self, doc_id: Tensor, position: Tensor, token_id: Tensor) -> SparseFeatures:
        """All rows, in the part's order; the arguments (rows) tell where they are from."""
        sae, order = self.slot.sae, self._order()
        counts = _joined(self._counts, torch.zeros(0, dtype=torch.int64))
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        indices = _joined([i for i, _ in self._entries], torch.zeros(0, dtype=torch.int32)).long()
        values = _joined([v for _, v in self._entries], torch.zeros(0))
        nowhere = torch.empty_like(order)
        found = SparseFeatures(indptr, indices, values, sae.d_sae, nowhere, nowhere, nowhere)[order]
        return SparseFeatures(found.indptr, found.indices, found.values, sae.d_sae, doc_id, position, token_id)

    def ordinary(self) -> Tensor:
        """(rows) bool: what was encoded."""
        return _joined(self._ordinary, torch.zeros(0, dtype=torch.bool))[self._order()]

    def activations(self) -> Tensor:
        """x (rows, d_in)."""
        return _joined(self._x, torch.zeros(0, self.slot.sae.d_in))[self._order()]

    def _order(self) -> Tensor:
        """Where each of the part's rows lies among those that were gathered."""
        return torch.argsort(_joined(self._places, torch.zeros(0, dtype=torch.int64)))


def _joined(tensors: Sequence[Tensor], none: Tensor) -> Tensor:
    return torch.cat(list(tensors)) if tensors else torch.empty_like(none, device="cpu")
