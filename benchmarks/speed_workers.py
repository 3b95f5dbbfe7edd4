"""Ways of speed.py in processes of their own: python benchmarks/speed_workers.py WAY DATA. Not run by hand.

So peers keep their environments, each way its own malloc, and memory is that of one way alone. A worker loads the data
from a file, checks that it computes what the dense way does, says so in a line of JSON, and then takes a step whenever
it is told to, answering with the CPU seconds of it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ENVIRONMENTS = Path(tempfile.gettempdir()) / "sae_hooks-speed"
PEERS = {"SAELens": "sae-lens==6.54.12", "dictionary_learning": "dictionary-learning==0.1.0",
         "sparsify": "eai-sparsify==1.3.3"}
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SPARSIFY_DISABLE_TRITON": "1", "TOKENIZERS_PARALLELISM": "0"}
LEARNING_RATE = 1e-9
K = 60  # of TopK

Tensors = dict[str, Any]


# --- the side that tells -------------------------------------------------------------------------------------

class Worker:
    """One way in a process of its own; `about` is what it said when it was ready. RuntimeError if it ends early."""

    def __init__(self, way: str, data: Path, settings: dict[str, str], environments: Path = ENVIRONMENTS) -> None:
        python = interpreter(way, environments) if way in PEERS else Path(sys.executable)
        self.way, self.errors = way, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen([python, __file__, way, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, env=os.environ | ALONE | settings)
        self.about: dict[str, Any] = json.loads(self._answer())

    def step(self) -> float:
        """Take a step; the CPU seconds of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
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
    if way.startswith("memory "):
        print(json.dumps(memory(way.removeprefix("memory "), saved["data"])), file=answers, flush=True)
        return
    step, about = built(way, saved["data"], saved["expected"])
    del saved
    step()
    print(json.dumps({**about, "torch": torch.__version__}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print(time.process_time() - start, file=answers, flush=True)


def built(way: str, tensors: Tensors, expected: Tensors) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(one step, what is to be said about it)."""
    if way in PEERS:
        step, x_hat, l0 = {"SAELens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}[way](
            tensors)
        target = expected["x_hat of topk" if way == "sparsify" else "x_hat"]
        apart = float((x_hat - target).norm() / target.norm())
        assert apart < 1e-4, f"the reconstruction is {apart:.1e} of its length away from the dense way's"
        return step, {"l0": l0, "version": version(PEERS[way].partition("==")[0])}
    return own(way, tensors, expected)


def own(way: str, tensors: Tensors, expected: Tensors) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The ways of speed_ways. Of several variants the one that is quickest here."""
    import speed_ways as ways

    data = ways.Data(**tensors)
    if way == "product":
        return product(data)
    if way in ("update", "topk"):
        return update(data, expected, K if way == "topk" else None)
    variants = {
        "by hand": lambda: {f"{n} tokens at once": ways.tuned_step(data, n) for n in ways.CHUNKS},
        "autograd": lambda: {"W_enc (d_sae, d_in)": ways.dense_step(data),
                             "W_enc (d_in, d_sae)": ways.dense_step(data, rows=False)},
        "objective": lambda: {"": ways.our_step(data)},
    }[way]()
    for variant in variants.values():
        ways.check_same(ways.gradients(variant), expected)
    whole = [ways.with_adam(variant) for variant in variants.values()]
    best = ways.fastest(whole) if len(whole) > 1 else 0
    return whole[best], {"note": list(variants)[best]}


def update(data: Any, expected: Tensors, k: int | None) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Learner.update, which uses the gradients of the matrices up: Adam's second moments tell their absolute values,
    W_dec's without its part along the rows. k: of TopK."""
    import speed_ways as ways

    from sae_hooks.kernels import remove_along

    learner, step = ways.our_update(data, k)
    loss, state = step(), learner.state()
    if k is not None:
        ways.check_same({"loss of topk": loss}, expected, 1e-2)
        return step, {}
    found = {name: (state[f"adam.{name}.exp_avg_sq"] / (1 - ways.BETAS[1])).sqrt() for name in learner.trained}
    found["W_enc"] = found["W_enc"].t()
    wanted = {name: expected[name].clone() for name in found}
    remove_along(wanted["W_dec"], data.W_dec)
    ways.check_same({"loss": loss, **found}, {"loss": expected["loss"], **{n: t.abs() for n, t in wanted.items()}})
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
    best = ways.fastest(list(variants.values()))
    return list(variants.values())[best], {"note": list(variants)[best]}


def memory(way: str, tensors: Tensors) -> dict[str, float]:
    """MiB at the peak of one call above what lay there before, less those of gradients."""
    import ctypes

    import speed_ways as ways

    def calls(data: Any) -> Callable[[], Any]:
        if way.startswith("splice"):
            return ways.splices(data)[way]
        if way == "by hand":
            return lambda: ways.tuned_step(data, 256)[1]()  # its buffers count, too
        return {"objective": ways.our_step, "autograd": ways.dense_step}[way](data)[1]

    calls(ways.make_data(64, 256, 64, 8.0, 16.0))()  # loads the code
    data = ways.Data(**tensors)
    call = calls(data)
    del tensors
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    kept = 0 if way.startswith("splice") else sum(t.nbytes for t in data.leaves().values())
    return {"mib": resident("VmHWM") - before - kept / 2**20}


def resident(what: str) -> float:
    """MiB, as the kernel counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


# --- peers: (one step, its reconstruction of x, its L0), on the same weights and data -------------------------

Peer = tuple[Callable[[], Any], torch.Tensor, float]


def saelens(t: Tensors) -> Peer:
    """SAETrainer.step, as its fit() calls it, for the same objective."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_sae, d_in = t["W_enc"].shape
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, l0_coefficient=0.01, jumprelu_bandwidth=t["bandwidth"], apply_b_dec_to_input=False))
    put(t, sae)
    trainer = SAETrainer(SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=len(t["x"]), lr=LEARNING_RATE, lr_end=LEARNING_RATE,
        adam_beta1=0.0, adam_beta2=0.999, logger=LoggingConfig(log_to_wandb=False)), sae, iter(()))

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(t["x"])
        trainer.n_training_steps += 1

    return step, *seen(sae, t["x"])


