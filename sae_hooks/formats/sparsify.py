"""The dialect of EleutherAI's sparsify: `layers.10/{cfg.json, sae.safetensors}`, TopK SAEs and transcoders.

A folder is named after the module that its SAE was trained on, as it is called inside the model without its head
(`layers.10`, `layers.3.mlp`, `h.0.attn`); below it may stand one folder a seed. An SAE reads and writes the module's
output, a transcoder reads its input. Files of before 2025 are the same but for keys that did not exist yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import SaeFormatError
from ..sae import SAE
from .config import size, switch, text
from .entry import Entry, Layout
from .hook_names import EMBEDDINGS, PATH, SIDES, kind_of, layer_of
from .weights import orient, require, subtract_from_bias

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
FORMAT, LAYOUTS = "sparsify", (Layout(WEIGHTS, CONFIG),)
NAMES = frozenset({"encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip"})
SEED = re.compile(r"seed\d+")
# What the one equation cannot express; all but the first are of its branches for cross-layer transcoders.
REFUSED = {"signed": "the k features of largest magnitude are kept, negative ones too",
           "normalize_io": "each input is normalised, by numbers that are not in the file",
           "n_targets": "it writes several layers", "n_sources": "it is written to by several layers",
           "post_encoder_scale": "its features are scaled anew for each layer",
           "coalesce_topk": "features of several layers share one TopK"}


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every folder among `files` (path -> bytes) with both files. Its name tells module and layer; whether the SAE
    transcodes, and so where it reads, only its config does."""
    found = []
    for path in files:
        folder, _, name = path.rpartition("/")
        config = f"{folder}/{CONFIG}".lstrip("/")
        if name == WEIGHTS and config in files:
            called = _called(f"{repo}/{path}")
            module = _module(called)
            found.append(Entry(dialect="sparsify", weights=path, config=config, layer=layer_of(module or ""),
                               kind="embedding" if module in EMBEDDINGS else None,
                               hook=called if folder or module else None))
    return found


def default(found: list[Entry]) -> list[Entry]:
    """What is meant when no site is given: the layers, not the embedding."""
    return [entry for entry in found if entry.kind != "embedding"] or found


def sites(kind: str, layer: int | None) -> tuple[str, str] | None:
    """The sites (read, written) where they cannot depend on the architecture: the residual stream only."""
    return (f"layers.{layer}.output",) * 2 if kind == "resid_post" and layer is not None else None


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with what its cfg.json says. Its L0 is k: fewer features fire only where fewer are positive."""
    recipe = _read(config)
    module = _module(entry.hook or "")
    site, site_out = entry.site, entry.site_out
    if module:
        site, site_out = f"{module}.{'input' if recipe.transcodes else 'output'}", f"{module}.output"
    return replace(entry, site=site, site_out=site_out, hook=None if module else entry.hook, d_in=recipe.d_in,
                   width=recipe.d_sae, l0=float(recipe.k), kind=_kind(site_out, recipe))


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE or transcoder in these tensors, b_dec folded into the encoder's bias where it is subtracted first.

    Raises SaeFormatError for what cannot be expressed, SaeMismatchError naming every tensor that does not fit.
    """
    if config is None:
        raise SaeFormatError(f"{CONFIG} is missing; it says how many features fire")
    recipe = _read(config)
    entry = refine(entry, config)
    if recipe.transcodes and entry.site and not entry.site_out:
        raise SaeFormatError(f"the transcoder reads {entry.site}, but which module's output it writes is not told: its "
                             "folder should be named after the module, such as layers.3.mlp")
    t = _tensors(tensors, recipe)
    W_enc, b_enc = t["encoder.weight"].T, t["encoder.bias"]
    if recipe.subtracts:
        b_enc = subtract_from_bias(b_enc, t["b_dec"], W_enc)
    return SAE(W_enc, b_enc, t["W_dec"], t["b_dec"], k=recipe.k, W_skip=t["W_skip"].T if recipe.skips else None,
               site=entry.site, site_out=entry.site_out)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """A checked cfg.json. `subtracts`: whether b_dec is taken off the input."""

    d_in: int | None
    d_sae: int | None
    k: int
    transcodes: bool
    subtracts: bool
    skips: bool


def _read(config: Mapping[str, Any]) -> _Recipe:
    """Check a cfg.json. Raises SaeFormatError naming the key.

    Skip transcoders of before `transcode` was a key had b_dec subtracted, as sparsify still does without that key. That
    they transcode is told by the skip: an SAE that were given what it is to predict would have nothing to learn.
    """
    activation = text(config, "activation") or "topk"
    if activation == "groupmax":
        raise SaeFormatError("activation is 'groupmax', which cannot be expressed: the largest feature of each of k "
                             "groups fires")
    if activation != "topk":
        raise SaeFormatError(f"activation is {activation!r}; sae_hooks reads topk")
    for key, why in REFUSED.items():
        if config.get(key) not in (None, False, 0, "none"):
            raise SaeFormatError(f"{key} is {config[key]!r}, which cannot be expressed: {why}")
    k = size(config, "k")
    if k is None:
        raise SaeFormatError("k is missing; it says how many features fire")
    transcode, skips = switch(config, "transcode", False), switch(config, "skip_connection", False)
    return _Recipe(d_in=size(config, "d_in"), d_sae=_d_sae(config), k=k, transcodes=transcode or skips,
                   subtracts=not transcode, skips=skips)


def _d_sae(config: Mapping[str, Any]) -> int | None:
    """num_latents, or, where that is 0 or not a key yet, d_in times expansion_factor."""
    given = config.get("num_latents")
    if given is not None and (type(given), given) != (int, 0):
        return size(config, "num_latents")
    d_in, factor = size(config, "d_in"), size(config, "expansion_factor")
    return d_in * factor if d_in and factor else None


def _tensors(tensors: Mapping[str, Tensor], recipe: _Recipe) -> dict[str, Tensor]:
    """The tensors, checked and oriented. b_dec that is subtracted from the input is as wide as the input."""
    if ("W_skip" in tensors) != recipe.skips:
        raise SaeFormatError(f"cfg.json says skip_connection: {str(recipe.skips).lower()}, the file has "
                             f"{'a' if 'W_skip' in tensors else 'no'} W_skip")
    require(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    d_sae = recipe.d_sae or tensors["encoder.bias"].numel()
    d_in = recipe.d_in or tensors["encoder.weight"].numel() // d_sae
    d_out = d_in if recipe.subtracts else tensors["b_dec"].numel()
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,),
                                          "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    return orient(tensors, shapes | ({"W_skip": (d_out, d_in)} if recipe.skips else {}))


def _kind(site_out: str | None, recipe: _Recipe) -> str | None:
    """What people call it. "transcoder" is one of an MLP: so it is put where a model calls its MLP otherwise."""
    written = kind_of(site_out) if site_out else None
    if recipe.transcodes:
        return "transcoder" if written == "mlp_out" or not site_out else None
    return written


def _called(path: str) -> str:
    """The name of the folder that a file is in, or, where it is one of a seed, of that above."""
    *above, folder, _ = ["", *path.split("/")]
    return above[-1] if SEED.fullmatch(folder) and above else folder


def _module(name: str) -> str | None:
    """A folder's name if it is the path of a module in a layer, or of the embedding; any other, also one with a site's
    side, may be anything."""
    if name in EMBEDDINGS:
        return name
    path = PATH.fullmatch(name) and layer_of(name) is not None
    return name if path and "hook_" not in name and name.rpartition(".")[2] not in SIDES else None
