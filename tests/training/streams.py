"""Tiny streams for the tests of the training: shards on disk, synthetic sparse data, tiny-gemma2 on text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_hooks.training import (
    BatchTopK,
    CachedStream,
    Gated,
    HarvestInfo,
    JumpReLU,
    ReLU,
    SiteInfo,
    Stream,
    TanhJumpReLU,
    TopK,
    Trainee,
)
from sae_hooks.training.live import LiveStream

IN, OUT = "model.layers.1.output", "model.layers.1.post_feedforward_layernorm.output"
WIDTHS = {IN: 16, OUT: 12}
RMS = {IN: 7.0, OUT: 0.6}  # far from 1 and from each other
SPECIAL = (0, 1, 2)  # of tiny-gemma2: padding, EOS, BOS

JUMPRELU = JumpReLU(sparsity=0.05, bandwidth=0.1, l0=None, warmup=4)
OBJECTIVES = {
    "jumprelu": JUMPRELU,
    "jumprelu-l0-batch": JumpReLU(sparsity=0.5, l0=3),
    "jumprelu-l0-token": JumpReLU(sparsity=0.1, l0=3, form="token", kernel="triangle"),
    "jumprelu-prefixes": JumpReLU(sparsity=0.05, prefixes=(4, 12)),
    "jumprelu-pre-bias": JumpReLU(sparsity=0.05, pre_bias=True),
    "tanh": TanhJumpReLU(sparsity=0.1, scale=10.0, pre_act=1e-3, bandwidth=0.3),
    "gated": Gated(sparsity=0.1),
    "relu": ReLU(sparsity=0.1),
    "topk": TopK(k=2, aux_k=4, dead_after=64),
    "batchtopk": BatchTopK(k=2, aux_k=4, dead_after=64),
}


def trainees(**changes: Any) -> list[Trainee]:
    """One of every objective, and of every kind of trainee: with a log threshold, in bfloat16, transcoders."""
    given: dict[str, Any] = {"site": IN, "d_sae": 24, "learning_rate": 0.01} | changes
    found = [Trainee(name=name, objective=objective, **given) for name, objective in OBJECTIVES.items()]
    given["objective"] = JUMPRELU
    low = replace(JUMPRELU, threshold=0.05)
    found += [Trainee(name="log-threshold", log_threshold=True, **given | {"objective": low}),
              Trainee(name="not-centred", centre=False, seed=1, **given),
              Trainee(name="clipped", clip=1.02, **given), Trainee(name="bf16", bf16=True, **given)]
    across = given | {"site_out": OUT}
    return [*found, Trainee(name="transcoder", **across), Trainee(name="transcoder-skip", skip=True, **across),
            Trainee(name="transcoder-topk", skip=True, **across | {"objective": OBJECTIVES["topk"]})]


def store(folder: Path, rows: int = 600, seed: int = 0, **changes: Any) -> Path:
    """Two shards of a site of 16 and one of 12 values, whose rows are few directions each, off the origin."""
    g = torch.Generator().manual_seed(seed)
    for site, width in WIDTHS.items():
        x = sparse_rows(rows, unit_rows(24, width, g), 3, g) + 0.3 * torch.randn(width, generator=g)
        write(folder, site, RMS[site] * x / x.square().sum(1).mean().sqrt(), RMS[site], **changes)
    return folder


def write(folder: Path, site: str, x: Tensor, rms_norm: float, **changes: Any) -> None:
    """A site's harvest, as `harvest` would leave it: x (n, d) in two shards."""
    (folder / site).mkdir(parents=True, exist_ok=True)
    info = HarvestInfo(**{"site": site, "model_name": "tiny", "typical_norm": 0.9 * rms_norm, "rms_norm": rms_norm,
                          "d_in": x.shape[1], "window": 5, "seed": 0} | changes)
    (folder / site / "harvest.json").write_text(json.dumps(asdict(info)))
    for n, part in enumerate(x.to(torch.bfloat16).split(-(-len(x) // 2))):
        save_file({"x": part.contiguous()}, folder / site / f"shard-{n:05d}.safetensors")


def cached(folder: Path, **changes: Any) -> CachedStream:
    """The stored rows, again and again."""
    return CachedStream(folder, **{"seed": 3, "epochs": None} | changes)


def live(model: nn.Module, sites: Sequence[str] = (IN, OUT), **changes: Any) -> LiveStream:
    """tiny-gemma2 on windows of random tokens, through a buffer that is refilled every few batches."""
    given: dict[str, Any] = {"windows": some_windows, "special_ids": SPECIAL, "buffer_tokens": 200, "epochs": None,
                             "tokens_per_batch": 64, "seed": 3} | changes
    return LiveStream(model, sites, **given)


def tiny_gemma2() -> nn.Module:
    """The model of `live`."""
    from transformers import AutoModelForCausalLM

    folder = Path(__file__).parents[1] / "models" / "tiny-gemma2"
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model


def some_windows(epoch: int, n: int = 30) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """Windows of 6 to 15 tokens, other ones each epoch, each beginning with BOS."""
    random = np.random.default_rng(epoch)
    for length in random.integers(5, 15, n):
        yield np.concatenate([[2], random.integers(3, 4096, length)]).astype(np.int32)


def unit_rows(n: int, width: int, g: torch.Generator) -> Tensor:
    """n random directions."""
    return torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=1)


def sparse_rows(n: int, dictionary: Tensor, active: float, g: torch.Generator) -> Tensor:
    """n sums of the dictionary's rows, each there with the same chance, `active` of them on average, with a weight
    uniform in 0.5 ... 1.5."""
    on = torch.rand(n, len(dictionary), generator=g) < active / len(dictionary)
    return (on * (0.5 + torch.rand(n, len(dictionary), generator=g))) @ dictionary


def tensors(sae: nn.Module) -> dict[str, Tensor]:
    """All of an SAE's tensors."""
    return dict(sae.named_parameters())


def unequal(some: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> list[str]:
    """Names of SAEs that are not of the same bits."""
    assert list(some) == list(others)
    return [name for name, sae in some.items()
            if tensors(sae).keys() != tensors(others[name]).keys()
            or not all(torch.equal(t, tensors(others[name])[key]) for key, t in tensors(sae).items())]


class Watched:
    """Another stream, that does something before a step."""

    def __init__(self, stream: Stream, step: int, do: Callable[[], object]) -> None:
        self.stream, self.left, self.do = stream, step, do

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def next(self, size: int) -> dict[str, Tensor]:
        """The other's next rows."""
        if self.left == 0:
            self.do()
        self.left -= 1
        return self.stream.next(size)


class Synthetic:
    """A `Stream` without end of `sparse_rows`, whose dictionary is known; normalised by its true mean square."""

    model_name = "synthetic"

    def __init__(self, dictionary: Tensor, active: float, seed: int = 0) -> None:
        self.dictionary, self.active = dictionary, active
        self.generator = torch.Generator().manual_seed(seed)
        sample = sparse_rows(20_000, dictionary, active, torch.Generator().manual_seed(1))
        norms = sample.norm(dim=1)
        rms, typical = float(norms.square().mean().sqrt()), float(norms.median())
        self.sites = {IN: SiteInfo(d_in=dictionary.shape[1], rms_norm=rms, typical_norm=typical)}

    def check_left(self, size: int) -> None:
        """There are always more."""

    def next(self, size: int) -> dict[str, Tensor]:
        """The next rows."""
        x = sparse_rows(size, self.dictionary, self.active, self.generator)
        return {IN: x / self.sites[IN].rms_norm}

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self.generator.set_state(state["generator"])
