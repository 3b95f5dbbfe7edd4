"""The parts of speed.py: each gives the lines of its tables, one by one. Not run by itself."""

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from speed_measure import Call, check_same, compare, fastest, ratio, rounds
from speed_peers import PEERS, K
from speed_ways import SITE, Data, dense_encoder, dense_step, gradients, make_data, our_step
from speed_workers import ENVIRONMENTS, Worker
from speed_workers import FEW as STEPPED
from torch import Tensor
from torch.nn import functional

from sae_hooks import edits

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
MALLOCS = {"default": {}, "pages kept": KEPT}
L0, NARROW, WIDE = 60.0, 66.0, 120.0  # pairs held: a window as the paper's, a tenth of L0, and one as wide as L0
K_SHAPE = (512, 8192)  # where peers run, with the narrow window
STEP_CASES = ((512, 8192, 2048), (768, 16384, 4096))
ROWS = {"objective": "ours (a): objective, backward, Adam", "update": "ours (b): Learner.update",
        "topk": f"ours: Learner.update of TopK({K})", "product": "x @ W_enc alone", "autograd": "dense autograd, Adam",
        "by hand": "dense by hand, Adam", "SAELens": "SAELens, SAETrainer.step",
        "dictionary_learning": "dictionary_learning, update", "sparsify": f"sparsify, TopK {K}, Adam"}
OWN = ("ours", "topk", "dense", "by hand")
NAMES = {"ours": "ours", "topk": f"ours, TopK {K}", "dense": "dense", "by hand": "dense by hand",
             "SAELens": "SAELens", "dictionary_learning": "dictionary_learning", "sparsify": f"sparsify, TopK {K}"}
STEP_OF = {way: way for way in PEERS} | {"ours": "update", "topk": "", "dense": "autograd", "by hand": "by hand"}
STEP_TARGETS = {"autograd": 5.0, "by hand": 4.0, "SAELens": 7.0, "dictionary_learning": 6.0, "sparsify": 1.7}
KEPT_TARGETS = STEP_TARGETS | {"autograd": 4.0}
OVER_PRODUCT = 1.35
SHAPES, TOKENS, FEW = ((512, 8192), (576, 16384), (2304, 16384)), (64, 512, 2048), (1, 2, 4, 8)
SWEEP_D, SWEEP_SAE, SWEEP_TOKENS = 512, (64, 256, 1024, 4096, 16384), (1, 4, 32, 512)
SHARES = (0.005, 0.05, 0.2, 0.6)
SWEEP_STEPS = ((256, 1024, 8192), (256, 1024))
SLOWER = 1.05
ROUNDED = 1e-5  # of a token's largest activation, what rounding can at most change another one by


def verdict(value: float, target: float, *, most: bool = False) -> str:
    """Whether it reaches its target: at least that, or at most."""
    met = value <= target if most else value >= target
    return f"   target {'<=' if most else '>='} {target:g}: {'met' if met else 'MISSED'}"


def ms(times: Sequence[float]) -> float:
    """Median, in milliseconds."""
    return 1e3 * statistics.median(times)


# --- a training step -----------------------------------------------------------------------------------------

def step(seconds: float, peers: Sequence[str], environments: Path, large: bool) -> Iterator[str]:
    """A table for each shape and each setting of malloc."""
    for shape, window in [(shape, w) for shape in (STEP_CASES if large else STEP_CASES[:1]) for w in (NARROW, WIDE)]:
        data = make_data(*shape, L0, window)
        with saved(data, expected(data)) as path:
            l0, held = data.counts()
            del data
            for malloc, settings in MALLOCS.items():
                yield (f"d_in {shape[0]}, d_sae {shape[1]}, batch {shape[2]}; L0 {l0:.1f}, {held:.1f} pairs held a "
                       f"token; malloc: {malloc}")
                here = peers if shape[:2] == K_SHAPE and window == NARROW else []
                ways = [way for way in ROWS if way not in PEERS or way in here]
                yield from step_table(ways, path, settings, environments, seconds)


