"""What speed.py compares: random data, and the ways of a training step and of inference. Not run by itself.

The dense ways are PyTorch's own operations; `Tuned` is the quickest dense step that we could write: five products,
chunk by chunk with everything between them in the cache, the backward pass by hand, into buffers that stay; by
torch.addmm, or by oneDNN, whose operator PyTorch has for its compiler, whichever is the quicker one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from speed_measure import Call, fastest
from torch import Tensor

from sae_hooks import SAE
from sae_hooks.training import Batch, JumpReLU, Learner, Objective, SiteInfo, TopK, Trainee

SITE = "model.layers.20.output"
SKEW, MOST_OFTEN = -0.8, 0.3  # features fire in proportion to their rank to this power, none more often
SPARSITY = 0.01  # beside errors of about 1 a token: the thresholds' gradients of both are of one size
LEARNING_RATE = 1e-9  # what is trained stays as it was, so that every step costs the same
BETAS = (0.0, 0.999)
CLEAR = 1e-5  # of a pre-activation's spread: no pre-activation is nearer to where rounding would decide
CHUNKS = (256, 1024)  # tokens: what Tuned tries
LEAVES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


# --- data ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """x (tokens, d_in) of mean squared norm 1; an SAE, whose W_enc is feature-major here: (d_sae, d_in)."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    bandwidth: float

    def leaves(self) -> dict[str, Tensor]:
        """The five tensors that are trained, on the same memory."""
        return {name: getattr(self, name).detach() for name in LEAVES}

    def sae(self) -> SAE:
        """The SAE, on the same memory."""
        return SAE(self.W_enc.t(), self.b_enc, self.W_dec, self.b_dec, threshold=self.threshold)

    def along(self) -> Tensor:
        """A gradient of reconstructions, as good as any: the activations of the token before."""
        return self.x.roll(1, 0)

    def first(self, tokens: int) -> "Data":
        """The same SAE, with fewer tokens."""
        return Data(**{**vars(self), "x": self.x[:tokens]})

    def counts(self) -> tuple[float, float]:
        """(L0, pairs held): a token's features above their thresholds, and those above the kernel's lower end."""
        active = held = 0
        for part in self.x.split(512):
            pre = torch.addmm(self.b_enc, part, self.W_enc.t())
            active += int((pre > self.threshold).sum())
            held += int((pre > self.threshold - self.bandwidth / 2).sum())
        return active / len(self.x), held / len(self.x)


def make_data(d_in: int, d_sae: int, tokens: int, l0: float, held: float | None = None, seed: int = 0) -> Data:
    """Gaussian x, unit-norm dictionary, one threshold a feature: l0 features of a token are active on average, and the
    STE's window adds so many that `held` have a value or a gradient (None: no window)."""
    g, sigma = torch.Generator().manual_seed(seed), d_in**-0.5
    W = F.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    cut = torch.special.ndtri(1 - firing_rates(d_sae, l0, g))  # in units of sigma
    threshold = (cut + 0.01 * torch.randn(d_sae, generator=g)).clamp(min=0.5)
    window = 0.0 if held is None else bisect(lambda u: float(torch.special.ndtr(u / 2 - cut).sum()), held, 100.0)
    data = Data(x=torch.empty(0, d_in), W_enc=W, b_enc=(sigma * (threshold - cut)).float(), W_dec=W.clone(),
                b_dec=0.1 * sigma * torch.randn(d_in, generator=g), threshold=(sigma * threshold).float(),
                bandwidth=sigma * window)
    return Data(**{**vars(data), "x": clear_tokens(data, tokens, g)})


def firing_rates(d_sae: int, l0: float, g: torch.Generator) -> Tensor:
    """How often each feature fires, float64: l0 in all, few often and most rarely, as in trained SAEs."""
    ranks = (torch.randperm(d_sae, generator=g) + 1).double() ** SKEW
    most = max(MOST_OFTEN, l0 / d_sae + 0.2)
    return (bisect(lambda c: float((c * ranks).clamp(max=most).sum()), l0, 1 / float(ranks.min())) * ranks).clamp(
        max=most)


