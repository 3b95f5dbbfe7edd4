"""Rows of any source: each stands for itself, with the place that it comes from."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_hooks.errors import DataError
from sae_hooks.records import records

ROWS = ["plain", {"text": "one", "label": 1}, None, [1, 2, 3], {"text": "", "label": 2}]


@pytest.mark.parametrize(("suffix", "opener"), [(".jsonl", open), (".jsonl.xz", lzma.open), (".jsonl.gz", gzip.open)])
def test_every_line_but_blank_ones_is_a_row_as_it_stands(tmp_path: Path, suffix: str, opener: Any) -> None:
    path = tmp_path / f"a{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(map(json.dumps, ROWS)))

    found = records(path)

    assert list(found) == list(found) == [(f"{path}, line {2 * i + 1}", row) for i, row in enumerate(ROWS)]


def test_a_text_file_is_one_row_with_its_path_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"b/1.txt": "two\n", "a.md": "", "no.json": "{}"}.items():
        (tmp_path / name).write_text(text)

    assert [row for _, row in records(tmp_path)] == [{"text": "", "path": "a.md"}, {"text": "two\n", "path": "b/1.txt"}]
    assert list(records(str(tmp_path / "b/1.txt"))) == [
        (str(tmp_path / "b/1.txt"), {"text": "two\n", "path": "1.txt"})]


def test_lists_and_arrays_are_rows_also_empty_ones() -> None:
    assert list(records(ROWS)) == [(f"list, row {i}", row) for i, row in enumerate(ROWS)]
    assert list(records({"test": ROWS}, split="test")) == list(records(ROWS))
    assert [row.tolist() for _, row in records(np.arange(6).reshape(2, 3))] == [[0, 1, 2], [3, 4, 5]]
    assert list(records([])) == []


def test_a_data_set_is_read_also_streamed() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "one", "label": 1}, {"text": None, "label": 2}]
    stored = datasets.Dataset.from_list(rows)

    for source in (stored, stored.to_iterable_dataset(), datasets.DatasetDict({"train": stored})):
        assert [row for _, row in records(source)] == rows
        assert [row for _, row in records(records(source))] == rows
    assert [row for _, row in records(stored["text"])] == ["one", None]


@pytest.mark.parametrize(("source", "said"), [
    ("a text, given as it is", r"a text itself goes into a list"), ("long " * 2000, "goes into a list"),
    ("no/such/file.txt", "there is no file"), (b"bytes", "got bytes"), (iter([1]), "only once"),
    ({"input_ids": [[1]]}, "no split 'train'; it has input_ids"), (7, "got int")])
def test_what_is_no_source_is_said_at_once(source: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        records(source)


def test_a_data_frame_is_refused_since_its_items_are_the_names_of_its_columns() -> None:
    pandas = pytest.importorskip("pandas")

    with pytest.raises(DataError, match=r"to_dict\('records'\)"):
        records(pandas.DataFrame({"text": ["one"]}))


@pytest.mark.parametrize(("suffix", "opener"), [(".jsonl", open), (".jsonl.xz", lzma.open), (".jsonl.gz", gzip.open)])
def test_a_line_that_is_no_utf8_is_named_after_those_before_it(tmp_path: Path, suffix: str, opener: Any) -> None:
    path = tmp_path / f"a{suffix}"
    with opener(path, "wb") as file:
        file.write('"naïve"\r\n'.encode() + b'"na\xefve"\n')
    reading = iter(records(path))

    assert next(reading)[1] == "naïve"
    with pytest.raises(DataError, match=r"line 2: expected a JSON object, got .*na.*ve.* can't decode byte 0xef"):
        next(reading)


def test_a_line_that_is_no_json_is_named_after_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"one"\n{"text": \n')
    reading = iter(records(path))

    assert next(reading)[1] == "one"
    with pytest.raises(DataError, match="line 2: expected a JSON object"):
        next(reading)