def step_table(ways: Sequence[str], path: Path, settings: dict[str, str], environments: Path,
               seconds: float) -> Iterator[str]:
    """All ways in lockstep, each in its process."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for way in ways:
            try:
                workers[way] = stack.enter_context(Worker(way, path, settings, environments))
            except RuntimeError as failure:
                yield f"  {ROWS[way]:37} FAILED: {failure}"
        times = rounds({way: worker.seconds for way, worker in workers.items()}, seconds)
        notes = {way: worker.about for way, worker in workers.items()}
    yield f"  {f'way ({len(times[ways[0]])} rounds)':37}{'ms':>9}{'/ product':>11}{'/ (a)':>8}{'/ (b)':>8}"
    targets = KEPT_TARGETS if settings else STEP_TARGETS
    for way in times:
        over = {other: ratio(times, way, other) for other in ("product", "objective", "update")}
        line = (f"  {ROWS[way]:37}{ms(times[way]):9.1f}{over['product']:11.2f}{over['objective']:8.2f}"
                f"{over['update']:8.2f}")
        if way in targets:
            line += verdict(over["update" if way in PEERS else "objective"], targets[way])
        elif way in ("objective", "update"):
            line += verdict(over["product"], OVER_PRODUCT, most=True)
        yield line + said(notes[way])


def said(about: Mapping[str, object]) -> str:
    """What a worker said of its way, for the end of its line."""
    parts = [str(about["note"])] if about.get("note") else []
    parts += [f"{about['version']}, torch {about['torch']}, L0 {about['l0']:.1f}"] if "version" in about else []
    return "   " + "; ".join(parts) if parts else ""


def expected(data: Data) -> dict[str, Tensor]:
    """What every way must find: loss, gradients, and reconstructions."""
    found = gradients(dense_step(data))
    with torch.no_grad():
        x_hats, to_x, counts, sure = ([], []), ([], []), [0, 0], []
        for x, along in zip(data.x.split(512), data.along().split(512), strict=True):
            pre = torch.addmm(data.b_enc, x, data.W_enc.t())
            values, features = pre.topk(K + 1, dim=-1)
            kept = torch.zeros_like(pre).scatter(-1, features[:, :K], values[:, :K].relu())
            sure.append(values[:, K - 1] - values[:, -1] > ROUNDED * values[:, 0])
            for i, acts in enumerate((pre * (pre > data.threshold), kept)):
                x_hats[i].append(torch.addmm(data.b_dec, acts, data.W_dec))
                to_x[i].append(((along @ data.W_dec.t()) * (acts > 0)) @ data.W_enc)
                counts[i] += int((acts > 0).sum())
    x_hat, of_topk, gradient, through_topk = (torch.cat(parts) for parts in (*x_hats, *to_x))
    return {**found, "x_hat": x_hat, "x_hat of topk": of_topk, "gradient": gradient,
            "gradient of topk": through_topk, "tokens of topk": torch.cat(sure), "features": torch.tensor(counts[0]),
            "features of topk": torch.tensor(counts[1]), "loss of topk": (of_topk - data.x).square().sum(-1).mean()}


@contextmanager
def saved(data: Data, found: dict[str, Tensor]) -> Iterator[Path]:
    """A file that workers read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.pt"
        torch.save({"data": vars(data), "expected": found}, path)
        yield path


# --- encode, splice, decode ----------------------------------------------------------------------------------

def inference(data: Data) -> dict[str, Call]:
    """The ways of inference; all of ours give what the dense ones give."""
    sae, acts, x = data.sae(), dense_encoder(data), data.x
    half = data.sae().to(torch.bfloat16)

    def nonzero() -> tuple[Tensor, Tensor, Tensor]:
        flat = acts(x).view(-1)
        at = flat.nonzero().view(-1)
        return at // sae.d_sae, at % sae.d_sae, flat.take(at)

    def naive() -> Tensor:
        pre = functional.linear(x, data.W_enc, data.b_enc)
        return (pre * (pre > data.threshold)).to_sparse_csr()

    ways: dict[str, Call] = {
        "encode_sparse": lambda: sae.encode_sparse(x), "naive": naive,
        "csr": lambda: acts(x).to_sparse_csr(), "nonzero": nonzero,
        "splice": lambda: sae(x), "half splice": lambda: half(x),
        "dense splice": lambda: torch.addmm(data.b_dec, acts(x), data.W_dec),
        "encode": lambda: sae.encode(x), "dense encode": lambda: acts(x)}
    csr, (indptr, indices, values) = ways["csr"](), ways["encode_sparse"]()
    assert torch.equal(csr.crow_indices(), indptr.long()), "encode_sparse: other numbers of features a token"
    assert torch.equal(csr.col_indices(), indices.long()), "encode_sparse: other features"
    check_same({"values": values, "encode": sae.encode(x), "splice": sae(x)},
               {"values": csr.values(), "encode": acts(x), "splice": ways["dense splice"]()}, 1e-5)
    return ways


