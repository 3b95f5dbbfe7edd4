"""How quick sae_hooks is on a CPU, beside dense PyTorch and beside other libraries, and how much memory it takes.

    python benchmarks/speed.py [--only step encode ...] [--seconds 3] [--no-peers] [--record]

Times are CPU time of one thread: medians over rounds in which every way has its turn, and ratios are medians of the
rounds' ratios. Weights, data and thresholds are the same for all ways, random (Gaussian activations, unit-norm
features that fire as often as their rank to the power -0.8); before it is timed each way has shown that it computes
what plain dense PyTorch computes. Dense ways are taken in the variant that is quickest here: layout of W_enc, how the
gate is written, tokens at once. A target stands beside what it is for; `met` or `MISSED`.

step    a training step at L0 60, where the window of the straight-through gradient makes a tenth more pairs (token,
        feature) count, and twice as many; with malloc as it comes and told to keep its pages. Every way is a process of
        its own. "/ product": over the encoder's product x @ W_enc alone, which no way can do without, into memory that
        stays; "/ (a)", "/ (b)": over ours without and with what Learner.update does besides. Targets beside dense are
        for (a), beside whole steps of peers for (b). Dense by hand: five products and little else, see speed_ways.py;
        both that and the product alone by MKL, as PyTorch multiplies, or by oneDNN, if it is the quicker one.
        Peers' environments are made on the first run, in the folder --environments (4 GB).
encode  SAE.encode_sparse; naive: pre = linear(x, W_enc, b); acts = pre * (pre > threshold); acts.to_sparse_csr(), as it
        is written first; csr: the variant of it that is quickest here; nonzero: that with nonzero and take.
splice  sae(x); dense: the same acts, acts W_dec + b_dec; half: ours with weights kept in bfloat16.
decode  both of few tokens, as in a decoding step.
edit    a clamp of all features: what it adds; dense: (values - acts) W_dec.
gradient  sae(x) and the gradient of x, weights frozen, beside dense autograd; forward: sae(x) alone where a gradient is
        wanted. By shape, and by share of active features; then beside peers as in `peers`, with the memory of it.
peers   encoding to the sparse form, splicing 2,048 tokens and few, each way in a process of its own, as in `step`;
        "/ours": over ours with the same gate. Peers' dense features are given to_sparse_csr(); sparsify's own are
        sparse. And the memory of a splice and of a training step.
memory  MiB that a process has at its peak above parameters, activations and, in the training step, gradients, which
        count as parameters. Without Adam, which makes no buffers. The code that a first call loads does not count.
sweep   ours/dense over sizes and shares of active features; what is above 1.05 is measured again, three times as
        long, and listed if it stays so. Training: objective and backward, beside plain dense autograd.
"""

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import speed_parts
import torch
from record import Record, cpu
from speed_peers import PEERS
from speed_workers import ENVIRONMENTS

from sae_hooks.kernels.cpu_products import ZEN_5
from sae_hooks.kernels.signs import HAS_BFLOAT16

KIND = "-zen-5" if ZEN_5 else "-bfloat16" if HAS_BFLOAT16 else ""  # of CPU, as the kernels tell them apart
RESULT = Path(__file__).parent / f"results/speed{KIND}.txt"
PARTS = ("step", "encode", "splice", "decode", "edit", "gradient", "peers", "memory", "sweep")


def parts(options: argparse.Namespace) -> dict[str, Callable[[], Iterator[str]]]:
    """What makes each part's lines."""
    seconds, peers = options.seconds, [] if options.no_peers else list(PEERS)

    def sweeps() -> Iterator[str]:
        yield from speed_parts.sweep(seconds)
        yield from speed_parts.sweep_steps(seconds)

    return {"step": lambda: speed_parts.step(10 * seconds, peers, options.environments, options.large),
            "encode": lambda: speed_parts.encode(seconds), "splice": lambda: speed_parts.splice(seconds),
            "decode": lambda: speed_parts.decode(seconds),
            "edit": lambda: speed_parts.edit(seconds),
            "gradient": lambda: speed_parts.gradient(seconds, peers, options.environments),
            "peers": lambda: speed_parts.peers(seconds, peers, options.environments),
            "memory": speed_parts.memory, "sweep": sweeps}


def machine(options: argparse.Namespace) -> str:
    """What was measured, on what."""
    malloc = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD"))]
    peers = "no peers" if options.no_peers else ", ".join(PEERS.values())
    return (f"{cpu()}, numpy {np.__version__}; {peers}; "
            f"{platform.libc_ver()[0]}'s malloc {' '.join(malloc) or 'as it comes'}, where not said otherwise")


def main() -> None:
    """Print the tables, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts (default: all)")
    parser.add_argument("--seconds", type=float, default=3.0,
                        help="CPU time of a case, about (a training step: ten times that; five rounds at least)")
    parser.add_argument("--no-peers", action="store_true", help="without other libraries")
    parser.add_argument("--large", action="store_true", help="training steps at (768, 16384), too: half an hour")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help=f"peers' folder ({ENVIRONMENTS})")
    parser.add_argument("--record", action="store_true",
                        help=f"write what is printed to {RESULT.name}, too, in place of the same parts there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = Record(RESULT if options.record else None, machine(options))
    for name, part in parts(options).items():
        if name in options.only:
            record.section(name)
            start, load = time.monotonic(), os.getloadavg()[0]
            for line in part():
                record.say(line)
            record.say(f"({time.monotonic() - start:.0f} s; load average at the beginning {load:.1f})")


if __name__ == "__main__":
    main()
