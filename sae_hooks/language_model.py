"""The language model and its tokenizer, as the command line loads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer

from .errors import SaeNotFoundError


def load_model(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), padding on the left. Runs no code of the model's repository. Raises SaeNotFoundError where
    transformers finds no such model or cannot load it, and where there is no tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where == "meta":
        raise typer.BadParameter("meta holds no values to compute with; give cpu, cuda ...", param_hint="--device")
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
    if len(tokenizer) == len(tokenizer.get_added_vocab()):  # as transformers makes one where no file of it is there
        raise SaeNotFoundError(f"there is no tokenizer in {name}, or one without a word; save the model's own there: "
                               "tokenizer.save_pretrained(folder)")
    with loading(name):
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=where, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded, tokenizer


@contextmanager
def loading(name: str) -> Iterator[None]:
    """What stops transformers from loading a model, as SaeNotFoundError with the reason."""
    try:
        yield
    except Exception as error:  # also ImportError, KeyError, AssertionError, and what tokenizers and safetensors raise
        told = repr(error) if isinstance(error, KeyError) else str(error)
        if "trust_remote_code" in told:
            told = ("it needs code of its own repository, which sae-hooks never runs. If you trust it, load it in "
                    "Python, and call attach_saes")
        raise SaeNotFoundError(f"cannot load the language model {name!r}: {told}") from error
