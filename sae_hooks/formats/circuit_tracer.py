"""Per-layer transcoders of circuit-tracer: `layer_5.safetensors`, beside one config.yaml for all layers.

The config tells where they read and write, as TransformerLens hooks inside a layer: "mlp.hook_in" (Qwen3: what the MLP
is given, the norm's gain in it) or "hook_resid_mid" (Llama 3.2: the residual stream, not normalised). Nothing else is
normalised or centred. A config that only lists transcoders of other repositories is refused, naming them; cross-layer
transcoders (`W_enc_0.safetensors`, `W_dec_0.safetensors`) are listed, but not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SaeFormatError
from ..sae import SAE
from .config import size, text
from .entry import WEIGHTS, Entry, Layout, all_of_them
from .hook_names import kind_of, to_site
from .weights import orient, require

CONFIG = "config.yaml"
FORMAT, LAYOUTS = "circuit-tracer", (Layout("layer_N.safetensors", CONFIG, ", which says what it reads and writes: its "
                    "keys are model_name, model_kind (transcoder_set), feature_input_hook and feature_output_hook"),)
THRESHOLD = "activation_function.threshold"
NAMES = frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", THRESHOLD})
PLACE = re.compile(r"layer_(\d+)\.safetensors")
CROSS_LAYER = re.compile(r"W_enc_(\d+)\.safetensors")
FEATURES = "features"  # the folder of what its dashboards show, which ends in .bin and is no weights
GATES = {None: "relu or jumprelu", "relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}
default = all_of_them


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every layer_N.safetensors beside a config.yaml, which may yet be one of something else, and cross-layer ones.

    Where a source has no weights at all, each config.yaml stands for the transcoders that it lists.
    """
    found: list[Entry] = []
    across: dict[str, Entry] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        config = f"{folder}/{CONFIG}".lstrip("/")
        if (place := PLACE.fullmatch(name)) and config in files:
            found.append(Entry(dialect="circuit_tracer", weights=path, config=config, layer=int(place[1])))
        elif CROSS_LAYER.fullmatch(name) and path.replace("W_enc_", "W_dec_") in files:
            across.setdefault(folder, Entry(dialect="circuit_tracer", weights=path, kind="clt"))
    if any(_may_be_weights(path) for path in files):
        return [*found, *across.values()]
    return [Entry(dialect="circuit_tracer", weights=path, config=path) for path in files
            if path.rpartition("/")[2] == CONFIG]


def sites(kind: str, layer: int | None) -> tuple[str, str] | None:
    """None: only its config tells where a transcoder reads and writes."""
    return None


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with the sites that config.yaml means. Raises SaeFormatError where it is none of circuit-tracer's, or
    means transcoders that are not here."""
    kind, model = text(config, "model_kind"), text(config, "model_name")
    if kind == "cross_layer_transcoder":
        return replace(entry, kind="clt", model_name=model)
    if kind != "transcoder_set":
        none = "no weights are here, and in the config " if entry.weights == entry.config else ""
        raise SaeFormatError(f"{none}model_kind is {kind!r}; in a config.yaml of circuit-tracer it is 'transcoder_set' "
                             "or 'cross_layer_transcoder', and no other is known to go with layer_N.safetensors")
    _refuse_elsewhere(entry, config)
    hooks = [text(config, key) for key in ("feature_input_hook", "feature_output_hook")]
    if None in hooks:
        raise SaeFormatError(f"feature_input_hook is {hooks[0]!r} and feature_output_hook {hooks[1]!r}; both must name "
                             "a place in a layer, such as 'mlp.hook_in'")
    named = [f"blocks.{entry.layer}.{hook}" for hook in hooks]
    read, write = (to_site(name, model) for name in named)
    return replace(entry, site=read or entry.site, site_out=write or entry.site_out, model_name=model,
                   kind="transcoder" if hooks[0] != hooks[1] else kind_of(read or named[0]),
                   hook=None if read else named[0])


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The transcoder in these tensors: encoder (d_sae, d_in), decoder (d_sae, d_out), skip (d_out, d_in).

    circuit-tracer's TopK keeps the k largest pre-activations even where they are negative, which among tens of
    thousands they are not; here they would be 0. Raises SaeFormatError, SaeMismatchError naming what does not fit.
    """
    if config is None:
        raise SaeFormatError(f"{CONFIG} is missing; it says where the transcoder reads and writes")
    entry = refine(entry, config)
    if entry.kind == "clt":
        raise SaeFormatError("a cross-layer transcoder writes to several layers; sae_hooks loads those of one layer")
    if entry.site_out is None:
        raise SaeFormatError(f"which module feature_output_hook {config['feature_output_hook']!r} means cannot be told "
                             f"for model_name {entry.model_name!r}")
    needs = [name for name in ("W_skip", THRESHOLD) if name in tensors]
    require(tensors, ("W_enc", "W_dec", "b_enc", "b_dec", *needs))
    d_sae, d_out = tensors["b_enc"].numel(), tensors["b_dec"].numel()
    d_in = tensors["W_enc"].numel() // max(d_sae, 1)
    shapes = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,),
              "W_skip": (d_out, d_in), THRESHOLD: (d_sae,)}
    t = orient(tensors, {name: shape for name, shape in shapes.items() if name in tensors})
    threshold, k = _gate(t, config)
    return SAE(t["W_enc"].T, t["b_enc"], t["W_dec"], t["b_dec"], threshold=threshold, k=k,
               W_skip=t["W_skip"].T if "W_skip" in t else None, site=entry.site, site_out=entry.site_out,
               metadata={"model_name": entry.model_name} if entry.model_name else {})


