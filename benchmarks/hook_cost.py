"""What hooks and edits add to a decoding step on a CPU: python benchmarks/hook_cost.py [--record]

The model is a stand-in: its layers do nothing and its tokens and activations stand ready, so that a step costs what
hooks cost. Everything else is as in transformers' generate: one token a step, a KV cache's length, an attention mask,
special ids. Each case runs in every round, in turn; numbers are medians over rounds, in microseconds of CPU time of
the one thread. "Beside a bare hook" divides by what a no-op forward hook adds to one layer.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import thread_time
from types import SimpleNamespace

import torch
from record import cpu

from sae_hooks import SAE, attach_saes, detach_saes

RESULT = Path(__file__).parent / "results" / "hook_cost.txt"
PROMPT, LAYERS = 32, 26
EDITED = "layers.20.output"
TARGETS = {"clamp 8": 100.0, "nothing open, a layer": 10.0}  # microseconds


class Layer(torch.nn.Module):
    """Gives back what it gets."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Cache:
    """A KV cache that knows only how long it is."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length


class Model(torch.nn.Module):
    """The hull of a language model: what hooks see of one, and nothing else."""

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.config = SimpleNamespace(bos_token_id=2, eos_token_id=1, pad_token_id=0)
        self.hidden = {n: torch.randn(1, n, d).to(dtype) for n in (1, PROMPT)}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Cache) -> torch.Tensor:
        hidden = self.hidden[input_ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        past_key_values.length += input_ids.shape[1]
        return hidden

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, masks: list[torch.Tensor]) -> float:
        """Read the prompt, then take a step for each mask; gives microseconds of CPU time a step."""
        cache, token = Cache(), torch.tensor([[7]])
        self(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache)
        start = thread_time()
        for mask in masks:
            self(input_ids=token, attention_mask=mask, past_key_values=cache)
        return (thread_time() - start) / len(masks) * 1e6


def make_sae(d: int, d_sae: int, norm: float | None) -> SAE:
    """Random rows that fire about half of the time; encoder and decoder share them. norm: its typical_norm, or None."""
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d), dim=-1)
    return SAE(rows.T, torch.zeros(d_sae), rows, torch.zeros(d), threshold=torch.zeros(d_sae),
               metadata={} if norm is None else {"typical_norm": norm})


def cases(d_sae: int) -> dict[str, Callable[[Model], list[object]]]:
    """name -> what opens it, on a model that has SAEs at every layer."""
    def some(k: int, value: float) -> dict[int, float]:
        return {i * (d_sae // k): value for i in range(k)}

    found: dict[str, Callable[[Model], list[object]]] = {"nothing open": lambda model: []}
    for k in (1, 8, 64, 512):
        found[f"clamp {k}"] = lambda model, k=k: [model.saes.clamp(some(k, 3.0), site=EDITED)]
    found["scale 8"] = lambda model: [model.saes.scale(some(8, 2.0), site=EDITED)]
    found["add 8"] = lambda model: [model.saes.add(some(8, 2.0), site=EDITED)]
    found["clamp 8, generated tokens only"] = lambda model: [
        model.saes.clamp(some(8, 3.0), site=EDITED, tokens="generated")]
    found["clamp 8, special tokens too"] = lambda model: [
        model.saes.clamp(some(8, 3.0), site=EDITED, special_tokens=True)]
    found["clamp 4 and scale 4"] = lambda model: [
        model.saes.clamp(some(4, 3.0), site=EDITED),
        model.saes.scale({f + 1: 2.0 for f in some(4, 0.0)}, site=EDITED)]
    return found


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median microseconds a step, by case."""
    plain, bare, attached = (Model(options.d, options.dtype).eval() for _ in range(3))
    for layer in bare.layers:
        layer.register_forward_hook(lambda module, args, output: None)
    sae = make_sae(options.d, options.d_sae, options.d**0.5 if options.sinks else None)
    attach_saes(attached, {f"layers.{i}.output": sae for i in range(LAYERS)})
    runs = {"no hooks": (plain, lambda model: []), "a bare hook at each layer": (bare, lambda model: [])}
    runs |= {name: (attached, opening) for name, opening in cases(options.d_sae).items()}
    masks = [torch.ones(1, PROMPT + n + 1, dtype=torch.int64) for n in range(options.steps)]
    prompt, times = torch.full((1, PROMPT), 7), {name: [] for name in runs}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, (model, opening) in runs.items():
            with torch.no_grad(), ExitStack() as stack:
                for handle in opening(model):
                    stack.enter_context(handle)
                times[name].append(model.generate(input_ids=prompt, attention_mask=masks[0][:, :PROMPT], masks=masks))
    detach_saes(attached)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def report(step: dict[str, float], options: argparse.Namespace) -> str:
    """The table, and how it compares with the targets."""
    bare = (step["a bare hook at each layer"] - step["no hooks"]) / LAYERS
    idle = (step["nothing open"] - step["no hooks"]) / LAYERS
    rows = {"bare hook, a layer": bare, "nothing open, a layer": idle}
    rows |= {name: step[name] - step["nothing open"] for name in cases(options.d_sae) if name != "nothing open"}
    lines = [f"{'adds to a decoding step':34} {'us':>8} {'beside a bare hook':>19}"]
    lines += [f"{name:34} {us:8.1f} {us / bare:19.1f}" + target(name, us) for name, us in rows.items()]
    return "\n".join([machine(options), *lines])


def target(name: str, us: float) -> str:
    """What is asked of this row, if anything."""
    if name not in TARGETS:
        return ""
    return f"   target {TARGETS[name]:.0f}: {'met' if us < TARGETS[name] else 'MISSED'}"


def machine(options: argparse.Namespace) -> str:
    """What was measured, on what."""
    return (f"d {options.d}, d_sae {options.d_sae}, {options.dtype}, batch 1, 1 token, {LAYERS} layers with SAEs, "
            f"{'with' if options.sinks else 'without'} typical_norm; medians of {options.rounds} rounds of "
            f"{options.steps} steps\n{cpu()}; load average {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=2304, help="width of the model (2304: Gemma 2 2B)")
    parser.add_argument("--d-sae", type=int, default=65536, help="features of each SAE")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32,
                        help="of the activations: float32, bfloat16, float16")
    parser.add_argument("--sinks", action="store_true", help="store a typical_norm, so that attention sinks are told")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=64, help="decoding steps a round")
    parser.add_argument("--record", action="store_true", help=f"write the table to {RESULT.name}, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = report(measure(options), options)
    print(text)
    if options.record:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(f"python benchmarks/hook_cost.py --record\n{text}\n")


if __name__ == "__main__":
    main()
