"""SAEs of sparsify and of dictionary_learning in sae_hooks: the same features, the same reconstructions?

    python benchmarks/compare_peers.py [--only sparsify] [--record]

Each library runs in an environment of its own (those of speed.py, made on the first run) and writes SAEs of every kind
that it has: random ones with biases and thresholds that matter, and some that its own trainer made in a few steps. It
reads them again, encodes and decodes float32 activations on the CPU; sae_hooks loads the same folders. Columns: average
L0; largest difference of encode and decode, relative to the largest value; (token, feature) pairs that are active in
one only, which float32 rounding at a threshold explains in ones and twos.
"""

import argparse
import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from speed_peers import PEERS

RESULT = Path(__file__).parent / "results/compare_peers.txt"
OPTIONS: dict[str, dict[str, Any]] = {"sparsify": {}, "dictionary_learning": {"allow_pickle": True}}
TOKENS, D_IN, WIDTH, K = 256, 512, 4096, 40
Written = Iterator[tuple[str, Path, Any]]


def main() -> None:
    """Have each library write, read what it wrote, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="these libraries")
    parser.add_argument("--environments", type=Path, help="the libraries' folder (as speed.py's)")
    parser.add_argument("--record", action="store_true", help=f"write what is printed to {RESULT.name}, too")
    parser.add_argument("--write", nargs=2, metavar=("LIBRARY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.write:
        return write(options.write[0], Path(options.write[1]))
    from record import Record, cpu
    from speed_workers import ALONE, ENVIRONMENTS, interpreter

    record = Record(RESULT if options.record else None, cpu())
    for library in options.only:
        python = interpreter(library, options.environments or ENVIRONMENTS)
        record.section(library)
        record.say(f"{PEERS[library]}; {TOKENS} random tokens, {D_IN} values each; {WIDTH} features where not trained")
        record.say(f"{'what':44} {'L0':>6} {'encode':>9} {'decode':>9} {'differ':>7}  site")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([python, __file__, "--write", library, folder], check=True, stdout=subprocess.DEVNULL,
                           env=os.environ | ALONE)
            for path in sorted(Path(folder).glob("*.pt"), key=lambda path: int(path.stem)):
                record.say(row(torch.load(path, weights_only=True), OPTIONS[library]))


def row(theirs: dict[str, Any], options: dict[str, Any]) -> str:
    """One SAE compared: what the library wrote into `folder` and found (acts, x_hat) for x (tokens, d_in)."""
    from sae_hooks.errors import SaeFormatError
    from sae_hooks.hub import load_sae

    name, x, acts, x_hat = (theirs[key] for key in ("name", "x", "acts", "x_hat"))
    try:
        sae = load_sae(theirs["folder"], **options).float()
    except SaeFormatError as error:
        return f"{name:44} refused: {str(error).rpartition('cfg.json: ')[2]}"
    with torch.no_grad():
        mine, decoded = sae.encode(x), sae.decode(acts) + sae.skip(x)
        truth = copy.deepcopy(sae).double().encode(x.double())
    both = (acts > 0) & (mine > 0)
    encode = float(((acts - mine) * both).abs().max() / acts.abs().max())
    decode = float((x_hat - decoded).abs().max() / x_hat.abs().max())
    differ, rounded = (int(((other > 0) != (mine > 0)).sum()) for other in (acts, truth))
    assert encode < 1e-5, (name, encode)
    assert decode < 1e-5, (name, decode)
    assert differ <= 3 + rounded, (name, differ, rounded)
    l0 = float((mine > 0).sum(1).float().mean())
    return f"{name:44} {l0:6.1f} {encode:9.1e} {decode:9.1e} {differ:7d}  {sae.site}"


# --- the libraries' side, where sae_hooks is not ---------------------------------------------------------------

@torch.no_grad()
def write(library: str, folder: Path) -> None:
    """Every kind of SAE in a folder, and in 0.pt, 1.pt, ... what each makes of random activations."""
    for number, (name, path, module) in enumerate({"sparsify": sparsify, "dictionary_learning": dictionary_learning}
                                                  [library](folder)):
        x = torch.randn(TOKENS, module.d_in if library == "sparsify" else module.activation_dim)
        x *= 3 if name.startswith("trained") else 1
        if library == "sparsify":
            module.cfg.multi_topk = False  # for the loss only: forward would return what 4 k features reconstruct
            found, x_hat = module.encode(x), module(x).sae_out
            acts = torch.zeros(TOKENS, module.num_latents).scatter_(1, found.top_indices, found.top_acts)
        else:
            acts, x_hat = module.encode(x), module(x)
        torch.save({"name": name, "folder": str(path), "x": x, "acts": acts, "x_hat": x_hat}, folder / f"{number}.pt")


def randomise(tensors: dict[str, torch.Tensor]) -> None:
    """Unit decoder rows, encoder rows like them, biases that are felt; about one feature in fifty fires."""
    rows = torch.nn.functional.normalize(torch.randn(WIDTH, D_IN), dim=1)
    lowered = () if "threshold" in tensors else ("encoder.bias", "gate_bias", "mag_bias")
    for name, t in tensors.items():
        if t.ndim == 2 and name != "W_skip":
            like = rows + 0.01 * torch.randn_like(rows) if "enc" in name else rows
            t.copy_(like if t.shape == rows.shape else like.T)
        elif t.is_floating_point():
            t.copy_(0.1 * torch.randn_like(t) - 2 * (name in lowered) + 2.1 * (name == "threshold"))


def sparsify(folder: Path) -> Written:
    """SparseCoder.save_to_disk and load_from_disk, of random SAEs and of those that Trainer.fit leaves."""
    from sparsify import SparseCoder, SparseCoderConfig

    expand = {"expansion_factor": WIDTH // D_IN, "k": K}
    for name, hook, settings in [
            ("TopK", "layers.3", {}), ("TopK, decoder not normalised", "h.3.attn", {"normalize_decoder": False}),
            ("TopK, num_latents, Multi-TopK", "layers.3.mlp", {"num_latents": WIDTH, "multi_topk": True}),
            ("TopK, bfloat16", "layers.3", {}), ("transcoder", "layers.3.mlp", {"transcode": True}),
            ("skip transcoder", "model.layers.3.mlp", {"transcode": True, "skip_connection": True}),
            ("skip transcoder, bfloat16", "layers.3.mlp", {"transcode": True, "skip_connection": True}),
            ("skip transcoder without the key transcode", "layers.3.mlp", {"skip_connection": True}),
            ("GroupMax", "layers.3", {"activation": "groupmax", "num_latents": WIDTH, "k": 64})]:
        coder = SparseCoder(D_IN, SparseCoderConfig(**expand | settings))
        randomise(coder.state_dict())
        path = folder / name.replace(" ", "-") / hook
        coder.to(torch.bfloat16 if "bfloat16" in name else torch.float32).save_to_disk(path)
        if "without" in name:
            config = json.loads((path / "cfg.json").read_text())
            (path / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if k != "transcode"}))
        yield name, path, SparseCoder.load_from_disk(path).float()
    for name, settings in {"trained": {}, "trained to transcode": {"transcode": True, "skip_connection": True}}.items():
        run = fit(folder, name, settings)
        for path in sorted(config.parent for config in run.rglob("cfg.json")):
            yield f"{name}: {path.relative_to(run)}", path, SparseCoder.load_from_disk(path)


@torch.enable_grad()
def fit(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """The run that sparsify's Trainer leaves after 8 steps on a random model of two layers: two places, two seeds."""
    import datasets
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=256,
                                         num_hidden_layers=2, initializer_range=0.2))
    data = datasets.Dataset.from_dict({"input_ids": torch.randint(256, (32, 64)).tolist()}).with_format("torch")
    config = TrainConfig(SparseCoderConfig(expansion_factor=8, k=8, **settings), batch_size=4, save_dir=str(folder),
                         hookpoints=["layers.1", "layers.1.mlp"], init_seeds=[0, 1], log_to_wandb=False,
                         run_name=name.replace(" ", "-"))
    Trainer(config, data, model).fit()
    return folder / name.replace(" ", "-")


