"""Documents: every kind of row as token ids and columns, each in its place; and windows of them."""

from __future__ import annotations

import json
import lzma
from datetime import UTC, date, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_hooks.documents import CHARACTERS_PER_CALL, DOCUMENTS_PER_CALL, Document, tokenised, windows
from sae_hooks.errors import DataError

BOS = 2  # of tiny_tokenizer
LLAMA = "a 🦙 b"
DEEP = reduce(lambda inner, _: [inner], range(2000), 1)


def document(n: int, prefix: tuple[int, ...] = (), wanted: np.ndarray | None = None) -> Document:
    """Ids 100, 101, ... after the prefix; n tokens in all."""
    ids = np.asarray([*prefix, *range(100, 100 + n - len(prefix))][:n], dtype=np.int32)
    return Document(7, ids, wanted, {}, prefix)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    "In the beginning", {"text": "In the beginning"}, {"text": None, "input_ids": None, "prompt": "In the beginning"},
    np.str_("In the beginning")])
def test_a_text_is_tokenised_as_the_tokenizer_does_it(tiny_tokenizer: Any, row: Any) -> None:
    field = "prompt" if "prompt" in row else None

    [found] = tokenised([row], tiny_tokenizer, field=field)

    assert found.ids.dtype == np.int32
    assert found.ids.tolist() == tiny_tokenizer("In the beginning")["input_ids"]
    assert (found.number, found.wanted, found.prefix) == (0, None, (BOS,))


def test_without_special_tokens_a_text_has_none_and_no_prefix(tiny_tokenizer: Any) -> None:
    [found] = tokenised(["In the beginning"], tiny_tokenizer, add_special_tokens=False)

    assert found.ids.tolist() == tiny_tokenizer("In the beginning", add_special_tokens=False)["input_ids"]
    assert found.prefix == ()


@pytest.mark.parametrize("row", [
    [BOS, 5, 6], (BOS, 5, 6), np.array([BOS, 5, 6], dtype=np.uint16), torch.tensor([BOS, 5, 6]),
    {"input_ids": [BOS, 5, 6]}, {"text": None, "input_ids": torch.tensor([BOS, 5, 6]), "attention_mask": [1, 1, 1]}])
def test_token_ids_are_taken_as_they_are_and_need_no_tokenizer(tiny_tokenizer: Any, row: Any) -> None:
    [alone], [known] = tokenised([row]), tokenised([row], tiny_tokenizer)

    assert alone.ids.dtype == np.int32
    assert alone.ids.tolist() == known.ids.tolist() == [BOS, 5, 6]
    assert (alone.prefix, known.prefix) == ((), (BOS,))
    assert set(alone.columns) <= {"text"}


@pytest.mark.parametrize(("ids", "prefix"), [
    ([BOS, 5, 6], (BOS,)), ([BOS, BOS, 5, BOS], (BOS, BOS)), ([5, BOS, 6], ()), ([BOS, 1], ()), ([], ())])
def test_without_a_tokenizer_the_special_ids_that_ids_begin_with_are_their_prefix(
        ids: list[int], prefix: tuple[int, ...]) -> None:
    [found] = tokenised([ids], special_ids={0, 1, BOS})

    assert found.prefix == prefix


def test_an_empty_row_is_a_document_without_tokens_in_its_place(tiny_tokenizer: Any) -> None:
    rows = [None, "", "a", [], {"text": None, "label": 1}, {"text": ""}, {"messages": []}, {"input_ids": None}, "b",
            float("nan"), {"text": float("nan")}, {"messages": np.array([], dtype=object)}]

    found = list(tokenised(rows, tiny_tokenizer))

    assert [d.number for d in found] == list(range(len(rows)))
    assert [d.number for d in found if len(d.ids)] == [2, 8]
    assert {(d.ids.dtype, d.prefix) for d in found if not len(d.ids)} == {(np.dtype(np.int32), ())}
    assert found[4].columns == {"label": 1}
    assert all(list(windows(d, 8, 2)) == [] for d in found if not len(d.ids))


def test_a_text_of_special_tokens_alone_keeps_them_all(tiny_tokenizer: Any) -> None:
    [found] = tokenised(["<eos><pad>"], tiny_tokenizer)

    assert found.ids.tolist() == [BOS, 1, 0]


def test_a_character_that_is_split_over_tokens_keeps_them_all(tiny_tokenizer: Any) -> None:
    [found] = tokenised([LLAMA], tiny_tokenizer)

    assert len(found.ids) > 1 + len(LLAMA)
    assert tiny_tokenizer.decode(found.ids[1:]) == LLAMA
    rows = [i for window in windows(found, 4, 1) for i in window.ids[window.first:]]
    assert tiny_tokenizer.decode(rows[1:]) == LLAMA


