"""Exports the same documents every time it is started: export_worker.py FOLDER [--file-size N [--also-tokenizer]]"""

import resource
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_hooks import attach_saes
from sae_hooks.export import export_features

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import make_sae

TINY_GEMMA2 = Path(__file__).parents[1] / "models" / "tiny-gemma2"

model = AutoModelForCausalLM.from_pretrained(TINY_GEMMA2, dtype=torch.float32, attn_implementation="eager").eval()
attach_saes(model, make_sae(192, 512, "model.layers.2.output", norm=34))
tokenizer = AutoTokenizer.from_pretrained(TINY_GEMMA2)
rows = [{"text": f"Chapter {n}. " + "And it came to pass in those days. " * (n % 7), "n": n} for n in range(60)]
if "--file-size" in sys.argv:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit, none = int(sys.argv[sys.argv.index("--file-size") + 1]), resource.RLIM_INFINITY
    save = tokenizer.save_pretrained

    def save_without_limit(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (none, none))
        save(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, none))

    if "--also-tokenizer" in sys.argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, none))
    else:
        tokenizer.save_pretrained = save_without_limit
print("begins", flush=True)
export_features(model, rows, sys.argv[1], tokenizer=tokenizer, tokens_per_shard=128, window=64)