def bisect(function: Callable[[float], float], value: float, high: float) -> float:
    """Where between 0 and high a growing function has that value."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > value else (middle, high)
    return low


def clear_tokens(data: Data, tokens: int, g: torch.Generator) -> Tensor:
    """Tokens none of whose pre-activations is so near to a threshold or an end of its window that rounding, which
    differs between the ways, would decide. So all ways must give the same to rounding."""
    d_in = data.W_enc.shape[1]
    edges = [data.threshold + shift * data.bandwidth / 2 for shift in ((-1, 0, 1) if data.bandwidth else (0,))]
    found: list[Tensor] = []
    while sum(len(part) for part in found) < tokens:
        part = torch.randn(min(tokens + 8, 256), d_in, generator=g) * d_in**-0.5
        pre = torch.addmm(data.b_enc, part, data.W_enc.t())
        near = torch.stack([((pre - edge).abs() < CLEAR * d_in**-0.5).any(1) for edge in edges]).any(0)
        found.append(part[~near])
    return torch.cat(found)[:tokens].clone()


# --- a training step: each way is a pair (its leaves, what leaves the loss's gradients in them and gives the loss) ---

Step = tuple[dict[str, Tensor], Callable[[], Tensor]]


class Jump(torch.autograd.Function):
    """JumpReLU with the straight-through gradient of its threshold, arXiv 2407.14435 eq. 11."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.bandwidth / 2
        return grad * (pre > threshold), -threshold / ctx.bandwidth * (grad * window).sum(0), None


class Heaviside(torch.autograd.Function):
    """The number of active features, with the straight-through gradient of the thresholds, eq. 12."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -1 / ctx.bandwidth * (grad * window).sum(0), None


def dense_step(data: Data, *, rows: bool = True) -> Step:
    """Plain autograd. rows: W_enc is kept feature-major; else (d_in, d_sae), as SAELens does."""
    leaves = {name: t.requires_grad_() for name, t in data.leaves().items()}
    if not rows:
        leaves["W_enc"] = data.W_enc.t().contiguous().requires_grad_()
    W_enc, b_enc, W_dec, b_dec, threshold = leaves.values()
    x = data.x

    def backward() -> Tensor:
        forget(leaves)
        pre = F.linear(x, W_enc, b_enc) if rows else torch.addmm(b_enc, x, W_enc)
        acts = Jump.apply(pre, threshold, data.bandwidth)
        error = (torch.addmm(b_dec, acts, W_dec) - x).square().sum(-1)
        loss = (error + SPARSITY * Heaviside.apply(pre, threshold, data.bandwidth).sum(-1)).mean()
        loss.backward()
        return loss.detach()

    return leaves, backward


def forget(leaves: Mapping[str, Tensor]) -> None:
    """No gradients."""
    for leaf in leaves.values():
        leaf.grad = None


def plainly(bias: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """bias + a @ b, in out."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def by_onednn(bias: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The same, in memory of its own."""
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.t(), bias, "none", [], "")


MULTIPLIED = {"": plainly, " by oneDNN": by_onednn}
if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    del MULTIPLIED[" by oneDNN"]


