"""What the tests of the Triton kernels share: data, references in float64, and views of matrices."""

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (1, 5, 40, 130, 600)
KINDS = ("mixed", "empty", "one row", "one id")


def close(found, expected, tolerance=None):
    """Within a share of the largest, that float32 or, where found is float64, float64 can keep."""
    tolerance = tolerance or (1e-12 if found.dtype == torch.float64 else 1e-5)
    found = found.double().cpu()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max() if expected.numel() else True


def same(found, other):
    return torch.equal(found.cpu(), other.cpu())


def normal(*shape, seed=0, dtype=torch.float64):
    """Random numbers, of dtype, as float64: what the references compute with."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).double()


def segments_of(kind, n=7, m=9, seed=0):
    """(starts, rows, ids) on the CPU, int64: n segments of up to 40 entries whose ids are below m."""
    random = np.random.default_rng(seed)
    lengths = {
        "mixed": np.array([3, 0, 40, 1, 0, 17, 8, *random.integers(0, 5, n)])[:n],
        "empty": np.zeros(n, int),
        "one row": np.array([0, 0, m, 0, 0, 0, 0] + [0] * n)[:n],
        "one id": np.ones(n, int),
    }[kind]
    ids = {"mixed": random.integers(0, m, lengths.sum()), "empty": np.zeros(0, int), "one row": random.permutation(m),
           "one id": np.full(n, m - 1)}[kind]
    starts = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    return starts, torch.from_numpy(np.repeat(np.arange(n), lengths)), torch.from_numpy(ids)


def summed(starts, ids, weights, table):
    """The weighted sums in float64, entry by entry."""
    out = torch.zeros(len(starts) - 1, table.shape[1], dtype=torch.float64)
    for row, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        for j in range(start, stop):
            out[row] += weights[j] * table[ids[j]]
    return out


def put(*tensors):
    return [t.to(DEVICE) for t in tensors]


def strided(table, gap=2):
    """The same numbers with nan around the rows, and between the columns where gap is 2: a view."""
    wide = torch.full((len(table), gap * table.shape[1] + 3), torch.nan, dtype=table.dtype, device=table.device)
    wide[:, 1:-2:gap] = table
    return wide[:, 1:-2:gap]


def padded(table):
    return strided(table, 1)


def far(tmp_path, dtype):
    """A matrix (3, 40) whose last row lies further away than int32 counts, mostly of nothing (a sparse file)."""
    if DEVICE == "cuda":
        numbers = torch.empty(2**31 + 64, dtype=dtype, device=DEVICE)
    else:
        name = str(dtype).removeprefix("torch.")
        numbers = torch.from_numpy(np.memmap(tmp_path / "far", dtype=name, mode="w+", shape=(2**31 + 64,)))
    return numbers.as_strided((3, 40), (2**30, 1))
