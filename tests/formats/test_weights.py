"""Foldings that the dialects share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_hooks.formats.weights import subtract_from_bias


class Largest(TorchDispatchMode):
    """Notes the most bytes that any result takes on memory of its own."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def test_a_shift_is_folded_in_without_a_second_encoder_in_memory():
    draw = torch.Generator().manual_seed(0)
    W_enc, b_enc, shift = (torch.randn(*size, generator=draw) for size in ((16, 40_000), (40_000,), (16,)))
    with Largest() as largest:
        folded = subtract_from_bias(b_enc, shift, W_enc)
    assert largest.bytes <= 16 * 4096 * 8  # 40 % of the encoder's; one in float64 would be 200 %
    expected = b_enc.numpy() - shift.double().numpy() @ W_enc.double().numpy()
    assert folded.dtype == torch.float32
    assert torch.allclose(folded.double(), torch.from_numpy(expected), rtol=0, atol=2e-6)
