"""What hooks and edits add to a compiled decoding step: python benchmarks/compiled_cost.py [--record]

A Gemma 2 of narrow layers, random and in bfloat16, generates with a static cache; its decoding steps are compiled by
inductor, as transformers does it on GPUs, here on the CPU. Each case has a process of its own, since models in one
process share what is compiled; all generate in turn, round by round. Milliseconds of CPU time of the one thread for a
token, medians over rounds of what a case takes more than the bare model beside it. Compiling takes minutes.
"""

import argparse
import multiprocessing
import os
import statistics
from multiprocessing.connection import Connection
from pathlib import Path
from time import process_time
from typing import Any

import torch
import transformers
from record import cpu

from sae_hooks import SAE, attach_saes

RESULT = Path(__file__).parent / "results" / "compiled_cost.txt"
D, D_SAE, PROMPT, NEW = 64, 256, 32, 33
CASES = ("bare", "nothing open", "clamp 8", "1 spliced", "all spliced")


def make_model(layers: int) -> Any:
    """Gemma 2's architecture, as deep as is asked for."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(hidden_size=D, num_hidden_layers=layers, num_attention_heads=4,
                                       num_key_value_heads=2, head_dim=16, intermediate_size=128, vocab_size=512)
    model: Any = transformers.Gemma2ForCausalLM(config)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def make_sae() -> SAE:
    """Random rows, some of which fire."""
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D), dim=-1)
    return SAE(rows.T, torch.zeros(D_SAE), rows, torch.zeros(D), threshold=torch.full((D_SAE,), 2.0))


def open_case(model: Any, case: str, layers: int) -> None:
    """Attach SAEs at all layers and open what the case is named for; it stays open."""
    if case == "bare":
        return
    attach_saes(model, {f"model.layers.{i}.output": make_sae() for i in range(layers)})
    if case == "clamp 8":
        model.saes.clamp({i * D_SAE // 8: 3.0 for i in range(8)}, layer=layers // 2)
    for layer in range(layers) if case == "all spliced" else [layers // 2] if case == "1 spliced" else []:
        model.saes.splice(layer=layer)


@torch.no_grad()
def work(pipe: Connection, case: str, layers: int) -> None:
    """Generate whenever the pipe says so, and send how long a token took."""
    torch.set_num_threads(1)
    model = make_model(layers)
    open_case(model, case, layers)
    compiling: Any = transformers.CompileConfig()
    compiling._compile_all_devices = True
    prompt = torch.randint(3, 500, (1, PROMPT))
    while pipe.recv():
        start = process_time()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW,
                       do_sample=False, cache_implementation="static", compile_config=compiling)
        pipe.send((process_time() - start) / NEW * 1e3)


def measure(layers: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token, by case and round."""
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for case in CASES:
        pipes[case], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, case, layers), daemon=True).start()
        theirs.close()  # so that `recv` raises EOFError, should the process die
    for _ in range(2):  # the first compiles, all of them at once; the second warms up
        for pipe in pipes.values():
            pipe.send(True)
        for pipe in pipes.values():
            pipe.recv()
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, pipe in pipes.items():
            pipe.send(True)
            times[case].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return times


def report(times: dict[str, list[float]], layers: int) -> str:
    """The table."""
    lines = [f"Gemma 2, {layers} layers, d {D}, bfloat16, SAEs of {D_SAE} features at all layers, batch 1; medians of "
             f"{len(times['bare'])} rounds of {NEW} tokens",
             f"{cpu()}, transformers {transformers.__version__}; load average {os.getloadavg()[0]:.1f}",
             f"{'ms a token':14} {'':>8} {'more than bare':>15}"]
    for case, found in times.items():
        more = statistics.median(ours - bare for ours, bare in zip(found, times["bare"], strict=True))
        lines.append(f"{case:14} {statistics.median(found):8.2f} {more:15.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--record", action="store_true", help=f"write the table to {RESULT.name}, too")
    options = parser.parse_args()
    text = report(measure(options.layers, options.rounds), options.layers)
    print(text)
    if options.record:
        RESULT.write_text(f"python benchmarks/compiled_cost.py --record\n{text}\n")


if __name__ == "__main__":
    main()