def cases(tokens: Sequence[int], names: Sequence[str], seconds: float) -> Iterator[tuple[str, int, dict]]:
    """(the line's beginning, tokens, times of these ways) of each shape and number of tokens."""
    for shape in SHAPES:
        most = make_data(*shape, max(tokens), L0)
        for n in tokens:
            data = most.first(n)
            ways = inference(data)
            times = compare({name: ways[name] for name in names}, seconds)
            yield f"{shape[0]:6d}{shape[1]:7d}{n:7d}{data.counts()[0]:7.1f}", n, times


CASE = "  d_in  d_sae tokens     L0"


@torch.no_grad()
def encode(seconds: float) -> Iterator[str]:
    """encode_sparse beside dense ways."""
    dense = ("naive", "csr", "nonzero")
    yield f"{CASE}{'ours ms':>10}{'naive/ours':>12}{'csr/ours':>10}{'nonzero/ours':>14}"
    for begin, tokens, times in cases(TOKENS, ("encode_sparse", *dense), seconds):
        naive, csr, nonzero = (ratio(times, way, "encode_sparse") for way in dense)
        line = f"{begin}{ms(times['encode_sparse']):10.2f}{naive:12.2f}{csr:10.2f}{nonzero:14.2f}"
        yield line + (verdict(naive, 1.8) if tokens == 2048 else "")


@torch.no_grad()
def splice(seconds: float) -> Iterator[str]:
    """sae(x) beside the dense splice."""
    yield f"{CASE}{'ours ms':>10}{'dense/ours':>12}{'half/ours':>11}"
    for begin, tokens, times in cases(TOKENS, ("splice", "dense splice", "half splice"), seconds):
        dense, half = (ratio(times, way, "splice") for way in ("dense splice", "half splice"))
        line = f"{begin}{ms(times['splice']):10.2f}{dense:12.2f}{half:11.2f}"
        yield line + (verdict(dense, 2.0) if tokens == 2048 else "")


@torch.no_grad()
def decode(seconds: float) -> Iterator[str]:
    """A decoding step: splice and encode_sparse of few tokens."""
    yield f"{CASE}{'splice ms':>11}{'dense/it':>10}{'half/it':>9}{'encode_sparse ms':>18}{'csr/it':>8}"
    for begin, tokens, times in cases(FEW, ("splice", "dense splice", "half splice", "encode_sparse", "csr"), seconds):
        dense, half = (ratio(times, way, "splice") for way in ("dense splice", "half splice"))
        line = (f"{begin}{ms(times['splice']):11.3f}{dense:10.2f}{half:9.2f}{ms(times['encode_sparse']):18.3f}"
                f"{ratio(times, 'csr', 'encode_sparse'):8.2f}")
        yield line + (verdict(dense, 2.2) if tokens == 4 else "")


@torch.no_grad()
def edit(seconds: float) -> Iterator[str]:
    """What a clamp of all features adds, beside the dense way."""
    yield f"{CASE}{'ours ms':>10}{'dense/ours':>12}"
    for shape in SHAPES:
        most = make_data(*shape, max(TOKENS), L0)
        for n in (*FEW[::2], *TOKENS):
            data = most.first(n)
            times = compare(clamps(data), seconds)
            yield (f"{shape[0]:6d}{shape[1]:7d}{n:7d}{data.counts()[0]:7.1f}{ms(times['ours']):10.2f}"
                   f"{ratio(times, 'dense', 'ours'):12.2f}")


def clamps(data: Data) -> dict[str, Call]:
    """A clamp of all features, made ready as a hook does, and the dense one."""
    values, acts = torch.linspace(0, 0.1, len(data.W_enc)), dense_encoder(data)
    made = edits.edit("clamp", SITE, dict(enumerate(values.tolist())))
    rows = edits.Rows.of(made, data.W_enc, data.b_enc, data.threshold, data.W_dec, data.x.device, data.x.dtype)
    ways = {"ours": lambda: rows.of_many(data.x[None], 1, 1)[0],
            "dense": lambda: (values - acts(data.x)) @ data.W_dec}
    check_same({"change": ways["ours"]()}, {"change": ways["dense"]()})
    return ways


