"""What a SAELens cfg.json says, old (flat) or new (with `metadata`), in one shape; and what of it we refuse."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SaeFormatError, SaeWarning
from .config import number, section, size, switch, text
from .hook_names import to_site

VERSION = "6.54.12"  # the SAELens whose loader was checked against what `dump` writes
GENERATED = ("sae_lens_version", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out")
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "standard": TENSORS, "topk": TENSORS, "transcoder": TENSORS, "topk_transcoder": TENSORS,
    "jumprelu": (*TENSORS, "threshold"), "jumprelu_transcoder": (*TENSORS, "threshold"),
    "skip_transcoder": (*TENSORS, "W_skip"), "topk_skip_transcoder": (*TENSORS, "W_skip"),
    "jumprelu_skip_transcoder": (*TENSORS, "threshold", "W_skip"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
NOT_FOLDABLE = {"layer_norm": "it normalises each token", "constant_norm_rescale": "it rescales each token",
                "expected_average_only_in": "its factor is not in the file: fold it with SAELens and save again",
                "covariance_whitening": "its matrix is not in the file: fold it with SAELens and save again"}
NEVER_USED = ("auto_map", "trust_remote_code", "dataset_trust_remote_code", "model_from_pretrained_kwargs")
OLD_FACTS = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id", "seqpos_slice",
             "sae_lens_training_version", "l0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked cfg.json. `needs`: the tensors of the architecture; `hook`: where it reads, as it stands there."""

    architecture: str
    needs: tuple[str, ...]
    d_in: int | None
    d_sae: int | None
    d_out: int | None
    k: int | None
    apply_b_dec: bool
    rescale: bool
    scales: bool
    hook: str | None
    site: str | None
    site_out: str | None
    l0: float | None
    model_name: str | None
    metadata: dict[str, Any]

    @property
    def transcodes(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return "transcoder" in self.architecture

    @property
    def skips(self) -> bool:
        """Whether it has an affine skip."""
        return "W_skip" in self.needs


def read(config: Mapping[str, Any]) -> Recipe:
    """Check a cfg.json and bring it into one shape. Raises SaeFormatError naming the key."""
    facts = section(config, "metadata")
    version = text(config, "sae_lens_version") or text(facts, "sae_lens_version") or "0"
    new = int(re.match(r"\d{0,9}", version)[0] or 0) >= 6  # type: ignore[index]
    cfg = dict(config) if new else _modern(config)
    if not new:
        facts = {k: cfg[k] for k in OLD_FACTS if cfg.get(k) is not None} | facts
    architecture = text(cfg, "architecture") or "standard"
    if architecture not in ARCHITECTURES:
        raise SaeFormatError(f"architecture is {architecture!r}; sae_hooks reads {', '.join(ARCHITECTURES)}")
    transcodes = "transcoder" in architecture
    _refuse(cfg, facts, architecture)
    model = text(facts, "model_name")
    if (typical := number(facts, "typical_norm")) is not None and not 0 < typical < float("inf"):
        raise SaeFormatError(f"typical_norm must be a norm above 0, got {typical}")
    site, site_out = _site(facts, "", model), _site(facts, "_out", model) if transcodes else None
    return Recipe(
        architecture=architecture, needs=ARCHITECTURES[architecture], d_in=size(cfg, "d_in"),
        d_sae=size(cfg, "d_sae"), d_out=size(cfg, "d_out" if transcodes else "d_in"), k=_k(cfg, architecture),
        apply_b_dec=switch(cfg, "apply_b_dec_to_input", not transcodes), site=site,
        hook=text(facts, "hook_name") or text(facts, "hf_hook_name"),
        rescale=architecture.startswith("topk") and switch(cfg, "rescale_acts_by_decoder_norm", False),
        site_out=site_out, scales=switch(cfg, "finetuning_scaling_factor", False), l0=number(facts, "l0"),
        model_name=model,
        metadata={k: v for k, v in facts.items() if k not in NEVER_USED and not (site and k in GENERATED)})


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat cfg.json from before SAELens 6 with today's keys (its defaults: handle_pre_6_0_config)."""
    cfg = {RENAMED.get(k, k): v for k, v in config.items()}
    kwargs = section(cfg, "activation_fn_kwargs")
    activation = text(cfg, "activation_fn") or "relu"
    if activation == "topk":
        cfg |= {"architecture": "topk", "k": kwargs.get("k")}
    elif activation != "relu":
        raise SaeFormatError(f"activation_fn is {activation!r}; sae_hooks reads relu and topk")
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    return cfg


def _refuse(cfg: Mapping[str, Any], facts: Mapping[str, Any], architecture: str) -> None:
    """Raise SaeFormatError for what the one equation cannot express; say what was read and left unused."""
    norm = text(cfg, "normalize_activations") or "none"
    if norm != "none":
        why = NOT_FOLDABLE.get(norm, "unknown")
        raise SaeFormatError(f"normalize_activations is {norm!r}, which cannot be folded into the weights: {why}")
    head = facts.get("hook_head_index", cfg.get("hook_head_index"))
    if head is not None:
        raise SaeFormatError(f"hook_head_index is {head!r}; SAEs of a single attention head are not supported")
    if "transcoder" in architecture and switch(cfg, "apply_b_dec_to_input", False):
        raise SaeFormatError("apply_b_dec_to_input is true, which a transcoder cannot have: b_dec is of the other site")
    loading = facts.get("model_from_pretrained_kwargs") or cfg.get("model_from_pretrained_kwargs") or {}
    if isinstance(loading, dict) and loading.get("center_writing_weights"):
        warnings.warn("this SAE was trained on a model with centred weights (center_writing_weights); it does not fit "
                      "the residual stream of the Hugging Face model as it is", SaeWarning, stacklevel=4)
    unused = [key for key in NEVER_USED if cfg.get(key) or facts.get(key)]
    if unused:
        logging.getLogger("sae_hooks").info("cfg.json: %s read as text and not used", ", ".join(unused))


def _k(cfg: Mapping[str, Any], architecture: str) -> int | None:
    if not architecture.startswith("topk"):
        return None
    k = size(cfg, "k")
    if k is None:
        raise SaeFormatError(f"architecture is {architecture!r}, but k is missing")
    return k


def _site(facts: Mapping[str, Any], side: str, model_name: str | None) -> str | None:
    """hf_hook_name where it is given, else hook_name translated where that is certain."""
    hf, lens = text(facts, "hf_hook_name" + side), text(facts, "hook_name" + side)
    return (to_site(hf, model_name) if hf else None) or (to_site(lens, model_name) if lens else None)
