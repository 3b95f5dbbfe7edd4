"""Documents: the rows of a source as token ids with their other columns, and the windows that a model reads of them.

A row is a text, a list of token ids, a list of chat messages, or a mapping that holds one of these and other columns.
Every row is a document, in its place: an empty one has no tokens, but it has its number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from .errors import DataError
from .records import Row, described, records
from .sizes import whole

FIELDS = ("text", "messages", "input_ids")  # where a row's document stands, the first that it has
DOCUMENTS_PER_CALL = 64  # a fast tokenizer spreads the texts of one call over the cores
CHARACTERS_PER_CALL = 2**20  # bounds what a call holds where the texts are long
FINE = ("ns]", "ps]", "fs]", "as]")  # numpy's units that are finer than a datetime's
SENTINELS = ("0", "1")  # contents of one character that no template treats in a way of its own

Ids = np.ndarray[Any, np.dtype[np.int32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Message = dict[str, Any]
Span = tuple[int, int]
Encoded = tuple[list[int], Mask | None]  # ids, and which of them are wanted


@dataclass(frozen=True, eq=False)
class Document:
    """One row of a source, tokenised.

    number: its place in the source, from 0. ids (n,): special tokens as the tokenizer or the chat template puts them;
    n is 0 for an empty text, [], None and NaN. wanted (n,): the tokens of the roles that were asked for; None: all.
    columns: the row's other columns, as JSON has them. prefix: the special tokens that the document begins with and
    that every later window of it begins with again, () if none.
    """

    number: int
    ids: Ids
    wanted: Mask | None
    columns: Mapping[str, Any]
    prefix: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Window:
    """What a model reads at once of one document: ids (length,), of which those from `first` on get a row each.

    document: its number. position: of ids[first] in the document; the rows after it follow it there. wanted
    (length - first,): as in Document.
    """

    document: int
    ids: Ids
    first: int
    position: int
    wanted: Mask | None


def tokenised(source: Any, tokenizer: Any = None, *, field: str | None = None, roles: str | Iterable[str] | None = None,
              add_special_tokens: bool = True, limit: int | None = None, split: str = "train",
              special_ids: Collection[int] = ()) -> Iterator[Document]:
    """Tokenise the rows of a source, in their order, as they are needed.

    source: as `records` takes it; its rows are strings, token ids (a list, an array or a tensor (n,)), chat messages
    (a list or an array of mappings), None or NaN, or mappings with one of these under `field` (default: the first of
    text, messages and input_ids that is there and neither None nor NaN). tokenizer: a transformers tokenizer; None will
    do where all rows are ids.
    roles: of chats, want only what these wrote: the tokens of a message's content, without the template's words around
    it. add_special_tokens: of texts; a chat has those of its template, ids are taken as they are. limit: documents.
    special_ids: the model's; without a tokenizer a document's prefix is the run of them that it begins with.

    Columns become what JSON holds: arrays and tensors lists, dates ISO 8601 strings, NaN None.

    Raises DataError: at once for a source that is missing, while reading for a row that cannot be told or tokenised,
    and at the end if there are chats, but no message in any of them of the roles.
    """
    rows = records(source, split=split)
    if field is not None and not isinstance(field, str):
        raise DataError(f"field must be the name of a column, a text; got {field!r}")
    if tokenizer is not None and not callable(tokenizer):
        raise DataError(f"expected a transformers tokenizer, got {described(tokenizer)}; AutoTokenizer loads one")
    if roles is not None and not getattr(tokenizer, "is_fast", False):
        raise DataError("roles= needs a fast tokenizer, which tells which characters a token stands for")
    wanted = None if roles is None else _names(roles)
    reader = _Reader(tokenizer, rows.field or field, wanted, add_special_tokens, special_ids)
    return reader.documents(islice(rows, None if limit is None else whole("limit", limit, 0)))


def _names(roles: Any) -> frozenset[str]:
    """One role, or several. Raises DataError."""
    names = [roles] if isinstance(roles, str) else list(roles) if isinstance(roles, Iterable) else [roles]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"roles must be the name of a role, or several, as texts; got {roles!r}")
    return frozenset(names)


def windows(document: Document, length: int, overlap: int) -> Iterator[Window]:
    """Cut a document into windows of at most `length` tokens; every token gets exactly one row, in order.

    The first window is ids[:length]. Each later one begins with the document's prefix and with the `overlap` tokens
    before its own, as context without rows. A document without tokens has no window. Raises DataError if length leaves
    no room for a token of its own.
    """
    prefix = np.asarray(document.prefix, dtype=np.int32)
    room = length - len(prefix) - overlap
    if room < 1:
        raise DataError(f"windows of {length} tokens leave no room after {len(prefix)} special ones and an overlap "
                        f"of {overlap}; expected length > special tokens + overlap")
    return _windows(document, prefix, length, overlap, room)


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text; most put one, BOS, or none."""
    plain, whole = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return tuple(whole[: starts[0]]) if starts else ()