def _gate(t: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor | None, int | None]:
    """The thresholds, or k. Raises SaeFormatError where config and tensors mean different gates."""
    activation, k, threshold = text(config, "activation"), size(config, "k"), t.get(THRESHOLD)
    gate = GATES.get(activation)
    if gate is None:
        raise SaeFormatError(f"activation is {activation!r}; sae_hooks reads relu, jumprelu and topk")
    if (gate == "topk") != (k is not None):
        raise SaeFormatError(f"activation is {activation!r}, but k is {k or 'missing'}; 'topk' needs one, which can be "
                             "added to the config.yaml of a local copy, and nothing else has one")
    if gate == "jumprelu" if threshold is None else gate in ("relu", "topk"):
        raise SaeFormatError(f"activation is {activation!r}, but the file has {'no' if threshold is None else 'an'} "
                             f"{THRESHOLD}")
    if threshold is None:
        return (None, k) if k is not None else (torch.zeros_like(t["b_enc"], dtype=torch.float32), None)
    below = int((threshold < 0).sum())
    if below:
        raise SaeFormatError(f"{below} of {threshold.numel()} thresholds are negative; circuit-tracer lets negative "
                             "pre-activations above them through, which no SAE here can")
    return threshold, None


def _refuse_elsewhere(entry: Entry, config: Mapping[str, Any]) -> None:
    """Raise SaeFormatError where the config lists the transcoders and the one of this layer is another file."""
    listed = config.get("transcoders")
    if not listed and entry.weights == entry.config:
        raise SaeFormatError("it lists no transcoders, and there is no layer_N.safetensors beside it")
    if not listed:
        return
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise SaeFormatError(f"transcoders must be a list of addresses, got {str(listed)[:200]}")
    here = listed[entry.layer] if entry.layer is not None and entry.layer < len(listed) else ""
    if here.rpartition("/")[2] != entry.weights.rpartition("/")[2]:
        places = list(dict.fromkeys("/".join(one.removeprefix("hf://").split("/")[:2]) for one in listed))
        raise SaeFormatError(f"its transcoders are files of {', '.join(places[:6])}{' and others' * (len(places) > 6)} "
                             f"({str(here or listed[:1])[:200]}), and nothing outside of the source is fetched; give "
                             "that repository as the source, or a copy that circuit-tracer has made of them "
                             "(save_transcoders_to_cache)")


def _may_be_weights(path: str) -> bool:
    return path.endswith(WEIGHTS) and FEATURES not in path.split("/")[:-1]