@pytest.mark.parametrize("rows", [3 * DOCUMENTS_PER_CALL, 2 * DOCUMENTS_PER_CALL + 1])
def test_rows_of_all_kinds_keep_their_order_over_the_calls_of_the_tokenizer(tiny_tokenizer: Any, rows: int) -> None:
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    kinds = [lambda i: f"text {i}", lambda i: [BOS, i], lambda i: [{"role": "user", "content": f"chat {i}"}],
             lambda i: None]
    source = [kinds[i % 4](i) for i in range(rows)]

    found = list(tokenised(source, tiny_tokenizer))

    plain = [tiny_tokenizer(f"text {i}")["input_ids"] if i % 4 == 0 else [BOS, i] if i % 4 == 1 else
             tiny_tokenizer(f"chat {i}", add_special_tokens=False)["input_ids"] if i % 4 == 2 else []
             for i in range(rows)]
    tiny_tokenizer.chat_template = None
    assert [d.ids.tolist() for d in found] == plain
    assert [d.number for d in found] == list(range(rows))


def test_a_million_tokens_are_one_document_and_no_call_holds_many_long_ones(tiny_tokenizer: Any) -> None:
    ids = np.arange(10**6, dtype=np.int64) % 4096
    [long] = tokenised([ids])
    calls: list[int] = []

    class Counting:
        def __call__(self, texts: Any, **options: Any) -> Any:
            calls.append(len(texts))
            return {"input_ids": [[5]] * len(texts)}

    found = list(tokenised(["x" * (CHARACTERS_PER_CALL // 2)] * 5, Counting()))

    rows = np.concatenate([window.ids[window.first:] for window in windows(long, 1024, 64)])
    assert np.array_equal(rows, ids)
    assert len(found) == 5
    assert calls[-3:] == [2, 2, 1]


def test_columns_are_kept_as_json_has_them(tiny_tokenizer: Any) -> None:
    columns = {"label": np.int64(3), "score": np.float32(0.5), "none": float("nan"), "flag": np.bool_(True),
               "vector": torch.tensor([[1, 2]]), "names": ("a", np.str_("b")), "inner": {"x": np.arange(2)},
               "day": date(2024, 2, 29), "time": datetime(2024, 2, 29, 1, tzinfo=UTC), "text ": "é",
               "instant": np.datetime64("2024-02-29T01:00:00.000000001"),
               "date": np.datetime64("2024-02-29"), "month": np.datetime64("2024-02"),
               "instants": np.array(["2024-02-29", "NaT"], "datetime64[ns]")}

    [found] = tokenised([{"text": "a", **columns}], tiny_tokenizer)

    assert found.columns == json.loads(json.dumps(found.columns, allow_nan=False)) == {
        "label": 3, "score": 0.5, "none": None, "flag": True, "vector": [[1, 2]], "names": ["a", "b"],
        "inner": {"x": [0, 1]}, "day": "2024-02-29", "time": "2024-02-29T01:00:00+00:00", "text ": "é",
        "instant": "2024-02-29T01:00:00", "date": "2024-02-29", "month": "2024-02-01",
        "instants": ["2024-02-29T00:00:00", None]}


def test_rows_of_a_data_frame_are_documents(tiny_tokenizer: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    frame = pandas.DataFrame({"text": ["one", None, None], "n": [1.5, None, 2.0], "input_ids": [None, None, [BOS, 9]],
                              "messages": [None, [{"role": "user", "content": "two"}], None]})
    frame.to_parquet(tmp_path / "frame.parquet")

    found = list(tokenised(pandas.read_parquet(tmp_path / "frame.parquet").to_dict("records"), tiny_tokenizer))

    tiny_tokenizer.chat_template = None
    assert [tiny_tokenizer.decode(d.ids) for d in found[:2]] == ["<bos>one", "two"]
    assert found[2].ids.tolist() == [BOS, 9]
    assert [d.columns["n"] for d in found] == [1.5, None, 2.0]


# --- sources --------------------------------------------------------------------------------------


def test_files_and_folders_are_documents_with_their_columns(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write('{"body": "one", "domain": "plays"}\n\n{"body": "two", "domain": "novels"}\n')
    (tmp_path / "c.txt").write_text("three")

    lines = list(tokenised(tmp_path / "a.jsonl.xz", tiny_tokenizer, field="body"))
    files = list(tokenised(str(tmp_path), tiny_tokenizer, field="body"))

    assert [(d.number, dict(d.columns)) for d in lines] == [(0, {"domain": "plays"}), (1, {"domain": "novels"})]
    assert [tiny_tokenizer.decode(d.ids[1:]) for d in [*lines, *files]] == ["one", "two", "three"]
    assert files[0].columns == {"path": "c.txt"}


def test_data_sets_are_read_whole_and_streamed(tiny_tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "one", "label": 1}, {"text": None, "label": 0}, {"input_ids": [BOS, 9], "label": None}]
    stored = datasets.Dataset.from_list([{"text": None, "input_ids": None, **row} for row in rows])

    for source in (stored, stored.to_iterable_dataset(), datasets.DatasetDict({"train": stored})):
        found = list(tokenised(source, tiny_tokenizer))
        assert [d.ids.tolist() for d in found] == [tiny_tokenizer("one")["input_ids"], [], [BOS, 9]]
        assert [d.columns["label"] for d in found] == [1, 0, None]


def test_a_limit_reads_no_further(tiny_tokenizer: Any) -> None:
    rows = ["one", "two", {"nothing": "a text"}]

    assert [d.number for d in tokenised(rows, tiny_tokenizer, limit=2)] == [0, 1]
    assert list(tokenised(rows, tiny_tokenizer, limit=0)) == []


@pytest.mark.parametrize(("row", "said"), [
    (3, "got int 3"), (b"bytes", "got bytes"), ({"body": "a"}, "'text' or 'messages' or 'input_ids', got an object"),
    ([1, -1], "0 or more and fit 32 bits, got -1 to 1"), ([2**31], "fit 32 bits"), ([1.0, 2.0], "integers"),
    ([True, False], "integers"), ([[1], [2, 3]], "integers"), ([1, None], "integers"), (torch.ones(1, 2), "integers"),
    (["a", "b"], "integers"), ({"text": "a", "raw": b"x"}, "the column 'raw' holds bytes"),
    ({"text": "a", "map": {1: 2}}, "the column 'map' holds an object"),
    ({"text": "a", 3: "x"}, "the name of a column must be a text, got 3"),
    ({"text": "a", "deep": DEEP}, "the column 'deep' is nested too deeply"),
    ("half \ud83d", "surrogate pair at character 5"),
    ({"text": "a", "far": float("inf")}, "the column 'far' holds float inf"),
    ({"input_ids": [5, 0], "attention_mask": [1, 0]}, "padded")])
def test_a_row_that_is_no_document_is_named(tiny_tokenizer: Any, row: Any, said: str) -> None:
    with pytest.raises(DataError, match="list, row 1") as caught:
        list(tokenised(["a", row], tiny_tokenizer))
    assert said in str(caught.value)


def test_what_cannot_be_asked_for_is_said_at_once(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="transformers tokenizer, got str"):
        tokenised(["a"], "google/gemma-2-2b")
    with pytest.raises(DataError, match="0 or more; got -1"):
        tokenised(["a"], tiny_tokenizer, limit=-1)
    for field in (3, b"text", ["text"], True):
        with pytest.raises(DataError, match="field must be the name of a column, a text; got "):
            tokenised([{3: "a", "text": "b"}], tiny_tokenizer, field=field)
    for roles in (3, [3], b"user"):
        with pytest.raises(DataError, match="roles must be the name of a role, or several, as texts; got "):
            tokenised(["a"], tiny_tokenizer, roles=roles)
    with pytest.raises(DataError, match="fast tokenizer"):
        tokenised([[1]], roles="user")
    with pytest.raises(DataError, match="row 0: tokenizer= is needed for a text"):
        list(tokenised(["a"]))


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [(), (BOS,), (BOS, 3)])
@pytest.mark.parametrize(("length", "overlap"), [(3, 0), (4, 1), (7, 3), (8, 0), (16, 13)])
def test_every_token_gets_one_row_in_order_and_the_context_before_it(prefix: Any, length: int, overlap: int) -> None:
    for n in range(70):
        whole = document(n, prefix, np.arange(n) % 3 == 0)
        ids = whole.ids.tolist()

        found = list(windows(whole, length, overlap))

        assert [i for w in found for i in range(w.position, w.position + len(w.ids) - w.first)] == list(range(n))
        assert [i for w in found for i in w.ids[w.first:].tolist()] == ids
        assert [i for w in found for i in w.wanted] == whole.wanted.tolist()
        assert all(len(w.ids) == length for w in found[:-1])
        assert all(w.first == 0 for w in found[:1])
        for w in found[1:]:
            assert w.ids[: w.first].tolist() == [*prefix, *ids[w.position - overlap : w.position]]
        assert {(w.document, w.ids.dtype) for w in found} <= {(7, np.dtype(np.int32))}


def test_a_document_that_fits_is_one_window_and_one_token_more_makes_two() -> None:
    assert [w.ids.tolist() for w in windows(document(5, (BOS,)), 5, 2)] == [[BOS, 100, 101, 102, 103]]
    assert [w.ids.tolist() for w in windows(document(6, (BOS,)), 5, 2)] == [
        [BOS, 100, 101, 102, 103], [BOS, 102, 103, 104]]


@pytest.mark.parametrize(("length", "overlap"), [(0, 0), (1, 0), (4, 3)])
def test_windows_without_room_for_a_token_are_refused_at_once(length: int, overlap: int) -> None:
    with pytest.raises(DataError, match=f"windows of {length} tokens leave no room after 1 special"):
        windows(document(2, (BOS,)), length, overlap)