@torch.enable_grad()
def gradient(seconds: float, names: Sequence[str], environments: Path) -> Iterator[str]:
    """The gradient of x through a splice beside dense autograd's, by shape and by share of active features; then all
    ways in processes of their own."""
    yield f"{CASE}{'ours ms':>10}{'dense/ours':>12}{'forward/ours':>14}"
    shapes = [(shape, L0, n) for shape in SHAPES for n in (FEW[2], *TOKENS)]
    for shape, l0, n in shapes + [(K_SHAPE, share * K_SHAPE[1], TOKENS[1]) for share in SHARES[1:]]:
        data = make_data(*shape, n, l0)
        times = compare(through(data), seconds)
        dense, forward = (ratio(times, way, "ours") for way in ("dense", "forward"))
        yield (f"{shape[0]:6d}{shape[1]:7d}{n:7d}{data.counts()[0]:7.1f}{ms(times['ours']):10.2f}{dense:12.2f}"
               f"{forward:14.2f}")
    data = make_data(*K_SHAPE, max(TOKENS), L0, NARROW)
    yield f"d_in {K_SHAPE[0]}, d_sae {K_SHAPE[1]}, {max(TOKENS)} tokens"
    ways = [way for way in (*OWN, *names) if way != "by hand"]
    with saved(data, expected(data)) as path:
        del data
        with ExitStack() as stack:
            workers = {way: stack.enter_context(Worker(f"gradient/{way}", path, {}, environments)) for way in ways}
            times = rounds({way: worker.seconds for way, worker in workers.items()}, seconds)
        yield f"  {'way':26}{'ms':>9}{'/ours':>7}{'MiB at the peak':>18}"
        for way in ways:
            same_gate = "topk" if way == "sparsify" else "ours"
            yield (f"  {NAMES[way]:26}{ms(times[way]):9.1f}{ratio(times, way, same_gate):7.2f}"
                   f"{peak(f'memory/gradient/{way}', path, environments):18.1f}")


def through(data: Data) -> dict[str, Call]:
    """The gradient of x through a splice, ours and dense; forward: ours without a backward pass."""
    sae, acts, along = data.sae(), dense_encoder(data), data.along()
    x = data.x.clone().requires_grad_()

    def dense() -> Tensor:
        return torch.autograd.grad(torch.addmm(data.b_dec, acts(x), data.W_dec), x, along)[0]

    def ours() -> Tensor:
        return torch.autograd.grad(sae(x), x, along)[0]

    check_same({"gradient": ours()}, {"gradient": dense()})
    return {"ours": ours, "dense": dense, "forward": lambda: sae(x)}


# --- peers' inference, and memory ----------------------------------------------------------------------------

def peers(seconds: float, names: Sequence[str], environments: Path) -> Iterator[str]:
    """Encoding and splicing, each way in its process, with each setting of malloc; then memory."""
    data = make_data(*K_SHAPE, max(TOKENS), L0, NARROW)
    with saved(data, expected(data)) as path:
        del data
        for malloc, settings in MALLOCS.items():
            yield f"d_in {K_SHAPE[0]}, d_sae {K_SHAPE[1]}, {max(TOKENS)} tokens; malloc: {malloc}"
            yield from inference_table([*OWN, *names], path, settings, environments, seconds)
        yield f"  {'MiB at the peak':26}{'splice':>9}{'step':>9}"
        for way in (*OWN, *names):
            found = [peak(f"memory/splice/{way}", path, environments)]
            found += [peak(f"memory/step/{STEP_OF[way]}", path, environments)] if STEP_OF[way] else []
            yield f"  {NAMES[way]:26}" + "".join(f"{mib:9.1f}" for mib in found)


def inference_table(ways: Sequence[str], path: Path, settings: dict[str, str], environments: Path,
                    seconds: float) -> Iterator[str]:
    """A line for each way, with milliseconds and how many times ours they are."""
    calls = {"encode": 1, "splice": 1, **{f"splice {n}": 20 for n in STEPPED}}  # as often in a round
    with ExitStack() as stack:
        workers = {way: stack.enter_context(Worker(f"inference/{way}", path, settings, environments)) for way in ways}
        times = {call: rounds({way: lambda worker=worker, call=call, n=n: worker.seconds(call, n)
                               for way, worker in workers.items()}, seconds) for call, n in calls.items()}
    yield f"  {'way':26}" + "".join(f"{call:>11}{'/ours':>7}" for call in calls)
    for way in ways:
        same_gate = "topk" if way == "sparsify" else "ours"
        yield f"  {NAMES[way]:26}" + "".join(
            f"{ms(found[way]):11.2f}{ratio(found, way, same_gate):7.2f}" for found in times.values())


# --- memory --------------------------------------------------------------------------------------------------

