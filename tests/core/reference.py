"""The same mathematics written a second time, from the equations: numpy, float64, full encode, error term kept.

Nothing here uses the code under test but the plain tensors of an SAE. `FullEdit` is what an edit means, in a plain
torch hook: the edited features of every token decoded, the reconstruction error of the clean features added back.
"""

import contextlib
import math

import numpy as np
import torch

SPECIAL = (0, 2)  # pad and bos of the random models; tiny_gemma2 has eos 1 besides


def array(tensor):
    return tensor.detach().double().cpu().numpy()


def encode(sae, x):
    """Feature activations (..., d_sae) of x (..., d_in): JumpReLU, arXiv 2407.14435 eq. 8, or the k largest, relu'd."""
    pre = x @ array(sae.W_enc) + array(sae.b_enc)
    if sae.k is None:
        return np.where(pre > array(sae.threshold), pre, 0.0)
    kept = np.zeros_like(pre, dtype=bool)
    np.put_along_axis(kept, np.argsort(-pre, axis=-1, kind="stable")[..., :sae.k], True, axis=-1)
    return np.where(kept & (pre > 0), pre, 0.0)


def decode(sae, acts):
    return acts @ array(sae.W_dec) + array(sae.b_dec)


def reconstruct(sae, x):
    skip = 0.0 if sae.W_skip is None else x @ array(sae.W_skip)
    return decode(sae, encode(sae, x)) + skip


def edited(acts, op, values, only_if_active=False):
    """acts (batch, tokens, d_sae) with an operation on some features; tensors of strengths hold one a request."""
    new = acts.copy()
    for feature, value in values.items():
        strengths = value.tolist() if isinstance(value, torch.Tensor) else [value]
        for row in range(len(acts)):
            strength = strengths[row * len(strengths) // len(acts)]
            if math.isnan(strength):
                continue
            old = acts[row, :, feature]
            target = {"clamp": np.full_like(old, strength), "scale": old * strength, "add": old + strength}[op]
            new[row, :, feature] = np.where(old > 0, target, old) if only_if_active else target
    return new


def ordinary(ids, mask=None, special=SPECIAL):
    """Boolean (batch, tokens): neither a special token nor padding."""
    keep = ~torch.isin(ids, torch.tensor(special))
    return keep if mask is None else keep & mask[:, : ids.shape[1]].bool()


class FullEdit:
    """A plain hook: x' = decode(edit(encode(x))) + (x - decode(encode(x))) at the chosen positions, else x.

    edit maps acts (batch, tokens, d_sae) to new ones; choose maps (ids, mask) of the pass to a boolean (batch, tokens).
    Sees whole sequences only, so the model must run without a KV cache. read and write are sites ("path.side").
    """

    def __init__(self, model, sae, edit, *, read="model.layers.1.output", write=None, choose=ordinary, keep_error=True):
        self.sae, self.edit, self.choose, self.keep_error = sae, edit, choose, keep_error
        self.model, self.read, self.write = model, read, write or read

    def __enter__(self):
        self.handles = [self.model.register_forward_pre_hook(self._note, with_kwargs=True)]
        if self.read != self.write:
            self.handles.append(tap(self.model, self.read, self._stash))
        self.handles.append(tap(self.model, self.write, self._change))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _note(self, module, args, kwargs):
        self.ids = args[0] if args else kwargs["input_ids"]
        self.mask = kwargs.get("attention_mask")

    def _stash(self, x):
        self.source = x

    def _change(self, x):
        source = array(self.source if self.read != self.write else x).reshape(*self.ids.shape, -1)
        acts = encode(self.sae, source)
        clean = decode(self.sae, acts)
        wide = array(x).reshape(clean.shape)
        error = wide - clean if self.keep_error else 0.0 if self.sae.W_skip is None else source @ array(self.sae.W_skip)
        new = decode(self.sae, self.edit(acts)) + error
        new = np.where(self.choose(self.ids, self.mask).numpy()[..., None], new, wide)
        return torch.from_numpy(new).reshape(x.shape).to(x.dtype)


def tap(model, site, fn):
    """A plain hook at a site: fn(x) may return what stands there instead. Returns the handle."""
    path, _, side = site.rpartition(".")
    module = model.get_submodule(path)

    def after(module, args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        new = fn(x)
        if new is None:
            return None
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    def before(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        new = fn(x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return module.register_forward_hook(after) if side == "output" else module.register_forward_pre_hook(
        before, with_kwargs=True)


@contextlib.contextmanager
def seen(model, *sites):
    """Lists of what passes at each site, as later modules receive it."""
    lists = [[] for _ in sites]
    handles = [tap(model, site, lambda x, note=note: note.append(x.detach().clone())) for site, note in zip(
        sites, lists, strict=True)]
    try:
        yield lists if len(lists) > 1 else lists[0]
    finally:
        for handle in handles:
            handle.remove()


def sample(model, site, ids, **inputs):
    """The activations (batch, tokens, d) at a site, without any SAE."""
    with torch.no_grad(), seen(model, site) as xs:
        model(input_ids=ids, **inputs)
    x = xs[0]
    return x if x.ndim == 3 else x.reshape(*ids.shape, -1)


def relative(got, want):
    """Distance of two tensors, relative to the second."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
