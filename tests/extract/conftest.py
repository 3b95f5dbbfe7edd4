"""tiny_gemma2 with an SAE, and its export."""

import pytest
from extract.exports import ROWS, SITE

from sae_hooks import attach_saes
from sae_hooks.export import export_features


@pytest.fixture
def model(tiny_gemma2, random_sae):
    return attach_saes(tiny_gemma2, random_sae(192, 512, SITE, norm=34))


@pytest.fixture
def export(model, tiny_tokenizer):
    """export(folder, documents=ROWS, model=model, **changes)"""
    def run(folder, documents=ROWS, model=model, **changes):
        settings = {"tokenizer": tiny_tokenizer, "tokens_per_shard": 40, "window": 32, "overlap": 4} | changes
        return export_features(model, documents, folder, **settings)
    return run
