"""dictionary_learning: `resid_post_layer_8/trainer_0/{ae.pt, config.json}`; the weights are pickled by PyTorch.

`eval_results.json`, where someone evaluated the SAE, has the L0 that was measured.

The class that config.json names decides the equation: here what `load_dictionary` of dictionary_learning 0.1.0 gives.
`scale_biases` has folded the scale of the activations in before anything was saved.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SaeFormatError, SaeWarning
from ..sae import SAE
from .config import number, section, size, text
from .entry import Entry, Layout
from .hook_names import kind_of, layer_of, residual_stream, to_site
from .weights import (
    fold_decoder_norms,
    gated_as_threshold,
    orient,
    positive,
    require,
    row_norms,
    subtract_from_bias,
)

WEIGHTS, CONFIG, EVALUATION = "ae.pt", "config.json", "eval_results.json"
FORMAT, LAYOUTS = "dictionary_learning", (Layout(WEIGHTS, CONFIG),)
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
TOPK = LINEAR | {"b_dec": "b_dec", "k": "k", "threshold": "threshold"}
MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
# dict_class -> {its tensor: ours}
CLASSES: dict[str, dict[str, str]] = {
    "AutoEncoder": LINEAR | {"bias": "b_dec"},
    "AutoEncoderNew": LINEAR | {"decoder.bias": "b_dec"},
    "GatedAutoEncoder": {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec",
                         "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"},
    "AutoEncoderTopK": TOPK, "BatchTopKSAE": TOPK,
    "MatryoshkaBatchTopKSAE": MATRICES | {"k": "k", "group_sizes": "group_sizes"},
    "JumpReluAutoEncoder": MATRICES,
}
OF_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")  # the others encode x - b_dec
WHOLE = ("k", "group_sizes")  # integers, which older files do not have; all groups of features are active when loaded
UNSET = -1.0
NAMES = frozenset(name for names in CLASSES.values() for name in names)
PLACE = re.compile(r"(?:^|/)(\w+?)_layer_(\d+)(?:_checkpoints)?(?=/)")
NAMED = re.compile(r"(\w+)_layer_(\d{1,9})")
UNFINISHED = re.compile(r"_checkpoints/|(?:^|/)trainer_\d+_step_\d+/")
sites = residual_stream


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every folder among `files` (path -> bytes) with both files; checkpoints of a training only where no finished SAE
    is. A folder named resid_post_layer_8 tells layer and kind."""
    found = [_entry(path, repo, files) for path in files
             if path.rpartition("/")[2] == WEIGHTS and path.removesuffix(WEIGHTS) + CONFIG in files]
    return [entry for entry in found if not UNFINISHED.search(f"{repo}/{entry.weights}")] or found


def default(found: list[Entry]) -> list[Entry]:
    """What is meant when no site is given: the residual stream where folders tell it, else all."""
    return [entry for entry in found if entry.kind == "resid_post"] or found


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with what its config.json says. The L0 is the k of the TopK family, of JumpReLU what was aimed at; of
    others it stays what was measured, if that was read.

    Raises SaeFormatError where folder and config disagree, and for a transcoder (buffer.io "in_and_out").
    """
    trainer, io = _trainer(config), text(section(config, "buffer"), "io")
    if io == "in_and_out":
        raise SaeFormatError("buffer.io is 'in_and_out': a transcoder; of this format sae_hooks reads plain SAEs only")
    layer, told = _place(entry, trainer, io)
    site = entry.site or told
    l0 = number(trainer, "k" if _class(trainer) in OF_K else "target_l0")
    return replace(entry, kind=kind_of(told) if told else entry.kind if entry.placed else None, site=site,
                   site_out=entry.site_out or site, layer=layer, model_name=text(trainer, "lm_name"),
                   hook=None if site else text(trainer, "submodule_name"), d_in=size(trainer, "activation_dim"),
                   width=size(trainer, "dict_size"), l0=entry.l0 if l0 is None else l0)


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE in these tensors, everything that is not the one equation folded in.

    Raises SaeFormatError for an unknown class, SaeMismatchError naming every tensor that does not fit.
    """
    if config is None:
        raise SaeFormatError(f"{CONFIG} is missing; it says which class the tensors are of")
    trainer, entry = _trainer(config), refine(entry, config)
    dict_class, k = _class(trainer), _k(tensors, trainer)
    t = _tensors(tensors, trainer)
    W_enc, b_enc, W_dec, threshold = _encoder(t, dict_class)
    if threshold is None and dict_class != "AutoEncoderTopK":
        warnings.warn(f"the threshold of this {dict_class} was never set, as in the first steps of a training: the {k} "
                      "largest features of each token are kept instead", SaeWarning, stacklevel=2)
    if dict_class not in UNCENTRED:
        b_enc = subtract_from_bias(b_enc, t["b_dec"], W_enc)
    return SAE(W_enc, b_enc, W_dec, t["b_dec"], threshold=threshold, k=k if threshold is None else None,
               site=entry.site, site_out=entry.site_out,
               metadata={n: v for n, v in {"model_name": entry.model_name, "l0": entry.l0}.items() if v is not None})


