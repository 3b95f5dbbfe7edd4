"""Activations of a model's sites on text: windows of token ids in, the ordinary tokens' activations out.

The model runs only as deep as the deepest site. Special tokens, padding and attention sinks are dropped, so
that every row is the activation of an ordinary token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_hooks.runtime import SINK_MULTIPLE
from sae_hooks.sites import Site, read, resolve

TOKENS_PER_BATCH = 4096

Window = np.ndarray[Any, np.dtype[np.int32]]


def context_windows(documents: Iterable[Sequence[int]], length: int, seed: int) -> list[Window]:
    """Cut token id lists into windows (<= length,) of one document each, and shuffle them all with seed.

    Windows of a single token are left out: a text's first token is an attention sink.
    """
    cut = (ids[i:i + length] for ids in documents for i in range(0, len(ids), length))
    kept = [np.asarray(window, dtype=np.int32) for window in cut if len(window) > 1]
    return [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))]


def padded_batches(windows: Sequence[Window],
                   tokens: int = TOKENS_PER_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
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


class _DeepEnoughError(Exception):
    """Raised by the last site that is met: nothing above it is wanted."""


@torch.inference_mode()
def site_activations(model: nn.Module, sites: Sequence[str], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Run model on ids, mask (batch, length) as deep as sites need: {site: x (batch, length, d_in)}.

    The model is left as it was. Raises SiteError for a site that it has not.
    """
    with _recording(model, sites) as seen, suppress(_DeepEnoughError):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return seen


@contextmanager
def _recording(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Hooks that fill {site: x}, and stop the forward pass when all sites were met."""
    seen: dict[str, Tensor] = {}
    found = {site: resolve(model, site) for site in sites}
    handles = [_record_at(place, name, seen, len(sites)) for name, place in found.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _record_at(place: Site, name: str, seen: dict[str, Tensor], wanted: int) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = read(output if place.side == "output" else args, name).detach()
        if len(seen) == wanted:
            raise _DeepEnoughError

    return place.module.register_forward_hook(hook)


def ordinary(x: Tensor, ids: Tensor, mask: Tensor, special_ids: Sequence[int], typical_norm: float) -> Tensor:
    """Mask (batch, length) of what an SAE is trained on and may replace: no padding, special token or sink.

    x (batch, length, d_in) are the site's activations, typical_norm their usual L2 norm, in the same units.
    """
    special = torch.isin(ids, torch.tensor(list(special_ids), dtype=ids.dtype, device=ids.device))
    sink: Tensor = torch.linalg.vector_norm(x.float(), dim=-1) > SINK_MULTIPLE * typical_norm
    return mask.bool() & ~special & ~sink


def measure_norms(model: nn.Module, site: str, windows: Sequence[Window],
                  special_ids: Sequence[int]) -> tuple[float, float, int]:
    """(typical_norm, rms_norm, d_in): median and root mean square of the L2 norms of ordinary tokens."""
    norms, d_in = [], 0
    for ids, mask in padded_batches(windows):
        x = site_activations(model, [site], ids, mask)[site]
        norms.append(x[ordinary(x, ids, mask, special_ids, float("inf"))].float().norm(dim=-1))
        d_in = x.shape[-1]
    norm = torch.cat(norms)
    typical = float(norm.median())
    return typical, float(norm[norm <= SINK_MULTIPLE * typical].square().mean().sqrt()), d_in


def harvest(model: nn.Module, typical_norms: dict[str, float], windows: Sequence[Window],
            special_ids: Sequence[int]) -> dict[str, Tensor]:
    """{site: bf16 activations (n, d_in) of ordinary tokens} for each site of typical_norms.

    Rows are in the order of `padded_batches`: windows longest first, and each window's tokens in their order.
    """
    rows: dict[str, list[Tensor]] = {site: [] for site in typical_norms}
    for ids, mask in padded_batches(windows):
        found = site_activations(model, list(rows), ids, mask)
        for site, typical_norm in typical_norms.items():
            x = found[site]
            rows[site].append(x[ordinary(x, ids, mask, special_ids, typical_norm)].bfloat16())
    return {site: torch.cat(parts) for site, parts in rows.items()}
