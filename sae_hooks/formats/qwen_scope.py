"""Qwen Scope: `SAE-Res-Qwen3-8B-Base-W64K-L0_100/layer12.sae.pt`; the weights are pickled by PyTorch.

Names tell everything: TopK, whose k and width stand in the repository's name, on the residual stream after a layer;
nothing is normalised or centred. A config.json beside the files says the same, where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import SaeFormatError
from ..sae import SAE
from .config import size, text
from .entry import Entry, Layout, all_of_them, d_in_from_size
from .hook_names import residual_stream
from .weights import orient, require

FORMAT, LAYOUTS = "Qwen Scope", (Layout("layerN.sae.pt"),)
NAMES = frozenset({"W_enc", "W_dec", "b_enc", "b_dec"})
CONFIG = "config.json"
REPO = re.compile(r"SAE-Res-([A-Za-z0-9.-]+?)-W(\d{1,5})K-L0_(\d{1,7})(?![A-Za-z0-9_])")
FILE = re.compile(r"layer(\d{1,4})\.sae\.pt")
UNTOLD = ("neither a folder's name nor a config.json tells k, how many features each token keeps: name the folder of "
          "the files as their repository is, SAE-Res-{model}-W{thousands of features}K-L0_{k}")
MOST_OVERHEAD = 4096  # bytes that torch.save adds; seen for four tensors: 1,500 to 2,000
default, sites = all_of_them, residual_stream


def entries(files: Mapping[str, int], repo: str) -> list[Entry]:
    """Every layer{n}.sae.pt among `files` (path -> bytes); its width and k are told by the name of a folder above."""
    return [_entry(path, bytes_, int(found[1]), repo, files) for path, bytes_ in files.items()
            if (found := FILE.fullmatch(path.rpartition("/")[2]))]


def refine(entry: Entry, config: dict[str, Any]) -> Entry:
    """The entry with what a config.json of Qwen Scope says; another's says nothing.

    Raises SaeFormatError where it says otherwise than the name, and where neither says k.
    """
    facts = config if config.get("model_type") == "topk_sae" else {}
    width, k = size({"d_sae": facts.get("d_sae")}, "d_sae"), size({"k": facts.get("k")}, "k")
    if text(facts, "hook_point") not in (None, "resid_post"):
        raise SaeFormatError(f"hook_point is {facts['hook_point']!r}, expected 'resid_post'")
    if entry.width not in (None, width or entry.width) or entry.l0 not in (None, k or entry.l0):
        raise SaeFormatError(f"the folder's name says {entry.width} features and k {entry.l0}, "
                             f"{CONFIG} {width} and {k}")
    if k is None and entry.l0 is None:
        raise SaeFormatError(UNTOLD)
    return replace(entry, width=entry.width or width, l0=entry.l0 or k, d_in=size(facts, "d_model") or entry.d_in,
                   model_name=entry.model_name or text(facts, "base_model"))


def build(entry: Entry, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> SAE:
    """The SAE in these tensors: W_enc is kept as (F, d), W_dec as (d, F).

    Raises SaeFormatError, SaeMismatchError naming every tensor that does not fit.
    """
    entry = refine(entry, config or {})
    require(tensors, ("W_enc", "W_dec", "b_enc", "b_dec"))
    d_sae, d = tensors["b_enc"].numel(), tensors["b_dec"].numel()
    t = orient({name: t.T if name.startswith("W_") and t.ndim == 2 else t for name, t in tensors.items()},
               {"W_enc": (d, d_sae), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)})
    assert entry.l0 is not None
    metadata = {"l0": entry.l0} | ({"model_name": entry.model_name} if entry.model_name else {})
    return SAE(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], k=int(entry.l0), site=entry.site,
               site_out=entry.site_out, metadata=metadata)


def _entry(path: str, bytes_: int, layer: int, repo: str, files: Mapping[str, int]) -> Entry:
    named = REPO.findall(f"{repo}/{path}")
    model, width, k = named[-1] if named else (None, None, None)
    config = f"{path.rpartition('/')[0]}/{CONFIG}".lstrip("/")
    read, write = sites("resid_post", layer) or (None, None)
    features = int(width) * 1024 if width else None
    return Entry(dialect="qwen_scope", weights=path, config=config if config in files else None, kind="resid_post",
                 site=read, site_out=write, layer=layer, width=features, l0=float(k) if k else None,
                 d_in=d_in_from_size(bytes_, features, vectors=1, most_overhead=MOST_OVERHEAD),
                 model_name=f"Qwen/{model}" if model else None,
                 flaw=UNTOLD if k is None and config not in files else None)
