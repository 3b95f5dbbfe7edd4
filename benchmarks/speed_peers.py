"""Other libraries, given the weights of speed.py: a training step of each, and inference. Not run by itself.

They are imported where they are used: each lives in an environment of its own, where sae_hooks is not.
"""

from collections.abc import Callable
from typing import Any

import torch

PEERS = {"SAELens": "sae-lens==6.54.12", "dictionary_learning": "dictionary-learning==0.1.0",
         "sparsify": "eai-sparsify==1.3.3"}
LEARNING_RATE = 1e-9
K = 60  # of TopK

Tensors = dict[str, Any]
Calls = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


# --- a training step: (it, its module) -----------------------------------------------------------------------

Peer = tuple[Callable[[], Any], Any]


def saelens(t: Tensors) -> Peer:
    """SAETrainer.step, as its fit() calls it, for the same objective."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_sae, d_in = t["W_enc"].shape
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, l0_coefficient=0.01, jumprelu_bandwidth=t["bandwidth"], apply_b_dec_to_input=False))
    put(t, sae)
    trainer = SAETrainer(SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=len(t["x"]), lr=LEARNING_RATE, lr_end=LEARNING_RATE,
        adam_beta1=0.0, adam_beta2=0.999, logger=LoggingConfig(log_to_wandb=False)), sae, iter(()))

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(t["x"])
        trainer.n_training_steps += 1

    return step, sae


def dictionary_learning(t: Tensors) -> Peer:
    """JumpReluTrainer.update; its sparsity loss is quadratic in L0."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    d_sae, d_in = t["W_enc"].shape
    trainer = JumpReluTrainer(steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", device="cpu",
                              lr=LEARNING_RATE, bandwidth=t["bandwidth"], target_l0=60.0, warmup_steps=1,
                              sparsity_warmup_steps=1)
    put(t, trainer.ae)
    steps = iter(range(1, 10**6))
    return (lambda: trainer.update(next(steps), t["x"])), trainer.ae


def sparsify(t: Tensors) -> Peer:
    """A step of its Trainer: SparseCoder's own sparse path for TopK, unit norms, and fused Adam. It takes b_dec off x,
    which b_enc makes good."""
    coder = sparse_coder(t)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.999), fused=True)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(t["x"]).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step, coder


STEPS = {"SAELens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def sparse_coder(t: Tensors) -> Any:
    """sparsify's TopK SAE."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    d_sae, d_in = t["W_enc"].shape
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=K))
    with torch.no_grad():
        coder.encoder.weight.copy_(t["W_enc"])
        coder.encoder.bias.copy_(t["b_enc"] + t["W_enc"] @ t["b_dec"])
        coder.W_dec.copy_(t["W_dec"])
        coder.b_dec.copy_(t["b_dec"])
    return coder


def put(t: Tensors, module: Any) -> Any:
    """A peer's JumpReLU SAE, given the weights."""
    with torch.no_grad():
        module.W_enc.copy_(t["W_enc"].t())
        for name in ("b_enc", "W_dec", "b_dec", "threshold"):
            getattr(module, name).copy_(t[name])
    return module


@torch.no_grad()
def seen(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What a peer's SAE makes of x: (reconstruction, L0)."""
    found = module.encode(x)
    if isinstance(found, torch.Tensor):
        return module.decode(found), float((found > 0).sum(-1).float().mean())
    return module.decode(found.top_acts, found.top_indices), float((found.top_acts > 0).sum(-1).float().mean())


# --- inference: (x -> the values of its features, sparse; x -> x_hat) -----------------------------------------

def of_module(module: Any) -> Calls:
    """A peer's dense SAE."""
    return (lambda x: module.encode(x).to_sparse_csr().values()), module


def saelens_inference(t: Tensors) -> Calls:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    d_sae, d_in = t["W_enc"].shape
    return of_module(put(t, JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))))


def dictionary_learning_inference(t: Tensors) -> Calls:
    from dictionary_learning.dictionary import JumpReluAutoEncoder

    return of_module(put(t, JumpReluAutoEncoder(*t["W_enc"].shape[::-1])))


def sparsify_inference(t: Tensors) -> Calls:
    """Without its forward, which computes a loss, too."""
    coder = sparse_coder(t)

    def splice(x: torch.Tensor) -> torch.Tensor:
        found = coder.encode(x)
        return coder.decode(found.top_acts, found.top_indices)

    return (lambda x: coder.encode(x).top_acts), splice


INFERENCE = {"SAELens": saelens_inference, "dictionary_learning": dictionary_learning_inference,
             "sparsify": sparsify_inference}
