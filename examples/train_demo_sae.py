"""Train the demo's SAE from a JSONL file of texts: harvest, train, evaluate, write the folder with its card.

    python examples/train_demo_sae.py --text train.jsonl.xz --held-out held-out.jsonl --cache acts --out sae

Each line of the files is {"text": ..., "domain": ...}. A harvest that was cut off goes on with the same
command; more processes help with `--worker 1/2` (and 0/2 for this one), each harvesting its share. Afterwards
`--contexts 8` prints where the features of the SAE in --out fire most, from which its labels.json is written
by hand, keeps their statistics beside the SAE, and writes the card anew. A training that was cut off, too,
goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_card import card
from smollm2 import MODEL_NAME, load_smollm2
from torch import Tensor
from tqdm import tqdm

from sae_hooks import SAE, attach_saes, export_features, load_sae
from sae_hooks.training import (
    CachedStream,
    Evaluation,
    JumpReLU,
    TrainConfig,
    Trainee,
    context_windows,
    documents,
    evaluate,
    harvest_infos,
    padded_batches,
    train,
    write_shards,
)

WINDOWS_PER_SHARD = 128
PATHS = ("text", "held_out", "cache", "out", "worker", "contexts")  # arguments that don't decide the numbers


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, help="training texts, .jsonl or .jsonl.xz")
    p.add_argument("--held-out", type=Path, required=True, help="texts never trained on, for the evaluation")
    p.add_argument("--cache", type=Path, required=True, help="for activations: 1.2 GB a million tokens")
    p.add_argument("--out", type=Path, required=True, help="folder of the SAE")
    p.add_argument("--layer", type=int, default=15)
    p.add_argument("--d-sae", type=int, default=8192)
    p.add_argument("--tokens", type=int, default=2_700_000, help="distinct tokens to train on")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--batch-size", type=int, default=1024)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--l0", type=float, default=27.0, help="features active on a token")
    p.add_argument("--bandwidth", type=float, default=0.03, help="of the kernel, at unit mean square")
    p.add_argument("--window", type=int, default=256, help="tokens of context")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--held-out-windows", type=int, default=240)
    p.add_argument("--worker", default="0/1", help="I/N: harvest every Nth shard from I on; only 0 trains")
    p.add_argument("--contexts", type=int, metavar="N", help="describe the features instead")
    return p


def main() -> None:
    args = arguments().parse_args()
    model, tokenizer = load_smollm2(torch.bfloat16)  # quicker than float32 on CPUs with bf16 instructions
    if args.contexts:
        describe(args, model, tokenizer)
        return
    harvest(args, model, tokenizer)
    if args.worker.startswith("0/"):
        sae = trained(args)
        ship(args, sae, measured(args, model, tokenizer, sae))


def windows_of(path: Path, args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    ids = tokenizer(list(documents(path)), add_special_tokens=False)["input_ids"]
    return context_windows(ids, args.window, args.seed)


def held_out(args: argparse.Namespace, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    windows = windows_of(args.held_out, args, tokenizer)[:args.held_out_windows]
    return list(padded_batches(windows, tokens=1024))


def site_of(args: argparse.Namespace) -> str:
    return f"model.layers.{args.layer}.output"


def harvest(args: argparse.Namespace, model: torch.nn.Module, tokenizer: Any) -> None:
    """Fill the cache with this worker's share of args.tokens."""
    worker, workers = map(int, args.worker.split("/"))
    windows, special = windows_of(args.text, args, tokenizer), tokenizer.all_special_ids
    windows = windows[:windows_wanted(args, windows)]
    infos = harvest_infos(model, args.cache, [site_of(args)], windows, special, model_name=MODEL_NAME,
                          window=args.window, seed=args.seed, windows_per_shard=WINDOWS_PER_SHARD)
    with tqdm(desc="harvest", unit=" tokens", total=args.tokens // workers) as bar:
        for tokens in write_shards(model, args.cache, infos, windows, special, worker=worker,
                                   workers=workers, windows_per_shard=WINDOWS_PER_SHARD):
            bar.update(tokens)


def windows_wanted(args: argparse.Namespace, windows: list[Any]) -> int:
    """How many windows hold args.tokens ordinary tokens, if two of each are sinks; whole shards."""
    enough = int(np.searchsorted(np.cumsum([len(w) - 2 for w in windows]), args.tokens))
    return (enough // WINDOWS_PER_SHARD + 1) * WINDOWS_PER_SHARD


def trained(args: argparse.Namespace) -> SAE:
    """The SAE for raw activations, with its metadata, from the activations in the cache."""
    stream = CachedStream(args.cache, [site_of(args)], seed=args.seed, epochs=args.epochs, max_tokens=args.tokens)
    steps = stream.rows * args.epochs // args.batch_size
    objective = JumpReLU(l0=args.l0, bandwidth=args.bandwidth, warmup=round(0.3 * steps))
    trainee = Trainee(name="demo", site=site_of(args), d_sae=args.d_sae, seed=args.seed, betas=(0.9, 0.999), clip=3.0,
                      learning_rate=args.learning_rate, objective=objective)
    config = TrainConfig(steps=steps, batch_size=args.batch_size, warmup=100, decay=0.5)
    sae = train(stream, [trainee], config, args.cache / "training")["demo"]
    sae.metadata |= {"n_tokens": stream.rows, "seed": args.seed, "dataset": args.text.name, "recipe": recipe(args)}
    return sae


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide the numbers; no paths."""
    return {name: value for name, value in vars(args).items() if name not in PATHS}


def measured(args: argparse.Namespace, model: torch.nn.Module, tokenizer: Any, sae: SAE) -> Evaluation:
    """The SAE as it will be stored, on held-out text."""
    batches = tqdm(held_out(args, tokenizer), desc="evaluate", unit=" batches")
    return evaluate(model, stored_form(sae).float(), batches, tokenizer.all_special_ids)


def stored_form(sae: SAE) -> SAE:
    """The SAE with fp16 matrices, half the size."""
    return SAE(sae.W_enc.half(), sae.b_enc, sae.W_dec.half(), sae.b_dec, threshold=sae.threshold,
               site=sae.site, metadata=sae.metadata)


def ship(args: argparse.Namespace, sae: SAE, result: Evaluation) -> None:
    """Write the folder: fp16 matrices, config, and the card."""
    sae = stored_form(sae)
    sae.metadata |= {"l0": round(result.l0, 1), "fvu": round(result.fvu, 4), "dead": round(result.dead, 4),
                     "loss_clean": round(result.loss_clean, 4), "loss_spliced": round(result.loss_spliced, 4),
                     "loss_zero": round(result.loss_zero, 4), "held_out_tokens": result.tokens,
                     "loss_recovered": round(result.loss_recovered, 4)}
    folder = sae.save_pretrained(args.out)
    write_card(folder, sae)
    print(f"{folder}: L0 {result.l0:.1f}, FVU {result.fvu:.3f}, dead {result.dead:.1%}, "
          f"loss +{result.delta_loss:.3f} nats, recovered {result.loss_recovered:.4f}")


def write_card(folder: Path, sae: SAE) -> None:
    """Write README.md, with the labels where there are some."""
    path = folder / "labels.json"
    labels = json.loads(path.read_text()) if path.exists() else {}
    (folder / "README.md").write_text(card(sae, labels))


def describe(args: argparse.Namespace, model: torch.nn.Module, tokenizer: Any) -> None:
    """Print where each feature of the SAE in args.out fires most, rare ones first; keep the statistics beside it."""
    sae = load_sae(args.out)
    attach_saes(model, sae)
    windows = windows_of(args.held_out, args, tokenizer)[:args.held_out_windows]
    rows = [{"input_ids": window} for window in windows]
    store = export_features(model, rows, args.cache / "held-out-features", tokenizer=tokenizer, window=args.window)
    sae.statistics = store.statistics()
    write_card(sae.save_pretrained(args.out), sae)
    for feature in sae.statistics.frequency.argsort().tolist():
        frequency, maximum = sae.statistics.frequency[feature], sae.statistics.max[feature]
        print(f"\nfeature {feature}: on {frequency:.3%}, at most {maximum:.1f}")
        for context in store.top(feature, args.contexts, context=12):
            print(f"  {context.activation:7.1f}  {str(context)!r}")


if __name__ == "__main__":
    main()