def _entry(path: str, repo: str, files: Mapping[str, int]) -> Entry:
    named = PLACE.findall(f"{repo}/{path}")
    kind, layer = named[-1] if named else (None, None)
    folder = path.removesuffix(WEIGHTS)
    return Entry(dialect="dictionary_learning", weights=path, config=folder + CONFIG,
                 evaluation=folder + EVALUATION if folder + EVALUATION in files else None,
                 kind="resid_post" if kind == "resid_post" else None, layer=None if layer is None else int(layer))


def _trainer(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = section(config, "trainer")
    if not trainer:
        raise SaeFormatError("no section 'trainer', which a config.json of dictionary_learning has")
    return trainer


def _class(trainer: Mapping[str, Any]) -> str:
    named = text(trainer, "dict_class")
    if named not in CLASSES:
        raise SaeFormatError(f"trainer.dict_class is {named!r}; sae_hooks reads {', '.join(CLASSES)}")
    return named


def _place(entry: Entry, trainer: Mapping[str, Any], io: str | None) -> tuple[int | None, str | None]:
    """The layer and the site that folder and config tell: the output of a layer where they call it resid_post, and of
    modules that are named by their paths, the side that buffer.io says."""
    name, layer = text(trainer, "submodule_name") or "", trainer.get("layer")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise SaeFormatError(f"trainer.layer must be a whole number from 0 on, got {layer!r}")
    called = NAMED.fullmatch(name)
    layers = {n for n in (entry.layer, layer, int(called[2]) if called else layer_of(name)) if n is not None}
    kind = called[1] if called else None if name else entry.kind
    apart = called is not None and entry.kind == "resid_post" and kind != "resid_post" and not entry.placed
    if apart or len(layers) > 1:
        raise SaeFormatError(f"the folder's name and {CONFIG} mean different places: {entry.weights}; submodule_name "
                             f"{name!r}, layer {layer}")
    only = layers.pop() if layers else None
    if kind == "resid_post" and only is not None and io in (None, "out"):
        return only, to_site(f"blocks.{only}.hook_resid_post", text(trainer, "lm_name"))
    if io in ("in", "out") and to_site(name) == f"{name}.output":
        return only, f"{name}.{io}put"
    return only, None


def _tensors(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floats of this class by our names, in their shapes; torch's linear layers keep theirs transposed."""
    dict_class = _class(trainer)
    names = CLASSES[dict_class]
    floats = {name: t for name, t in tensors.items() if name not in WHOLE}
    require(floats, [name for name in names if name not in WHOLE and (name != "threshold" or dict_class not in OF_K)])
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise SaeFormatError(f"{dict_class} has no tensors {', '.join(unknown)}")
    t = {names[name]: value.T if name.endswith(".weight") and value.ndim == 2 else value
         for name, value in floats.items()}
    d_in = size(trainer, "activation_dim") or t["b_dec"].numel()
    d_sae = size(trainer, "dict_size") or t["b_mag" if dict_class == "GatedAutoEncoder" else "b_enc"].numel()
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
              "threshold": () if dict_class in OF_K else (d_sae,)}
    return orient(t, {name: shapes.get(name, (d_sae,)) for name in t})


def _k(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> int | None:
    """How many features the TopK family keeps, as config and file say. Raises SaeFormatError where they differ."""
    if _class(trainer) not in OF_K:
        return None
    told = {value for value in (size(trainer, "k"), size(_numbers(tensors), "k")) if value is not None}
    if len(told) != 1:
        raise SaeFormatError(f"{WEIGHTS} and {CONFIG} should say one k, got {sorted(told) or 'none'}")
    return told.pop()


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: t.item() for name, t in tensors.items() if t.numel() == 1}


def _encoder(t: Mapping[str, Tensor], dict_class: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """W_enc, b_enc, W_dec and the threshold of each feature: None for TopK, whose encode does not use the one that it
    keeps, and where BatchTopK has none."""
    if dict_class == "GatedAutoEncoder":
        W_enc, b_enc, level = gated_as_threshold(t["W_enc"], t["b_gate"], t["b_mag"], t["r_mag"])
        return W_enc, b_enc, t["W_dec"], level
    W_enc, b_enc, W_dec = t["W_enc"], t["b_enc"], t["W_dec"]
    zeros = torch.zeros_like(b_enc, dtype=torch.promote_types(b_enc.dtype, torch.float32))
    if dict_class == "AutoEncoderTopK":
        return W_enc, b_enc, W_dec, None
    if dict_class in OF_K:
        level = t.get("threshold", zeros.new_tensor(UNSET))
        return W_enc, b_enc, W_dec, zeros + level if float(level) >= 0 else None
    if dict_class == "JumpReluAutoEncoder":
        return W_enc, b_enc, W_dec, positive(t["threshold"])
    norms = row_norms(W_dec, zeros.dtype)
    if dict_class == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):
        W_enc, b_enc, W_dec = fold_decoder_norms(W_enc, b_enc, W_dec)  # as its from_pretrained does
    return W_enc, b_enc, W_dec, zeros