def memory() -> Iterator[str]:
    """MiB at the peak above parameters, and for the step their gradients, in processes of their own."""
    yield f"{'what':14}  d_in  d_sae tokens{'ours':>9}{'dense':>9}{'by hand':>9}{'ours/dense':>12}{'ours/by hand':>14}"
    for what, ways in {"training step": ("step/objective", "step/autograd", "step/by hand"),
                       "splice": ("splice/ours", "splice/dense", "splice/by hand")}.items():
        for shape in STEP_CASES:
            with saved(make_data(*shape, L0, WIDE), {}) as path:
                ours, dense, by_hand = (peak(f"memory/{way}", path) for way in ways)
            yield (f"{what:14}{shape[0]:6d}{shape[1]:7d}{shape[2]:7d}{ours:9.1f}{dense:9.1f}{by_hand:9.1f}"
                   f"{ours / dense:12.3f}{ours / by_hand:14.2f}{verdict(ours / dense, 0.1, most=True)}")


def peak(way: str, path: Path, environments: Path = ENVIRONMENTS) -> float:
    """What the worker measured."""
    with Worker(way, path, {}, environments) as worker:
        return float(worker.about["mib"])


# --- sweep ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def sweep(seconds: float) -> Iterator[str]:
    """Ours over dense, where dense may be the better choice."""
    pairs = {"splice": "dense splice", "encode": "dense encode", "encode_sparse": "csr"}
    heads = "".join(f"{name:>15}" for name in pairs)
    yield f" d_sae tokens  share     L0{heads}   dense splice ms   (ours/dense, d_in {SWEEP_D})"
    slow: dict[str, dict[str, float]] = {}
    for d_sae in SWEEP_SAE:
        for share in SHARES:
            most = make_data(SWEEP_D, d_sae, max(SWEEP_TOKENS), share * d_sae)
            for tokens in SWEEP_TOKENS:
                data = most.first(tokens)
                found, dense = twice(inference(data), pairs, seconds)
                begin = f"{d_sae:6d}{tokens:7d}{share:7.1%}{data.counts()[0]:7.1f}"
                slow[begin] = {name: value for name, value in found.items() if value > SLOWER}
                yield begin + "".join(f"{found[name]:15.2f}" for name in pairs) + f"{dense['splice']:18.3f}"
    yield from listed(slow, len(slow) * len(pairs))


@torch.enable_grad()
def sweep_steps(seconds: float) -> Iterator[str]:
    """Objective and backward pass over plain dense autograd."""
    yield f" d_sae  batch  share     L0   held     step   dense ms   (ours/dense, d_in {SWEEP_D})"
    slow: dict[str, dict[str, float]] = {}
    for d_sae in SWEEP_STEPS[0]:
        for share in SHARES:
            pairs_held = d_sae * min(2 * share, (1 + share) / 2)
            most = make_data(SWEEP_D, d_sae, max(SWEEP_STEPS[1]), share * d_sae, pairs_held)
            for batch in SWEEP_STEPS[1]:
                data = most.first(batch)
                found, dense = twice(training(data), {"step": "dense step"}, seconds)
                l0, held = data.counts()
                begin = f"{d_sae:6d}{batch:7d}{share:7.1%}{l0:7.1f}{held:7.1f}"
                slow[begin] = {name: value for name, value in found.items() if value > SLOWER}
                yield f"{begin}{found['step']:9.2f}{dense['step']:11.2f}"
    yield from listed(slow, len(slow))


def training(data: Data) -> dict[str, Call]:
    """Our step and the dense one in the layout that is quicker here, without Adam."""
    ours, dense = our_step(data), [dense_step(data), dense_step(data, rows=False)]
    check_same(gradients(ours), gradients(dense[0]))
    return {"step": ours[1], "dense step": dense[fastest([backward for _, backward in dense])][1]}


def twice(ways: Mapping[str, Call], pairs: Mapping[str, str],
          seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """(each way over its dense one, milliseconds of the dense ones). What comes out as too slow is measured again,
    three times as long, and that counts."""
    def measured(pairs: Mapping[str, str], seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        times = compare({name: ways[name] for pair in pairs.items() for name in pair}, seconds)
        return ({ours: ratio(times, ours, dense) for ours, dense in pairs.items()},
                {ours: ms(times[dense]) for ours, dense in pairs.items()})

    found, dense = measured(pairs, seconds)
    again = {ours: other for ours, other in pairs.items() if found[ours] > SLOWER}
    return found | (measured(again, 3 * seconds)[0] if again else {}), dense


def listed(slow: Mapping[str, Mapping[str, float]], of: int) -> Iterator[str]:
    """The cases in which ours was too slow."""
    n = sum(len(found) for found in slow.values())
    yield f"{n} of {of} above {SLOWER}; target none: {'MISSED' if n else 'met'}"
    for begin, found in slow.items():
        if found:
            yield f"{begin}  {', '.join(f'{name} {value:.2f}' for name, value in found.items())}"
