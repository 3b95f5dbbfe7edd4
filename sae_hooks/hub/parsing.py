"""Configs that nobody vouches for, parsed strictly, JSON and YAML; and written so that they can be read back."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import SaeFormatError
from .safe_files import open_regular

MOST_CONFIG = 2**20  # bytes; a config is a few hundred
MOST_DIGITS = 20
MOST_EVENTS = 5_000  # of a YAML config: PyYAML takes 15 seconds for a MiB of "1,1,1,..."
MOST_DEPTH = 100  # of a YAML config: PyYAML's time grows with the square of the depth


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB, strictly: no NaN, no infinity, no duplicate keys, no lone surrogates, no depth.

    A byte order mark is accepted. A file whose name ends in .yaml is YAML (`parse_yaml`). Raises SaeFormatError naming
    the flaw, SaeNotFoundError.
    """
    with open_regular(path) as file:
        raw = file.read(MOST_CONFIG + 1)
    if len(raw) > MOST_CONFIG:
        raise SaeFormatError(f"larger than {MOST_CONFIG} bytes; a config is a few hundred")
    return parse_yaml(raw, "config") if path.suffix == ".yaml" else parse_json(raw, "config")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in these bytes, under the rules of read_config. Raises SaeFormatError."""
    strict: dict[str, Any] = {"object_pairs_hook": _no_duplicates, "parse_constant": _no_constant,
                              "parse_float": _finite, "parse_int": _short}
    return _parsed(raw, what, "JSON", "an object", lambda text: json.loads(text, **strict), (ValueError,))


def parse_yaml(raw: bytes, what: str) -> dict[str, Any]:
    """The mapping in the one YAML 1.1 document of these bytes, under the rules of read_config: what JSON could say too.

    Keys are text. A date, and whatever else is no number, true, false or null, stays the text that it is. Aliases,
    anchors, tags, merges (<<), a second document and more than 5,000 parts are refused. Raises SaeFormatError.
    """
    import yaml

    def read(text: str) -> Any:
        loader = yaml.SafeLoader(text)
        return _document(_events(loader), loader)

    wrong = (yaml.YAMLError, ValueError, OverflowError)  # the last of 1:1:...:1.5 and "\\UFFFFFFFF"
    return _parsed(raw, what, "YAML", "a mapping", read, wrong)


def _parsed(raw: bytes, what: str, language: str, expected: str, read: Callable[[str], Any],
            wrong: tuple[type[Exception], ...]) -> dict[str, Any]:
    """What `read` makes of a text in a language, which is to be what is expected; wrong: what it raises for others."""
    try:
        value = read(raw.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except RecursionError as error:
        raise SaeFormatError(f"the {what} is nested too deeply") from error
    except SaeFormatError as error:
        raise SaeFormatError(f"the {what} has {error}") from None
    except wrong as error:
        told = " ".join(str(error).split())[:400]
        raise SaeFormatError(f"the {what} is not {language} in UTF-8: {told}") from error
    if not isinstance(value, dict):
        raise SaeFormatError(f"the {what} is a {language} {type(value).__name__}, expected {expected}")
    return value


def json_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as indented JSON. Raises SaeFormatError if something in it is not plain JSON."""
    try:
        return json.dumps(config, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise SaeFormatError(f"metadata must be plain JSON (text, finite numbers, lists, dicts): {error}") from error


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as JSON that read_config takes back. Raises SaeFormatError if it is none, or over 1 MiB."""
    raw = json_bytes(config)
    if len(raw) > MOST_CONFIG:
        raise SaeFormatError(f"the config would have {len(raw)} bytes, and is read up to {MOST_CONFIG}; keep what is "
                             "large out of the metadata")
    parse_json(raw, "config")
    return raw


# --- JSON ----------------------------------------------------------------------------------------------------

def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise SaeFormatError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return found


def _no_constant(name: str) -> float:
    raise SaeFormatError(f"{name}, which is no finite number")


def _finite(literal: str, parse: Callable[[str], float] = float) -> float:
    value = parse(literal)
    if not math.isfinite(value):
        raise SaeFormatError(f"{literal[:40]}, which is no finite number")
    return value


def _short(literal: str, parse: Callable[[str], int] = int) -> int:
    if len(literal) > MOST_DIGITS:
        raise SaeFormatError(f"a whole number of {len(literal)} digits")
    return parse(literal)


# --- YAML ----------------------------------------------------------------------------------------------------

def _events(loader: Any) -> Iterator[Any]:
    """PyYAML's events, one by one: nothing behind a flaw is parsed."""
    for n in itertools.count():
        if n > MOST_EVENTS:
            raise SaeFormatError(f"more than {MOST_EVENTS} keys, values and brackets; a config has some tens")
        yield loader.get_event()


def _document(events: Iterator[Any], loader: Any) -> Any:
    """The value of the one document in a stream, None where there is none."""
    import yaml

    next(events)  # the stream starts
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _value(next(events), events, loader)
    next(events)  # the document ends
    if not isinstance(next(events), yaml.StreamEndEvent):
        raise SaeFormatError("a second document")
    return value


def _value(event: Any, events: Iterator[Any], loader: Any, depth: int = 0) -> Any:
    """The value that starts with this event, the events up to its end taken."""
    import yaml

    if depth > MOST_DEPTH:
        raise RecursionError
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise SaeFormatError(f"the alias or anchor {event.anchor[:40]!r}; with them a short text can mean a long one")
    if event.tag is not None:
        raise SaeFormatError(f"the tag {event.tag[:80]!r}; plain values need none")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, loader)
    inside = itertools.takewhile(lambda one: not isinstance(one, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, loader, depth + 1) for item in inside]
    return _no_duplicates([(_key(key, loader), _value(next(events), events, loader, depth + 1)) for key in inside])


def _key(event: Any, loader: Any) -> str:
    import yaml

    if isinstance(event, yaml.CollectionStartEvent):
        raise SaeFormatError("a list or mapping for a key")
    key = _value(event, iter(()), loader)
    if not isinstance(key, str):
        raise SaeFormatError(f"the key {event.value!r}, which is no text; in quotes it is")
    if key == "<<" and event.implicit[0]:
        raise SaeFormatError("a merge (<<)")
    return key


def _scalar(event: Any, loader: Any) -> Any:
    """What PyYAML's safe loader takes a scalar for, where that is a number, true, false or null; else its text."""
    import yaml

    kind = loader.resolve(yaml.ScalarNode, event.value, event.implicit).rpartition(":")[2]
    node = yaml.ScalarNode(None, event.value)
    if kind == "int":
        return _short(event.value, lambda _: loader.construct_yaml_int(node))
    if kind == "float":
        return _finite(event.value, lambda _: loader.construct_yaml_float(node))
    if kind == "bool":
        return loader.construct_yaml_bool(node)
    return None if kind == "null" else event.value
