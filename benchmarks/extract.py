"""What extraction costs beside the bare forward pass, and what it holds in memory.

    python benchmarks/extract.py speed                 # SmolLM2-135M, 16,384 features after layer 15
    python benchmarks/extract.py memory --text FILE    # tiny-gemma2, 2 million tokens
    python benchmarks/extract.py speed --device cuda   # a model of Gemma 2 2B's shape, random weights

speed: extraction and the forward pass cut at the same site, on the same batches, in turns: medians of CPU time, one
thread (on a GPU: of wall time). memory: resident memory after each shard, drawn against tokens. The SAE is random, its
thresholds such that 60 features are active on a token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_hooks import SAE, attach_saes, export_features
from sae_hooks.documents import Window
from sae_hooks.extract import Extractor, Part, batches
from sae_hooks.forward import DeepEnoughError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
L0 = 60
SITE = "model.layers.2.output"  # of tiny-gemma2
MILLION = 1_000_000


def random_sae(x: torch.Tensor, d_sae: int, site: str) -> SAE:
    """Random directions, and the thresholds at which each feature is active on L0 / d_sae of the tokens x (n, d)."""
    W = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    W = W.to(x.device)
    pre = x.float() @ W.T
    rank = max(1, round(len(x) * (1 - L0 / d_sae)))
    threshold = pre.kthvalue(rank, dim=0).values.clamp(min=0)
    return SAE(W.T, torch.zeros(d_sae), W, torch.zeros(x.shape[1]), threshold=threshold, site=site)


# --- speed --------------------------------------------------------------------------------------------------

def speed(args: argparse.Namespace) -> str:
    """Tokens a second of both, and their ratio."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    model, site, d_sae, windows = gemma_shaped(args) if args.device != "cpu" else smollm2(args)
    part = Part(0, 0)
    for number, ids in enumerate(windows):
        part.add(Window(document=number, ids=ids, first=0, position=0, wanted=None))
    bare = bare_pass(model, site, part, args)
    rows = torch.cat(bare(keep=True))
    attach_saes(model, random_sae(rows[::7], d_sae, site))
    extractor = Extractor(model, tokens_per_batch=args.batch)
    found = extractor.run(part)
    clock = time.process_time if args.device == "cpu" else synchronised(args.device)
    times = interleaved({"forward": bare, "extract": lambda: extractor.run(part)}, clock, args.rounds)
    rate = {name: part.rows / seconds for name, seconds in times.items()}
    l0 = next(iter(found.features.values())).l0
    return (f"{site}, d_sae {d_sae:,}, L0 {l0:.0f}, {part.rows:,} tokens in batches of {args.batch}: forward pass "
            f"{rate['forward']:,.0f} tokens/s, extraction {rate['extract']:,.0f} tokens/s, "
            f"ratio {rate['extract'] / rate['forward']:.3f}")


