"""Sites: the places in a model that an SAE reads and writes.

A site is a Hugging Face module path with its side: "model.layers.20.output", "model.layers.20.self_attn.o_proj.input".
A third side, ".normalized", is what an RMSNorm gives before its gain (Gemma Scope 1's transcoders read it); it can only
be read. People may say `layer=20, site="mlp_out"` instead: see `alias`.
"""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SaeAttachError, SiteError

SIDES = ("input", "output", "normalized")
KINDS = ("resid_post", "mlp_out", "attn_out", "transcoder")
OTHER_TOWERS = re.compile(r"vision|visual|audio|image|encoder(?!_decoder)")
LAYER_LISTS = ("layers", "h", "blocks")

# Within a decoder layer, first match wins. What a norm after the sub-layer gives (Gemma 2 and 3, OLMo 2, GLM-4) is what
# the residual stream receives.
MLP_OUT = ("post_feedforward_layernorm.output", "post_mlp_layernorm.output", "post_ffn_norm.output",
           "mlp.dense_4h_to_h.output", "mlp.output", "feed_forward.output", "fc2.output", "block_sparse_moe.output",
           "mlp_block.output", "ffn.down_proj.output", "ffn.output", "mixer.down_proj.output")
MLP_IN = ("pre_feedforward_layernorm.output", "mlp.input", "feed_forward.input", "fc1.input", "block_sparse_moe.input",
          "mlp_block.input", "ffn.up_proj.input", "ffn.input", "mixer.up_proj.input")
ATTN_OUT = (
    "self_attn.o_proj.input",
    "attn.c_proj.input",
    "attn.out_proj.input",
    "attn.attention.out_proj.input",
    "attention.dense.input",
    "self_attn.out_proj.input",
    "self_attention.dense.input",
    "self_attn.dense.input",
    "norm_attn_norm.attn.out_proj.input",
    "temporal_block.o_proj.input",
    "mixer.o_proj.input",
)
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "mlp_block", "ffn")  # that give what is as wide as the layer
AGAIN = re.compile(r"\b(albert_layer_groups|[HL]_module)\b")  # layers of ALBERT and HRM: a pass runs them several times
TIME_FIRST = ("fsmt", "xlnet")  # models inside which activations are (tokens, batch, d)


@dataclass(frozen=True)
class Site:
    """A place in one model: the module that was found, the path it has there, and the side."""

    path: str
    side: str
    module: nn.Module

    @cached_property
    def key(self) -> str:
        """The path with its side."""
        return f"{self.path}.{self.side}"

    def __str__(self) -> str:
        return self.key


def resolve(model: nn.Module, site: str) -> Site:
    """Find a site such as "model.layers.20.output" in a model, also inside PEFT, compiled and multimodal wrappers.

    The path may be a suffix of the real one, or the real one a suffix of it. Raises SiteError naming what comes
    nearest, or for a place inside a model of TIME_FIRST.
    """
    path, _, side = site.rpartition(".")
    if side not in SIDES:
        raise SiteError(
            f"a site is a module path that ends in {', '.join('.' + s for s in SIDES)}, or with layer= one of "
            f"{', '.join(KINDS)}; got {site!r}"
        )
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            modules.setdefault(name.replace("._orig_mod", ""), module)  # the wrapper of a layer compiled by itself
    found = _by_suffix(path, modules)
    if len(found) == 1:
        for outer in ancestors(model, found[0]):
            if getattr(text_config(outer), "model_type", None) in TIME_FIRST:
                raise SiteError(f"{type(outer).__name__} keeps its activations as (tokens, batch, d); SAEs need them "
                                "as (batch, tokens, d)")
        return Site(found[0], side, modules[found[0]])
    if found:
        raise SiteError(
            f"{site!r} fits {len(found)} modules of {type(model).__name__}: {', '.join(found[:5])}; give the full path"
        )
    raise SiteError(_unknown(model, path, modules))


def alias(model: nn.Module, layer: int, kind: str = "resid_post") -> tuple[str, str]:
    """The sites (read, written) that people call `layer=20, site="mlp_out"`; both the same except for transcoders.

    resid_post: output of the decoder layer. mlp_out: what the MLP adds to the residual stream. attn_out: input of the
    attention's output projection (heads concatenated), as Gemma Scope has it. transcoder: the MLP's input and output.
    """
    root = f"{layers_path(model)}.{layer}"
    block = resolve(model, f"{root}.output").module
    if kind == "resid_post":
        return f"{root}.output", f"{root}.output"
    if kind == "transcoder":
        return f"{root}.{_first(block, MLP_IN, root)}", f"{root}.{_first(block, MLP_OUT, root)}"
    if kind not in KINDS:
        raise SiteError(f"site must be a module path with its side, or one of {', '.join(KINDS)}; got {kind!r}")
    only = f"{root}.{_first(block, MLP_OUT if kind == 'mlp_out' else ATTN_OUT, root)}"
    return only, only


def layers_path(model: nn.Module) -> str:
    """Path of the list of decoder layers of the (text) model. Raises SiteError if there is not exactly one."""
    depth = getattr(text_config(model), "num_hidden_layers", None)
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LAYER_LISTS
        and isinstance(module, nn.ModuleList)
        and depth in (None, len(module))
        and not OTHER_TOWERS.search(name)
    ]
    if len(found) != 1:
        raise SiteError(
            f"cannot tell the decoder layers of {type(model).__name__} (candidates: {found or 'none'}); "
            "give the site as a module path, such as 'model.layers.3.output'"
        )
    return found[0]


