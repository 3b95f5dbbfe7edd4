"""Speed on a GPU: python benchmarks/speed_gpu.py [--only PART] [--mode MODE ...] [--record]

Without a GPU, `--smoke` runs all of it on the CPU with tiny shapes in under a minute; its numbers mean nothing. Times
are medians of interleaved rounds after a warm-up, between CUDA events. "out of memory" in a row is a result, too: the
rest goes on. `--record` writes results/speed-gpu-NAME.txt, line by line; of a file that is there already it replaces
the sections that were run. Weights and activations are random; each SAE's thresholds are set by measurement so that 60
features are active on a token, the r-th most frequent in proportion to r^-0.8. Peak GB is what a case needs on the GPU
above what lay there before it was built: for a step that is weights, optimiser and all, without the batches.

step            a training step, `Learner.update` (bf16 products, betas 0 and 0.999) beside dense bf16 autograd.
    pairs       (token, feature) pairs a token that have a value or a gradient: L0 and the kernel's window (--bandwidth)
    dense/it    how many times as long the dense step takes
    product     share of the encoder's one product (batch, d_in) x (d_in, d_sae), in bf16, in the step
splice          `sae(x, torch.float32)` and `sae.encode_sparse(x)` for x in bfloat16, as hooks of such a model hand it
                over, by dtype of the weights.
    bf16/it     how many times as long the dense way takes, all in bfloat16: product, threshold, product; and for
                encode product, threshold, nonzero, its values
    f32/it      the same, all in float32, TF32 off
sweep           the step, and a splice of 4,096 tokens in bfloat16 by weights in bfloat16 and in float32, by share of
                features active; beside each (/dense) over the dense way in the weights' own dtype: at most 1.05
language-model  Gemma 2 9B's shapes in bfloat16, an SAE of 16k features at every layer (--sae-dtype). Modes: prefill of
                4 x 1024 tokens; generate 16 tokens from 32, batch 1, greedy, with the default cache; static: with
                cache_implementation="static", not compiled; compiled: the same, compiled by transformers' own way,
                some cases only, one after another: compiling takes minutes for each.
                Below, medians of what each round gives beside the bare model's, which stands next to it:
    of bare     tokens/s as a share of the same model's without SAEs
    extra ms    that a forward pass takes longer than the bare one
    arithmetic  ms that it should at least: prefill, for each SAE 2 d_in d_sae FLOP a token at the throughput of that
                very product in the SAE's dtype, measured in this run, and its L0 decoder rows read; a token alone: the
                encoder and those rows read, at the measured bandwidth of a copy
    extra/it    measured extra time / arithmetic
    of it       tokens/s as a share of what bare time and arithmetic would make
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from record import Record
from speed_gpu_parts import (
    Bench,
    Builds,
    Case,
    Failed,
    Result,
    Timing,
    active,
    attempt,
    free,
    measure,
    product,
    random_sae,
    set_thresholds,
    splice,
    step,
    verdict,
)
from speed_gpu_sweep import sweep
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, Gemma2Config

from sae_hooks import attach_saes, detach_saes

RESULTS = Path(__file__).parent / "results"
PARTS, MODES = ("step", "splice", "sweep", "language-model"), ("prefill", "generate", "static", "compiled")
GEMMA_2_9B: dict[str, Any] = {
    "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "intermediate_size": 14336, "vocab_size": 256000, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}
TINY: dict[str, Any] = GEMMA_2_9B | {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 512}
OFTEN, PAIRED = 4, 4  # rounds of generation for one of a prefill, and of a clamp for one of other cases
WARM_UPS = {"prefill": 2, "generate": 1, "static": 1, "compiled": 3}
CLAMP = "clamp 8 features"
COMPILED = ("bare", CLAMP, "nothing open", "1 spliced")
HEAD = (f"{'mode':10}{'case':18}{'tokens/s':>10}{'of bare':>9}{'peak GB':>9}{'L0':>6}{'extra ms':>10}"
        f"{'arithmetic':>12}{'extra/it':>10}{'of it':>7}")


# --- language-model -----------------------------------------------------------------------------------------


class Gemma:
    """Gemma 2 9B's shapes with random weights, bare and with SAEs at all layers: two models, one memory."""

    def __init__(self, bench: Bench) -> None:
        self.bench, small = bench, bench.smoke
        self.d_sae, self.new = (256, 4) if small else (16384, 16)
        torch.manual_seed(0)
        with bench.device:  # made, and initialised, where it is to be
            made = AutoModelForCausalLM.from_config(Gemma2Config(**TINY if small else GEMMA_2_9B), dtype=torch.bfloat16)
        self.bare: Any = made.eval().requires_grad_(False)
        self.model: Any = copy.deepcopy(self.bare, {id(p): p for p in self.bare.parameters()})  # the same tensors
        self.config = self.bare.config
        self.saes = [random_sae(self.config.hidden_size, self.d_sae, bench.sae_dtype, bench.device)
                     for _ in self.layers()]
        attach_saes(self.model, {f"model.layers.{i}.output": sae for i, sae in enumerate(self.saes)})
        self.ids = torch.randint(3, self.config.vocab_size, (2, 32) if small else (4, 1024), device=bench.device)
        self.settings: dict[str, tuple[list[list[Tensor]], float, float]] = {}  # by case: biases and thresholds, L0s

    def layers(self) -> nn.ModuleList:
        """Those that have hooks."""
        found: nn.ModuleList = self.model.model.layers
        return found

    def cases(self) -> dict[str, tuple[int, ...]]:
        """The layers that each case splices."""
        depth = len(self.layers())
        numbers = (1, depth) if self.bench.smoke else (1, 10, depth)
        spliced = {f"{n} spliced": tuple((2 * i + 1) * depth // (2 * n) for i in range(n)) for n in numbers}
        return {"bare": (), "nothing open": (), **spliced, CLAMP: (), "capture a layer": ()}

    def open(self, case: str, stack: ExitStack) -> None:
        """Open what the case is named for."""
        middle = len(self.layers()) // 2
        for layer in self.cases()[case]:
            stack.enter_context(self.model.saes.splice(layer=layer))
        if case == CLAMP:
            stack.enter_context(self.model.saes.clamp({i * self.d_sae // 8: 3.0 for i in range(8)}, layer=middle))
        if case == "capture a layer":
            stack.enter_context(self.model.saes.capture(layer=middle))

    @contextmanager
    def opened(self, case: str) -> Iterator[None]:
        """Inside, the case is open, its thresholds are in force, and a first short pass has been."""
        with torch.no_grad(), ExitStack() as stack:
            if case != "bare":
                kept = self.settings[case if self.cases()[case] else "nothing open"][0]
                for sae, tensors in zip(self.saes, kept, strict=True):
                    for there, here in zip(_adapted(sae), tensors, strict=True):
                        there.copy_(here)
                self.open(case, stack)
                self.model(input_ids=self.ids[:1, :8], use_cache=False, logits_to_keep=1)
            yield

    @torch.no_grad()
    def adapt(self, case: str) -> None:
        """Set thresholds by the hidden states that reach each layer while the case is open, and keep them; all in one
        pass, each layer just before its SAE reads. Then count what is active in generated tokens, where it reads."""
        read, counts = self.cases()[case] or (len(self.layers()) // 2,), []

        def at_prefill(layer: int, module: nn.Module, args: Any, output: Any) -> None:
            set_thresholds(self.saes[layer], _hidden(output), self.bench.l0)
            if layer in read:
                counts.append(active(self.saes[layer], _hidden(output)))

        def at_decoding(layer: int, module: nn.Module, args: Any, output: Any) -> None:
            if layer in read and output[0].shape[-2] == 1:
                counts.append(active(self.saes[layer], _hidden(output)))

        l0s = []
        with ExitStack() as stack:
            self.open(case, stack)
            for hook, run in ((at_prefill, partial(self.run, self.model, "prefill")),
                              (at_decoding, partial(self.run, self.model, "generate", 16))):
                handles = [layer.register_forward_hook(partial(hook, i), prepend=True)  # before the SAE's own
                           for i, layer in enumerate(self.layers())]
                run()
                for handle in handles:
                    handle.remove()
                l0s.append(sum(counts) / max(len(counts), 1))
                counts.clear()
        self.settings[case] = [[t.clone() for t in _adapted(sae)] for sae in self.saes], l0s[0], l0s[1]

    def run(self, model: Any, mode: str, new: int | None = None) -> None:
        """What is timed."""
        if mode == "prefill":
            model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
            return
        prompt, new = self.ids[:1, :32], new or self.new
        how: dict[str, Any] = {} if mode == "generate" else {"cache_implementation": "static"}
        if mode == "static":
            how["disable_compile"] = True
        if mode == "compiled":
            how["compile_config"] = CompileConfig()
            if self.bench.smoke:  # traces, and runs the graphs as they are
                how["compile_config"] = CompileConfig(backend="eager", mode="default")
                how["compile_config"]._compile_all_devices = True
        text = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                              min_new_tokens=new, do_sample=False, **how)
        assert text.shape[1] == prompt.shape[1] + new

    def builds(self, mode: str) -> Builds:
        """What `measure` takes."""
        def build(case: str) -> Case:
            model = self.bare if case == "bare" else self.model
            return Case(partial(self.run, model, mode), partial(self.opened, case), WARM_UPS[mode])

        compiled = COMPILED[:2] if self.bench.smoke else COMPILED
        return {case: partial(build, case) for case in (compiled if mode == "compiled" else self.cases())}


def _adapted(sae: Any) -> tuple[Tensor, ...]:
    """What differs between cases."""
    return sae.b_enc, sae.b_dec, sae.threshold


def _hidden(output: Any) -> Tensor:
    """A layer's hidden states (tokens, d)."""
    x: Tensor = output[0] if isinstance(output, tuple) else output
    return x.flatten(0, -2)


class Arithmetic:
    """Seconds that splicing should at least take, from what this GPU was measured to do."""

    def __init__(self, gemma: Gemma) -> None:
        bench, self.gemma = gemma.bench, gemma
        self.tokens = gemma.ids.numel()
        d, dtype = gemma.config.hidden_size, bench.sae_dtype
        numbers = 2**20 if bench.smoke else 2**30

        def copying() -> Case:
            here, there = torch.ones(2, numbers, dtype=torch.bfloat16, device=bench.device)
            return Case(lambda: there.copy_(here))

        found = measure({"product": lambda: product(self.tokens, d, gemma.d_sae, dtype, bench.device),
                         "copy": copying}, bench)
        self.product, copy_s = (_seconds(found[name]) for name in ("product", "copy"))
        self.bandwidth = 4 * numbers / copy_s
        self.row = d * dtype.itemsize
        bench.say(f"product ({self.tokens}, {d}) x ({d}, {gemma.d_sae}) in {dtype}: {1e3 * self.product:.3f} ms, "
                  f"{2 * self.tokens * d * gemma.d_sae / self.product / 1e12:.0f} TFLOP/s; "
                  f"copy: {self.bandwidth / 1e12:.2f} TB/s")

    def extra(self, case: str, mode: str) -> float:
        """Of a forward pass."""
        layers = len(self.gemma.cases()[case])
        _, in_prefill, in_decoding = self.gemma.settings[case]
        if mode == "prefill":
            return layers * (self.product + self.tokens * in_prefill * self.row / self.bandwidth)
        return layers * (self.gemma.d_sae + in_decoding) * self.row / self.bandwidth


def _seconds(result: Result) -> float:
    return result.seconds if isinstance(result, Timing) else float("nan")


def row(gemma: Gemma, arithmetic: Arithmetic, mode: str, case: str, result: Result, bare: Result) -> str:
    """A line of the table."""
    if isinstance(result, Failed):
        return f"{mode:10}{case:18}{result}"
    tokens, passes = (arithmetic.tokens, 1) if mode == "prefill" else (gemma.new, gemma.new)
    pairs = list(zip(bare.times, result.times, strict=True)) if isinstance(bare, Timing) else [(float("nan"),) * 2]
    share = statistics.median(b / t for b, t in pairs)
    extra = statistics.median(t - b for b, t in pairs) / passes
    line = f"{mode:10}{case:18}{tokens / result.seconds:10.1f}{share:9.3f}{result.peak / 1e9:9.2f}"
    if case == CLAMP:
        asked = f"   target 0.98: {verdict(share >= 0.98)}" if mode != "prefill" else ""
        return f"{line}{'':6}{1e3 * extra:10.3f}{asked}"
    if not gemma.cases()[case]:
        return f"{line}{'':6}{1e3 * extra:10.3f}"
    l0, due = gemma.settings[case][1 if mode == "prefill" else 2], arithmetic.extra(case, mode)
    of_it = statistics.median((b + passes * due) / t for b, t in pairs)
    return (f"{line}{l0:6.0f}{1e3 * extra:10.3f}{1e3 * due:12.3f}{extra / due:10.2f}{of_it:7.3f}   targets: extra/it "
            f"1.2: {verdict(extra <= 1.2 * due)}, of it 0.8: {verdict(of_it >= 0.8)}")


def in_turns(mode: str, builds: Builds) -> list[tuple[list[str], int]]:
    """(cases, rounds for one that was asked for) of what is timed in turns: a clamp, which costs little, with nothing
    but the bare model, which thus comes out twice; compiled ones, which take long to make, one after another.
    Generation, whose speed is the CPU's, is timed in short turns and many."""
    often = 1 if mode == "prefill" else OFTEN
    if mode == "compiled":
        return [([case], often) for case in builds]
    return [([case for case in builds if case != CLAMP], often), (["bare", CLAMP], PAIRED * often)]


def language_model(bench: Bench, modes: tuple[str, ...], section: Callable[[str], None]) -> None:
    """The part `language-model`: a section for each mode."""
    gemma = Gemma(bench)
    try:
        for case, spliced in gemma.cases().items():
            if spliced or case == "nothing open":
                gemma.adapt(case)
        if bench.device.type == "cuda":
            bench.say(f"model and SAEs ({bench.sae_dtype}) take {torch.cuda.memory_allocated() / 1e9:.1f} GB")
        for mode in modes:
            section(f"language-model: {mode}, SAEs in {bench.sae_dtype}".replace("torch.", ""))
            arithmetic = Arithmetic(gemma)
            bench.say(HEAD)
            builds, found = gemma.builds(mode), {}  # type: Builds, dict[str, Result]
            for group, times in in_turns(mode, builds):
                found |= measure({case: builds[case] for case in group}, replace(bench, rounds=times * bench.rounds))
                for case in group:
                    bench.say(row(gemma, arithmetic, mode, case, found[case], found["bare"]))
    finally:
        detach_saes(gemma.model)


# --- command line -------------------------------------------------------------------------------------------


def machine() -> str:
    """What it runs on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    libraries = f"torch {torch.__version__}, transformers {version('transformers')}, triton {triton}"
    if not torch.cuda.is_available():
        return f"CPU, {libraries}"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    return (f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB, "
            f"driver {driver}, CUDA {torch.version.cuda}, {libraries}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="of language-model")
    parser.add_argument("--sae-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="in language-model")
    parser.add_argument("--bandwidth", type=float, default=0.001, help="of the training's kernel; 0.001 is the paper's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, to prove that it runs")
    parser.add_argument("--record", action="store_true", help="write results/speed-gpu-NAME.txt, too")
    options = parser.parse_args()
    if options.smoke and options.record:
        parser.error("--smoke measures nothing that is worth a record")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --smoke does without")
    return options


def main() -> None:
    """Run the parts; none ends another."""
    options = arguments()
    path = None
    if options.record:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        path = RESULTS / f"speed-gpu-{name}.txt"
    if options.smoke:
        torch.set_num_threads(1)
    record = Record(path, machine())
    device, rounds = ("cpu", 1) if options.smoke else ("cuda", options.rounds)
    bench = Bench(torch.device(device), options.smoke, rounds, getattr(torch, options.sae_dtype), options.bandwidth,
                  record.say, 6 if options.smoke else 60)
    for part in PARTS if options.only is None else (options.only,):
        record.section(part)
        run = {"step": partial(step, bench), "splice": partial(splice, bench), "sweep": partial(sweep, bench),
               "language-model": partial(language_model, bench, tuple(options.mode), record.section)}[part]
        failed = attempt(run)
        if isinstance(failed, Failed):
            record.say(str(failed))
        free()


if __name__ == "__main__":
    main()
