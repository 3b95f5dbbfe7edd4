"""Pooled features and activations equal a dense reference exactly, for documents of every kind."""

import numpy as np
import pytest
from extract.stores import ONLY_SPECIAL, made, stored, write

from sae_hooks import DataError
from sae_hooks.store import open_features, pooling

REDUCE = {"max": lambda x: x.max(0), "mean": lambda x: x.sum(0) / len(x), "sum": lambda x: x.sum(0),
          "last": lambda x: x[-1], "any": lambda x: (x != 0).any(0)}
KINDS = {"many shards": {"rows_per_shard": 4}, "a row a shard": {"rows_per_shard": 1},
         "one shard": {"rows_per_shard": 100}, "bfloat16": {"dtype": "bfloat16"}, "float32": {"dtype": "float32"},
         "no feature fires": {"density": 0.0}, "every feature fires": {"density": 1.0}}


def reference(dense, how, x):
    """One row a document, by the plainest numpy there is, in float64; zeros where no token is ordinary."""
    pooled = np.zeros((len(dense.documents), x.shape[1]))
    for document in range(len(pooled)):
        rows = dense.tokens_of(document)
        if len(rows):
            pooled[document] = REDUCE[how](x[rows].astype(np.float64))
    return pooled.astype(np.float32)


@pytest.mark.parametrize("how", REDUCE)
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_features_equal_a_dense_reference(tmp_path, monkeypatch, how, kind):
    monkeypatch.setattr(pooling, "CELLS", 120)  # three documents at a time
    monkeypatch.setattr("sae_hooks.store.folder.AT_ONCE", 5)
    store, dense = stored(tmp_path, **KINDS[kind])
    pooled = store.pooled(how)
    assert pooled.shape == (10, 40)
    assert pooled.dtype == np.float32
    assert pooled.has_canonical_format
    assert np.array_equal(pooled.toarray(), reference(dense, how, dense.features))


@pytest.mark.parametrize("how", ["max", "mean", "sum", "last"])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 100])
def test_pooled_activations_equal_a_dense_reference(tmp_path, monkeypatch, how, rows_per_shard):
    monkeypatch.setattr(pooling, "CELLS", 18)
    monkeypatch.setattr("sae_hooks.store.folder.AT_ONCE", 5)
    store, dense = stored(tmp_path, rows_per_shard)
    pooled = store.pooled(how, of="activations")
    assert pooled.dtype == np.float32
    assert np.array_equal(pooled, reference(dense, how, dense.activations))


def test_documents_without_ordinary_tokens_are_rows_of_zeros(tmp_path):
    store, dense = stored(tmp_path)
    assert (dense.doc_id == ONLY_SPECIAL).any()
    for how in REDUCE:
        assert store.pooled(how)[[1, ONLY_SPECIAL, 5, 9]].nnz == 0


def test_large_stores_are_reduced_like_small_ones(tmp_path):
    store, dense = stored(tmp_path, 1000, lengths=[700, 3000, 0, 2500, 9, 1], d_sae=300, dtype="float16")
    for how in REDUCE:
        assert np.array_equal(store.pooled(how).toarray(), reference(dense, how, dense.features))


@pytest.mark.parametrize(("how", "of"), [("median", "features"), ("any", "activations"), (None, "features"),
                                         ("max", "tokens")])
def test_what_cannot_be_pooled_is_told(tmp_path, how, of):
    store, _ = stored(tmp_path)
    with pytest.raises(DataError, match="expected"):
        store.pooled(how, of=of)


def test_activations_that_were_not_kept_are_told(tmp_path):
    write(tmp_path, made(), activations=False)
    store = open_features(tmp_path)
    for ask in (store.activations, lambda: store.pooled("max", of="activations")):
        with pytest.raises(DataError, match="export it with activations=True"):
            ask()


def test_statistics_count_ordinary_tokens_only(tmp_path):
    store, dense = stored(tmp_path)
    statistics = store.statistics()
    tokens = int(dense.ordinary.sum())
    assert statistics.tokens == tokens
    assert np.array_equal(statistics.frequency.numpy(), ((dense.features > 0).sum(0) / tokens).astype(np.float32))
    assert np.array_equal(statistics.max.numpy(), dense.features.max(0))