def _windows(document: Document, prefix: Ids, length: int, overlap: int, room: int) -> Iterator[Window]:
    ids, n, start = document.ids, len(document.ids), 0
    while start < n:
        stop = min(n, start + (room if start else length))
        context = np.concatenate([prefix, ids[start - overlap : start]]) if start else ids[:0]
        wanted = None if document.wanted is None else document.wanted[start:stop]
        yield Window(document.number, np.concatenate([context, ids[start:stop]]), len(context), start, wanted)
        start = stop


@dataclass(frozen=True)
class _Chat:
    """A conversation as its template renders it, and the characters (start, stop) that are wanted; None: all."""

    text: str
    spans: list[Span] | None


@dataclass(frozen=True)
class _Checked:
    """A row that can be tokenised."""

    number: int
    content: str | _Chat | Ids
    columns: dict[str, Any]


class _Reader:
    """Rows -> documents, some at a time."""

    def __init__(self, tokenizer: Any, field: str | None, roles: frozenset[str] | None, add: bool,
                 special_ids: Collection[int]) -> None:
        self.tokenizer, self.field, self.roles, self.add = tokenizer, field, roles, add
        self.special_ids = frozenset(special_ids)
        self.seen: set[str] = set()  # roles, while some are wanted
        self.prefix = prefix_ids(tokenizer) if tokenizer is not None else ()

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        for some in _batches(self.checked(i, where, row) for i, (where, row) in enumerate(rows)):
            texts = self.encoded([row.content for row in some if isinstance(row.content, str)])
            chats = self.encoded_chats([row.content for row in some if isinstance(row.content, _Chat)])
            for row in some:
                if isinstance(row.content, np.ndarray):
                    yield self.document(row, row.content)
                else:
                    yield self.document(row, *next(texts if isinstance(row.content, str) else chats))
        if self.roles is not None and self.seen and not self.roles & self.seen:
            raise DataError(f"roles={sorted(self.roles)}, but the messages of all documents are of "
                            f"{', '.join(sorted(self.seen))}; name some of these")

    def document(self, row: _Checked, ids: Any, wanted: Mask | None = None) -> Document:
        ids = np.asarray(ids, dtype=np.int32)
        if self.roles is not None and wanted is None:  # a row without messages, of which none is anyone's
            wanted = np.zeros(len(ids), dtype=np.bool_)
        return Document(row.number, ids, wanted, row.columns, self.prefix_of(ids))

    def prefix_of(self, ids: Ids) -> tuple[int, ...]:
        """The special tokens before a document's text, () for a document of special tokens alone."""
        if self.tokenizer is None:
            end = next((i for i, one in enumerate(ids) if one not in self.special_ids), 0)
            return tuple(ids[:end].tolist())
        begins = len(ids) > 0 and tuple(ids[: len(self.prefix)].tolist()) == self.prefix
        return self.prefix if begins else ()

    def encoded(self, texts: list[str]) -> Iterator[Encoded]:
        if texts:
            found = self.tokenizer(texts, add_special_tokens=self.add, return_attention_mask=False, verbose=False)
            yield from ((ids, None) for ids in found["input_ids"])

    def encoded_chats(self, chats: list[_Chat]) -> Iterator[Encoded]:
        if not chats:
            return
        found = self.tokenizer([chat.text for chat in chats], add_special_tokens=False, return_attention_mask=False,
                               return_offsets_mapping=self.roles is not None, verbose=False)
        for i, (ids, chat) in enumerate(zip(found["input_ids"], chats, strict=True)):
            yield ids, None if chat.spans is None else _covered(chat, found["offset_mapping"][i])

    def checked(self, number: int, where: str, row: Any) -> _Checked:
        content, columns = _parted(row, self.field, where)
        if other := [name for name in columns if not isinstance(name, str)]:
            raise DataError(f"{where}: the name of a column must be a text, got {other[0]!r}")
        plain = {name: _plain(value, f"{where}: the column {name!r}") for name, value in columns.items()}
        return _Checked(number, self.content(content, where), plain)

    def content(self, content: Any, where: str) -> str | _Chat | Ids:
        """Told by what it is. An empty one is no token ids, whatever the tokenizer would put before it."""
        if isinstance(content, np.ndarray) and content.dtype == object:  # what a data frame has for a list
            content = content.tolist()
        if _is_missing(content) or (isinstance(content, str | Sequence) and not content):
            return np.zeros(0, dtype=np.int32)
        chat = isinstance(content, Sequence) and isinstance(content[0], Mapping)
        if self.roles is not None and not chat:
            raise DataError(f"{where}: roles= needs chat messages, got {described(content)}")
        if not chat and not isinstance(content, str):
            return _ids(content, where)
        if self.tokenizer is None:
            raise DataError(f"{where}: tokenizer= is needed for {'messages' if chat else 'a text'}")
        if not chat:
            return _text(content, where)
        rendered = _rendered(self.tokenizer, content, self.roles, where)
        if self.roles is not None:
            self.seen.update(message["role"] for message in content)
        return rendered


