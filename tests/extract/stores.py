"""Random stores with their dense counterpart: tokens of documents, features, activations, cut into shards anywhere."""

from dataclasses import dataclass

import numpy as np
import torch

from sae_hooks import SparseFeatures
from sae_hooks.store import open_features
from sae_hooks.store.writing import write_export, write_manifest, write_shard

LENGTHS = (5, 0, 1, 12, 3, 0, 7, 30, 2, 0)  # tokens of each document
ONLY_SPECIAL = 2  # of this document no token is encoded
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SITE = "model.layers.1.output"


@dataclass
class Dense:
    """What a store holds, as arrays: features (n, d_sae) float32 as stored, activations (n, d_in), and which tokens."""

    features: np.ndarray
    activations: np.ndarray
    ordinary: np.ndarray
    doc_id: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    documents: list[dict]

    def tokens_of(self, document):
        """Rows of a document's ordinary tokens."""
        return np.flatnonzero((self.doc_id == document) & self.ordinary)


def made(lengths=LENGTHS, d_sae=40, d_in=6, density=0.2, dtype="float16", seed=0, token_id=None):
    """A random Dense: the first token of each document is special, so is all of document ONLY_SPECIAL."""
    random = np.random.default_rng(seed)
    doc_id, n = np.repeat(np.arange(len(lengths)), lengths), sum(lengths)
    position = np.concatenate([np.arange(0), *(np.arange(length) for length in lengths)])
    ordinary = (position > 0) & (doc_id != ONLY_SPECIAL)
    features = random.lognormal(size=(n, d_sae)) * (random.random((n, d_sae)) < density) * ordinary[:, None]
    features = torch.from_numpy(features).to(DTYPES[dtype]).float().numpy()
    activations = random.standard_normal((n, d_in)).astype(np.float32)
    token_id = random.integers(3, 4096, n) if token_id is None else np.asarray(token_id)
    documents = [{"doc_id": number, "tokens": length, "columns": {"label": f"{number % 3}"} if number % 4 else {}}
                 for number, length in enumerate(lengths)]
    return Dense(features, activations, ordinary, doc_id, position, token_id, documents)


def sparse(dense, rows, features=None):
    """Rows of a Dense as SparseFeatures."""
    features = torch.from_numpy((dense.features if features is None else features)[rows])
    row, column = features.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (features != 0).sum(1).cumsum(0)])
    columns = (torch.from_numpy(part[rows].astype(np.int64)) for part in (dense.doc_id, dense.position, dense.token_id))
    return SparseFeatures(indptr, column, features[row, column], features.shape[1], *columns)


def write(folder, dense, rows_per_shard=9, dtype="float16", sites=(SITE,), manifest=True, activations=True):
    """Write a Dense with the same features at every site; a document begins in the shard of its first row."""
    widths = {"d_in": dense.activations.shape[1], "d_sae": dense.features.shape[1]}
    saes = {site: {"site": site, **widths} for site in sites}
    export = write_export(folder, {"saes": saes, "model": {"name": "tiny"}})
    starts = np.searchsorted(dense.doc_id, np.arange(len(dense.documents)))
    shards = max(1, -(-len(dense.doc_id) // rows_per_shard))
    begins = np.minimum(starts // rows_per_shard, shards - 1)
    entries = []
    for number in range(shards):
        rows = slice(number * rows_per_shard, (number + 1) * rows_per_shard)
        acts = torch.from_numpy(dense.activations[rows])
        entries.append(write_shard(
            folder, number, export=export, first_row=number * rows_per_shard, dtype=dtype,
            features={site: sparse(dense, rows) for site in sites},
            ordinary={site: torch.from_numpy(dense.ordinary[rows]) for site in sites},
            activations=dict.fromkeys(sites, acts) if activations else None,
            documents=[document for document, at in zip(dense.documents, begins, strict=True) if at == number]))
    if manifest:
        write_manifest(folder, entries)
    return entries


def stored(folder, rows_per_shard=9, dtype="float16", **settings):
    """A random store and its Dense."""
    dense = made(dtype=dtype, **settings)
    write(folder, dense, rows_per_shard, dtype)
    return open_features(folder), dense