def smollm2(args: argparse.Namespace) -> tuple[Any, str, int, list[Any]]:
    """(model, site, d_sae, windows) of real text."""
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    texts = [json.loads(line)["text"] for line in (ROOT / "examples/data/documents.jsonl").read_text().splitlines()]
    ids = np.asarray([i for text in texts for i in tokenizer(text)["input_ids"]], dtype=np.int32)
    return model, "model.layers.15.output", 16_384, list(ids[:args.tokens // 256 * 256].reshape(-1, 256))


def gemma_shaped(args: argparse.Namespace) -> tuple[Any, str, int, list[Any]]:
    """A model of Gemma 2 2B's shape with random weights in bfloat16, and random tokens."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
                          num_key_value_heads=4, head_dim=256)
    with torch.device(args.device):
        model = Gemma2ForCausalLM(config).to(torch.bfloat16).eval()
    ids = np.random.default_rng(0).integers(5, 250_000, (max(1, args.tokens // 1024), 1024)).astype(np.int32)
    return model, "model.layers.12.output", 16_384, list(ids)


def bare_pass(model: Any, site: str, part: Part, args: argparse.Namespace) -> Callable[..., list[torch.Tensor]]:
    """The forward passes alone, cut at the site."""
    module = model.get_submodule(site.rpartition(".")[0])

    @torch.no_grad()
    def run(keep: bool = False) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def stop(module: Any, inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            seen.extend([x.flatten(0, 1).cpu() if keep else x.new_empty(0)])
            raise DeepEnoughError

        handle = module.register_forward_hook(stop)
        try:
            for batch in batches(part.windows, args.batch):
                with suppress(DeepEnoughError):
                    model(input_ids=batch.ids.to(args.device), attention_mask=batch.mask.to(args.device),
                          use_cache=False)
        finally:
            handle.remove()
        return seen

    return run


def synchronised(device: str) -> Callable[[], float]:
    """Wall time, after the device has done what it was given."""
    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def interleaved(what: dict[str, Callable[[], Any]], clock: Callable[[], float], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(rounds):
        for name, do in what.items():
            start = clock()
            do()
            taken[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# --- memory ----------------------------------------------------------------------------------

def memory(args: argparse.Namespace) -> str:
    """Export to a store; how memory grows, how long opening and reading take."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "tests" / "models" / "tiny-gemma2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    attach_saes(model, random_sae(sample(model, tokenizer, args.text), 16_384, SITE))
    texts = first_texts(args.text, tokenizer, args.tokens)
    before, points = resident(), [(0, 0.0)]
    peak = Peak()

    def note(rows: int, documents: int) -> None:
        points.append((points[-1][0] + rows, peak.take() - before))

    with tempfile.TemporaryDirectory(dir=args.scratch) as out, peak:
        start = time.perf_counter()
        export_features(model, texts, out, tokenizer=tokenizer, window=256, progress=note)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        shards = json.loads((Path(out) / "manifest.json").read_text())["shards"]
        nonzeros = sum(entry["nonzeros"][SITE] for entry in shards)
    draw(points[1:])
    most = max(mb for _, mb in points)
    early = max(mb for tokens, mb in points if tokens <= 200_000)
    return (f"tiny-gemma2, 16,384 features: {points[-1][0]:,} tokens in {seconds:.0f} s; at most {most:.0f} MB above "
            f"the model and its texts, {early:.0f} MB in the first 200,000 tokens; {size / 1e6:,.0f} MB on disk, "
            f"{size / nonzeros:.2f} bytes a non-zero")


def sample(model: Any, tokenizer: Any, path: Path) -> torch.Tensor:
    """Some activations, to set thresholds by."""
    from sae_hooks.training import padded_batches, windows
    from sae_hooks.training.harvest import ordinary, site_activations

    site, rows = SITE, []
    some = [window for window, _ in zip(windows(read_texts(path), tokenizer, 256), range(40), strict=False)]
    for ids, mask in padded_batches(some):
        x = site_activations(model, [site], ids, mask)[site]
        rows.append(x[ordinary(x, ids, mask, tokenizer.all_special_ids, float("inf"))])
    return torch.cat(rows)


def read_texts(path: Path) -> list[str]:
    """All texts of a JSONL file."""
    from sae_hooks.training import documents

    return list(documents(path))


def first_texts(path: Path, tokenizer: Any, tokens: int) -> list[str]:
    """As many texts, again from the first one where they end, as hold so many tokens."""
    texts, found, count = read_texts(path), [], 0
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    while count < tokens:
        for text, length in zip(texts, lengths, strict=True):
            if count < tokens:
                found.append(text)
                count += length
    return found


def resident() -> float:
    """Resident memory of this process, MB, without pages of mapped files."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """The most resident memory since the last look, sampled fifty times a second."""

    def __init__(self) -> None:
        self._most, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def take(self) -> float:
        """The peak, in MB; then it starts anew."""
        most, self._most = max(self._most, resident()), 0.0
        return most

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, resident())


def draw(points: list[tuple[int, float]]) -> None:
    """results/extract-memory.{png,svg}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "sae_hooks", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        axes.plot([tokens / MILLION for tokens, _ in points], [mb for _, mb in points], color="#0072B2")
        axes.set(xlabel="tokens exported (millions)", ylabel="peak memory above the model (MB)", ylim=(0, None))
        axes.grid(color="#DDDDDD")
        for end, facts in (("png", {}), ("svg", {"Date": None})):
            figure.savefig(RESULTS / f"extract-memory.{end}", dpi=160, metadata=facts)


def main() -> None:
    """Measure, print, and keep it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("speed", "memory"))
    p.add_argument("--device", default="cpu")
    p.add_argument("--tokens", type=int)
    p.add_argument("--batch", type=int, default=1024, help="positions of a forward pass")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--text", type=Path, help="JSONL, for memory")
    p.add_argument("--scratch", type=Path, help="where the store is written, for a while")
    args = p.parse_args()
    args.tokens = args.tokens or (4096 if args.what == "speed" else 2 * MILLION)
    where = f"{os.cpu_count()}-core CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    told = f"{(speed if args.what == 'speed' else memory)(args)}\n({where}; torch {torch.__version__})"
    print(told)
    (RESULTS / f"extract-{args.what}{'' if args.device == 'cpu' else '-gpu'}.txt").write_text(told + "\n")


if __name__ == "__main__":
    main()
