"""Entries of a sparse matrix as (rows, columns, values), by row, then by column, and as CSR."""

import numpy as np
import torch
from torch import Tensor

from .segments import stable_order

Triplets = tuple[Tensor, Tensor, Tensor]
Csr = tuple[Tensor, Tensor, Tensor]
RUN = 16  # entries of a row in a part, on average, from which a CPU puts whole runs in order more quickly than entries


def moved(found: Triplets, rows: int, columns: int) -> Triplets:
    """The entries of a tile whose first row and first column are these."""
    return (found[0] + rows if rows else found[0]), (found[1] + columns if columns else found[1]), found[2]


def by_row(parts: list[Triplets], n: int, like: Tensor) -> Triplets:
    """The entries of tiles of the same n tokens, by row, then by column."""
    rows, columns, values = joined(parts, like)
    if len(parts) > 1:
        by_runs = rows.is_cpu and len(rows) >= RUN * n * len(parts)
        order = _order_of_runs([part[0] for part in parts], n) if by_runs else stable_order(rows, n)
        rows, columns, values = (part.index_select(0, order) for part in (rows, columns, values))
    return rows, columns, values


def _order_of_runs(rows: list[Tensor], n: int) -> Tensor:
    """`stable_order` of ascending rows of several parts, one after the other, as the runs of a row in each of them."""
    starts = np.stack([np.searchsorted(part.numpy(), np.arange(n + 1)) for part in rows], axis=1)  # (n + 1, parts)
    before = np.cumsum([0, *map(len, rows[:-1])])
    lengths = np.diff(starts, axis=0).ravel()
    order = np.repeat((starts[:-1] + before).ravel() - (lengths.cumsum() - lengths), lengths)
    return torch.from_numpy(order + np.arange(len(order)))


def joined(parts: list[Triplets], like: Tensor) -> Triplets:
    """The entries of all parts, one after the other; where there is none, values like `like`."""
    if not parts:
        none = torch.zeros(0, dtype=torch.int64, device=like.device)
        return none, none, like.new_zeros(0)
    if len(parts) == 1:
        return parts[0]
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows, columns, values


def compressed(found: Triplets, n: int) -> Csr:
    """The CSR of n rows with these entries, which are in order."""
    rows, columns, values = found
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device)), columns, values
