"""Tiny models and SAEs for the training tests."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae_hooks.sae import SAE

BOS, SINK = 1, 7  # SINK: a token id whose embedding makes a massive activation


@pytest.fixture
def model_with_a_sink_token() -> LlamaForCausalLM:
    """Two Llama layers, d 16, in which token SINK (7) has an activation a hundred times too long."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                         bos_token_id=BOS, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[SINK] *= 100
    return model.requires_grad_(False)


@pytest.fixture
def sae64() -> SAE:
    """A random float64 SAE, d_in 6, d_sae 24, whose thresholds lie amid the pre-activations."""
    g = torch.Generator().manual_seed(3)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=g)

    return SAE(normal(6, 24), 0.1 * normal(24), normal(24, 6), normal(6), threshold=normal(24).abs())
