"""Gemma Scope (Gemma 2): `layer_20/width_16k/average_l0_71/params.npz`, arXiv 2408.05147.

No config: everything is told by names. Trained scales are folded in already; nothing is normalised or centred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import SaeFormatError
from ..sae import SAE
from .entry import Entry, Layout, d_in_from_size, told_width
from .weights import orient, positive, require

FORMAT, LAYOUTS = "Gemma Scope", (Layout("params.npz"),)
NAMES = frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "w_enc", "w_dec", "scaling_factor"})
REPO = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)\b")
PLACE = re.compile(r"(?:layer_(\d+)|(embedding))/width_(\d+[km]?)/average_l0_(\d+(?:\.\d+)?)/[^/]*$")
KINDS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoders": "transcoder"}
LAYER_SITES = {"resid_post": ("output", "output"), "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
               "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
               "transcoder": ("pre_feedforward_layernorm.normalized", "post_feedforward_layernorm.output")}
EMBEDDING = "model.embed_tokens.output"


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every params.npz among `files` (path -> bytes), told by its path and by `repo`, a repository id or local path."""
    return [_entry(path, size, repo) for path, size in files.items() if path.rpartition("/")[2] == "params.npz"]


def default(found: list[Entry]) -> list[Entry]:
    """What is meant when neither site nor layer is given: the layers, not the embedding."""
    return [entry for entry in found if entry.kind != "embedding"] or found


def sites(kind: str, layer: int | None) -> tuple[str, str] | None:
    """The sites (read, written) of an SAE of this kind at this layer; None if they cannot be told."""
    if kind == "embedding":
        return EMBEDDING, EMBEDDING
    if layer is None or kind not in LAYER_SITES:
        return None
    read, write = LAYER_SITES[kind]
    return f"model.layers.{layer}.{read}", f"model.layers.{layer}.{write}"


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """There is no config."""
    return entry


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE in these tensors. Raises SaeFormatError, SaeMismatchError naming the tensors that do not fit."""
    named = {"W_" + name[2:] if name.startswith("w_") else name: t for name, t in tensors.items()}
    require(named, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
    if "scaling_factor" in named and not bool((named["scaling_factor"] == 1).all()):
        raise SaeFormatError("scaling_factor is not all ones; no published Gemma Scope file has such a one")
    d_sae, d_out = named["b_enc"].numel(), named["b_dec"].numel()
    t = orient(named, {"W_enc": (named["W_enc"].numel() // max(d_sae, 1), d_sae), "W_dec": (d_sae, d_out),
                       "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)})
    if entry.kind == "embedding":
        # transformers 5 multiplies by sqrt(d) inside embed_tokens; these SAEs were trained on the bare rows
        t |= {"W_enc": t["W_enc"].div_(d_out**0.5), "W_dec": t["W_dec"].mul_(d_out**0.5),
              "b_dec": t["b_dec"].mul_(d_out**0.5)}
    return SAE(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"],
               threshold=positive(t["threshold"]), site=entry.site, site_out=entry.site_out,
               metadata={k: v for k, v in {"model_name": entry.model_name, "l0": entry.l0}.items() if v is not None})


def _entry(path: str, size: int, repo: str) -> Entry:
    full = f"{repo}/{path}"
    named, place = REPO.findall(full), PLACE.search(full)
    layer = int(place[1]) if place and place[1] else None
    width = told_width(place[3]) if place else None
    kind = "embedding" if place and place[2] else KINDS[named[-1][2]] if named else None
    read, write = (kind and sites(kind, layer)) or (None, None)
    return Entry(dialect="gemma_scope", weights=path, kind=kind, site=read, site_out=write, layer=layer, width=width,
                 l0=float(place[4]) if place else None, d_in=d_in_from_size(size, width),
                 model_name=_model(named[-1][0], named[-1][1]) if named else None)


def _model(size: str, variant: str) -> str:
    return f"google/gemma-2-{size}{'-it' if variant == 'it' else ''}"
