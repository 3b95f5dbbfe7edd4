"""Which entries of a matrix matter: those above a threshold, or the largest of each row.

On CPUs numpy finds them: in one thread it compares three times as quickly as PyTorch, lists them five times, and
selects twice. But PyTorch takes all threads. To gate, no marks are needed there: the sign of pre - threshold does it in
a quarter of the time of PyTorch's products with marks.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .segments import triton_for
from .triplets import Triplets

FEW_MARKS, THREADS = 2**13, 4  # entries up to which, and threads above which PyTorch's own search is the quicker one
FEW_GATED = 2**12  # entries from which that is so
GROUPS = 4  # a number to be selected: more bring the bound nearer, but are more to select from


def on_cpu(t: Tensor) -> bool:
    """Whether numpy can have it."""
    return t.is_cpu


def by_numpy(t: Tensor) -> bool:
    """Whether it is the quicker one."""
    return on_cpu(t) and t.numel() > FEW_MARKS and torch.get_num_threads() <= THREADS


def above(pre: Tensor, threshold: Tensor, marks: Tensor | None = None) -> Triplets:
    """(rows, columns, values) of what is above in pre (tokens, features); marks: of those, if they are known."""
    if (triton := triton_for(pre)) is not None:
        found: Triplets = triton.Above(pre, threshold).listed()
        return found
    return marked(pre, exceeding(pre, threshold) if marks is None else marks)


def exceeding(pre: Tensor, threshold: Tensor) -> Tensor:
    """Marks of what is above in pre (tokens, features)."""
    if not by_numpy(pre):
        return pre > threshold
    return torch.from_numpy(pre.detach().numpy() > threshold.detach().numpy())


def not_zero(acts: Tensor) -> Tensor:
    """Marks of what is not 0, also of nan."""
    return torch.from_numpy(acts.detach().numpy() != 0) if by_numpy(acts) else acts != 0


def gated(pre: Tensor, threshold: Tensor, out: Tensor | None = None) -> Tensor:
    """pre (tokens, features) where it is above threshold (features), elsewhere its product with 0, which keeps nan: in
    out, if that is given, which may be pre itself."""
    if not _has_quick_signs(pre, threshold):
        return torch.mul(pre, pre > threshold, out=out)
    by_sign = torch.ops.aten.leaky_relu_backward  # pre where the second is above 0, elsewhere pre times the third
    if out is None:
        acts: Tensor = by_sign.default(pre, pre - threshold, 0.0, False)
        return acts
    rest = torch.sub(pre, threshold, out=None if out is pre else out)
    filled: Tensor = by_sign.grad_input(pre, rest, 0.0, False, grad_input=out)
    return filled


def _has_quick_signs(pre: Tensor, threshold: Tensor) -> bool:
    """Whether the sign of pre - threshold gates pre more quickly than marks, and autograd wants no gradient."""
    if torch.compiler.is_compiling() or not on_cpu(pre) or pre.dtype is not threshold.dtype:
        return False
    return pre.numel() >= FEW_GATED and not pre.requires_grad


def mask_(pre: Tensor, marks: Tensor) -> Tensor:
    """pre gated by marks that are there already, in its own memory."""
    if not by_numpy(pre):
        return pre.mul_(marks)
    values = pre.numpy()
    with np.errstate(invalid="ignore"):  # of what is not finite
        np.multiply(values, marks.numpy(), out=values)
    return pre


def count(marks: Tensor) -> int:
    """How many are marked."""
    return int(np.count_nonzero(marks.numpy()) if on_cpu(marks) else marks.count_nonzero())


def marked(pre: Tensor, marks: Tensor) -> Triplets:
    """(rows, columns, values) of the marked entries of a matrix, by row, then by column."""
    if not by_numpy(pre):
        rows, columns = marks.nonzero(as_tuple=True)
        return rows, columns, pre[rows, columns]
    at = np.flatnonzero(marks.numpy())
    rows, columns = (torch.from_numpy(part) for part in np.divmod(at, pre.shape[1]))
    return rows, columns, pre.reshape(-1).index_select(0, torch.from_numpy(at))  # an index takes four times as long


def topk_gate(pre: Tensor, k: int) -> Tensor:
    """pre (..., m) with 0 in place of all but the k largest positive entries of each row, in plain operations."""
    values, columns = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, columns, values)


def keep_largest(pre: Tensor, k: int) -> Tensor:
    """The same in the quicker way. Rows of nan stay so, at k entries at least."""
    if not by_numpy(pre):
        return topk_gate(pre, k)
    each = pre.reshape(-1, pre.shape[-1])
    rows, columns, values = largest(each, k)
    kept = torch.zeros_like(each).index_put((rows, columns), values)
    if bool((lost := each[:, :1].isnan()).any()):
        kept = kept.masked_fill(lost, torch.nan)
    return kept.view(pre.shape)


def largest(pre: Tensor, k: int) -> Triplets:
    """(rows, columns, values) of the k largest positive entries of each row of pre (n, m), or of all that are positive,
    by row, then by column."""
    if not by_numpy(pre):
        return _sorted_largest(pre, k)
    return most_of_each(marked(pre, exceeding(pre, _below(pre.detach(), k))), len(pre), k)


def most_of_each(found: Triplets, n: int, k: int) -> Triplets:
    """The k largest entries of each of n rows, or all where there are fewer; on CPUs."""
    rows, columns, values = found
    numbers = values.detach().numpy()
    counts = np.bincount(rows.numpy(), minlength=n)
    most = int(counts.max(initial=0))
    if most <= k:
        return found
    places = np.arange(len(rows)) - (counts.cumsum() - counts)[rows.numpy()]
    candidates = np.full((n, most), -np.inf, numbers.dtype)
    candidates[rows.numpy(), places] = numbers
    chosen = np.argpartition(candidates, most - k, axis=1)[:, most - k:]
    kept = np.zeros(candidates.shape, dtype=bool)
    np.put_along_axis(kept, chosen, True, axis=1)
    at = torch.from_numpy(np.flatnonzero(kept[rows.numpy(), places]))
    return rows.index_select(0, at), columns.index_select(0, at), values.index_select(0, at)


def _below(pre: Tensor, k: int) -> Tensor:
    """A number (n, 1) >= 0 for each row of pre (n, m): all its k largest positive entries are above, and few others.

    The columns are put in groups. The k-th largest of the groups' maxima is not above the k-th largest entry.
    """
    n, m = pre.shape
    if not 0 < k < m:
        return pre.new_full((n, 1), 0.0 if k else torch.inf)
    least = kth_of(group_maxima(pre, max(m // (GROUPS * k), 1)), k)
    return torch.from_numpy(np.maximum(np.nextafter(least, np.array(-np.inf, least.dtype)), 0))


def group_maxima(pre: Tensor, size: int) -> Tensor:
    """The maxima (n, groups) of as many groups of `size` columns as pre (n, m) has."""
    groups = pre.shape[1] // size
    return pre[:, :size * groups].reshape(len(pre), size, groups).amax(1)


def kth_of(numbers: Tensor, k: int) -> np.ndarray[Any, np.dtype[Any]]:
    """The k-th largest number (n, 1) of each row; on CPUs."""
    at = numbers.shape[1] - k
    return np.partition(numbers.numpy(), at, axis=1)[:, at, None]


def _sorted_largest(pre: Tensor, k: int) -> Triplets:
    """The same by PyTorch's operations, which select by sorting."""
    values, columns = pre.topk(min(k, pre.shape[1]), dim=-1, sorted=False)
    columns, order = columns.sort(dim=-1)
    values = values.gather(-1, order)
    rows, places = (values > 0).nonzero(as_tuple=True)
    return rows, columns[rows, places], values[rows, places]
