"""Llama Scope (OpenMOSS): SAEs and transcoders of Llama 3.1 8B, R1-Distill-Llama 8B and Qwen3, in two layouts.

2024 (arXiv 2410.20526): `Llama3_1-8B-Base-L5R-8x/{hyperparams.json, checkpoints/final.safetensors}`. Since then, and
for what llamascopium saves: a folder with config.json and sae_weights.safetensors (R1-Distill, Llama Scope 2).
They were trained on scaled activations, and their gates may weigh a feature by its decoder row; all that is folded in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SaeFormatError
from ..sae import SAE
from .entry import Entry, Layout
from .hook_names import kind_of, layer_of, residual_stream, to_site
from .llama_scope_config import Recipe, average, read
from .weights import orient, require, row_norms, to_change

FORMAT, FIRST = "Llama Scope", "hyperparams.json"
LAYOUTS = (Layout("checkpoints/final.safetensors", FIRST), Layout("sae_weights.safetensors", "config.json"))
NORM = "dataset_average_activation_norm."  # before the hook's name, which may be any
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "log_jumprelu_threshold")
BARE = ("W_E", "b_E", "W_D", "b_D", "activation_function.log_jumprelu_threshold")
NAME = re.compile(r"(?:^|[/-])(?:L(\d+)(R|M|A|TC)(?:-(\d+)[xX])?|layer(\d+)_(transcoder|lorsa)_(\d+)x(?:_k(\d+))?)/")
KINDS = {"R": "resid_post", "M": "mlp_out", "A": "attn_out", "TC": "transcoder"}
MODELS = {"Llama3_1-8B-Base-L": ("meta-llama/Llama-3.1-8B", 4096),
          "Llama-Scope-R1-Distill": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 4096),
          "Llama-Scope-2-Qwen3-1.7B": ("Qwen/Qwen3-1.7B", 2048)}
MIXTURE = re.compile(r"[^/]+-OpenR1-Math-[^/]+(?=/)")


class _Names(frozenset[str]):
    """The tensor names that are fixed, and those that end in any hook's name."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(NORM))