def runs_again(model: nn.Module, site: Site) -> bool:
    """Whether a forward pass is known to run a site's module several times: it is of AGAIN, or part of several
    layers."""
    names = [re.sub(r"\d+", "", name) for name, m in model.named_modules(remove_duplicate=False) if m is site.module]
    return len(names) > len(set(names)) or AGAIN.search(site.path) is not None


def ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around the one at a path, the model first."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also inside a multimodal wrapper; None where a model has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module, wanted: int) -> int:
    """So many tokens at once, or as many as the model's config says that it takes, if that is less.

    Beyond them learned positions end, and others are such as no training has seen. Models without such a limit
    (state spaces, relative positions) state none, None or -1.
    """
    config = text_config(model)
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    limits = [limit - _unused_positions(model) for limit in stated if isinstance(limit, int) and limit > 0]
    return min([wanted, *limits])


def _unused_positions(model: nn.Module) -> int:
    """Positions before the first that a token gets: RoBERTa's and ESM's count from behind the padding's."""
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "position_embeddings"]
    return max([table.padding_idx + 1 for table in tables
                if isinstance(table, nn.Embedding) and table.padding_idx is not None], default=0)


def width(model: nn.Module, site: Site) -> int | None:
    """Size of the last dimension at a site, where the module tells it; None where only a forward pass would."""
    module = getattr(site.module, "base_layer", site.module)  # PEFT's wrapper of a linear layer
    if isinstance(module, nn.Linear):
        return module.in_features if site.side == "input" else module.out_features
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
        return weight.shape[-1]
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # GPT-2's transposed linear layer
        return weight.shape[0 if site.side == "input" else 1]
    in_layer = re.search(rf"\b({'|'.join(LAYER_LISTS)})\.\d+(\.({'|'.join(MLPS)}))?$", site.path)
    config = text_config(model)  # of the text model, not of a tower beside it
    hidden, several = getattr(config, "hidden_size", None), hasattr(config, "hc_count")
    known = in_layer and not several and not OTHER_TOWERS.search(site.path)  # Qwen4's layers give several side by side
    return hidden if known and isinstance(hidden, int) else None


def read(value: Any, where: str) -> Tensor:
    """The hidden states (..., d) in a module's output: a tensor, or the first floating one of a tuple or list."""
    if isinstance(value, Tensor):
        return value
    index = _hidden_index(value, where)
    hidden: Tensor = value[index]
    return hidden


def write(value: Any, new: Tensor, where: str) -> Any:
    """The same output with its hidden states replaced; tuples, lists and named tuples keep their type."""
    if isinstance(value, Tensor):
        return new
    items = list(value)
    items[_hidden_index(value, where)] = new
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def find_input(args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> int | str:
    """Where a module's hidden-state input stands: a position in args, or a name in kwargs ("hidden_states" first)."""
    for i, value in enumerate(args):
        if _is_hidden(value):
            return i
    for name in sorted(kwargs, key=lambda name: name != "hidden_states"):
        if _is_hidden(kwargs[name]):
            return name
    raise SaeAttachError(f"{where}: no floating-point tensor among the module's inputs")


def input_at(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> Tensor:
    """The input that stands where `find_input` says."""
    x: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return x


def replace_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with another input in its place."""
    if isinstance(place, int):
        return (*args[:place], new, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: new}


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """RMS-normalise x (..., d) without the norm's gain, with the norm's own epsilon; float32 inside, x's dtype out."""
    eps = next((e for name in ("eps", "variance_epsilon") if (e := getattr(norm, name, None)) is not None), 1e-6)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _by_suffix(path: str, modules: dict[str, nn.Module]) -> list[str]:
    if path in modules:
        return [path]
    parts = path.split(".")
    for start in range(len(parts)):
        if parts[start].isdigit():  # "0.mlp" would fit a layer of any list
            break
        suffix = ".".join(parts[start:])
        found = [name for name in modules if name == suffix or name.endswith("." + suffix)]
        if found:
            text_only = [name for name in found if not OTHER_TOWERS.search(name)]
            return text_only or found
    return []


def _unknown(model: nn.Module, path: str, modules: dict[str, nn.Module]) -> str:
    number = re.search(r"\.(\d{1,9})(\.|$)", path)
    try:
        depth = len(resolve(model, layers_path(model) + ".output").module)  # type: ignore[arg-type]
    except SiteError:
        depth = None
    if depth is not None and number and int(number[1]) >= depth:
        return f"{type(model).__name__} has layers 0 to {depth - 1}; the SAE is for layer {number[1]} ({path})"
    near = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
    return f"{type(model).__name__} has no module {path!r}; nearest: {', '.join(near) or 'none'}"


def _first(block: nn.Module, candidates: tuple[str, ...], root: str) -> str:
    names = {name for name, _ in block.named_modules()}
    if "shared_mlp" in names:  # Granite's adds to the residual stream what both give together
        names.discard("block_sparse_moe")
    for candidate in candidates:
        if candidate.rpartition(".")[0] in names:
            return candidate
    raise SiteError(f"{root} has none of {', '.join(candidates)}; give the site as a module path")


def _hidden_index(value: Any, where: str) -> int:
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            if _is_hidden(item):
                return i
    raise SaeAttachError(
        f"{where}: expected a tensor or a tuple that holds one, the module returned {type(value).__name__}"
    )


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point()
