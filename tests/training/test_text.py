"""Texts from files, folders and data sets, and the windows that are cut of them."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from sae_hooks.errors import DataError
from sae_hooks.training.text import Windows, context_windows, documents, prefix_ids, windows

TEXTS = ["in the beginning", "was the word", "and the word was long and long and long"]
BOS = 2  # of tiny_tokenizer


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts nothing before a text."""
    words = {word: i for i, word in enumerate(sorted({w for text in TEXTS for w in text.split()}))}
    made = Tokenizer(WordLevel({**words, "<unk>": len(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "domain": "scripture"}) + "\n" for text in texts)


def opened(path: Path, content: str) -> Path:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
def test_the_lines_of_a_file_can_be_read_again_and_again(tmp_path: Path, name: str) -> None:
    found = documents(opened(tmp_path / name, jsonl(TEXTS) + "\n"))

    assert list(found) == TEXTS
    assert list(found) == TEXTS
    assert list(documents(str(tmp_path / name), field="domain")) == ["scripture"] * 3


def test_a_folder_gives_its_texts_sorted_with_those_of_its_folders(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"b/1.txt": "two", "a.md": "one", "c.txt": "three", "b/no.json": "{}"}.items():
        (tmp_path / name).write_text(text)

    assert list(documents(tmp_path)) == ["one", "two", "three"]
    assert list(documents(tmp_path / "a.md")) == ["one"]


def test_lists_rows_and_splits_are_read_as_they_are_and_empty_texts_left_out() -> None:
    rows = [{"text": text} for text in ("one", " \n", "two")]

    assert list(documents(["one", "", "two"])) == ["one", "two"]
    assert list(documents(rows)) == ["one", "two"]
    assert list(documents({"train": [], "test": rows}, split="test")) == ["one", "two"]


def test_shuffled_texts_are_all_there_and_each_epoch_has_its_order(tmp_path: Path) -> None:
    texts = [str(i) for i in range(50)]
    found = documents(opened(tmp_path / "a.jsonl", jsonl(texts)), seed=1)

    first, again = list(found), list(found)
    found.set_epoch(1)
    second = list(found)

    assert first == again
    assert sorted(first) == sorted(second) == sorted(texts)
    assert len({tuple(order) for order in (texts, first, second)}) == 3
    assert first == list(documents(texts, seed=1))


def test_shuffled_texts_of_a_reading_that_broke_off_are_all_read_again() -> None:
    def texts() -> Iterator[str]:
        yield "one"
        if next(readings) == 0:
            raise KeyboardInterrupt
        yield from ("two", "three")

    class Interrupted:
        def __iter__(self) -> Iterator[str]:
            return texts()

    readings = count()
    found = documents(Interrupted(), seed=1)
    with pytest.raises(KeyboardInterrupt):
        list(found)

    assert sorted(found) == ["one", "three", "two"]
    assert sorted(found) == ["one", "three", "two"]
    assert next(readings) == 2  # and then they are held


def test_an_object_of_the_datasets_library_is_read_and_shuffles_itself() -> None:
    datasets = pytest.importorskip("datasets")
    stored = datasets.Dataset.from_list([{"text": text} for text in TEXTS])

    assert list(documents(stored)) == TEXTS
    assert sorted(documents(stored.to_iterable_dataset(), seed=1)) == sorted(TEXTS)


@pytest.mark.parametrize(("line", "said"), [
    ("{'text': 1}", "expected a JSON object"), ('["in"]', "expected a text under 'text'"),
    ('{"body": "in"}', "got an object with body; name the field with field="),
    ('{"text": 3}', "expected a string under 'text', got int")])
def test_a_line_without_a_text_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = opened(tmp_path / "a.jsonl", jsonl(["one"]) + line)

    reading = iter(documents(path))

    assert next(reading) == "one"
    with pytest.raises(DataError, match="line 2") as caught:
        next(reading)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.gz"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    path = opened(tmp_path / name, jsonl([f"{i} {i * i}" for i in range(3000)]))
    path.write_bytes(path.read_bytes()[:-2000])

    with pytest.raises(DataError, match=r"cannot be read after line \d+"):
        list(documents(path))


def test_what_is_missing_or_no_text_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed

    for source, said in [(tmp_path / "no.jsonl", "no file or folder"), ("no.jsonl.xz", "no file or folder"),
                         (tmp_path / "empty", "holds no .txt or .md"), (iter(["one"]), "read only once"),
                         ("owner/name", r"pip install 'sae-hooks\[train\]'"), (3, "got int"),
                         ({"test": []}, "no split 'train'; it has test"), (__file__, "no known kind")]:
        with pytest.raises(DataError, match=said):
            documents(source)
    for source, said in [([], "no text at all"), ([" ", ""], "no text at all"), (tmp_path, "UTF-8"),
                         ([{"text": 1}], "row 0")]:
        with pytest.raises(DataError, match=said):
            list(documents(source))


# --- windows --------------------------------------------------------------------------------------


def test_every_window_begins_with_bos_as_the_model_has_it_at_inference(tiny_tokenizer: Any) -> None:
    ids = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]

    found = list(windows(TEXTS, tiny_tokenizer, 5))

    assert prefix_ids(tiny_tokenizer) == (BOS,)
    assert {int(window[0]) for window in found} == {BOS}
    assert max(map(len, found)) == 5
    assert [i for window in found for i in window[1:]] == [i for text in ids for i in text]
    mixed = context_windows(ids, 5, seed=0, prefix=(BOS,))
    assert sorted(w.tolist() for w in found) == sorted(w.tolist() for w in mixed)