def dictionary_learning(folder: Path) -> Written:
    """Random SAEs of every class that load_dictionary reads, and those that trainSAE leaves."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
    from dictionary_learning.utils import load_dictionary

    for module, name, more in [
            (dictionary, "AutoEncoder", {}), (dictionary, "AutoEncoderNew", {}), (dictionary, "GatedAutoEncoder", {}),
            (dictionary, "JumpReluAutoEncoder", {}), (top_k, "AutoEncoderTopK", {"k": K}),
            (batch_top_k, "BatchTopKSAE", {"k": K}),
            (matryoshka_batch_top_k, "MatryoshkaBatchTopKSAE", {"k": K, "group_sizes": [WIDTH // 4, 3 * WIDTH // 4]})]:
        ae = getattr(module, name)(D_IN, WIDTH, **more)
        randomise(ae.state_dict())
        path = folder / name
        path.mkdir()
        torch.save(ae.state_dict(), path / "ae.pt")
        facts = {"dict_class": name, "activation_dim": D_IN, "dict_size": WIDTH, "layer": 3, **more,
                 "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}
        (path / "config.json").write_text(json.dumps({"trainer": facts, "buffer": {"d_submodule": D_IN, "io": "out"}}))
        yield name, path, load_dictionary(str(path), "cpu")[0]
    for path in train(folder / "run"):
        ae, config = load_dictionary(str(path), "cpu")
        yield f"trained: {config['trainer']['dict_class']}", path, ae


@torch.enable_grad()
def train(run: Path) -> list[Path]:
    """What trainSAE leaves of each trainer after 20 steps on normalised activations."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.training import trainSAE

    class Data(list[torch.Tensor]):
        config: ClassVar = {"d_submodule": 64, "io": "out", "ctx_len": 128}

    base = {"steps": 20, "activation_dim": 64, "dict_size": 512, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped",
            "submodule_name": "resid_post_layer_3", "device": "cpu", "warmup_steps": 2}
    warm, top = {"sparsity_warmup_steps": 2}, {"k": 16, "threshold_start_step": 5}
    configs = [{"trainer": trainer, **base, **more} for trainer, more in [
        (trainers.StandardTrainer, warm), (trainers.GatedSAETrainer, warm), (trainers.JumpReluTrainer, warm),
        (trainers.TopKTrainer, top), (trainers.BatchTopKTrainer, top),
        (MatryoshkaBatchTopKTrainer, {"group_fractions": [0.25, 0.75], **top})]]
    trainSAE(Data(3 * torch.randn(TOKENS, 64) + 0.3 for _ in range(21)), configs, steps=20, save_dir=str(run),
             normalize_activations=True, device="cpu")
    return [run / f"trainer_{i}" for i in range(len(configs))]


if __name__ == "__main__":
    main()
