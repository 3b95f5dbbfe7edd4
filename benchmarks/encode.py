"""What encoding to CSR costs beside the dense way, and beside the one product that it cannot do without.

For each shape, batch and L0, as ratios of CPU time (medians of interleaved rounds, one thread):

    dense / ours   how many times faster than pre = x @ W_enc + b_enc; acts = pre * (pre > threshold); acts.nonzero()
    csr / ours     the same, where the dense way also takes the values that it found: what ours returns
    ours / product over x @ W_enc alone

W_enc of the dense way and of the product lies as SAELens keeps it, (d_in, d_sae); ours is feature-major. Activations
and encoder are random, one threshold for all features. 1 to 8 tokens is a decoding step.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_hooks import SAE

RESULT = Path(__file__).parent / "results/encode.txt"
SHAPES = ((576, 16384), (576, 8192), (2304, 16384), (192, 1024))
TOKENS = (1, 2, 4, 8, 64, 512, 4096)
L0 = (30, 60, 120)
HEAD = "   d_in  d_sae tokens   L0   dense/ours   csr/ours   ours/product   product ms"


def random_sae(d_in: int, d_sae: int) -> SAE:
    """Unit-norm features, thresholds still 0."""
    W = torch.randn(d_sae, d_in)
    W /= W.norm(dim=1, keepdim=True)
    return SAE(W.T, 0.1 * torch.randn(d_sae), W, torch.zeros(d_in), threshold=torch.zeros(d_sae))


def threshold_for(sae: SAE, x: Tensor, l0: int) -> float:
    """Above which l0 features of a token are active, on average."""
    pre = sae.pre_activations(x[:256]).flatten()
    return float(pre.kthvalue(len(pre) - l0 * min(len(x), 256)).values)


def ways(sae: SAE, x: Tensor, W_enc: Tensor) -> dict[str, Callable[[], object]]:
    """What is compared."""
    def dense() -> Tensor:
        pre = x @ W_enc + sae.b_enc
        return (pre * (pre > sae.threshold)).nonzero()

    def csr() -> tuple[Tensor, Tensor]:
        pre = x @ W_enc + sae.b_enc
        acts = pre * (pre > sae.threshold)
        at = acts.nonzero()
        return at, acts[at[:, 0], at[:, 1]]

    return {"ours": lambda: sae.encode_sparse(x), "product": lambda: x @ W_enc, "dense": dense, "csr": csr}


def medians(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """CPU seconds of each, over interleaved rounds: as many as take about so long, 3 to 200."""
    start = time.process_time()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    once = time.process_time() - start
    for _ in range(min(max(round(seconds / once), 3), 200)):
        for name, function in functions.items():
            before = time.process_time()
            function()
            times[name].append(time.process_time() - before)
    return {name: statistics.median(values) for name, values in times.items()}


def measured(seconds: float, most_tokens: int) -> Iterator[str]:
    """A line of the table for each case."""
    for d_in, d_sae in SHAPES:
        sae = random_sae(d_in, d_sae)
        W_enc = sae.W_enc.contiguous()
        for tokens in (n for n in TOKENS if n <= most_tokens):
            for l0 in L0:
                x = torch.randn(tokens, d_in)
                sae.threshold.fill_(threshold_for(sae, x, l0))
                t = medians(ways(sae, x, W_enc), seconds)
                yield (f"{d_in:7d}{d_sae:7d}{tokens:7d}{l0:5d}{t['dense'] / t['ours']:13.2f}"
                       f"{t['csr'] / t['ours']:11.2f}{t['ours'] / t['product']:15.2f}{1e3 * t['product']:13.2f}")


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of a case, about")
    parser.add_argument("--tokens", type=int, default=max(TOKENS), help="the largest batch")
    parser.add_argument("--record", action="store_true", help=f"write the table to {RESULT.name}, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [f"{os.cpu_count()}-core CPU ({torch.backends.cpu.get_cpu_capability()}), one thread; Python "
             f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; glibc's malloc as it "
             f"comes; load average {os.getloadavg()[0]:.1f} at the start", HEAD]
    print(*lines, sep="\n")
    with torch.no_grad():
        for line in measured(options.seconds, options.tokens):
            print(line, flush=True)
            lines.append(line)
    if options.record:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join([" ".join(["python benchmarks/encode.py", *sys.argv[1:]]), *lines]) + "\n")


if __name__ == "__main__":
    main()
