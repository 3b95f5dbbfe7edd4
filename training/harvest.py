"""Activations of a model's sites on text: windows of token ids in, the ordinary tokens' activations out.

The model runs only as deep as the deepest site. Special tokens, padding and attention sinks are dropped, so that every
row is the activation of an ordinary token; what is dropped at one site is dropped at all, so that row i of every site
is of the same token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_hooks.errors import DataError, SiteError
from sae_hooks.forward import DeepEnoughError, eval_mode, input_device, reads_text, uncompiled
from sae_hooks.runtime import SINK_MULTIPLE
from sae_hooks.sites import Site, find_input, normalize, read, resolve

from .text import Window

TOKENS_PER_BATCH = 4096
NORM_WINDOWS = 64  # that norms are measured on: 16,000 tokens at a window of 256


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """A site's width, and the root mean square and the median of its ordinary tokens' L2 norms, in its own units."""

    d_in: int
    rms_norm: float
    typical_norm: float

    def normalised(self, x: Tensor) -> Tensor:
        """x / rms_norm, in x's place and with the same bits on every device: GPUs multiply by the inverse of a number,
        but divide by a tensor."""
        return x.div_(torch.full((), self.rms_norm, dtype=x.dtype, device=x.device))


def padded_batches(windows: Sequence[Window], tokens: int = TOKENS_PER_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input_ids, attention_mask), each (batch, length), of at most `tokens` positions or one window.

    Windows of like length go together, longest first, so that little is padded; padding is on the right.
    """
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i]), i))
    while order:
        size = max(1, tokens // len(windows[order[0]]))
        yield _padded([windows[i] for i in order[:size]])
        order = order[size:]


def _padded(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    length = max(map(len, windows))
    ids, mask = torch.zeros(2, len(windows), length, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, :len(window)], mask[row, :len(window)] = torch.from_numpy(window), 1
    return ids, mask


@torch.no_grad()  # not inference_mode: a training may go on to differentiate through what comes out
def site_activations(model: nn.Module, sites: Sequence[str], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Run model on ids, mask (batch, length) as deep as sites need: {site: x (batch, length, d_in)}.

    A site ends in .output, .input or .normalized (sites.py). ids and mask may lie anywhere; each x lies where the model
    computes it, which differs between sites of a model that accelerate has spread over devices. The model runs in eval
    mode, without dropout, and is left as it was. Raises SiteError for a site that it has not, that a forward pass does
    not reach, that reads another text (a decoder beside an encoder), or whose activations are not one a token.
    """
    where = input_device(model, ids.device)
    with eval_mode(model), uncompiled(), _recording(model, sites) as seen, suppress(DeepEnoughError):
        model(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False)
    if unmet := [site for site in sites if site not in seen]:
        raise SiteError(f"a forward pass of {type(model).__name__} on text never reaches {', '.join(unmet)}")
    return {site: _one_a_token(seen[site], ids, site) for site in sites}


def _one_a_token(x: Tensor, ids: Tensor, site: str) -> Tensor:
    """x (batch, length, d_in), also where a module gets (batch * length, d_in), as experts do. Raises SiteError for
    others: Gemma 3n's layers give four streams, DeepSeek-V4's four a token."""
    if x.shape[:-1] in (ids.shape, (ids.numel(),)):
        return x.reshape(*ids.shape, x.shape[-1])
    raise SiteError(f"{site} gives activations {tuple(x.shape)} for tokens {tuple(ids.shape)}; a training needs one a "
                    "token. Train at a site inside the layer that gives these, such as its MLP's output")


@contextmanager
def _recording(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Hooks that fill {site: x}, and stop the forward pass when all sites were met."""
    seen: dict[str, Tensor] = {}
    found = {site: resolve(model, site) for site in sites}
    if other := [site for site, place in found.items() if not reads_text(model, place.module)]:
        raise SiteError(f"a training gives {type(model).__name__} input_ids alone, which its encoder reads; "
                        f"{', '.join(other)} reads a text of its own")
    handles = [_record_at(place, name, seen, len(found)) for name, place in found.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _record_at(place: Site, name: str, seen: dict[str, Tensor], wanted: int) -> RemovableHandle:
    def note(x: Tensor) -> None:
        if name in seen:
            raise SiteError(f"a forward pass runs {name} more than once; on which run to train cannot be told")
        seen[name] = x.detach()
        if len(seen) == wanted:
            raise DeepEnoughError
        seen[name] = seen[name].clone()  # some models go on to add to it in place (Falcon's parallel MLP)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        note(read(output, name))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = find_input(args, kwargs, name)
        x = args[at] if isinstance(at, int) else kwargs[at]
        note(normalize(x, module) if place.side == "normalized" else x)

    if place.side == "output":
        return place.module.register_forward_hook(after)
    return place.module.register_forward_pre_hook(before, with_kwargs=True)


def ordinary(x: Tensor, ids: Tensor, mask: Tensor, special_ids: Sequence[int], typical_norm: float) -> Tensor:
    """Mask (batch, length), on x's device, of what an SAE is trained on and may replace: no padding, special token or
    sink.

    x (batch, length, d_in) are the site's activations, typical_norm their usual L2 norm, in the same units.
    """
    special = torch.isin(ids, torch.tensor(list(special_ids), dtype=ids.dtype, device=ids.device))
    sink: Tensor = torch.linalg.vector_norm(x.float(), dim=-1) > SINK_MULTIPLE * typical_norm
    return (mask.to(ids.device).bool() & ~special).to(x.device) & ~sink


def ordinary_rows(found: Mapping[str, Tensor], ids: Tensor, mask: Tensor, special_ids: Sequence[int],
                  typical_norms: Mapping[str, float]) -> dict[str, Tensor]:
    """{site: bf16 rows (n, d_in)} of the positions that are ordinary at every site, each where its activations are.

    found: what `site_activations` gave for ids, mask (batch, length). Raises DataError for activations that are not
    finite.
    """
    masks = [ordinary(x, ids, mask, special_ids, typical_norms[site]).to(ids.device) for site, x in found.items()]
    keep = torch.stack(masks).all(0)
    rows = {site: x[keep.to(x.device)].bfloat16() for site, x in found.items()}
    for site, x in rows.items():
        if not bool(x.isfinite().all()):
            raise DataError(f"{site} gave activations that are not finite, in {found[site].dtype}; load the model in "
                            "bfloat16 or float32")
    return rows


def measure_sites(model: nn.Module, sites: Sequence[str], windows: Sequence[Window],
                  special_ids: Sequence[int]) -> dict[str, SiteInfo]:
    """What `harvest` needs to know first of each site, measured on windows: norms of ordinary tokens, width.

    rms_norm leaves out what is a sink at any of the sites. Raises DataError if no token is ordinary.
    """
    norms: dict[str, list[Tensor]] = {site: [] for site in sites}
    widths: dict[str, int] = {}
    for ids, mask in padded_batches(windows):
        for site, x in site_activations(model, sites, ids, mask).items():
            kept = x[ordinary(x, ids, mask, special_ids, float("inf"))]
            norms[site].append(kept.float().norm(dim=-1).cpu())
            widths[site] = x.shape[-1]
    joined = {site: torch.cat(parts) if parts else torch.empty(0) for site, parts in norms.items()}
    _check_measured(joined, windows, special_ids)
    typical = {site: float(norm.median()) for site, norm in joined.items()}
    keep = torch.stack([norm <= SINK_MULTIPLE * typical[site] for site, norm in joined.items()]).all(0)
    rms = {site: float(norm[keep].square().mean().sqrt()) for site, norm in joined.items()}
    return {site: SiteInfo(d_in=widths[site], rms_norm=rms[site], typical_norm=typical[site]) for site in sites}


def _check_measured(norms: Mapping[str, Tensor], windows: Sequence[Window], special_ids: Sequence[int]) -> None:
    for site, norm in norms.items():
        if not len(norm):
            raise DataError(
                f"no ordinary token is left to train on: all {sum(map(len, windows)):,} tokens of {len(windows):,} "
                f"windows are special ones (special_ids has {len(set(special_ids)):,}); give other texts, or only the "
                "ids of BOS, EOS, padding and the like"
            )
        if not bool(norm.isfinite().all()):
            raise DataError(f"{site} gave activations that are not finite; load the model in bfloat16 or float32")


def harvest(model: nn.Module, typical_norms: Mapping[str, float], windows: Sequence[Window],
            special_ids: Sequence[int], *, tokens: int = TOKENS_PER_BATCH) -> dict[str, Tensor]:
    """{site: bf16 activations (n, d_in) of ordinary tokens, on the CPU} for each site of typical_norms.

    Rows are in the order of `padded_batches`: windows longest first, and each window's tokens in their order; row i is
    of the same token at all sites. tokens: positions of one forward pass.
    """
    parts: dict[str, list[Tensor]] = {site: [] for site in typical_norms}
    for ids, mask in padded_batches(windows, tokens):
        found = site_activations(model, list(parts), ids, mask)
        for site, rows in ordinary_rows(found, ids, mask, special_ids, typical_norms).items():
            parts[site].append(rows.cpu())
    return {site: torch.cat(rows) for site, rows in parts.items()}
