"""How good an SAE is: sparsity, reconstruction, and what the model loses when it lives on the reconstruction.

Protocol of arXiv 2407.14435 and Gemma Scope 1 (arXiv 2408.05147, 3.3): special tokens, padding and attention sinks
are never replaced, and only predictions from the other, ordinary, positions count. The SAE is attached as anybody
attaches it, so every site, transcoder, dtype and device_map that can be hooked can be evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from sae_hooks.attach import attach_saes, detach_saes
from sae_hooks.errors import DataError, SaeAttachError
from sae_hooks.forward import eval_mode, input_device
from sae_hooks.measure import Group, Measurement, Trial, grouped, measure, ratio
from sae_hooks.sae import SAE
from sae_hooks.saes import Saes

from .attribution import Uniformity, own_gradients

Batches = Iterable[tuple[Tensor, Tensor]]


LOWEST, PER_DECADE = -8, 10  # of the histogram: a feature that fires once in 10^8 tokens, and fine enough to merge


@dataclass(frozen=True)
class FrequencyHistogram:
    """How many features fire how often: counts of log10 frequency from -8 to 0 in bins of 0.1, and how many never do.

    What is rarer than the first bin is counted in it.
    """

    counts: tuple[int, ...]
    dead: int

    @classmethod
    def of(cls, frequencies: Tensor) -> FrequencyHistogram:
        """Of shares of tokens (d_sae), each from 0 to 1."""
        alive = frequencies[frequencies > 0].double().cpu()
        bins = -LOWEST * PER_DECADE
        place = ((alive.log10() - LOWEST) * PER_DECADE + 1e-9).floor().long().clamp(0, bins - 1)
        return cls(tuple(torch.bincount(place, minlength=bins).tolist()), len(frequencies) - len(alive))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured.

    tokens: ordinary positions, the ones that were replaced. predictions: those from them, which the losses are means
    of, in nats a prediction: loss_clean of the model as it is, loss_spliced and loss_zero with x_hat and with zeros
    in place of x. l0: mean number of features active on a token. fvu: mean squared error over the mean squared
    distance to the mean activation, a ratio of dataset means. gamma: relative reconstruction bias E|x_hat|^2 /
    E[x_hat . x] (arXiv 2404.16014 eq. 9-10), below 1 for shrinkage. cosine: of x and x_hat, mean over tokens. For a
    transcoder, x in these is what it should write. dead, over_1_percent, over_10_percent: shares of the features that
    fired on no token, on more than 1 % and more than 10 % of them. uniformity: of the active features' importance
    (attribution.py), None if not asked for. text: SHA-256 of the token ids, for telling whether two evaluations are
    of the same text. frequencies (d_sae), float64: share of the tokens on which each feature fired.
    """

    tokens: int
    predictions: int
    l0: float
    fvu: float
    gamma: float
    cosine: float
    dead: float
    over_1_percent: float
    over_10_percent: float
    loss_clean: float
    loss_spliced: float
    loss_zero: float
    uniformity: float | None = None
    text: str = ""
    frequencies: Tensor = field(repr=False, compare=False)

    @property
    def delta_loss(self) -> float:
        """Nats a prediction that splicing costs: the paper's first measure."""
        return self.loss_spliced - self.loss_clean

    @property
    def loss_recovered(self) -> float:
        """1 where splicing costs nothing, 0 where it costs what zeros cost (arXiv 2404.16014, 2.3)."""
        return ratio(self.loss_zero - self.loss_spliced, self.loss_zero - self.loss_clean)

    @property
    def histogram(self) -> FrequencyHistogram:
        """The frequencies, binned."""
        return FrequencyHistogram.of(self.frequencies)

    def scalars(self) -> dict[str, float | int | None]:
        """All numbers by name, always in the same order; without text and frequencies."""
        plain = [f.name for f in fields(self) if f.name not in ("text", "frequencies")]
        return {name: getattr(self, name) for name in [*plain, "delta_loss", "loss_recovered"]}


def evaluate(model: nn.Module, sae: SAE, batches: Batches, special_ids: Sequence[int] = (), *,
             uniformity_positions: int = 0) -> Evaluation:
    """Measure one SAE at its own site in model; see `evaluate_all`."""
    return evaluate_all(model, {"sae": sae}, batches, special_ids, uniformity_positions=uniformity_positions)["sae"]


