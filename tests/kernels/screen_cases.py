"""What the tests of both screens share: an SAE's encoder, its tokens, and the exact word on them."""

import torch


def parts_of(dtype=torch.float32, n=24, d=33, d_sae=70):
    """x, W_rows, bias, threshold: about a tenth is active."""
    random = torch.Generator().manual_seed(0)
    x, W_rows, bias = (torch.randn(shape, generator=random) for shape in ((n, d), (d_sae, d), (d_sae,)))
    x *= torch.logspace(-2, 3, n)[:, None]  # tokens of very different norms, as a model's first one
    threshold = exact(x, W_rows.to(dtype), bias).quantile(0.9, dim=0).float()
    return x, W_rows.to(dtype), bias, threshold


def exact(x, W_rows, bias):
    return x.double() @ W_rows.double().T + bias.double()
