"""`l0=` is met at the end of a training, in both of the published forms, with the coefficients that they have if none
is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2ForCausalLM

from sae_hooks.sae import SAE
from sae_hooks.training import CachedStream, JumpReLU, TrainConfig, Trainee, harvest, train
from sae_hooks.training.harvest import measure_sites
from sae_hooks.training.text import documents, windows

from . import streams
from .streams import SPECIAL

ROOT = Path(__file__).parents[2]
SITE = "model.layers.2.output"
TARGETS, FORMS = (10, 30, 100), ("batch", "token")
STEPS, TOKENS = 250, 16_000


@pytest.fixture(scope="module")
def activations(tiny_gemma2_loaded: Gemma2ForCausalLM, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory,
                ) -> CachedStream:
    """tiny-gemma2 on this repository's own text."""
    texts = [path.read_text() for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("sae_hooks/*.py")))]
    some = list(windows(documents(texts), tiny_tokenizer, 128))
    some = some[:: max(1, 128 * len(some) // TOKENS)]
    infos = measure_sites(tiny_gemma2_loaded, [SITE], some, SPECIAL)
    rows = harvest(tiny_gemma2_loaded, {SITE: infos[SITE].typical_norm}, some, SPECIAL)[SITE]
    folder = tmp_path_factory.mktemp("activations")
    streams.write(folder, SITE, rows, infos[SITE].rms_norm)
    return CachedStream(folder, epochs=None)


@pytest.fixture(scope="module")
def trained(activations: CachedStream) -> dict[str, SAE]:
    some = [Trainee(name=f"{form} {l0}", site=SITE, d_sae=512, learning_rate=2e-3,
                    objective=JumpReLU(l0=l0, form=form, warmup=STEPS // 4))  # type: ignore[arg-type]
            for form in FORMS for l0 in TARGETS]
    config = TrainConfig(steps=STEPS, batch_size=256, warmup=20, decay=0.3)
    return train(activations, some, config, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("l0", TARGETS)
def test_an_l0_target_is_met_within_five_percent(
        l0: int, form: str, trained: dict[str, SAE], activations: CachedStream) -> None:
    x = activations.next(8000)[SITE] * activations.sites[SITE].rms_norm

    found = float((trained[f"{form} {l0}"].encode(x) > 0).sum(1).double().mean())

    assert abs(found / l0 - 1) < 0.05
    assert torch.isfinite(trained[f"{form} {l0}"](x)).all()
