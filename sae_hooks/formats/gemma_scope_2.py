"""Gemma Scope 2 (Gemma 3): `resid_post/layer_12_width_16k_l0_medium/{config.json, params.safetensors}`.

Crosscoders and cross-layer transcoders are listed, but not loaded. examples.safetensors (larger than the weights) is
never asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import SaeFormatError
from ..sae import SAE
from .config import number, switch, text
from .entry import Entry, Layout, d_in_from_size, told_width
from .hook_names import in_layer
from .weights import orient, positive, require

FORMAT, LAYOUTS = "Gemma Scope 2", (Layout("params.safetensors"),)
NAMES = frozenset({"w_enc", "w_dec", "b_enc", "b_dec", "threshold", "affine_skip_connection"})
REPO = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)\b")
PLACE = re.compile(r"(?:^|/)(resid_post|mlp_out|attn_out|transcoder)(_all)?/"
                   r"layer_(\d+)_width_(\d+[km]?)_l0_(small|medium|big)(_affine)?((?:_seed_\d+)?)/params\.safetensors$")
UNSUPPORTED = re.compile(r"(?:^|/)(crosscoder|clt)/[^/]*_?width_(\d+[km]?)_[^/]*/params_layer_0\.safetensors$")
# The middle of what each word covers, in folders of four layers and of all layers (where L0 grows with depth).
L0 = {("small", False): 18.0, ("medium", False): 55.0, ("big", False): 140.0, ("small", True): 15.0,
      ("medium", True): 50.0, ("big", True): 90.0}
LAYER_SITES = {"resid_post": ("output", "output"), "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
               "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
               "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")}


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every single-layer SAE and transcoder among `files` (path -> bytes), and the multi-layer ones, unsupported."""
    found = []
    for path, size in files.items():
        if place := PLACE.search(f"{repo}/{path}"):
            found.append(_entry(path, size, repo, place, files))
        elif other := UNSUPPORTED.search(f"{repo}/{path}"):
            found.append(Entry(dialect="gemma_scope_2", weights=path, kind=other[1], width=told_width(other[2]),
                               model_name=_model(f"{repo}/{path}")))
    return found


def default(found: list[Entry]) -> list[Entry]:
    """What is meant when no site is given: the residual stream; plain SAEs before seeds and affine variants."""
    return [entry for entry in found if entry.kind == "resid_post"] or found


def sites(kind: str, layer: int | None) -> tuple[str, str] | None:
    """The sites (read, written) of an SAE of this kind at this layer; None if they cannot be told."""
    if layer is None or kind not in LAYER_SITES:
        return None
    read, write = LAYER_SITES[kind]
    return f"model.layers.{layer}.{read}", f"model.layers.{layer}.{write}"


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with what its config.json says. Raises SaeFormatError if the two name different places."""
    read = text(config, "hf_hook_point_in") or entry.site
    write = text(config, "hf_hook_point_out") or (entry.site_out if entry.kind == "transcoder" else read)
    for ours, theirs in ((entry.site, read), (entry.site_out, write)):
        if ours and theirs and in_layer(ours) != in_layer(theirs):
            raise SaeFormatError(f"the folder's name means {ours}, config.json says {theirs}")
    return replace(entry, l0=number(config, "l0") or entry.l0)


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE or transcoder in these tensors. Raises SaeFormatError, SaeMismatchError naming what does not fit."""
    config = config or {}
    if entry.kind in ("crosscoder", "clt"):
        raise SaeFormatError(f"a {entry.kind} spans several layers; sae_hooks loads single-layer SAEs and transcoders")
    architecture = text(config, "architecture") or "jump_relu"
    if architecture != "jump_relu":
        raise SaeFormatError(f"config.json: architecture is {architecture!r}, expected 'jump_relu'")
    entry = refine(entry, config)
    require(tensors, ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"))
    skip = tensors.get("affine_skip_connection")
    if switch(config, "affine_connection", skip is not None) != (skip is not None):
        raise SaeFormatError(f"config.json says affine_connection: {skip is None}, the file has "
                             f"{'one' if skip is not None else 'none'}")
    d_sae, d_out = tensors["b_enc"].numel(), tensors["b_dec"].numel()
    d_in = tensors["w_enc"].numel() // max(d_sae, 1)
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,),
              "threshold": (d_sae,)}
    t = orient(tensors, shapes | ({"affine_skip_connection": (d_in, d_out)} if skip is not None else {}))
    return SAE(t["w_enc"], t["b_enc"], t["w_dec"], t["b_dec"], threshold=positive(t["threshold"]),
               W_skip=t.get("affine_skip_connection"), site=entry.site, site_out=entry.site_out,
               metadata={k: v for k, v in {"model_name": entry.model_name, "l0": entry.l0}.items() if v is not None})


def _entry(path: str, size: int, repo: str, place: re.Match[str], files: Mapping[str, int]) -> Entry:
    kind, everywhere, layer, width = place[1], bool(place[2]), int(place[3]), told_width(place[4])
    read, write = sites(kind, layer) or (None, None)
    config = path.removesuffix("params.safetensors") + "config.json"
    return Entry(dialect="gemma_scope_2", weights=path, config=config if config in files else None, kind=kind,
                 site=read, site_out=write, layer=layer, width=width, l0=L0[place[5], everywhere],
                 d_in=d_in_from_size(size, width, affine=bool(place[6])), model_name=_model(f"{repo}/{path}"))


def _model(full: str) -> str | None:
    named = REPO.findall(full)
    if not named:
        return None
    size, variant = named[-1]
    return f"google/gemma-3-{size}{'' if (size, variant) == ('270m', 'pt') else '-' + variant}"
