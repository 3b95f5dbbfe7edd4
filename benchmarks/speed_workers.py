"""Ways of speed.py in processes of their own: python benchmarks/speed_workers.py WAY DATA. Not run by hand.

So peers keep their environments, each way its own malloc, and memory is that of one way alone. A worker loads the data
from a file, checks that it computes what the dense way does, says so in a line of JSON, and then does what it is told
to, a step or one of inference's calls, answering with the CPU seconds of it.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import speed_peers as peers
import torch
from speed_measure import check_same, cpu_seconds, fastest
from speed_peers import PEERS, Calls, K, Tensors

ENVIRONMENTS = Path(tempfile.gettempdir()) / "sae_hooks-speed"
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SPARSIFY_DISABLE_TRITON": "1", "TOKENIZERS_PARALLELISM": "0"}
FEW = (4, 1)  # tokens of a decoding step
OF_TOPK = ("topk", "sparsify")


# --- the side that tells -------------------------------------------------------------------------------------

class Worker:
    """One way in a process of its own; `about` is what it said when it was ready. RuntimeError if it ends early."""

    def __init__(self, way: str, data: Path, settings: dict[str, str], environments: Path = ENVIRONMENTS) -> None:
        peer = way.rpartition("/")[2]
        python = interpreter(peer, environments) if peer in PEERS else Path(sys.executable)
        self.way, self.errors = way, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen([python, __file__, way, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, env=os.environ | ALONE | settings)
        self.about: dict[str, Any] = json.loads(self._answer())

    def seconds(self, call: str = "step", repeats: int = 1) -> float:
        """CPU seconds of a call, of so many on average."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{repeats} {call}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """Its input ends, and so does the process."""
        self.process.communicate()
        self.errors.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{self.way} ended with status {self.process.returncode}: {last}")


def interpreter(peer: str, environments: Path) -> Path:
    """The peer's interpreter; torch first and of this version, so that both sides run the same kernels."""
    python = environments / peer / "bin" / "python"
    if not (environments / peer / "complete").exists():
        print(f"making an environment for {peer} in {environments / peer}", file=sys.stderr)
        venv.create(environments / peer, with_pip=True, clear=True)
        torch_too = f"torch=={torch.__version__.partition('+')[0]}"
        for packages in ([torch_too], [torch_too, "numpy", PEERS[peer]]):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        # its operators are another torch build's, and transformers imports it wherever it finds it
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
        (environments / peer / "complete").touch()
    return python


# --- the side that is told -----------------------------------------------------------------------------------