def dictionary_learning(t: Tensors) -> Peer:
    """JumpReluTrainer.update; its sparsity loss is quadratic in L0."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    d_sae, d_in = t["W_enc"].shape
    trainer = JumpReluTrainer(steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", device="cpu",
                              lr=LEARNING_RATE, bandwidth=t["bandwidth"], target_l0=60.0, warmup_steps=1,
                              sparsity_warmup_steps=1)
    put(t, trainer.ae)
    steps = iter(range(1, 10**6))
    return (lambda: trainer.update(next(steps), t["x"])), *seen(trainer.ae, t["x"])


def sparsify(t: Tensors) -> Peer:
    """A step of its Trainer: SparseCoder's own sparse path for TopK, unit norms, and fused Adam. It takes b_dec off x,
    which b_enc makes good."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    d_sae, d_in = t["W_enc"].shape
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=K))
    with torch.no_grad():
        coder.encoder.weight.copy_(t["W_enc"])
        coder.encoder.bias.copy_(t["b_enc"] + t["W_enc"] @ t["b_dec"])
        coder.W_dec.copy_(t["W_dec"])
        coder.b_dec.copy_(t["b_dec"])
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.999), fused=True)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(t["x"]).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        out = coder(t["x"])
    return step, out.sae_out, float((out.latent_acts > 0).sum(-1).float().mean())


def put(t: Tensors, module: Any) -> None:
    """Give a peer's JumpReLU SAE the weights."""
    with torch.no_grad():
        module.W_enc.copy_(t["W_enc"].t())
        for name in ("b_enc", "W_dec", "b_dec", "threshold"):
            getattr(module, name).copy_(t[name])


@torch.no_grad()
def seen(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What a peer's SAE makes of x: (reconstruction, L0)."""
    acts = module.encode(x)
    return module.decode(acts), float((acts > 0).sum(-1).float().mean())


if __name__ == "__main__":
    main()