def _batches(rows: Iterable[_Checked]) -> Iterator[list[_Checked]]:
    some: list[_Checked] = []
    characters = 0
    for row in rows:
        some.append(row)
        characters += len(row.content.text if isinstance(row.content, _Chat) else row.content)
        if len(some) == DOCUMENTS_PER_CALL or characters >= CHARACTERS_PER_CALL:
            yield some
            some, characters = [], 0
    yield some


def _parted(row: Any, field: str | None, where: str) -> tuple[Any, dict[str, Any]]:
    """(the row's document, its other columns)."""
    if not isinstance(row, Mapping):
        return row, {}
    there = [name for name in (FIELDS if field is None else (field,)) if name in row]
    if not there:
        expected = " or ".join(map(repr, FIELDS if field is None else (field,)))
        raise DataError(f"{where}: expected {expected}, got {described(row)}; name the field with field=")
    name = next((name for name in there if not _is_missing(row[name])), there[0])
    columns = {column: value for column, value in row.items() if column != name}
    mask = columns.pop("attention_mask", None) if name == "input_ids" else None
    if mask is not None and not np.all(np.asarray(mask)):
        raise DataError(f"{where}: attention_mask says that input_ids are padded; give them without padding")
    return row[name], columns


def _text(text: str, where: str) -> str:
    try:
        text.encode()  # a tokenizer refuses a whole batch for one text, and does not say which
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text has half a surrogate pair at character {error.start}: it was cut there, or "
                        "decoded wrongly") from error
    return str(text)


