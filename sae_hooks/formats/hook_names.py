"""TransformerLens hook names <-> sites (Hugging Face module path and side).

What "blocks.7.hook_mlp_out" is in a Hugging Face model depends on its architecture: with a norm after the MLP (Gemma 2
and 3) it is that norm's output. Where the model is not known, only names that mean the same everywhere are translated.
"""

from __future__ import annotations

import re

from ..sites import ATTN_OUT, MLP_OUT

SIDES = ("output", "input", "normalized")
PATH = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*(?:\.(?:\d+|[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*))+")
PLACE = re.compile(r"(?:(?!__\w+__\.)[A-Za-z0-9_-]+\.)+(?:output|input|normalized)")  # any module, but for dunder names
LAYER = re.compile(r"\b(?:layers|h|blocks|block)\.(\d{1,9})\b")  # of thousands of digits, Python makes no number
# What stands before the decoder layers of one and the same model, here and there: it names no other stack of layers.
WRAPPERS = frozenset({"model", "language_model", "text_model", "base_model", "backbone", "transformer", "gpt_neox",
                      "decoder", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

SAME_EVERYWHERE = {"hook_resid_post": "output", "hook_resid_pre": "input"}
TELLING = {"attn.hook_z": "self_attn.o_proj.input", "hook_mlp_out": "post_feedforward_layernorm.output"}
GEMMA = {"hook_mlp_out": "post_feedforward_layernorm.output", "attn.hook_z": "self_attn.o_proj.input",
         "hook_attn_out": "post_attention_layernorm.output", "hook_resid_mid": "pre_feedforward_layernorm.input",
         "ln2.hook_normalized": "pre_feedforward_layernorm.normalized", "mlp.hook_in": "mlp.input",
         "mlp.hook_post": "mlp.down_proj.input"}
LLAMA = {"hook_mlp_out": "mlp.output", "attn.hook_z": "self_attn.o_proj.input",
         "hook_attn_out": "self_attn.o_proj.output", "hook_resid_mid": "post_attention_layernorm.input",
         "ln2.hook_normalized": "post_attention_layernorm.normalized", "mlp.hook_in": "mlp.input",
         "mlp.hook_out": "mlp.output", "mlp.hook_post": "mlp.down_proj.input"}
GPT2 = {"hook_mlp_out": "mlp.output", "attn.hook_z": "attn.c_proj.input", "hook_attn_out": "attn.c_proj.output",
        "hook_resid_mid": "ln_2.input", "mlp.hook_in": "mlp.input", "mlp.hook_post": "mlp.c_proj.input"}
NEOX = {"hook_mlp_out": "mlp.output", "attn.hook_z": "attention.dense.input", "hook_attn_out": "attention.dense.output",
        "mlp.hook_in": "mlp.input", "mlp.hook_post": "mlp.dense_4h_to_h.input"}
# What in a model's name -> (list of layers, token embedding, names inside a layer). The first match wins. "gemma-2b" is
# a Gemma 1, without norms after attention and MLP, and what else is called gemma ("medgemma") may be any of them.
FAMILIES: dict[str, tuple[str, str, dict[str, str]]] = {
    r"\bgemma-?[23](?![0-9a-z])": ("model.layers", "model.embed_tokens", GEMMA),
    "gpt-?2": ("transformer.h", "transformer.wte", GPT2),
    "pythia|gpt-neox": ("gpt_neox.layers", "gpt_neox.embed_in", NEOX),
    r"llama|mistral|qwen|smollm|\bgemma-(?:[27]b|1\.1)\b": ("model.layers", "model.embed_tokens", LLAMA),
}
EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
KINDS = {"output": "resid_post", "hook_resid_post": "resid_post", "hook_mlp_out": "mlp_out", "attn.hook_z": "attn_out",
         **dict.fromkeys(MLP_OUT, "mlp_out"), **dict.fromkeys(ATTN_OUT, "attn_out")}


def to_site(name: str, model_name: str | None = None) -> str | None:
    """The site that a hook name means, or None where that is not certain.

    A site is returned as it is; a bare module path ("model.layers.7", as SAELens' Hugging Face training writes it)
    means the module's output; TransformerLens names are translated with the help of the model's name.
    """
    if name.rpartition(".")[2] in SIDES:
        return name if PLACE.fullmatch(name) else None
    family = _family(model_name)
    if name == "hook_embed":
        return family and f"{family[1]}.output"
    lens = re.fullmatch(r"blocks\.(\d+)\.([A-Za-z0-9_.]+)", name)
    if lens is None:
        plain = PATH.fullmatch(name) and "hook_" not in name and LAYER.search(name)
        return f"{name}.output" if plain else None
    if family is None:  # most open models keep their decoder layers in model.layers, and suffixes are resolved later
        return f"model.layers.{lens[1]}.{SAME_EVERYWHERE[lens[2]]}" if lens[2] in SAME_EVERYWHERE else None
    layers, _, inside = family
    place = (SAME_EVERYWHERE | inside).get(lens[2])
    return place and f"{layers}.{lens[1]}.{place}"


def to_lens(site: str, model_name: str | None = None) -> str:
    """The TransformerLens name of a site where that is certain, else the site itself (SAELens takes any string)."""
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)", site)
    family = _family(model_name)
    if found:
        for lens, place in (SAME_EVERYWHERE | (family[2] if family else TELLING)).items():
            if place == found[2]:
                return f"blocks.{found[1]}.{lens}"
    return site


def layer_of(site: str) -> int | None:
    """The layer number in a site or hook name, or None."""
    found = LAYER.search(site)
    return int(found[1]) if found else None


def kind_of(site: str, site_out: str | None = None) -> str | None:
    """What people call a site or hook: "resid_post", "mlp_out", "attn_out", "embedding"; "transcoder" where two are
    given."""
    if site_out not in (None, site):
        return "transcoder"
    if site.endswith(tuple(f"{name}.output" for name in EMBEDDINGS)):
        return "embedding"
    inside = re.sub(r"^.*?\b(?:layers|h|blocks)\.\d+\.", "", site)
    return KINDS.get(inside)


def residual_stream(kind: str, layer: int | None) -> tuple[str, str] | None:
    """The sites (read, written) that a kind at a layer means where the architecture is not known: of "resid_post" only.
    """
    return (f"model.layers.{layer}.output",) * 2 if kind == "resid_post" and layer is not None else None


def may_mean(hook: str, site: str) -> bool:
    """Whether a hook name that to_site leaves open may mean this site: nothing that both tell of it differs."""
    layers, kind = {layer_of(hook), layer_of(site)} - {None}, kind_of(site)
    return len(layers) < 2 and ("hook_" not in hook or kind in (None, kind_of(hook)))


def in_layer(site: str) -> str:
    """A site from its list of layers on: "layers.7.mlp.output"."""
    return ".".join(_split(site)[1])


def stack_of(site: str) -> list[str]:
    """What tells a site's list of layers from others: ["encoder"] of "model.encoder.layers.7.output", else []."""
    return [part for part in _split(site)[0] if part not in WRAPPERS]


def _split(site: str) -> tuple[list[str], list[str]]:
    """The parts of a site before its list of layers, and those from it on."""
    parts = site.split(".")
    at = next((i for i, part in enumerate(parts) if part in ("layers", "h", "blocks")), 0)
    return parts[:at], parts[at:]


def _family(model_name: str | None) -> tuple[str, str, dict[str, str]] | None:
    name = (model_name or "").lower()
    return next((family for pattern, family in FAMILIES.items() if re.search(pattern, name)), None)
