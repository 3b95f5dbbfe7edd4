"""A store in other formats: Parquet, datasets, and the documents' columns."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from extract.stores import LENGTHS, made, stored, write

from sae_hooks import DataError
from sae_hooks.extras import EXTRAS
from sae_hooks.store import open_features


def dense_of(table):
    """Dense features of a table's lists."""
    features = np.zeros((len(table["indices"]), 40), dtype=np.float32)
    for row, (indices, values) in enumerate(zip(table["indices"], table["values"], strict=True)):
        features[row, indices] = values
    return features


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_parquet_holds_the_same_rows(tmp_path, dtype):
    pq = pytest.importorskip("pyarrow.parquet")
    store, dense = stored(tmp_path / "store", dtype=dtype)
    store.to_parquet(tmp_path / "features.parquet")
    table = pq.read_table(tmp_path / "features.parquet").to_pydict()
    assert sorted(table) == ["doc_id", "indices", "position", "token_id", "values"]
    assert np.array_equal(dense_of(table), dense.features)
    for column in ("doc_id", "position", "token_id"):
        assert table[column] == getattr(dense, column).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "store"]


def test_parquet_that_cannot_be_finished_leaves_nothing(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    store, _ = stored(tmp_path / "store")
    (tmp_path / "store/shard-00005.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="shard-00005"):
        store.to_parquet(tmp_path / "features.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_dataset_holds_the_same_rows_and_is_made_once(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    store, dense = stored(tmp_path / "store")
    made_once = store.to_dataset()
    assert np.array_equal(dense_of(made_once[:]), dense.features)
    assert made_once["token_id"][:] == dense.token_id.tolist()
    before = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*.arrow")]
    assert store.to_dataset()[7] == made_once[7]
    assert [(path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*.arrow")] == before
    assert len(before) == 1


@pytest.mark.parametrize(("module", "extra", "use"), [
    ("scipy.sparse", "probes", lambda s, path: s.rows(3).to_scipy()),
    ("scipy.sparse", "probes", lambda s, path: s.csr()),
    ("scipy.sparse", "probes", lambda s, path: s.pooled("max")),
    ("pyarrow.parquet", "probes", lambda s, path: s.to_parquet(path / "x.parquet")),
    ("datasets", "train", lambda s, path: s.to_dataset())])
def test_without_its_library_a_form_names_the_extra_that_brings_it(tmp_path, monkeypatch, module, extra, use):
    store, _ = stored(tmp_path / "store")
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(DataError, match=rf"needs the {module.partition('.')[0]} library.*'sae-hooks\[{extra}\]'"):
        use(store, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_extras_that_are_named_bring_these_libraries():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for library, extra in EXTRAS.items():
        assert any(requirement.startswith(library) for requirement in project["optional-dependencies"][extra])


def test_labels_are_one_a_document_and_none_where_a_document_has_none(tmp_path):
    store, _ = stored(tmp_path)
    assert store.labels("label") == [f"{number % 3}" if number % 4 else None for number in range(len(LENGTHS))]
    with pytest.raises(DataError, match="no document has 'domain'; columns: label"):
        store.labels("domain")
    with pytest.raises(DataError, match=r"no document has \['label'\]; columns: label"):
        store.labels(["label"])


def test_columns_of_any_plain_json_are_kept(tmp_path):
    dense = made(lengths=(2, 0, 3))
    values = ["é\u2028\n\"", {"a": [1, None, True]}, 10**30]
    for document, value in zip(dense.documents, values, strict=True):
        document["columns"] = {"x": value}
    write(tmp_path, dense, 2)
    assert open_features(tmp_path).labels("x") == values


def test_what_was_asked_is_kept(tmp_path):
    store, _ = stored(tmp_path)
    assert store.export["model"] == {"name": "tiny"}
    assert repr(store).endswith("60 tokens of 10 documents; model.layers.1.output (40 features, "
                                f"{store.csr().nnz / 60:.1f} active per token))")