def main() -> None:
    way, path = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the peer prints is no answer
    torch.set_num_threads(1)
    torch.manual_seed(0)
    saved = torch.load(path, weights_only=True)
    if way.startswith("memory/"):
        print(json.dumps(memory(way.removeprefix("memory/"), saved["data"])), file=answers, flush=True)
        return
    calls, about = built(way, saved["data"], saved["expected"])
    del saved
    for call in calls.values():
        call()
    print(json.dumps({**about, "torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        repeats, call = line.split(maxsplit=1)
        print(cpu_seconds(calls[call.strip()], int(repeats)) / int(repeats), file=answers, flush=True)


def built(way: str, tensors: Tensors, expected: Tensors) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """(its calls by name, what is to be said about it)."""
    kind, _, who = way.rpartition("/")
    about = {"version": version(PEERS[who].partition("==")[0])} if who in PEERS else {}
    if kind == "inference":
        return inference(who, tensors, expected), about
    if kind == "gradient":
        return {"step": gradient(who, tensors, expected)}, about
    if who in PEERS:
        step, module = peers.STEPS[who](tensors)
        x_hat, l0 = peers.seen(module, tensors["x"])
        check_tokens("x_hat", x_hat, expected, who)
        return {"step": step}, {"l0": l0, **about}
    step, about = own(way, tensors, expected)
    return {"step": step}, about


def own(way: str, tensors: Tensors, expected: Tensors) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The ways of speed_ways. Of several variants the one that is quickest here."""
    import speed_ways as ways

    data = ways.Data(**tensors)
    if way == "product":
        return product(data)
    if way in ("update", "topk"):
        return update(data, expected, K if way == "topk" else None)
    variants = {
        "by hand": lambda: {f"{n} tokens at once{how}": ways.tuned_step(data, n, multiply)
                           for n in ways.CHUNKS for how, multiply in ways.MULTIPLIED.items()},
        "autograd": lambda: {"W_enc (d_sae, d_in)": ways.dense_step(data),
                             "W_enc (d_in, d_sae)": ways.dense_step(data, rows=False)},
        "objective": lambda: {"": ways.our_step(data)},
    }[way]()
    for variant in variants.values():
        check_same(ways.gradients(variant), expected)
    whole = [ways.with_adam(variant) for variant in variants.values()]
    best = fastest(whole) if len(whole) > 1 else 0
    return whole[best], {"note": list(variants)[best]}


def update(data: Any, expected: Tensors, k: int | None) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Learner.update, which uses the gradients of the matrices up: Adam's second moments tell their absolute values,
    W_dec's without its part along the rows. k: of TopK."""
    import speed_ways as ways

    from sae_hooks.kernels import remove_along

    learner, step = ways.our_update(data, k)
    loss, state = step(), learner.state()
    if k is not None:
        check_same({"loss of topk": loss}, expected, 1e-2)
        return step, {}
    found = {name: (state[f"adam.{name}.exp_avg_sq"] / (1 - ways.BETAS[1])).sqrt() for name in learner.trained}
    found["W_enc"] = found["W_enc"].t()
    wanted = {name: expected[name].clone() for name in found}
    remove_along(wanted["W_dec"], data.W_dec)
    check_same({"loss": loss, **found}, {"loss": expected["loss"], **{n: t.abs() for n, t in wanted.items()}})
    return step, {}


def product(data: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """x @ W_enc and nothing else, into memory that stays."""
    import speed_ways as ways

    out, x = torch.empty(len(data.x), len(data.W_enc)), data.x
    feature_major, other = data.W_enc.t(), data.W_enc.t().contiguous()

    def chunked() -> None:
        for part in x.split(256):
            torch.mm(part, feature_major, out=out[:len(part)])

    variants = {"W_enc (d_sae, d_in)": lambda: torch.mm(x, feature_major, out=out),
                "W_enc (d_in, d_sae)": lambda: torch.mm(x, other, out=out), "256 tokens at once": chunked}
    variants |= {f"x @ W_enc{how}": lambda multiply=multiply: multiply(None, x, feature_major, out)
                 for how, multiply in ways.MULTIPLIED.items() if how}
    best = fastest(list(variants.values()))
    return list(variants.values())[best], {"note": list(variants)[best]}


def memory(way: str, tensors: Tensors) -> dict[str, float]:
    """MiB at the peak of one call above what lay there before, less those of gradients."""
    import ctypes

    few = {name: t[:2**13] if name in ("W_enc", "b_enc", "W_dec", "threshold") else t for name, t in tensors.items()}
    measured(way, {**few, "x": few["x"][:512]})[0]()  # loads the code, also of a screen
    call, gradients = measured(way, tensors)
    del tensors
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return {"mib": resident("VmHWM") - before - gradients / 2**20}


def measured(way: str, tensors: Tensors) -> tuple[Callable[[], Any], int]:
    """(what memory is measured of, bytes of the gradients that it leaves)."""
    kind, _, who = way.rpartition("/")
    if kind == "splice":
        splice = INFERENCE[who](tensors)[1]
        return torch.no_grad()(lambda: splice(tensors["x"])), 0
    if kind == "gradient":
        return gradient(who, tensors), tensors["x"].nbytes
    if who in PEERS:
        step, module = peers.STEPS[who](tensors)
        step()  # Adam makes its state
        for parameter in module.parameters():
            parameter.grad = None
        return step, sum(t.nbytes for t in module.parameters())
    import speed_ways as ways

    data = ways.Data(**tensors)
    gradients = sum(t.nbytes for t in data.leaves().values())
    if who == "update":
        step = ways.our_update(data)[1]
        step()
        return step, 0  # it leaves none
    if who == "by hand":
        return lambda: ways.tuned_step(data, 256)[1](), gradients  # its buffers count, too
    return {"objective": ways.our_step, "autograd": ways.dense_step}[who](data)[1], gradients


def resident(what: str) -> float:
    """MiB, as the kernel counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


# --- inference: (x -> the values of its features, sparse; x -> x_hat) -----------------------------------------

@torch.no_grad()
def inference(who: str, tensors: Tensors, expected: Tensors) -> dict[str, Callable[[], Any]]:
    """Encoding and splicing all tokens, and splicing few."""
    values, splice = INFERENCE[who](tensors)
    x, gate = tensors["x"], " of topk" if who in OF_TOPK else ""
    check_tokens("x_hat", splice(x), expected, who)
    assert int((values(x) > 0).sum()) == int(expected[f"features{gate}"]), "other numbers of features"
    calls = {"encode": lambda: values(x), "splice": lambda: splice(x)}
    calls |= {f"splice {n}": lambda n=n: splice(x[:n]) for n in FEW}
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def gradient(who: str, tensors: Tensors, expected: Tensors | None = None) -> Callable[[], Any]:
    """Splicing all tokens, and the gradient of x."""
    splice, x = INFERENCE[who](tensors)[1], tensors["x"].clone().requires_grad_()
    along = tensors["x"].roll(1, 0)

    def call() -> torch.Tensor:
        return torch.autograd.grad(splice(x), x, along)[0]

    if expected is not None:
        check_tokens("gradient", call(), expected, who)
    return call


def check_tokens(what: str, found: torch.Tensor, expected: Tensors, who: str) -> None:
    """check_same for what each token gives; with TopK for the tokens whose k features are the same however sums are
    rounded."""
    if who not in OF_TOPK:
        return check_same({what: found}, expected)
    what, sure = f"{what} of topk", expected["tokens of topk"]
    assert sure.float().mean() > 0.9, "too few tokens to compare"
    return check_same({what: found[sure]}, {what: expected[what][sure]})


def ours(t: Tensors, k: int | None = None) -> Calls:
    """k: of TopK."""
    from sae_hooks import SAE

    gate = {"threshold": t["threshold"]} if k is None else {"k": k}
    sae = SAE(t["W_enc"].t(), t["b_enc"], t["W_dec"], t["b_dec"], **gate)
    return (lambda x: sae.encode_sparse(x)[2]), sae


def dense(t: Tensors) -> Calls:
    """The quickest way of several."""
    import speed_ways as ways

    data = ways.Data(**t)
    acts = ways.dense_encoder(data)
    return (lambda x: acts(x).to_sparse_csr().values()), lambda x: torch.addmm(data.b_dec, acts(x), data.W_dec)


def by_hand(t: Tensors) -> Calls:
    """Some tokens at once, into memory that stays."""
    import speed_ways as ways

    return ways.tuned_inference(ways.Data(**t))


INFERENCE = peers.INFERENCE | {"ours": ours, "topk": lambda t: ours(t, K), "dense": dense, "by hand": by_hand}


if __name__ == "__main__":
    main()