class Tuned:
    """The dense step by hand: see above. Pre-activations are taken less their thresholds (u), so that one vectorised
    operation each makes the gate and the window: threshold_backward and hardtanh_backward."""

    def __init__(self, data: Data, chunk: int, multiply: Callable[..., Tensor]) -> None:
        self.data, self.chunk, self.multiply = data, min(chunk, len(data.x)), multiply
        self.leaves = data.leaves()
        for leaf in self.leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        self.u, self.acts, self.to_acts = (torch.empty(self.chunk, len(data.W_enc)) for _ in range(3))
        self.mask = np.empty((self.chunk, len(data.W_enc)), dtype=bool)
        self.lack = torch.empty(self.chunk, data.x.shape[1])
        self.ones = torch.ones(self.chunk)

    def __call__(self) -> Tensor:
        loss = 0.0
        for name in ("b_enc", "b_dec", "threshold"):
            self.leaves[name].grad.zero_()
        price = SPARSITY / len(self.data.x)
        offset, cost = self.leaves["b_enc"] - self.leaves["threshold"], price / self.leaves["threshold"]
        for start in range(0, len(self.data.x), self.chunk):
            x = self.data.x[start:start + self.chunk]
            loss += self.forward(x, offset, price)
            self.backward(x, cost, float(start > 0))
        self.leaves["threshold"].grad *= -self.leaves["threshold"] / self.data.bandwidth
        return torch.tensor(loss)

    def forward(self, x: Tensor, offset: Tensor, price: float) -> float:
        """The part of the loss; leaves u, the features, and the gradient of x_hat in `lack`."""
        n, tokens = len(x), len(self.data.x)
        acts, mask = self.acts[:n], self.mask[:n]
        u = self.multiply(offset, x, self.leaves["W_enc"].t(), self.u[:n])
        torch.add(u, self.leaves["threshold"], out=acts)
        torch.ops.aten.threshold_backward.grad_input(acts, u, 0.0, grad_input=acts)
        lack = self.multiply(self.leaves["b_dec"], acts, self.leaves["W_dec"], self.lack[:n])
        lack -= x
        np.greater(u.numpy(), 0.0, out=mask)
        loss = float(lack.square().sum()) / tokens + price * np.count_nonzero(mask)
        lack *= 2 / tokens
        self.given = u, lack
        return loss

    def backward(self, x: Tensor, cost: Tensor, beta: float) -> None:
        """Add the chunk's gradients; beta 0: put them in place of what is there."""
        n, half = len(x), self.data.bandwidth / 2
        acts, ones, (u, lack) = self.acts[:n], self.ones[:n], self.given
        grad = {name: leaf.grad for name, leaf in self.leaves.items()}
        self.add(grad["W_dec"], acts.t(), lack, beta)
        grad["b_dec"] += lack.sum(0)
        to_acts = self.multiply(None, lack, self.leaves["W_dec"].t(), self.to_acts[:n])
        torch.add(to_acts, cost, out=acts)
        torch.ops.aten.hardtanh_backward.grad_input(acts, u, -half, half, grad_input=acts)
        grad["threshold"].addmv_(acts.t(), ones)
        torch.ops.aten.threshold_backward.grad_input(to_acts, u, 0.0, grad_input=to_acts)
        self.add(grad["W_enc"], to_acts.t(), x, beta)
        grad["b_enc"].addmv_(to_acts.t(), ones)

    def add(self, grad: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
        """grad * beta + a @ b, in grad."""
        if self.multiply is plainly:
            grad.addmm_(a, b, beta=beta)
        elif beta:
            grad += self.multiply(None, a, b, grad)
        else:
            grad.copy_(self.multiply(None, a, b, grad))


def tuned_step(data: Data, chunk: int, multiply: Callable[..., Tensor] = plainly) -> Step:
    """So many tokens at once."""
    tuned = Tuned(data, chunk, multiply)
    return tuned.leaves, tuned


def our_step(data: Data) -> Step:
    """The objective and its backward pass, as a Learner calls them."""
    sae, objective = data.sae(), JumpReLU(sparsity=SPARSITY, bandwidth=data.bandwidth)
    leaves = {name: getattr(sae, name).requires_grad_() for name in objective.trained}
    batch = Batch(x=data.x, target=data.x, step=0, idle=torch.zeros(sae.d_sae, dtype=torch.int64))

    def backward() -> Tensor:
        forget(leaves)
        loss = objective(sae, batch, {}).total
        loss.backward()
        return loss.detach()

    return leaves, backward


def our_update(data: Data, k: int | None = None) -> tuple[Learner, Callable[[], Tensor]]:
    """The whole of Learner.update: gradients of the decoder projected, its rows kept at norm 1, features counted. k: of
    TopK, in place of JumpReLU."""
    objective: Objective = JumpReLU(sparsity=SPARSITY, bandwidth=data.bandwidth)
    if k is not None:
        objective = TopK(k=k)
    d_sae, d_in = data.W_enc.shape
    learner = Learner(Trainee(name="speed", site=SITE, d_sae=d_sae, objective=objective, betas=BETAS,
                              learning_rate=LEARNING_RATE), {SITE: SiteInfo(d_in=d_in, rms_norm=1.0, typical_norm=1.0)})
    with torch.no_grad():
        for name in learner.trained:
            source = getattr(data, name)
            learner.trained[name].copy_(source.t() if name == "W_enc" else source)
    steps = iter(range(10**9))
    return learner, lambda: learner.update({SITE: data.x}, next(steps), 1.0).total.detach()


def with_adam(step: Step) -> Call:
    """Gradients, and then a step of fused Adam, which copies what is transposed and so is given it as it lies."""
    leaves, backward = step
    moved = {name: as_it_lies(leaf.detach()) for name, leaf in leaves.items()}
    optimizer = torch.optim.Adam(moved.values(), lr=LEARNING_RATE, betas=BETAS, fused=True)

    def whole() -> None:
        backward()
        for name, t in moved.items():
            t.grad = as_it_lies(leaves[name].grad)
        optimizer.step()
        optimizer.zero_grad()  # so that the next backward pass finds their memory free

    return whole


def as_it_lies(t: Tensor) -> Tensor:
    """A matrix, or its transpose, which has the features first."""
    return t if t.is_contiguous() else t.t()


def gradients(step: Step) -> dict[str, Tensor]:
    """The loss, and the gradients by name with W_enc's feature-major, of one backward pass."""
    leaves, backward = step
    loss = backward()
    shape = leaves["W_dec"].shape
    found = {name: leaf.grad for name, leaf in leaves.items()}
    if found["W_enc"].shape != shape:
        found["W_enc"] = found["W_enc"].t()
    return {"loss": loss, **found}


# --- inference -----------------------------------------------------------------------------------------------

def dense_encoder(data: Data) -> Callable[[Tensor], Tensor]:
    """x -> (tokens, d_sae) features: the quickest here of two layouts of W_enc and two ways to write the gate."""
    W_enc, b_enc, threshold, other = data.W_enc, data.b_enc, data.threshold, data.W_enc.t().contiguous()
    nothing = torch.zeros(())

    def gated(pre: Tensor) -> Tensor:
        return pre * (pre > threshold)

    def chosen(pre: Tensor) -> Tensor:
        return torch.where(pre > threshold, pre, nothing)

    ways = [lambda x: gated(F.linear(x, W_enc, b_enc)), lambda x: chosen(F.linear(x, W_enc, b_enc)),
            lambda x: gated(torch.addmm(b_enc, x, other)), lambda x: chosen(torch.addmm(b_enc, x, other))]
    return ways[fastest([lambda way=way: way(data.x[:256]) for way in ways])]


def tuned_inference(data: Data, chunk: int = 256) -> tuple[Call, Call]:
    """Dense by hand, so many tokens at once, into buffers: (x -> the values of its features, sparse; x -> x_hat)."""
    ways = [_tuned_inference(data, chunk, multiply) for multiply in MULTIPLIED.values()]
    return ways[fastest([lambda way=way: way[1](data.x) for way in ways])]


def _tuned_inference(data: Data, chunk: int, multiply: Callable[..., Tensor]) -> tuple[Call, Call]:
    u, acts = (torch.empty(chunk, len(data.W_enc)) for _ in range(2))
    offset = data.b_enc - data.threshold

    def encode(x: Tensor) -> Tensor:
        rest = multiply(offset, x, data.W_enc.t(), u[:len(x)])
        torch.add(rest, data.threshold, out=acts[:len(x)])
        return torch.ops.aten.threshold_backward.grad_input(acts[:len(x)], rest, 0.0, grad_input=acts[:len(x)])

    def values(x: Tensor) -> Tensor:
        found = []
        for part in x.split(chunk):
            flat = encode(part).view(-1)
            at = flat.nonzero().view(-1)
            rows, columns = at // len(data.W_enc), at % len(data.W_enc)
            found.append((rows, columns, flat.take(at)))
        return tuple(map(torch.cat, zip(*found, strict=True)))[2]

    def splice(x: Tensor) -> Tensor:
        x_hat = torch.empty_like(x)
        parts = [multiply(data.b_dec, encode(part), data.W_dec, out)
                 for part, out in zip(x.split(chunk), x_hat.split(chunk), strict=True)]
        return x_hat if multiply is plainly else torch.cat(parts)

    return values, splice
