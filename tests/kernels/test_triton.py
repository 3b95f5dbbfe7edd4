"""The Triton kernels against float64 arithmetic and PyTorch: on a GPU, or where there is none in the interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from sae_hooks.kernels import segments, triton_ops  # noqa: E402

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


def check_above(pre, threshold, slack=None):
    limit = threshold.double() if slack is None else threshold.double() - slack[0].double()[:, None] * slack[1].double()
    expected = (pre.double() > limit).nonzero()
    rows, columns, values = triton_ops.above(*put(pre, threshold), None if slack is None else tuple(put(*slack)))
    assert rows.dtype == columns.dtype == torch.int64
    assert values.dtype == pre.dtype
    assert same(torch.stack([rows, columns], 1), expected)
    assert same(values, pre[expected[:, 0], expected[:, 1]])
    return len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "f"), [(1, 1), (5, 3), (3, 1024), (2, 1025), (4, 2500)])
def test_above_finds_what_is_above_in_order(n, f, dtype):
    check_above(normal(n, f).to(dtype), normal(f, seed=1).to(dtype).abs())


@pytest.mark.parametrize(("n", "f"), [(0, 5), (5, 0), (0, 0), (3, 1100)])
def test_above_may_find_nothing(n, f):
    assert check_above(normal(n, f).float(), torch.full((f,), 99.0)) == 0


def test_above_finds_everything_and_single_entries_in_blocks_of_nothing():
    assert check_above(normal(3, 1100).float(), torch.full((1100,), -99.0)) == 3300
    pre = torch.zeros(3, 4000)
    pre[[0, 2, 2], [3999, 0, 1024]] = 1
    assert check_above(pre, torch.zeros(4000)) == 3


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # the interpreter's numpy
def test_above_is_strict_and_nan_is_above_nothing():
    inf, nan = torch.inf, torch.nan
    pre = torch.tensor([[0.0, 1.0, nan, inf, -inf, -0.0], [1e-45, nan, -1.0, -inf, inf, 2.0]])
    for threshold in ([0.0] * 6, [-0.0, 1.0, -inf, inf, -inf, 0.0], [nan, 0.5, nan, 1.0, inf, 2.0], [-inf] * 6):
        check_above(pre, torch.tensor(threshold))
    check_above(pre, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 2.0]), (torch.tensor([0.0, nan]), torch.ones(6)))
    check_above(pre, torch.zeros(6), (torch.tensor([inf, 1.0]), torch.ones(6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slack_lowers_thresholds_and_ties_stay_below(dtype):
    random = torch.Generator().manual_seed(0)
    pre, threshold, by_row, by_column = (  # small integers, so that a quarter are ties, exactly
        torch.randint(-3, 4, shape, generator=random).to(dtype) for shape in [(3, 1100), (1100,), (3,), (1100,)])
    without = check_above(pre, threshold)
    assert without < check_above(pre, threshold, (by_row.abs(), by_column.abs()))
    check_above(pre, threshold, (by_row, by_column))
    check_above(pre, threshold, (by_row.bfloat16(), by_column.float()))
    assert without == check_above(pre, threshold, (torch.zeros(3), by_column))


def test_above_takes_strided_matrices(tmp_path):
    pre, threshold = normal(3, 40).float(), normal(40, seed=1).float()
    expected = triton_ops.above(*put(pre, threshold))
    matrix = far(tmp_path, torch.float32)
    matrix.copy_(pre)
    on = pre.to(DEVICE)
    for other in (strided(on), padded(on), on.T.contiguous().T, matrix):
        found = triton_ops.above(other, strided(threshold.to(DEVICE)[None])[0])
        assert all(same(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", WIDTHS)
def test_weighted_sums(d, kind):
    starts, _, ids = segments_of(kind)
    weights, table = normal(len(ids), seed=1), normal(9, d)
    found = triton_ops.weighted_sums(*put(starts, ids, weights, table))
    assert found.dtype == torch.float64
    close(found, summed(starts, ids, weights, table))
    found = triton_ops.weighted_sums(*put(starts.int(), ids.int(), weights.float(), table.float()))
    assert found.dtype == torch.float32
    close(found, summed(starts, ids, weights, table))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", WIDTHS)
def test_dots(d, kind):
    starts, rows, ids = segments_of(kind)
    by_row, by_id = normal(7, d), normal(9, d, seed=1)
    expected = (by_row[rows] * by_id[ids]).sum(1)
    found = triton_ops.dots(*put(starts, rows, ids, by_row, by_id))
    assert found.dtype == torch.float64
    close(found, expected)
    found = triton_ops.dots(*put(starts.int(), rows.int(), ids.int(), by_row.float(), by_id.float()))
    assert found.dtype == torch.float32
    close(found, expected)


@pytest.mark.parametrize("integers", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
@pytest.mark.parametrize("one", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_mix_and_sums_are_wide(one, other, integers):
    starts, rows, ids = segments_of("mixed", seed=1)
    indices = put(starts.to(integers[0]), rows.to(integers[0]), ids.to(integers[1]))
    weights, by_row, table = normal(len(ids), dtype=one), normal(7, 40, dtype=one), normal(9, 40, seed=1, dtype=other)
    found = triton_ops.weighted_sums(indices[0], indices[2], *put(weights.to(one), table.to(other)))
    assert found.dtype == (torch.float64 if one == other == torch.float64 else torch.float32)
    close(found, summed(starts, ids, weights, table))
    products = triton_ops.dots(*indices, *put(by_row.to(one), table.to(other)))
    assert products.dtype == found.dtype
    close(products, (by_row[rows] * table[ids]).sum(1))


@pytest.mark.parametrize("view", [strided, padded])
def test_views_are_taken_as_they_are(view):
    starts, rows, ids = put(*segments_of("mixed"))
    weights, by_row, table = put(normal(len(ids)).float(), normal(7, 40).float(), normal(9, 40, seed=1).float())
    rows_and_ids = torch.stack([rows, ids], 1)  # what nonzero makes: columns of one matrix
    found = triton_ops.weighted_sums(starts, rows_and_ids[:, 1], view(weights[None])[0], view(table))
    assert same(found, triton_ops.weighted_sums(starts, ids, weights, table))
    found = triton_ops.dots(starts, rows_and_ids[:, 0], rows_and_ids[:, 1], view(by_row), view(table))
    assert same(found, triton_ops.dots(starts, rows, ids, by_row, table))


def test_rows_lie_further_away_than_int32_counts(tmp_path):
    table = far(tmp_path, torch.float16)
    near = normal(3, 40, dtype=torch.float16)
    table.copy_(near)
    starts, rows, ids = segments_of("mixed", n=3, m=3)
    weights = normal(len(ids), seed=1, dtype=torch.float32)
    indices = put(starts.int(), rows.int(), ids.int())
    close(triton_ops.weighted_sums(indices[0], indices[2], *put(weights.float()), table),
          summed(starts, ids, weights, near))
    close(triton_ops.dots(*indices, table, table), (near[rows] * near[ids]).sum(1))


def test_no_rows_and_no_columns():
    starts, none, weights = put(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    table = torch.zeros(4, 5, device=DEVICE)
    assert triton_ops.weighted_sums(starts, none, weights, table).shape == (0, 5)
    assert triton_ops.weighted_sums(starts.repeat(3), none, weights, table[:, :0]).shape == (2, 0)
    assert triton_ops.weighted_sums(starts.repeat(3), none, weights, table[:0]).tolist() == [[0.0] * 5] * 2
    assert triton_ops.dots(starts, none, none, table, table).shape == (0,)
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert triton_ops.dots(starts, zero, zero, table[:, :0], table[:, :0]).tolist() == [0.0, 0.0]


def test_what_is_not_taken_may_be_nan():
    starts, rows, ids = put(*segments_of("one row", m=8))
    weights, by_row, table = put(torch.ones(8), torch.ones(7, 40), torch.ones(9, 40))
    by_row[[0, 1, 3, 4, 5, 6]] = torch.nan
    table[0], ids = torch.inf, ids + 1
    assert triton_ops.weighted_sums(starts, ids, weights, table).cpu().sum(1).tolist() == [0, 0, 320, 0, 0, 0, 0]
    assert triton_ops.dots(starts, rows, ids, by_row, table).tolist() == [40.0] * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_in_pytorch_agree(kind, dtype, monkeypatch):
    monkeypatch.setattr(segments, "TRITON_ON", ())
    starts, rows, ids = segments_of(kind, m=50)
    if kind == "mixed":  # PyTorch's dots want each id at most once in a row
        some = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        ids = torch.cat([some[:length].sort()[0] for length in starts.diff().tolist()])
    starts, rows, ids = put(starts.int(), rows.int(), ids.int())
    weights, by_row, table = put(normal(len(ids)).float(), normal(7, 40).float(), normal(50, 40, seed=1).to(dtype))
    for name, arguments in [("weighted_sums", (starts, ids, weights, table)),
                            ("dots", (starts, rows, ids, by_row, table))]:
        expected, found = getattr(segments, name)(*arguments), getattr(triton_ops, name)(*arguments)
        assert found.dtype == expected.dtype
        close(found, expected.double().cpu())


def test_runs_agree_bit_for_bit():
    starts, rows, ids = put(*segments_of("mixed", n=20))
    weights, by_row, table = put(normal(len(ids)).float(), normal(20, 600).float(), normal(9, 600, seed=1).float())

    def run():
        weight, square, last = table.clone(), table.square(), torch.zeros(9, dtype=torch.int32, device=DEVICE)
        features = torch.tensor([4, 2, 5, 0], device=DEVICE)
        triton_ops.adam_rows(weight, square, last, features, starts, ids, weights, by_row, step=3, rate=0.1,
                             beta2=0.999, eps=1e-8, unit=True)
        return (weight, square, last, triton_ops.weighted_sums(starts, ids, weights, table),
                triton_ops.dots(starts, rows, ids, by_row, table), *triton_ops.above(table, by_row[0]))

    assert all(same(*pair) for pair in zip(run(), run(), strict=True))


@pytest.mark.parametrize(("d", "dtype", "stored", "unit"), [
    (5, torch.float64, torch.float64, True), (600, torch.float64, torch.float64, False),
    (40, torch.float32, torch.float32, False), (130, torch.float32, torch.bfloat16, True),
    (40, torch.float32, torch.float64, True),
])
def test_adam_rows_is_adam_on_dense_gradients(d, dtype, stored, unit):
    m, n, steps = 5, 6, 30
    random = np.random.default_rng(d)
    reference = torch.nn.functional.normalize(normal(m, d, dtype=dtype))
    weight = reference.to(dtype, copy=True).to(DEVICE)
    square, last = torch.zeros_like(weight), torch.zeros(m, dtype=torch.int32, device=DEVICE)
    reference.requires_grad_()
    adam = torch.optim.Adam([reference], betas=(0.0, 0.999))
    integers = (torch.int32, torch.int64)
    for step in range(1, steps + 1):
        active = random.random((m, n)) < random.choice([0.0, 0.1, 0.9], (m, 1))
        active[3] = step in (1, 29)  # once, and once more after long
        ids = torch.from_numpy(active.nonzero()[1])
        starts = torch.from_numpy(np.concatenate([[0], active.sum(1).cumsum()]))
        features = torch.from_numpy(random.permutation(active.any(1).nonzero()[0]))
        weights, table = normal(len(ids), seed=step, dtype=torch.float32), normal(n, d, seed=-step, dtype=stored)
        rate = 0.03 / step
        grad = summed(starts, ids, weights, table)
        with torch.no_grad():
            reference.grad = grad - (grad * reference).sum(1, keepdim=True) * reference if unit else grad
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        if unit:
            with torch.no_grad():
                reference[features] = torch.nn.functional.normalize(reference[features])
        before = [t.clone() for t in (weight, square, last)]
        one, other = integers[step % 2], integers[step // 2 % 2]
        triton_ops.adam_rows(
            weight, square, last, *put(features.to(one), starts.to(other), ids.to(one), weights.to(dtype),
            table.to(stored)), step=step, rate=rate, beta2=0.999, eps=1e-8, unit=unit)
        rest = [row for row in range(m) if row not in features.tolist()]
        assert all(same(now[rest], was[rest]) for now, was in zip((weight, square, last), before, strict=True))
        assert (last[features.to(DEVICE)] == step).all()
    close(weight, reference.detach())
    decayed = square.double().cpu() * 0.999 ** (steps - last.double().cpu())[:, None]
    close(decayed, adam.state[reference]["exp_avg_sq"], 1e-12 if dtype == torch.float64 else 1e-5)
    assert len(last.unique()) > 1


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("unit", [False, True])
def test_adam_rows_in_pytorch_agrees(unit, beta2, monkeypatch):
    monkeypatch.setattr(segments, "TRITON_ON", ())
    starts, _, ids = put(*(part.int() for part in segments_of("mixed")))
    weights, table = put(normal(len(ids)).float(), normal(9, 40, seed=1).float())
    features = torch.tensor([6, 1, 0, 2], device=DEVICE)  # 1 has no entries
    start = torch.nn.functional.normalize(normal(7, 40, seed=2)).float()
    results = []
    for adam_rows in (segments.adam_rows, triton_ops.adam_rows):
        weight, square = put(start.clone(), start.square())
        last = torch.arange(7, dtype=torch.int32, device=DEVICE)
        adam_rows(weight, square, last, features, starts, ids, weights, table, step=70, rate=0.1, beta2=beta2, eps=1e-6,
                  unit=unit)
        results.append((weight, square, last))
    for expected, found in zip(*results, strict=True):
        close(found, expected.double().cpu(), 1e-5)


def test_adam_rows_moves_nothing_without_features_and_says_what_it_cannot_do():
    starts, _, ids = put(*segments_of("one id", n=4))
    weights, table = put(torch.ones(4), torch.ones(9, 6))

    def step(weight, square, features):
        last = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        triton_ops.adam_rows(weight, square, last, features, starts, ids, weights, table, step=1, rate=0.1, beta2=0.999,
                             eps=1e-8, unit=False)

    weight, square, features = put(normal(4, 6).float(), torch.zeros(4, 6), torch.tensor([2]))
    before = weight.clone()
    step(weight, square, features[:0])
    assert same(weight, before)
    for left, right in [(weight.T.contiguous().T, square), (weight, padded(square))]:
        with pytest.raises(ValueError, match="contiguous"):
            step(left, right, features)
    for left, right in [(weight.bfloat16(), square.bfloat16()), (weight, square.double())]:
        with pytest.raises(ValueError, match="float32"):
            step(left, right, features)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_hooks.kernels import triton_ops as ops

def compile(kernel, types, constants, warps=4):
    names = kernel.arg_names
    constants = constants | {n: None for n in names if n not in types and n not in constants}
    signature = {n: types.get(n, "constexpr") for n in names}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in ("table", "d", "stride") if types.get(n)}
    built = triton.compile(ASTSource(kernel, signature, constants, even), target=GPUTarget("cuda", 90, 32),
                           options={"num_warps": warps, **ops.FUSION})
    assert len(built.asm["cubin"]) > 1000
    print(kernel.__name__)

for number, slack in (("*fp32", True), ("*fp64", False)):
    types = {"pre": number, "threshold": number, "f": "i32", "stride": "i32"}
    types |= {"by_row": number, "by_column": number} if slack else {}
    compile(ops._count_above, types | {"counts": "*i64"}, {"BLOCK": 1024})
    outputs = {"places": "*i64", "out_rows": "*i64", "out_columns": "*i64", "out_values": number}
    compile(ops._write_above, types | outputs, {"BLOCK": 1024})
for table, number, starts, ids in (("*fp32", "*fp32", "*i32", "*i64"), ("*bf16", "*fp32", "*i64", "*i32"),
                                   ("*fp64", "*fp64", "*i32", "*i32")):
    types = {"starts": starts, "ids": ids, "weights": number, "table": table, "d": "i32", "stride": "i32"}
    sizes = {"K": 8, "BLOCK": 512}
    compile(ops._weighted_sums, types | {"out": number}, sizes, 2)
    adam = {"weight": number, "square": number, "last": "*i32", "features": "*i64", "scalars": number, "step": "i32"}
    compile(ops._adam_rows, types | adam, {"UNIT": table != "*fp64", "K": 8, "BLOCK": 4096}, 16)
    pairs = {"rows": ids, "ids": ids, "by_row": number, "by_id": table, "out": number, "count": "i32", "d": "i32",
             "row_stride": "i32", "id_stride": "i32"}
    compile(ops._dots, pairs, {"K": 16, "BLOCK": 128})
one = {"d": 1, "row_stride": 1, "id_stride": 1}  # Triton makes constants of ones
compile(ops._dots, {n: t for n, t in pairs.items() if n not in one}, one | {"K": 16, "BLOCK": 1})
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 14
