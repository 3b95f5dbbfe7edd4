"""The SAELens dialect, ours too: a folder with cfg.json and sae_weights.safetensors.

Read: SAELens 6 and older; architectures standard, jumprelu, topk, gated, and transcoders with and without skip.
Written: SAELens 6, so that it loads our folders unchanged; what it does not know stands under `metadata`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SaeFormatError, SaeWarning
from ..sae import SAE
from .entry import Entry, Layout, all_of_them
from .hook_names import SIDES, kind_of, layer_of, residual_stream, to_lens, to_site
from .saelens_config import GENERATED, VERSION, Recipe, read
from .weights import fold_decoder_norms, gated_as_threshold, orient, positive, require, subtract_from_bias, to_change

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
FORMAT, LAYOUTS = "SAELens", (Layout(WEIGHTS, CONFIG),)
NAMES = frozenset({"W_enc", "b_enc", "W_dec", "b_dec", "threshold", "log_threshold", "W_skip", "b_gate", "b_mag",
                   "r_mag", "scaling_factor"})
default, sites = all_of_them, residual_stream


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every folder among `files` (path -> bytes) with both files. A name that is a site in a layer tells it."""
    found = []
    for path in files:
        folder, _, name = path.rpartition("/")
        config = f"{folder}/{CONFIG}" if folder else CONFIG
        if name == WEIGHTS and config in files:
            last = folder.rpartition("/")[2]
            named = last.rpartition(".")[2] in SIDES and layer_of(last) is not None  # "run-2.output" may be any name
            site = to_site(last) if named else None
            found.append(Entry(dialect="saelens", weights=path, config=config, site=site,
                               kind=site and kind_of(site), layer=layer_of(last)))
    return found


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with what its cfg.json says. Raises SaeFormatError where the folder's name and cfg.json disagree."""
    recipe = read(config)
    site, site_out = recipe.site or entry.site, recipe.site_out or entry.site_out
    if entry.site and recipe.site and entry.site != recipe.site:
        raise SaeFormatError(f"the folder's name means {entry.site}, cfg.json says {recipe.site}")
    told = site or recipe.hook or ""
    return replace(entry, site=site, site_out=site_out or (None if recipe.transcodes else site),
                   layer=layer_of(told) if told else entry.layer, d_in=recipe.d_in, width=recipe.d_sae, l0=recipe.l0,
                   kind="transcoder" if recipe.transcodes else kind_of(told), model_name=recipe.model_name,
                   hook=None if site else recipe.hook or None)


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE in these tensors, everything that is not the one equation folded in.

    Raises SaeFormatError for what cannot be folded (per-token normalisation, unknown architectures), SaeMismatchError
    naming every tensor that does not fit.
    """
    if config is None:
        raise SaeFormatError(f"{CONFIG} is missing; it says which architecture the tensors are")
    recipe = read(config)
    entry = refine(entry, config)
    if recipe.transcodes and entry.site and not entry.site_out:
        raise SaeFormatError(f"the transcoder reads {entry.site}, but cfg.json does not tell which site it writes")
    t = _tensors(tensors, recipe)
    W_enc, b_enc, threshold = _encoder(t, recipe)
    if recipe.apply_b_dec:
        b_enc = subtract_from_bias(b_enc, t["b_dec"], W_enc)
    W_dec = t["W_dec"]
    if recipe.rescale:
        # TopK picks the k largest of pre * |decoder row| then
        W_enc, b_enc, W_dec = fold_decoder_norms(W_enc, b_enc, W_dec)
    if "scaling_factor" in t:
        W_dec = to_change(W_dec).mul_(t["scaling_factor"][:, None])
    return SAE(W_enc, b_enc, W_dec, t["b_dec"], threshold=threshold, k=recipe.k, site=entry.site,
               W_skip=t["W_skip"].T if recipe.skips else None, site_out=entry.site_out, metadata=recipe.metadata)


def dump(sae: SAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, contiguous) and the cfg.json of an SAE. Warns where SAELens has no such architecture.

    Raises SaeFormatError for what `build` would not take back: metadata that mean something else here, sites that are
    none, tensors that are no floats.
    """
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    architecture = _architecture(sae)
    model = str(sae.metadata.get("model_name") or "")
    read_at, written_at = to_lens(sae.site or "", model), to_lens(sae.site_out or "", model)
    metadata = {k: v for k, v in sae.metadata.items() if k not in GENERATED}
    metadata |= {"sae_lens_version": VERSION, "hook_name": read_at, "hf_hook_name": sae.site}
    if "transcoder" in architecture:
        metadata |= {"hook_name_out": written_at, "hf_hook_name_out": sae.site_out}
    config: dict[str, Any] = {
        "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float64" if sae.dtype == torch.float64 else "float32",
        "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "hook_z" if read_at.endswith("hook_z") else "none", "architecture": architecture}
    if sae.k is not None:
        config |= {"k": int(sae.k), "rescale_acts_by_decoder_norm": False}
    if "transcoder" in architecture:
        config["d_out"] = sae.d_out
    config |= {"metadata": metadata}
    _check_readable(sae, tensors, config)
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, config


def _check_readable(sae: SAE, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    try:
        require(tensors, tensors)
        told = refine(Entry(dialect="saelens", weights=WEIGHTS), config)
    except SaeFormatError as error:
        raise SaeFormatError(f"the SAE at {sae.site!r} could not be read back: {error}") from error
    for ours, theirs in ((sae.site, told.site), (sae.site_out, told.site_out)):
        if ours != theirs:
            raise SaeFormatError(f"{ours!r} is not a site: a module path with its side, such as "
                                 "'model.layers.20.output'")


def _architecture(sae: SAE) -> str:
    gate = "jumprelu" if sae.k is None else "topk"
    if sae.site == sae.site_out and sae.W_skip is None and sae.d_in == sae.d_out:
        return gate
    name = f"{gate}_{'skip_' if sae.W_skip is not None else ''}transcoder"
    if gate == "topk":
        warnings.warn(f"SAELens has no {name}; the folder can be read by sae_hooks only", SaeWarning, stacklevel=3)
    return name


def _tensors(tensors: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of this architecture, checked and oriented; scaling_factor only where it does something."""
    scale = tensors.get("scaling_factor")
    t = {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}
    if "log_threshold" in t:
        t["threshold"] = t.pop("log_threshold").double().exp()
    require(t, recipe.needs)
    unknown = [name for name in t if name not in recipe.needs]
    if unknown:
        raise SaeFormatError(f"{recipe.architecture} has no tensors {', '.join(unknown)}")
    bias = t["b_gate" if recipe.architecture == "gated" else "b_enc"]
    d_sae, d_out = recipe.d_sae or bias.numel(), recipe.d_out or t["b_dec"].numel()
    d_in = recipe.d_in or t["W_enc"].numel() // max(d_sae, 1)
    matrices = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    turned = orient(t, {name: matrices.get(name, (d_sae,)) for name in recipe.needs})
    if scale is None or bool((scale == 1).all()):
        return turned
    if not recipe.scales:
        raise SaeFormatError("scaling_factor is not all ones, but finetuning_scaling_factor is not true")
    return turned | orient({"scaling_factor": scale}, {"scaling_factor": (d_sae,)})


def _encoder(t: Mapping[str, Tensor], recipe: Recipe) -> tuple[Tensor, Tensor, Tensor | None]:
    """W_enc, b_enc and threshold, None for TopK."""
    if recipe.architecture != "gated":
        if recipe.k is not None:
            return t["W_enc"], t["b_enc"], None
        zeros = torch.zeros_like(t["b_enc"], dtype=torch.float32)
        return t["W_enc"], t["b_enc"], positive(t["threshold"]) if "threshold" in t else zeros
    return gated_as_threshold(t["W_enc"], t["b_gate"], t["b_mag"], t["r_mag"])
