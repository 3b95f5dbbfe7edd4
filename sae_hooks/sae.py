"""The sparse autoencoder: one equation, two gates.

    pre = x W_enc + b_enc;   acts = gate(pre);   x_hat = acts W_dec + b_dec (+ x W_skip)

The gate is a threshold per feature (JumpReLU, arXiv 2407.14435 eq. 8; ReLU is threshold 0; BatchTopK at inference is
one threshold for all) or TopK (arXiv 2406.04093). Every published format is folded into these tensors when it is
loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .errors import SaeMismatchError
from .statistics import FeatureStatistics

EXACT = ("b_enc", "b_dec", "threshold")  # a thousandth of the memory, and they decide which features fire


class SAE(nn.Module):
    """A trained SAE on plain tensors, for inference; `sae_hooks.training` borrows it to train.

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_out), b_dec (d_out), and either threshold (d_sae), >= 0, or k,
    the number of features that TopK keeps; W_skip (d_in, d_out) for transcoders with an affine skip. The tensors are
    taken over without a copy where they already lie as needed: W_enc has the field's shape, but is kept feature-major
    in memory (`W_enc.T` is contiguous), so that a feature is one contiguous row. Biases and thresholds stay float32
    when the SAE is moved to a half dtype. Parameters start with requires_grad False.

    `site` is where x is read, as a module path with its side ("model.layers.20.output"); `site_out` where x_hat belongs
    (another place only for transcoders). `metadata` is a JSON-like dict that travels with the weights; inference reads
    `typical_norm` from it: the usual L2 norm of the site's activations, against which attention sinks are told.
    `statistics` may hold how often and how strongly each feature fires; they stay on the CPU, and are saved beside the
    weights.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    W_skip: Tensor | None
    _statistics: FeatureStatistics | None = None

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        threshold: Tensor | None = None,
        k: int | None = None,
        W_skip: Tensor | None = None,
        site: str | None = None,
        site_out: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        statistics: FeatureStatistics | None = None,
    ) -> None:
        super().__init__()
        _check_shapes(W_enc, b_enc, W_dec, b_dec, threshold, k, W_skip)
        self.W_enc = _parameter(W_enc.T.contiguous().T)
        self.W_dec = _parameter(W_dec.contiguous())
        self.b_enc, self.b_dec = _parameter(_exact(b_enc)), _parameter(_exact(b_dec))
        self.threshold = None if threshold is None else _parameter(_exact(threshold))
        self.W_skip = None if W_skip is None else _parameter(W_skip.contiguous())
        self.k = k
        self.site, self.site_out = site, site_out or site
        self.metadata: dict[str, Any] = dict(metadata or {})
        if statistics is not None:
            self.statistics = statistics

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the activations that are reconstructed; d_in except for some transcoders."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """What the matrices are stored in."""
        return self.W_enc.dtype

    @property
    def statistics(self) -> FeatureStatistics | None:
        """How often and how strongly each feature fires, if that was measured (`feature_statistics`).

        May be set. Raises SaeMismatchError for statistics of another number of features.
        """
        return self._statistics

    @statistics.setter
    def statistics(self, measured: FeatureStatistics | None) -> None:
        if measured is not None and measured.d_sae != self.d_sae:
            raise SaeMismatchError(
                f"statistics of {measured.d_sae} features; the SAE at {self.site!r} has {self.d_sae}"
            )
        self._statistics = measured

    def pre_activations(self, x: Tensor) -> Tensor:
        """Map x (..., d_in) to pre-activations (..., d_sae), in float32 (float64 if x and the weights are)."""
        pre = self._at_once(x)
        if pre is None:
            W_enc, b_enc = self._encoder
            pre = kernels.pre_activations(self._rows(x, W_enc.shape[0]), W_enc.T, b_enc)
        return _shaped(pre, x)

    def encode(self, x: Tensor) -> Tensor:
        """Map activations x (..., d_in) to feature activations (..., d_sae), in x's own scale; float32 or wider."""
        if (pre := self._at_once(x)) is not None:
            return _shaped(self.gate(pre), x)
        if torch.compiler.is_compiling() or self._needs_plain(x):
            return self.gate(self.pre_activations(x))
        (W_enc, b_enc), gate = self._encoder, self._gate
        if not isinstance(gate, Tensor):
            return kernels.keep_largest(self.pre_activations(x), gate)
        return _shaped(kernels.encode(self._rows(x, W_enc.shape[0]), W_enc.T, b_enc, gate), x)

    def gate(self, pre: Tensor) -> Tensor:
        """Feature activations from pre-activations (..., d_sae): JumpReLU (arXiv 2407.14435 eq. 8) or TopK."""
        gate = self._gate
        return kernels.gated(pre, gate) if isinstance(gate, Tensor) else kernels.topk_gate(pre, gate)

    def encode_sparse(self, x: Tensor) -> kernels.Csr:
        """Feature activations of x (..., d_in) as CSR (indptr (n + 1), indices, values), n = product of x's leading
        sizes.

        (n, d_sae) is never held; TopK compares all features of a token, and takes its tokens in slices.
        """
        pre, gate = self._at_once(x), self._gate
        if pre is not None:
            found = kernels.above(pre, gate) if isinstance(gate, Tensor) else kernels.largest(pre, gate)
            return kernels.compressed(found, len(pre))
        W_enc, b_enc = self._encoder
        rows, W_rows = self._rows(x, W_enc.shape[0]), W_enc.T
        if (followed := kernels.encode_with_gradient(rows, W_rows, b_enc, gate)) is not None:
            return followed
        if isinstance(gate, Tensor):
            return kernels.encode_sparse(rows, W_rows, b_enc, gate)
        return kernels.encode_topk(rows, W_rows, b_enc, gate)

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction (..., d_out) of feature activations (..., d_sae), without the skip: acts W_dec + b_dec."""
        W_dec, b_dec = self._decoder
        rows = self._rows(acts, W_dec.shape[0])
        if (x_hat := kernels.decoded_at_once(rows, W_dec, b_dec)) is not None:
            return _shaped(x_hat, acts)
        if self._needs_plain(acts):
            dtype = kernels.wide(acts, W_dec)
            return _shaped(_product(rows, W_dec, dtype) + b_dec.to(dtype), acts)
        return _shaped(kernels.decode(rows, W_dec, b_dec), acts)

    def skip(self, x: Tensor) -> Tensor | float:
        """What an affine skip adds to the reconstruction of x (..., d_in): (..., d_out), or 0.0 without one."""
        if self.W_skip is None:
            return 0.0
        return _product(x, self.W_skip, torch.promote_types(x.dtype, torch.float32))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Reconstruct x (..., d_in) as x_hat (..., d_out), in x's dtype, or the one given; gradients flow where x or
        the weights ask, at the cost of the active features where x alone does."""
        (W_enc, b_enc), (W_dec, b_dec) = self._encoder, self._decoder
        rows = self._rows(x, W_enc.shape[0])
        pre = kernels.at_once(rows, W_enc, b_enc) if kernels.decodes_at_once(rows, W_dec, b_dec) else None
        if pre is not None:
            out = torch.addmm(b_dec, self.gate(pre), W_dec)
        elif self._needs_plain(x):
            followed = kernels.reconstruct_with_gradient(rows, W_enc.T, b_enc, self._gate, W_dec, b_dec)
            out = self.decode(self.encode(rows)) if followed is None else followed
        elif isinstance(gate := self._gate, Tensor):
            out = kernels.reconstruct(rows, W_enc.T, b_enc, gate, W_dec, b_dec)
        else:
            out = kernels.reconstruct_topk(rows, W_enc.T, b_enc, gate, W_dec, b_dec)
        x_hat = _shaped(out, x)
        if self.W_skip is not None:
            x_hat = x_hat + self.skip(x)
        return kernels.cast(x_hat, dtype or x.dtype)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write folder/cfg.json and folder/sae_weights.safetensors in the SAELens 6 dialect; returns the folder.

        Statistics, if there are any, stand beside them in feature_statistics.safetensors; if not, such a file is
        removed. Each file is replaced whole or not at all. Raises OSError if the folder cannot be written,
        SaeFormatError for what load_sae would refuse.
        """
        from .hub import save_pretrained  # upward: hub/ alone touches weights on disk

        return save_pretrained(self, folder)

    def push_to_hub(
        self, repo_id: str, *, path_in_repo: str = "", token: str | None = None, private: bool = False
    ) -> str:
        """Upload what save_pretrained writes, as one commit; returns its address. Makes the repository if needed."""
        from .hub import push_to_hub

        return push_to_hub(self, repo_id, path_in_repo=path_in_repo, token=token, private=private)

    def extra_repr(self) -> str:
        """One line for repr: sizes, gate, site."""
        gate = f"top {self.k}" if self.threshold is None else "jumprelu"
        return f"{self.d_in} -> {self.d_sae} -> {self.d_out}, {gate}, site={self.site!r}, {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
        kept = {name: p.detach() for name in EXACT if (p := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype not in (torch.float32, torch.float64):
                new.data = old.to(device=new.device, dtype=torch.float32)
        return self

    @property
    def _encoder(self) -> tuple[Tensor, Tensor]:
        """W_enc and b_enc, which take a microsecond each where they are read as attributes."""
        own: Mapping[str, Any] = self._parameters
        return own["W_enc"], own["b_enc"]

    @property
    def _decoder(self) -> tuple[Tensor, Tensor]:
        """W_dec and b_dec, likewise."""
        own: Mapping[str, Any] = self._parameters
        return own["W_dec"], own["b_dec"]

    @property
    def _gate(self) -> Tensor | int:
        """Thresholds (d_sae), or k."""
        threshold: Tensor | None = self._parameters.get("threshold")
        if threshold is not None:
            return threshold
        assert self.k is not None
        return self.k

    def _needs_plain(self, x: Tensor) -> bool:
        """Whether plain operations must be taken: for gradients, forward-mode derivatives and vmap."""
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return True
        return not torch.compiler.is_compiling() and not kernels.is_bare(x)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """Pre-activations (n, d_sae) of x (..., d_in), if they are few."""
        W_enc, b_enc = self._encoder
        return kernels.at_once(self._rows(x, W_enc.shape[0]), W_enc, b_enc)

    def _rows(self, x: Tensor, width: int) -> Tensor:
        """x (..., width) as (n, width)."""
        if x.shape[-1] != width:
            what = "features" if width == self.d_sae else "activations"
            raise SaeMismatchError(f"the SAE at {self.site!r} takes {what} of width {width}, got {tuple(x.shape)}")
        return x if x.ndim == 2 else x.reshape(-1, width)


def _product(x: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weights in a dtype, whatever torch.autocast says."""
    if kernels.autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return _product(x, weights, dtype)
    return kernels.product(x.to(dtype), weights.to(dtype))


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """rows (n, width) as (..., width), with the leading sizes of another tensor."""
    return rows if like.ndim == 2 else rows.reshape(*like.shape[:-1], rows.shape[-1])


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_shapes(
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None,
    k: int | None,
    W_skip: Tensor | None,
) -> None:
    """Raise SaeMismatchError naming every tensor that does not fit the others."""
    if W_enc.ndim != 2 or W_dec.ndim != 2:
        raise SaeMismatchError(f"W_enc and W_dec must be matrices, got {tuple(W_enc.shape)} and {tuple(W_dec.shape)}")
    if (threshold is None) == (k is None):
        raise SaeMismatchError("give exactly one gate: threshold (per feature) or k (TopK)")
    (d_in, d_sae), d_out = W_enc.shape, W_dec.shape[1]
    expected = {
        "W_dec": (W_dec, (d_sae, d_out)),
        "b_enc": (b_enc, (d_sae,)),
        "b_dec": (b_dec, (d_out,)),
        "threshold": (threshold, (d_sae,)),
        "W_skip": (W_skip, (d_in, d_out)),
    }
    wrong = [
        f"{name} is {tuple(t.shape)}, expected {shape}"
        for name, (t, shape) in expected.items()
        if t is not None and tuple(t.shape) != shape
    ]
    if wrong:
        raise SaeMismatchError(f"with W_enc {tuple(W_enc.shape)}: " + "; ".join(wrong))
    if k is not None and not 0 < k <= d_sae:
        raise SaeMismatchError(f"k must be between 1 and {d_sae}, got {k}")
    if threshold is not None and not bool((threshold >= 0).all()):
        at = int((~(threshold >= 0)).nonzero()[0])
        raise SaeMismatchError(f"thresholds must be >= 0; feature {at} has {float(threshold[at])}")