NAMES = _Names({*LINEAR, *BARE})
sites = residual_stream


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every folder among `files` (path -> bytes) in one of the layouts; its name tells layer, kind and width."""
    found = []
    for path in files:
        for layout in LAYOUTS:
            folder = path.removesuffix(layout.weights)
            config = f"{folder}{layout.config}"
            if layout.names(path) and config in files and folder + "cfg.json" not in files:  # with cfg.json: SAELens
                found.append(_entry(path, folder, config, repo))
    return found


def default(found: list[Entry]) -> list[Entry]:
    """What is meant where neither site nor layer is given: no sparse attention, and of one text that R1-Distill was
    trained on, the one of most SAEs: layers of different ones are no set."""
    plain = [entry for entry in found if entry.kind != "lorsa"] or found
    mixtures = [mixture[0] for entry in plain if (mixture := MIXTURE.search(entry.weights))]
    most = max(sorted(set(mixtures)), key=mixtures.count, default="")
    return [entry for entry in plain if not (mixture := MIXTURE.search(entry.weights)) or mixture[0] == most]


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with what its config says. Raises SaeFormatError where the folder's name and the config disagree."""
    recipe = read(config, first=_is_first(entry))
    site, site_out = to_site(recipe.hook, entry.model_name), to_site(recipe.hook_out, entry.model_name)
    site = site or entry.site
    layer, kind = layer_of(recipe.hook), "transcoder" if recipe.transcodes else kind_of(recipe.hook)
    for named, told, what in ((entry.layer, layer, "layer"), (entry.kind, kind, "kind"),
                              (entry.width, recipe.d_sae, "width")):
        if told is not None and named not in (None, told):
            raise SaeFormatError(f"the folder's name means {what} {named}, its config {told} (hook_point_in is "
                                 f"{recipe.hook!r})")
    return replace(entry, site=site, site_out=site_out or entry.site_out or (None if recipe.transcodes else site),
                   layer=entry.layer if layer is None else layer, kind=kind or entry.kind, d_in=recipe.d_model,
                   width=recipe.d_sae or entry.width, l0=entry.l0 if recipe.k is None else float(recipe.k),
                   hook=None if site else recipe.hook)


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE or transcoder in these tensors, as it acts on activations as they are.

    Features have the scale that the authors' loader gives them: of 2024 that of unit decoder rows; since then what
    `encode` gives for normalised activations, but TopK features are times the norm of their decoder row, by which they
    are chosen. Raises SaeFormatError for what cannot be folded, SaeMismatchError naming the tensors that do not fit.
    """
    if config is None:
        raise SaeFormatError("its config is missing; it says what the tensors mean")
    recipe = read(config, first=_is_first(entry))
    entry = refine(entry, config)
    if entry.site and not entry.site_out:
        raise SaeFormatError(f"the transcoder reads {entry.site}, but its config calls the site that it writes "
                             f"{recipe.hook_out!r}, and which module that is depends on the model")
    W_enc, b_enc, W_dec, b_dec, threshold = _tensors(tensors, recipe)
    norms = _norms(tensors, recipe)
    scale, scale_out = (W_enc.shape[0] ** 0.5 / norm for norm in norms) if norms else (1.0, 1.0)
    unit, threshold = _unit(W_dec, threshold, recipe, scale, scale_out)
    told = {"model_name": entry.model_name, "l0": entry.l0, "typical_norm": norms[0] if norms else None}
    return SAE(to_change(W_enc.T).mul_((unit * scale)[:, None]).T, b_enc * unit,
               to_change(W_dec).div_((torch.where(unit > 0, unit, 1) * scale_out)[:, None]), b_dec / scale_out,
               threshold=threshold, k=recipe.k, site=entry.site, site_out=entry.site_out,
               metadata={k: v for k, v in told.items() if v is not None})


def _entry(path: str, folder: str, config: str, repo: str) -> Entry:
    full = f"{repo}/{folder}"
    model, d_model = next((MODELS[part] for part in MODELS if part in full), (None, None))
    named = list(NAME.finditer(full))
    first, place, times, later, word, more, k = named[-1].groups() if named else (None,) * 7
    layer, factor = first or later, times or more
    return Entry(dialect="llama_scope", weights=path, config=config, model_name=model,
                 kind=KINDS.get(place or "", word), layer=int(layer) if layer else None,
                 width=d_model * int(factor) if d_model and factor else None, l0=float(k) if k else None)


def _is_first(entry: Entry) -> bool:
    return (entry.config or "").endswith(FIRST)


def _tensors(tensors: Mapping[str, Tensor], recipe: Recipe) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """W_enc, b_enc, W_dec, b_dec in our shapes, and the threshold of each feature as it stands; vectors in float32 or
    wider."""
    linear = "W_E" not in tensors
    names = LINEAR if linear else BARE
    needed = [*names[:3], *names[3:4] * recipe.biased, *names[4:] * recipe.keeps_thresholds]
    require(tensors, needed)
    unknown = [name for name in tensors if name not in needed and not name.startswith(NORM)]
    if unknown:
        raise SaeFormatError(f"an SAE of act_fn {recipe.gate!r} has no tensors {', '.join(unknown)} beside "
                             f"{', '.join(needed)}")
    d_sae = recipe.d_sae or tensors[names[1]].numel()
    d = recipe.d_model or tensors[names[0]].numel() // max(d_sae, 1)
    shapes = ((d_sae, d), (d_sae,), (d, d_sae)) if linear else ((d, d_sae), (d_sae,), (d_sae, d))
    expected: dict[str, tuple[int, ...]] = dict(zip(names, (*shapes, (d,), (d_sae,)), strict=True))
    t = orient(tensors, {name: expected[name] for name in needed})
    W_enc, W_dec = (t[name].T if linear else t[name] for name in (names[0], names[2]))
    b_enc = _wide(t[names[1]])
    b_dec = _wide(t[names[3]]) if recipe.biased else b_enc.new_zeros(d)
    if recipe.keeps_thresholds:
        return W_enc, b_enc, W_dec, b_dec, _wide(t[names[4]]).exp()
    return W_enc, b_enc, W_dec, b_dec, torch.full_like(b_enc, recipe.threshold or 0.0) if recipe.k is None else None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _norms(tensors: Mapping[str, Tensor], recipe: Recipe) -> tuple[float, float] | None:
    """The average norms (read, written) of the activations by which they were scaled; None where they were not."""
    if not recipe.normalised or recipe.norms:
        return recipe.norms
    found = [tensors.get(NORM + hook) for hook in (recipe.hook, recipe.hook_out)]
    read_at, written = (average(None if t is None else float(t) if t.numel() == 1 else math.nan, repr(hook))
                        for t, hook in zip(found, (recipe.hook, recipe.hook_out), strict=True))
    return read_at, written


def _unit(W_dec: Tensor, threshold: Tensor | None, recipe: Recipe, scale: float,
          scale_out: float) -> tuple[Tensor, Tensor | None]:
    """What each feature of normalised activations is multiplied by (d_sae), and the threshold for what that gives.

    The loader of 2024 brings the decoder to the raw scale, then its rows to norm 1, and its threshold is for that:
    weight / scale_out. Where rows keep their norms it is 1 / scale. Thresholds since then are for weight * feature.
    """
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    weight = row_norms(W_dec, wide) if recipe.weighed else torch.ones_like(W_dec[:, 0], dtype=wide)
    if recipe.first:
        return (weight / scale_out if recipe.weighed else weight / scale), threshold
    if threshold is None:
        return weight, None
    # a row of norm 0 makes the threshold infinite, or 0 / 0: such a feature writes nothing, whether it fires or not
    return torch.ones_like(weight), torch.nan_to_num(threshold / weight)
