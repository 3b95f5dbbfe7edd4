"""Random models of every architecture whose sites have aliases, and random SAEs: small and quick."""

import math

import torch

from sae_hooks.sae import SAE

HIDDEN, VOCABULARY, POSITIONS = 32, 128, 128
LLAMA_LIKE = {
    "hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS, "initializer_range": 0.15}
SIXTEEN_WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

# architecture -> (model class, config class, number of layers is called, its own settings). The weights'
# spread is seven times the usual one: at width 32 a layer would otherwise add almost nothing.
ARCHITECTURES = {
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", "num_hidden_layers", {
        **LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "Gemma3Text": ("Gemma3ForCausalLM", "Gemma3TextConfig", "num_hidden_layers", {
        **LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", "num_hidden_layers", LLAMA_LIKE),
    "Mistral": ("MistralForCausalLM", "MistralConfig", "num_hidden_layers", {
        **LLAMA_LIKE, "head_dim": 8, "sliding_window": None}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", "num_hidden_layers", LLAMA_LIKE),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", "num_hidden_layers", {**LLAMA_LIKE, "head_dim": 8}),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", "num_hidden_layers", {
        **LLAMA_LIKE, "original_max_position_embeddings": POSITIONS}),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", "n_layer", {
        "n_embd": HIDDEN, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.15}),
    "GPTNeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", "num_hidden_layers", {
        "hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS, "initializer_range": 0.15}),
    "OPT": ("OPTForCausalLM", "OPTConfig", "num_hidden_layers", {
        "hidden_size": HIDDEN, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": POSITIONS, "init_std": 0.15}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", "n_layer", {
        "hidden_size": HIDDEN, "n_head": 4, "initializer_range": 0.15}),
}
MULTIMODAL = "Gemma3"  # Gemma3ForConditionalGeneration: the text model inside a wrapper with a vision tower


def make_model(architecture, layers=3, seed=0, **settings):
    """A model in float32, eval mode, eager attention: width 32, vocabulary 128, pad 0, bos 2, no eos.

    architecture: a key of ARCHITECTURES, or "Gemma3" for the multimodal wrapper. Further settings go to the
    config (of the text model). The same arguments give the same weights; the random state is left alone.
    """
    import transformers

    if architecture == MULTIMODAL:
        model_class, config = transformers.Gemma3ForConditionalGeneration, multimodal_config(layers, settings)
    else:
        names = ARCHITECTURES[architecture]
        model_class, config = getattr(transformers, names[0]), text_config(architecture, layers, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def text_config(architecture, layers, settings):
    import transformers

    _, config_class, layers_name, own = ARCHITECTURES[architecture]
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None}
    return getattr(transformers, config_class)(**{**tokens, **own, layers_name: layers, **settings})


def multimodal_config(layers, settings):
    """Gemma 3 with a vision tower of 2 x 2 patches; an image stands for 4 tokens of id 5."""
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=text_config("Gemma3Text", layers, settings).to_dict(),
        vision_config={**SIXTEEN_WIDE, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
        pad_token_id=0, bos_token_id=2, eos_token_id=None)


def make_sae(d_in, d_sae, site="model.layers.1.output", seed=0, *, norm=None, like=None, k=None, d_out=None,
             site_out=None, skip=False, dtype=torch.float32):
    """A random SAE of which about a tenth of the features fires: thresholds per feature, or TopK with `k`.

    The thresholds fit activations whose L2 norm is about `norm`; or give a sample of them as `like`
    (..., d_in), and it is their median. The default, sqrt(d_in), suits unit-variance noise; tiny_gemma2's is
    12 (embedding), 23, 29, 34 (after layers 0, 1, 2). It is kept as typical_norm.
    Encoder rows are the decoder's, a little off; all weights are of `dtype` but the biases and thresholds.
    """
    if norm is None:
        norm = math.sqrt(d_in) if like is None else like.float().flatten(0, -2).norm(dim=-1).median().item()
    d_out, random = d_out or d_in, torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, max(d_in, d_out), generator=random), dim=-1)
    W_enc = directions[:, :d_in].T + 0.01 * torch.randn(d_in, d_sae, generator=random)
    spread = norm * W_enc.norm(dim=0) / math.sqrt(d_in)  # of x W_enc over directions of x
    threshold = spread * (1.15 + 0.25 * torch.rand(d_sae, generator=random))  # 1.28 is a normal's upper tenth
    b_enc = 0.02 * norm * torch.randn(d_sae, generator=random) / math.sqrt(d_in)
    b_dec = 0.02 * norm * torch.randn(d_out, generator=random)
    W_skip = 0.1 * torch.randn(d_in, d_out, generator=random).to(dtype) if skip else None
    gate = {"threshold": threshold} if k is None else {"k": k}
    return SAE(W_enc.to(dtype), b_enc, directions[:, :d_out].contiguous().to(dtype), b_dec, W_skip=W_skip,
               site=site, site_out=site_out, metadata={"typical_norm": norm}, **gate)