def _ids(content: Any, where: str) -> Ids:
    """Check token ids (n,) of any kind."""
    if isinstance(content, bytes | bytearray) or not isinstance(content, Sequence | np.ndarray | Tensor):
        raise DataError(f"{where}: expected a text, token ids or chat messages, got {described(content)}")
    try:
        ids = np.asarray(content.tolist() if isinstance(content, Tensor) else content)
    except ValueError as error:
        raise DataError(f"{where}: token ids must be one row of integers, got {described(content)}") from error
    if ids.ndim == 1 and not len(ids):
        return ids.astype(np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"{where}: token ids must be one row of integers, got {described(content)}")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise DataError(f"{where}: token ids must be 0 or more and fit 32 bits, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def _rendered(tokenizer: Any, messages: Sequence[Any], roles: frozenset[str] | None, where: str) -> _Chat:
    """The conversation as text, and where in it the messages of the roles stand."""
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: a message must have a role and a content, got {described(message)}")
    chat = [dict(message) for message in messages]

    def render(some: list[Message]) -> str:
        try:
            return str(tokenizer.apply_chat_template(some, tokenize=False))
        except Exception as error:  # a template is a program of its own, which raises what it likes
            raise DataError(f"{where}: the tokenizer's chat template cannot render the messages: {error}") from error

    text = _text(render(chat), where)
    if roles is None:
        return _Chat(text, None)
    return _Chat(text, [_span(render, chat, i, text, where) for i, m in enumerate(chat) if m["role"] in roles])


def _span(render: Callable[[list[Message]], str], chat: list[Message], i: int, text: str, where: str) -> Span:
    """The characters of the i-th message's content in the rendered text.

    What stands before and after it is what renderings with another content there have in common. So no turn needs to
    be rendered as it is at the end of a chat (some templates strip earlier ones), and a default system prompt, which a
    template puts before the first turn, is nobody's.
    """
    content = chat[i].get("content")
    if not isinstance(content, str):
        raise DataError(f"{where}: roles cannot be told: expected a string as the content of message {i}, got "
                        f"{described(content)}")
    if not content.strip():
        return 0, 0
    one, other = (render([*chat[:i], {**chat[i], "content": made_up}, *chat[i + 1 :]]) for made_up in SENTINELS)
    if one == other:  # the template leaves the message out
        return 0, 0
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    before, after = one[:start], one[start + 1 :]
    stop = len(text) - len(after)
    same = other == before + SENTINELS[1] + after and text.startswith(before) and text.endswith(after)
    if not same or stop < start or _letters(text[start:stop]) not in _letters(content):
        raise DataError(f"{where}: roles cannot be told: the chat template does not put the content of message {i} "
                        f"({chat[i]['role']}) as one piece into a frame that is the same for others; leave out roles=")
    return start, stop


def _letters(text: str) -> str:
    """Without white space, which templates strip and normalise."""
    return "".join(text.split())


def _covered(chat: _Chat, offsets: Sequence[tuple[int, int]]) -> Mask:
    """Which tokens stand for a character of the spans; offsets: each token's characters (start, stop)."""
    inside = np.zeros(len(chat.text) + 1, dtype=np.int64)
    for start, stop in chat.spans or ():
        inside[start + 1 : stop + 1] = 1
    until = inside.cumsum()
    found = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    return np.asarray(until[found[:, 1]] > until[found[:, 0]])


def _is_missing(value: Any) -> bool:
    """None, or NaN and pandas' NaT: what data frames have for it."""
    return value is None or (isinstance(value, float | date) and value != value)


def _plain(value: Any, where: str) -> Any:
    """A column's value as JSON has it."""
    try:
        return _json(value, where)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply for JSON; convert or remove it") from error


def _json(value: Any, where: str) -> Any:
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind == "M":
        fine = str(value.dtype).endswith(FINE)  # these make numbers, not dates
        value = value.astype("datetime64[us]") if fine else value
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if _is_missing(value):
        return None
    if isinstance(value, str | int) or (isinstance(value, float) and abs(value) < float("inf")):
        return value
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _json(inner, where) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_json(inner, where) for inner in value]
    raise DataError(f"{where} holds {described(value)}, which JSON has no form for; convert or remove it")