def test_without_special_tokens_windows_are_the_text_alone(tiny_tokenizer: Any, plain_tokenizer: Any) -> None:
    for tokenizer, add in ((tiny_tokenizer, False), (plain_tokenizer, True)):
        ids = tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]

        found = list(windows([TEXTS[2]], tokenizer, 4, add_special_tokens=add))

        cut = [ids[i:i + 4] for i in range(0, len(ids), 4)]
        assert [window.tolist() for window in found] == [piece for piece in cut if len(piece) > 1]


def test_a_window_of_one_token_is_left_out_but_not_one_of_bos_and_a_token() -> None:
    assert [w.tolist() for w in context_windows([[5, 6, 7], [8]], 2, seed=0)] == [[5, 6]]
    assert sorted(w.tolist() for w in context_windows([[5, 6, 7], [8]], 3, seed=0, prefix=[BOS])) == [
        [BOS, 5, 6], [BOS, 7], [BOS, 8]]


def test_texts_without_end_are_read_as_they_are_needed(plain_tokenizer: Any) -> None:
    def endless(epoch: int) -> Iterator[str]:
        return (TEXTS[i % 3] for i in count(epoch))

    found = windows(endless, plain_tokenizer, 3)

    assert len(list(islice(found(0), 500))) == 500
    assert next(found(0)).tolist() != next(found(1)).tolist()


def test_windows_can_be_opened_at_any_place_and_pass_over_the_texts_before(plain_tokenizer: Any) -> None:
    found = windows(TEXTS * 50, plain_tokenizer, 3)
    whole = list(found.read(0))

    for i, (position, _) in list(enumerate(whole))[::7]:
        rest = [(place, w.tolist()) for place, w in found.read(0, position)]
        assert rest == [(place, w.tolist()) for place, w in whole[i + 1:]]


def test_shares_split_the_texts(plain_tokenizer: Any) -> None:
    found = windows(TEXTS * 5, plain_tokenizer, 3)

    parts = [[w.tolist() for _, w in found.read(0, share=(i, 4))] for i in range(4)]

    assert sorted(w for part in parts for w in part) == sorted(w.tolist() for w in found)


def test_windows_without_room_and_texts_without_windows_are_refused(tiny_tokenizer: Any, plain_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="leave no room"):
        windows(TEXTS, tiny_tokenizer, 2)
    with pytest.raises(DataError, match="no window of two tokens"):
        list(windows(["word", "long"], plain_tokenizer, 4))
    with pytest.raises(DataError, match="share 1 of 2"):
        list(Windows([[1, 2]]).read(0, share=(1, 2)))


@pytest.mark.parametrize(("texts", "told"), [
    ((text for text in ["a text"]), "an iterator can be read only once"), ("a text", "a text itself goes into a list"),
    ([{"text": "a text"}], r"expected texts, got an object with text; documents\(...\) takes them from rows"),
    ([b"a text"], "expected texts, got bytes")])
def test_what_are_no_texts_to_be_read_again_is_said(texts: Any, told: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=told):
        list(windows(texts, tiny_tokenizer, 8))
