"""The Triton kernels against float64 arithmetic and PyTorch: on a GPU, or where there is none in the interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernels.triton_cases import (
    DEVICE,
    KINDS,
    WIDTHS,
    close,
    far,
    normal,
    padded,
    put,
    same,
    segments_of,
    strided,
    summed,
)

triton = pytest.importorskip("triton")

from sae_hooks.kernels import segments, triton_ops, triton_sums  # noqa: E402


@pytest.fixture(params=[False, True], ids=["", "long segments"])
def long_segments(request, monkeypatch):
    """Also where most have programs of their own, each with few sums side by side, that look for them among others."""
    if request.param:
        for name, value in {"LONG": 2, "LONGER": 0, "ROWS": 2, "APART": 8, "APART_COLUMNS": 64}.items():
            monkeypatch.setattr(triton_sums, name, value)


@pytest.mark.usefixtures("long_segments")
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
    to_all, to_each = normal(d, seed=2), normal(7, 1, seed=3)
    found = triton_ops.weighted_sums(*put(starts, ids, weights, table, to_all, to_each))
    close(found, summed(starts, ids, weights, table) + to_all + to_each)


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


@pytest.mark.usefixtures("long_segments")
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


@pytest.mark.usefixtures("long_segments")
@pytest.mark.parametrize("view", [strided, padded])
def test_views_are_taken_as_they_are(view):
    starts, rows, ids = put(*segments_of("mixed"))
    weights, by_row, table = put(normal(len(ids)).float(), normal(7, 40).float(), normal(9, 40, seed=1).float())
    rows_and_ids = torch.stack([rows, ids], 1)  # what nonzero makes: columns of one matrix
    found = triton_ops.weighted_sums(starts, rows_and_ids[:, 1], view(weights[None])[0], view(table))
    assert same(found, triton_ops.weighted_sums(starts, ids, weights, table))
    found = triton_ops.dots(starts, rows_and_ids[:, 0], rows_and_ids[:, 1], view(by_row), view(table))
    assert same(found, triton_ops.dots(starts, rows, ids, by_row, table))


@pytest.mark.usefixtures("long_segments")
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


@pytest.mark.usefixtures("long_segments")
def test_no_rows_and_no_columns():
    starts, none, weights = put(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    table = torch.zeros(4, 5, device=DEVICE)
    assert triton_ops.weighted_sums(starts, none, weights, table).shape == (0, 5)
    assert triton_ops.weighted_sums(starts.repeat(3), none, weights, table[:, :0]).shape == (2, 0)
    assert triton_ops.weighted_sums(starts.repeat(3), none, weights, table[:0]).tolist() == [[0.0] * 5] * 2
    assert triton_ops.dots(starts, none, none, table, table).shape == (0,)
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert triton_ops.dots(starts, zero, zero, table[:, :0], table[:, :0]).tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("long_segments")
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

    order = segments.longest_first(starts[:10])

    def run():
        weight, square, last = table.clone(), table.square(), torch.zeros(9, dtype=torch.int32, device=DEVICE)
        triton_ops.adam_rows(weight, square, last, order, starts[:10], ids, weights, by_row, step=3, rate=0.1,
                             beta2=0.999, eps=1e-8, unit=True)
        return (weight, square, last, triton_ops.weighted_sums(starts, ids, weights, table),
                triton_ops.dots(starts, rows, ids, by_row, table), *triton_ops.Above(table, by_row[0]).listed())

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
        features = torch.from_numpy(active.any(1).nonzero()[0])
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
            weight, square, last, put(*segments.longest_first(starts)), *put(starts.to(other), ids.to(one),
            weights.to(dtype), table.to(stored)), step=step, rate=rate, beta2=0.999, eps=1e-8, unit=unit)
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
    start = torch.nn.functional.normalize(normal(7, 40, seed=2)).float()
    results = []
    for adam_rows in (segments.adam_rows, triton_ops.adam_rows):
        weight, square = put(start.clone(), start.square())
        last = torch.arange(7, dtype=torch.int32, device=DEVICE)
        adam_rows(weight, square, last, segments.longest_first(starts), starts, ids, weights, table, step=70, rate=0.1,
                  beta2=beta2, eps=1e-6, unit=unit)
        results.append((weight, square, last))
    for expected, found in zip(*results, strict=True):
        close(found, expected.double().cpu(), 1e-5)


def test_adam_rows_moves_nothing_without_entries_and_says_what_it_cannot_do():
    starts, _, ids = put(*segments_of("one id", n=4))
    weights, table = put(torch.ones(4), torch.ones(9, 6))

    def step(weight, square, entries=4):
        last = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        cut = starts.clamp(max=entries)
        triton_ops.adam_rows(weight, square, last, segments.longest_first(cut), cut, ids[:entries], weights[:entries],
                             table, step=1, rate=0.1, beta2=0.999, eps=1e-8, unit=False)

    weight, square = put(normal(4, 6).float(), torch.zeros(4, 6))
    before = weight.clone()
    step(weight, square, 0)
    assert same(weight, before)
    for left, right in [(weight.T.contiguous().T, square), (weight, padded(square))]:
        with pytest.raises(ValueError, match="contiguous"):
            step(left, right)
    for left, right in [(weight.bfloat16(), square.bfloat16()), (weight, square.double())]:
        with pytest.raises(ValueError, match="float32"):
            step(left, right)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_hooks.kernels import triton_edit as edit_of, triton_ops as ops, triton_sums as sums_of

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
    types |= {"by_row": number, "by_column": number} if slack else {"bias": number}
    compile(ops._mark_above, types | {"marks": "*i32", "counts": "*i64"}, {"BLOCK": 1024, "WORD": 32})
    entries = {n: t for n, t in types.items() if n in ("pre", "bias", "stride")}
    entries |= {"marks": "*i32", "words": "i32", "places": "*i64", "most": "i32", "out_values": number}
    outputs = {"out_rows": "*i64", "out_columns": "*i64"} if slack else {"out_columns": "*i32"}
    compile(ops._list_marked, entries | outputs, {"BLOCK": 256, "WORD": 32, "PART": 32})
    few = {n: t for n, t in types.items() if not n.startswith("by_")} | {"out_columns": "*i32", "out_values": number}
    compile(ops._collect, few, {"PART": 16384, "BLOCK": 4096}, 16)
    few = {"ids": "*i32", "weights": number, "table": number, "base": number, "out": number, "parts": "i32", "d": "i32",
           "stride": "i32"}
    few |= {"old": "*bf16", "out": "*bf16", "chosen": "*i1"} if slack else {}
    compile(ops._decode_collected, few, {"PART": 16384, "K": 32, "BLOCK": 128}, 2)
    parts = {n: types[n] for n in ("pre", "threshold", "f", "stride")} | {"out": "*bf16"}
    compile(ops._gated_parts, parts, {"BLOCK": 1024})
for table, number, starts, ids in (("*fp32", "*fp32", "*i32", "*i64"), ("*bf16", "*fp32", "*i64", "*i32"),
                                   ("*fp64", "*fp64", "*i32", "*i32")):
    types = {"starts": starts, "ids": ids, "weights": number, "table": table, "d": "i32", "stride": "i32"}
    sizes = {"K": 8, "BLOCK": 512}
    added = {"to_all": number, "to_each": number} if table == "*bf16" else {}
    sums = types | added | {"out": number, "n": "i32", "long": "i32"}
    compile(sums_of._weighted_sums, sums, sizes, 1)
    compile(sums_of._long_sums, sums, {"K": 128, "BLOCK": 128, "ROWS": 128}, 8)
    adam = {"weight": number, "square": number, "last": "*i32", "lengths": ids, "features": "*i64",
            "scalars": number, "step": "i32"}
    compile(sums_of._adam_rows, types | adam, {"UNIT": table != "*fp64", "K": 2, "BLOCK": 4096}, 8)
    pairs = {"rows": ids, "ids": ids, "by_row": number, "by_id": table, "out": number, "count": "i32", "d": "i32",
             "row_stride": "i32", "id_stride": "i32"}
    compile(sums_of._dots, pairs, {"K": 16, "BLOCK": 128})
for kept, wide, read in (("*bf16", "*fp32", True), ("*fp64", "*fp64", True), ("*fp16", "*fp32", False)):
    types = {n: wide for n in ("W_dec", "b_enc", "gain", "shift")} | {"x": kept, "old": kept, "out": kept}
    types |= {n: "i32" for n in ("d_in", "d_out", "k", "x_stride", "enc_stride", "dec_stride")}
    types |= {"W_enc": wide, "threshold": wide} if read else {"chosen": "*i1"}
    compile(edit_of._edit, types, {"ONLY_IF_ACTIVE": read, "K": 8, "READ": 512, "BLOCK": 512})
one = {"d": 1, "row_stride": 1, "id_stride": 1}  # Triton makes constants of ones
compile(sums_of._dots, {n: t for n, t in pairs.items() if n not in one}, one | {"K": 16, "BLOCK": 1})
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 26