@torch.inference_mode(False)  # else nothing of it could take part in the backward passes of the uniformity
@torch.no_grad()
def evaluate_all(model: nn.Module, saes: Mapping[str, SAE], batches: Batches, special_ids: Sequence[int] = (), *,
                 uniformity_positions: int = 0) -> dict[str, Evaluation]:
    """Measure SAEs, each at its own site in model, on the same batches of (input_ids, attention_mask), each (batch,
    length), on any device: {name: Evaluation}, in the order given.

    Costs a clean forward pass a batch, a zero-ablated one for each site, a spliced one for each SAE. special_ids: ids
    that are left alone, besides the BOS, EOS and padding that the model's configs name. Attention sinks are told by
    metadata["typical_norm"], and are replaced like other tokens where an SAE has none. uniformity_positions: in how
    many positions of each window to measure the uniformity of attribution, a backward pass each (Evaluation's
    `uniformity`); 0 leaves it out. SAEs are used where they are or, if the site is on another device, as a copy
    there until the end.

    The model is left as it was, also after an error, and runs in eval mode. Raises SaeAttachError if SAEs are attached
    to it already, what attach_saes raises, DataError if the batches have no prediction to count.
    """
    if not saes:
        return {}
    uniformity = {name: Uniformity() for name in saes}
    text = hashlib.sha256()
    with _attached(model, saes, special_ids) as attached:
        measurements = {name: Measurement(attached._slots[name]) for name in saes}
        groups = grouped(list(measurements.values()), model)
        for ids, mask in batches:
            _take_text(text, ids, mask)
            device = input_device(model, ids.device)
            trial = Trial(model, attached._runtime, ids.to(device), mask.to(device))
            measure(trial, groups)
            if uniformity_positions:
                _attribute(trial, groups, uniformity, uniformity_positions)
    empty = [name for name, m in measurements.items() if not m.predictions]
    if empty:
        raise DataError("nothing to measure: the batches have no token that is neither special, padding nor an "
                        f"attention sink and has a next token (for {', '.join(empty)})")
    return {name: _evaluation(m, uniformity[name], text.hexdigest()) for name, m in measurements.items()}


def _evaluation(m: Measurement, uniformity: Uniformity, text: str) -> Evaluation:
    s = m.statistics
    over = {limit: float((s.frequencies > limit).double().mean()) for limit in (0.01, 0.1)}
    return Evaluation(
        tokens=s.n, predictions=m.predictions, l0=s.l0, fvu=s.fvu, gamma=s.gamma, cosine=s.cosine, dead=s.dead,
        over_1_percent=over[0.01], over_10_percent=over[0.1], loss_clean=m.loss_clean, loss_spliced=m.loss_spliced,
        loss_zero=m.loss_zero, uniformity=uniformity.mean if uniformity.tokens else None, text=text,
        frequencies=s.frequencies)


def _attribute(trial: Trial, groups: Iterable[Group], uniformity: Mapping[str, Uniformity], positions: int) -> None:
    """Take a trial into the uniformities, by the names of the slots; the SAEs of a group share the gradients."""
    for group in groups:
        x, gradient = own_gradients(trial, group, positions)
        for m in group.members:
            uniformity[m.slot.name].update(m.slot.on(x.device), x, gradient)


@contextmanager
def _attached(model: nn.Module, saes: Mapping[str, SAE], special_ids: Iterable[int]) -> Iterator[Saes]:
    """The model in eval mode with the SAEs attached under their names, for as long as the block lasts."""
    present = getattr(model, "saes", None)
    if isinstance(present, Saes) and len(present):
        raise SaeAttachError(
            f"SAEs are attached to this {type(model).__name__}: {', '.join(present)}; evaluate attaches those that it "
            "measures itself, so call detach_saes(model) first")
    with eval_mode(model):
        try:
            for name, sae in saes.items():
                attach_saes(model, sae, name=name)
            attached: Saes = model.saes  # type: ignore[assignment]
            attached.special_ids = attached.special_ids | set(special_ids)
            yield attached
        finally:
            detach_saes(model)


def _take_text(text: hashlib._Hash, ids: Tensor, mask: Tensor) -> None:
    """Hash each row's tokens, without padding; how rows are batched and padded makes no difference."""
    for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True):
        kept = row[keep].long().numpy()
        text.update(len(kept).to_bytes(8, "little") + kept.astype("<i8").tobytes())
