"""What a hyperparams.json (2024) or config.json (since) of OpenMOSS says, in one shape; and what of it we refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SaeFormatError
from .config import LIMITS, number, section, size, switch, text

GATES = ("jumprelu", "topk", "relu")
MOST_THRESHOLD = 1e38  # float32 ends at 3.4e38
NOT_FOLDABLE = {"token-wise": "it rescales each token", "batch-wise": "it rescales each batch"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked config. `first`: in the layout of 2024, whose thresholds are for features of the raw scale; since then
    they are for those of normalised activations. `weighed`: the gate sees features times the norm of their decoder row.
    `normalised`: trained on activations scaled to an average norm of sqrt(d_model), which is not yet in the weights;
    `norms` are the averages (read, written) where the config has them, else the weight file has.
    """

    first: bool
    gate: str
    k: int | None
    threshold: float | None
    weighed: bool
    normalised: bool
    norms: tuple[float, float] | None
    biased: bool
    d_model: int | None
    d_sae: int | None
    hook: str
    hook_out: str

    @property
    def transcodes(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.hook != self.hook_out

    @property
    def keeps_thresholds(self) -> bool:
        """Whether the weight file has a threshold for each feature."""
        return self.gate == "jumprelu" and not self.first


def read(config: Mapping[str, Any], *, first: bool) -> Recipe:
    """Check a config; `first`: it is of the layout of 2024. Raises SaeFormatError naming the key."""
    kind = text(config, "sae_type") or "sae"
    if kind != "sae":
        raise SaeFormatError(f"sae_type is {kind!r}; sae_hooks reads 'sae' alone, which reads one site and writes one")
    normalised = _normalised(config)
    gate, k, threshold = _gate(config, first)
    hook = text(config, "hook_point_in")
    if hook is None:
        raise SaeFormatError("hook_point_in is missing; it says what the SAE reads")
    return Recipe(first=first, gate=gate, k=k, threshold=threshold, normalised=normalised, hook=hook,
                  weighed=switch(config, "sparsity_include_decoder_norm", True), d_sae=_d_sae(config),
                  norms=_norms(config) if first and normalised else None, d_model=size(config, "d_model"),
                  biased=switch(config, "use_decoder_bias", True), hook_out=text(config, "hook_point_out") or hook)


def average(value: float | None, of: str) -> float:
    """An average norm that is one. Raises SaeFormatError for none and for what no activations can have."""
    if value is None:
        raise SaeFormatError(f"no dataset_average_activation_norm of {of}, by which norm_activation 'dataset-wise' "
                             "scales; without it the features cannot be computed")
    if not 0 < value < float("inf"):
        raise SaeFormatError(f"dataset_average_activation_norm of {of} must be a norm above 0, got {value}")
    return value


def _normalised(config: Mapping[str, Any]) -> bool:
    """Whether the scales are still to be folded in. Raises SaeFormatError for what the one equation cannot express."""
    norm = text(config, "norm_activation")
    if norm not in ("dataset-wise", "inference"):
        why = NOT_FOLDABLE.get(norm or "", "unknown")
        raise SaeFormatError(f"norm_activation is {norm!r}, which cannot be folded into the weights: {why}; sae_hooks "
                             "reads 'dataset-wise' and 'inference'")
    for key in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if switch(config, key, False):
            raise SaeFormatError(f"{key} is true; sae_hooks reads plain encoders, as all that are published have")
    return norm == "dataset-wise"


def _gate(config: Mapping[str, Any], first: bool) -> tuple[str, int | None, float | None]:
    """The gate with its k or its one threshold. In 2024 a TopK SAE with a threshold above 0 acts as JumpReLU."""
    gate = (text(config, "act_fn") or "").lower()
    if gate not in GATES:
        why = ", which compares the tokens of a batch with each other" if gate == "batchtopk" else ""
        raise SaeFormatError(f"act_fn is {config.get('act_fn')!r}{why}; sae_hooks reads {', '.join(GATES)}")
    threshold = number(config, "jump_relu_threshold") if first else None
    if gate == "topk" and threshold:
        gate = "jumprelu"
    if first and gate == "jumprelu" and not (threshold is not None and 0 <= threshold <= MOST_THRESHOLD):
        raise SaeFormatError(f"jump_relu_threshold must be a number from 0 to {MOST_THRESHOLD}, got {threshold}")
    k = size(config, "top_k") if gate == "topk" else None
    if gate == "topk" and k is None:
        raise SaeFormatError("act_fn is 'topk', but top_k is missing")
    return gate, k, threshold if gate == "jumprelu" else None


def _norms(config: Mapping[str, Any]) -> tuple[float, float]:
    norms = section(config, "dataset_average_activation_norm")
    return average(number(norms, "in"), "'in'"), average(number(norms, "out"), "'out'")


def _d_sae(config: Mapping[str, Any]) -> int | None:
    told, d_model, factor = size(config, "d_sae"), size(config, "d_model"), number(config, "expansion_factor")
    if told is not None or d_model is None or factor is None:
        return told
    if not 1 <= d_model * factor <= LIMITS["d_sae"]:
        raise SaeFormatError(f"expansion_factor must make 1 to {LIMITS['d_sae']} features of d_model {d_model}, got "
                             f"{factor}")
    return int(d_model * factor)
