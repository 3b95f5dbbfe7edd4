"""The feature store: what is written is read, whole and in every form, whatever the shards' borders."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from extract.stores import LENGTHS, SITE, made, sparse, stored, write

from sae_hooks import DataError, SiteError
from sae_hooks.store import open_features
from sae_hooks.store.writing import read_entry, read_export, write_export, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # torch says so once a process
ROOT = Path(__file__).parents[2]


def same(features, dense, rows=slice(None)):
    """Whether SparseFeatures are these rows of a Dense, in every part."""
    expected = sparse(dense, rows)
    parts = ("indptr", "indices", "values", "doc_id", "position", "token_id")
    return all(torch.equal(getattr(features, part), getattr(expected, part)) for part in parts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows_per_shard", [1, 9, 30, 1000])
def test_what_is_written_is_read_in_every_form(tmp_path, dtype, rows_per_shard):
    store, dense = stored(tmp_path, rows_per_shard, dtype)
    assert len(store) == sum(LENGTHS)
    assert store.documents == len(LENGTHS)
    assert np.array_equal(store.csr().toarray(), dense.features)
    assert np.array_equal(store.torch().to_dense().numpy(), dense.features)
    assert same(store.rows(slice(None)), dense)
    assert np.array_equal(store.activations(), dense.activations)
    assert [len(part) for part in store.shards()] == [
        min(rows_per_shard, len(store) - at) for at in range(0, len(store), rows_per_shard)]
    assert np.array_equal(np.vstack([part.to_dense().numpy() for part in store.shards()]), dense.features)
    store.verify()


@pytest.mark.parametrize("index", [
    3, -1, slice(2, 31), slice(40, 10, -7), slice(5, 5), [59, 0, 0, 17], [], np.array([8, 9, 10]),
    torch.tensor([-60, 44]), np.arange(60) % 7 == 0], ids=str)
def test_rows_are_chosen_as_numpy_chooses_them_also_across_shards(tmp_path, index):
    store, dense = stored(tmp_path)
    numbers = np.arange(60)[np.asarray(index, dtype=np.int64) if isinstance(index, list) else np.asarray(index)
                            if not isinstance(index, slice) else index].reshape(-1)
    assert same(store.rows(index), dense, numbers)
    assert np.array_equal(store.activations(index=index), dense.activations[numbers])


@pytest.mark.parametrize("index", [60, -61, [0, 60], [0.5], [[1]], [True, False]])
def test_rows_that_are_not_there_are_an_index_error(tmp_path, index):
    store, _ = stored(tmp_path)
    with pytest.raises(IndexError):
        store.rows(index)


def test_what_is_returned_stays_when_the_files_are_cut(tmp_path):
    store, dense = stored(tmp_path)
    rows, some, csr, acts = store.rows(slice(None)), store.rows([3, 50]), store.csr(), store.activations()
    column, provenance = store.column(7), store.rows(slice(0, 9)).token_id
    for path in tmp_path.glob("shard-*"):
        path.write_bytes(b"")
    assert same(rows, dense)
    assert same(some, dense, [3, 50])
    assert np.array_equal(csr.toarray(), dense.features)
    assert np.array_equal(acts, dense.activations)
    assert np.array_equal(column[0], np.flatnonzero(dense.features[:, 7]))
    assert provenance.tolist() == dense.token_id[:9].tolist()


@pytest.mark.parametrize("feature", [0, 7, 39])
def test_a_column_is_the_rows_on_which_a_feature_fires(tmp_path, feature):
    store, dense = stored(tmp_path)
    rows, values = store.column(feature)
    assert (rows.dtype, values.dtype) == (np.int64, np.float32)
    assert np.array_equal(rows, np.flatnonzero(dense.features[:, feature]))
    assert np.array_equal(store.column(torch.tensor(feature))[0], store.column(np.uint8(feature))[0])
    assert np.array_equal(values, dense.features[rows, feature])


@pytest.mark.parametrize("feature", [-1, 40, True, 1.5, "3"])
def test_a_feature_that_is_not_there_is_an_index_error(tmp_path, feature):
    store, _ = stored(tmp_path)
    with pytest.raises(IndexError, match=f"feature {feature!r} of 40"):
        store.column(feature)


def test_two_processes_write_the_same_bytes(tmp_path):
    program = ("import sys; from pathlib import Path; from extract.stores import *;"
               "write(Path(sys.argv[1]), made(), sites=('b.output', 'a.output', 'c.input'))")
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, tmp_path / name], check=True, cwd=ROOT / "tests")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert sorted(one) == sorted(["export.json", "manifest.json", *(f"documents-0000{n}.jsonl" for n in range(7)),
                                  *(f"shard-0000{n}.safetensors" for n in range(7))])


def test_the_entry_of_a_shard_is_read_back_from_its_files(tmp_path):
    entries = write(tmp_path, made(), manifest=False)
    export = write_export(tmp_path, {key: value for key, value in read_export(tmp_path).items() if key != "format"})
    assert [read_entry(tmp_path, number, export) for number in range(len(entries))] == entries
    assert read_entry(tmp_path, len(entries), export) is None


@pytest.mark.parametrize(("lengths", "density"), [((), 0.2), ((0, 0), 0.2), ((9, 20), 0.0), ((9, 20), 1.0)],
                         ids=["no documents", "empty documents", "no feature fires", "every feature fires"])
def test_extremes_are_kept_as_they_are(tmp_path, lengths, density):
    store, dense = stored(tmp_path, lengths=lengths, density=density)
    assert store.csr().shape == (sum(lengths), 40)
    assert np.array_equal(store.csr().toarray(), dense.features)
    assert store.pooled("max").shape == (len(lengths), 40)
    assert store.pooled("last").nnz == np.count_nonzero(store.pooled("last").toarray())
    assert len(store.column(3)[0]) == np.count_nonzero(dense.features[:, 3])
    assert store.rows([]).d_sae == 40
    assert "FeatureStore" in repr(store)


@pytest.mark.parametrize(("d_sae", "kind"), [(2**16, "U16"), (2**16 + 1, "U32"), (2**20, "U32")])
def test_indices_are_as_wide_as_the_last_feature_needs(tmp_path, d_sae, kind):
    dense = made(lengths=(3, 4), d_sae=d_sae, density=0.0)
    dense.features[5, [0, d_sae - 1]] = [1.5, 2.5]
    write(tmp_path, dense, 4)
    store = open_features(tmp_path)
    assert f'/indices":{{"dtype":"{kind}"'.encode() in (tmp_path / "shard-00001.safetensors").read_bytes()
    assert [part.tolist() for part in store.column(d_sae - 1)] == [[5], [2.5]]
    assert store.rows(5).indices.tolist() == [0, d_sae - 1]
    assert store.pooled("sum")[1].indices.tolist() == [0, d_sae - 1]


@pytest.mark.parametrize(("value", "dtype", "told"), [
    (7e4, "float16", "feature 8 is 70000 at document 3, position 2 is too large for float16; take dtype='bfloat16'"),
    (np.nan, "float32", "feature 8 is nan at document 3, position 2"), (np.inf, "bfloat16", "feature 8 is inf")])
def test_a_value_that_the_dtype_cannot_hold_is_refused_and_nothing_is_written(tmp_path, value, dtype, told):
    dense = made()
    dense.features[:9] = 0
    dense.features[8, 8] = value
    with pytest.raises(DataError, match=told):
        write(tmp_path, dense, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]


def test_a_value_that_the_dtype_rounds_to_nothing_does_not_fire_in_any_form(tmp_path):
    dense = made()
    tiny = np.flatnonzero(dense.features[:, 7])[::2]
    dense.features[tiny, 7] = 2e-8
    write(tmp_path, dense)
    store = open_features(tmp_path)
    dense.features[tiny, 7] = 0
    fires = np.flatnonzero(dense.features[:, 7])
    assert len(tiny) > 1
    assert same(store.rows(slice(None)), dense)
    assert store.column(7)[0].tolist() == fires.tolist()
    assert store.csr().nnz == np.count_nonzero(dense.features)
    assert store.pooled("any")[:, [7]].nnz == len(np.unique(dense.doc_id[fires]))
    assert store.statistics().frequency[7].item() == pytest.approx(len(fires) / dense.ordinary.sum())
    store.verify()


def test_a_full_disk_is_told_and_leaves_nothing_of_the_shard(tmp_path, monkeypatch):
    entries = write(tmp_path, made(), manifest=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"shard-00007.safetensors could not be written.*No space left.*MB are free"):
        write_shard(tmp_path, len(entries), export="", first_row=60, features={SITE: sparse(made(), slice(0, 9))},
                    ordinary={SITE: torch.from_numpy(made().ordinary[:9])}, documents=[])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fault", [
    "order", "twice", "other tokens", "index", "not ordinary", "documents", "dtype", "json"])
def test_rows_that_break_the_rules_of_the_store_are_refused(tmp_path, fault):
    dense, rows = made(), np.arange(9)
    settings = {"documents": [{"doc_id": 0, "tokens": 5, "columns": {}}], "dtype": "float16"}
    if fault in ("order", "twice"):
        rows[3] = 2 if fault == "twice" else 8
    features = {SITE: sparse(dense, rows), "b": sparse(dense, rows + 1 if fault == "other tokens" else rows)}
    if fault == "index":
        features["b"].indices[0] = 40
    ordinary = {name: torch.from_numpy(dense.ordinary[rows]) & (fault != "not ordinary") for name in features}
    if fault == "documents":
        settings["documents"] *= 2
    if fault == "json":
        settings["documents"][0]["columns"]["x"] = float("nan")
    if fault == "dtype":
        settings["dtype"] = "int8"
    with pytest.raises(DataError):
        write_shard(tmp_path, 0, export="", first_row=0, features=features, ordinary=ordinary, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elsewhere", [lambda store: store, lambda store: pickle.loads(pickle.dumps(store))],
                         ids=["opened", "pickled"])
def test_a_store_that_was_opened_by_a_relative_path_is_read_from_elsewhere(tmp_path, monkeypatch, elsewhere):
    dense = made()
    write(tmp_path / "store", dense)
    monkeypatch.chdir(tmp_path)
    store = open_features("store")
    monkeypatch.chdir("/")
    assert same(elsewhere(store).rows(slice(None)), dense)


def test_a_site_is_told_by_its_name_or_the_end_of_it(tmp_path):
    dense = made()
    write(tmp_path, dense, sites=("model.layers.1.output", "model.layers.11.output"))
    store = open_features(tmp_path)
    assert store.sites == ("model.layers.1.output", "model.layers.11.output")
    assert store.d_sae("layers.1.output") == 40
    for wrong in (None, "output", "layers.2.output", "1.outpu"):
        with pytest.raises(SiteError, match=r"model\.layers\.1\.output, model\.layers\.11\.output"):
            store.csr(wrong)
    assert np.array_equal(store.csr("11.output").toarray(), dense.features)
