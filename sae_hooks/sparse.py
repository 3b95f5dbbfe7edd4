"""SparseFeatures: the feature activations of many tokens, as compressed sparse rows with their provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import SaeMismatchError
from .extras import needed

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


WAYS = "rows are chosen by a number, a slice, or a row of numbers or booleans"


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """CSR over tokens: row i holds `indices[indptr[i]:indptr[i + 1]]` with `values` of the same slice.

    indptr (n + 1) int64, indices (nnz) int64, values (nnz) float; doc_id, position and token_id (n) int64 tell which
    token each row is: the document, its place among the document's real tokens (padding not counted), its id in the
    vocabulary (-1 where the model was given none). Tensors are as made, on the device they were made on; nothing is
    copied.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    d_sae: int
    doc_id: Tensor
    position: Tensor
    token_id: Tensor

    def __post_init__(self) -> None:
        n = len(self.indptr) - 1
        short = [name for name in ("doc_id", "position", "token_id") if len(getattr(self, name)) != n]
        if n < 0 or short or len(self.indices) != len(self.values):
            raise SaeMismatchError(f"{n} rows, but {', '.join(short) or 'indices and values'} of another length")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __repr__(self) -> str:
        return f"SparseFeatures({len(self)} tokens x {self.d_sae} features, {self.l0:.1f} active per token)"

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> SparseFeatures:
        """The chosen rows, in the order asked for: an int, a slice, a list of numbers, or a tensor or array (numbers of
        any integer type, or booleans). Raises IndexError for rows that are not there and what chooses none."""
        picked = self._row_numbers(rows)
        starts, counts = self.indptr[picked], self.indptr[picked + 1] - self.indptr[picked]
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(indptr[-1]), device=indptr.device) - indptr[:-1].repeat_interleave(counts)
        entries = starts.repeat_interleave(counts) + within
        return SparseFeatures(
            indptr,
            self.indices[entries],
            self.values[entries],
            self.d_sae,
            self.doc_id[picked],
            self.position[picked],
            self.token_id[picked],
        )

    @property
    def l0(self) -> float:
        """Active features per token, on average."""
        return len(self.indices) / max(len(self), 1)

    @property
    def rows(self) -> Tensor:
        """Row number of each entry (nnz)."""
        numbers = torch.arange(len(self), device=self.indptr.device)
        return numbers.repeat_interleave(self.indptr.diff())

    def to_dense(self) -> Tensor:
        """Feature activations (n, d_sae); n * d_sae values are allocated."""
        dense = torch.zeros(len(self), self.d_sae, dtype=self.values.dtype, device=self.values.device)
        dense[self.rows, self.indices] = self.values
        return dense

    def to_torch(self) -> Tensor:
        """A torch sparse CSR tensor (n, d_sae) on the same memory."""
        size, device = (len(self), self.d_sae), self.values.device
        return torch.sparse_csr_tensor(self.indptr, self.indices, self.values, size, device=device,
                                       check_invariants=False)

    def to_scipy(self) -> csr_matrix:
        """A scipy CSR matrix (n, d_sae), on the CPU, float32 or float64. Raises DataError without scipy (the extra
        `probes`)."""
        csr_matrix = needed("scipy.sparse").csr_matrix
        values = self.values.detach().cpu()
        wide = values if values.dtype == torch.float64 else values.float()
        parts = (wide.numpy(), self.indices.cpu().numpy(), self.indptr.cpu().numpy())
        return csr_matrix(parts, shape=(len(self), self.d_sae))

    def top(self, k: int) -> list[list[tuple[int, float]]]:
        """For each row its k strongest features as (feature, activation), strongest first. Raises ValueError if k is
        below 0."""
        if k < 0:
            raise ValueError(f"expected k of 0 or more, got {k}")
        bounds = self.indptr.tolist()
        rows = [
            (self.indices[a:b], self.values[a:b].topk(min(k, b - a))) for a, b in pairwise(bounds)
        ]
        return [list(zip(i[best.indices].tolist(), best.values.tolist(), strict=True)) for i, best in rows]

    def _row_numbers(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        every = torch.arange(len(self), device=self.indptr.device)
        if isinstance(rows, slice):  # torch takes no step below 0
            chosen = range(len(self))[rows]
            return every[: len(chosen)] * chosen.step + chosen.start
        try:
            index = torch.as_tensor(rows, device="cpu" if isinstance(rows, int) else every.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IndexError(f"{WAYS}, got {rows!r}") from error
        flags = index.dtype == torch.bool
        if index.ndim > 1 or (flags and index.ndim == 0) or (index.is_floating_point() and index.numel()):
            raise IndexError(f"{WAYS}, got {rows!r}")
        if index.ndim == 0:
            if not -len(self) <= int(index) < len(self):
                raise IndexError(f"row {int(index)} of {len(self)}")
            return every[int(index)].reshape(1)
        return every[index if flags and index.numel() else index.long()]  # torch takes uint8 for booleans


def concatenate(parts: Sequence[SparseFeatures]) -> SparseFeatures:
    """One SparseFeatures with the rows of all parts, in order. Raises SaeMismatchError if their d_sae differ or none
    is given."""
    if len({part.d_sae for part in parts}) != 1:
        raise SaeMismatchError(f"cannot join features of {sorted({part.d_sae for part in parts})} widths")
    lengths = torch.cat([part.indptr.diff() for part in parts])
    indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("indices", "values", "doc_id", "position", "token_id")
    }
    return SparseFeatures(indptr=indptr, d_sae=parts[0].d_sae, **joined)
