"""What tells one model, SAE or tokenizer from another: plain JSON, compared when an export goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .forward import input_device
from .sae import SAE

SAMPLED = 64  # values of each parameter of a model, rows of an SAE: hashing all would take as long as loading it
TOLD = ("name", "revision", "source")  # for people: the same model may be found under another name
BY_NAME = ("saes", "open_saes")  # whose keys are users' names, which may be any of those


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Class, dtype, and digests of its config and of some values of each parameter; where it came from."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    kept = {key: value for key, value in settings.items() if not key.startswith(("_", "transformers_version"))}
    return {"name": getattr(config, "_name_or_path", "") or type(model).__name__,
            "revision": getattr(config, "_commit_hash", None), "class": type(model).__name__,
            "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
            "config": _digest([json.dumps(kept, sort_keys=True, default=str).encode()]),
            "weights": _digest(_sample(name, p) for name, p in model.named_parameters())}


def weights_digest(model: nn.Module) -> str:
    """Of some values of each parameter, the same in bfloat16 and float32; "" where some are off-loaded: those have none
    to show."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return ""
    return _digest(_sample(name, p.detach().to(torch.bfloat16)) for name, p in model.named_parameters())


def sae_identity(sae: SAE) -> dict[str, Any]:
    """Site, sizes and a digest of all tensors; where it came from."""
    tensors = sorted(sae.named_parameters())
    return {"site": sae.site, "d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k,
            "dtype": str(sae.dtype).removeprefix("torch."), "typical_norm": sae.metadata.get("typical_norm"),
            "source": sae.metadata.get("source"),
            "weights": _digest(part for name, p in tensors for part in (name.encode(), raw_bytes(p)))}


def sae_digest(sae: SAE) -> str:
    """Of the gate, the biases and some features' rows, cheaply; the same in every dtype that holds these values."""
    step = max(1, sae.d_sae // SAMPLED)
    tensors = (sae.b_enc, sae.b_dec, sae.threshold, sae.W_enc.T[::step], sae.W_dec[::step])
    return _digest([str(sae.k).encode(), *(raw_bytes(t.detach().cpu().double()) for t in tensors if t is not None)])


def adapters_identity(model: nn.Module) -> list[dict[str, Any]]:
    """What PEFT's layers compute with, layers alike together: adapters that are active, merged, disabled, and their
    scaling. Empty for a model without such layers."""
    alike: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        disabled = getattr(module, "disable_adapters", None)  # a method of transformers' models, a bool of these layers
        if isinstance(disabled, bool):
            active, merged = (list(getattr(module, name, ())) for name in ("active_adapters", "merged_adapters"))
            told = {"active": active, "merged": merged, "disabled": disabled,
                    "scaling": getattr(module, "scaling", None)}
            alike.setdefault(json.dumps(told, sort_keys=True, default=str), []).append(path)
    return [json.loads(told) | {"layers": _digest([json.dumps(paths).encode()])}
            for told, paths in sorted(alike.items())]


def autocast_identity(model: nn.Module) -> dict[str, str]:
    """The device type and dtype of an autocast that is in effect where the model runs; {} if none is."""
    device = torch.device(input_device(model, torch.device("cpu"))).type
    if not torch.is_autocast_enabled(device):
        return {}
    return {"device": device, "dtype": str(torch.get_autocast_dtype(device)).removeprefix("torch.")}


def tokenizer_identity(tokenizer: Any) -> dict[str, Any] | None:
    """Class and a digest of what decides its ids; None for no tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    kept = {key: value for key, value in facts.items() if key not in ("padding", "truncation")}
    return {"name": getattr(tokenizer, "name_or_path", ""), "class": type(tokenizer).__name__,
            "vocabulary": _digest([json.dumps(kept, sort_keys=True).encode()]),
            "chat_template": _digest([str(tokenizer.chat_template).encode()])
            if getattr(tokenizer, "chat_template", None) else None}


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Where two identities differ, as "saes.model.layers.2.output.weights: there x, here y"; what only people read is
    left out."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        told = () if path in BY_NAME else TOLD
        keys = [key for key in (*there, *(k for k in here if k not in there)) if key not in told]
        return [one for key in keys for one in differences(there.get(key), here.get(key),
                                                           f"{path}.{key}" if path else str(key))]
    return [] if there == here else [f"{path}: there {there!r}, here {here!r}"]


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as they lie in row-major order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _sample(name: str, parameter: Tensor) -> bytes:
    """Name, shape and values spread over a parameter; off-loaded ones (on "meta") have none to show."""
    told = f"{name}{tuple(parameter.shape)}".encode()
    if parameter.device.type == "meta" or not parameter.numel():
        return told
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED)
    return told + raw_bytes(flat[::step][:SAMPLED])


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:32]
