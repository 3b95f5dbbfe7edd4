"""What the tests of edits in a plain forward pass share: rows of ids, SAEs that fit a place, edits that matter."""

import torch
from core.reference import FullEdit, array, edited, encode, ordinary, relative, sample, seen
from tiny_models import ARCHITECTURES, MULTIMODAL, make_sae

from sae_hooks import sites

EVERY = [*ARCHITECTURES, MULTIMODAL]
NAN = float("nan")
IDS = torch.tensor([[0, 0, 2, 17, 45, 99, 23], [2, 31, 13, 77, 120, 64, 33], [2, 50, 60, 70, 80, 2, 100]])
MASK = (IDS != 0).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
SITE = "model.layers.1.output"
STRENGTHS = {
    "clamp": (9.0, -2.0, torch.tensor([5.0, NAN, 0.0])),
    "scale": (3.0, 0.0, torch.tensor([-1.0, 2.0, NAN])),
    "add": (5.0, -2.0, torch.tensor([NAN, NAN, 4.0])),
}


def strengths(op, features):
    """An edit of three features: a number, a number, and one for each row."""
    return dict(zip(features, STRENGTHS[op], strict=False))


def outcome(model, *places, **inputs):
    """What passes at the sites, and the logits."""
    with seen(model, *places) as lists:
        logits = model(**(inputs or INPUTS)).logits
    return [one[0] for one in (lists if len(places) > 1 else [lists])], logits


def made_for(model, kind, layer=1, **settings):
    """A random SAE for an alias of a layer."""
    read, write = sites.alias(model, layer, kind)
    source, target = sample(model, read, IDS), sample(model, write, IDS)
    return make_sae(source.shape[-1], 64, read, like=source, d_out=target.shape[-1], site_out=write, **settings)


def firing(sae, x):
    """The features that fire at most of the ordinary tokens, where x (3, 7, d) is read; most often first."""
    acts = torch.from_numpy(encode(sae, array(x)))[ordinary(IDS, MASK)]
    return (acts > 0).sum(0).sort(descending=True, stable=True).indices[:8].tolist()


def hold_as_full_edit(model, sae, op, values, clean):
    """An edit of an attached SAE changes what the full encode, edit and decode change, at the ordinary tokens alone;
    clean is what stands there without it."""
    with FullEdit(model, sae, lambda acts: edited(acts, op, values), read=sae.site, write=sae.site_out):
        (want,), want_logits = outcome(model, sae.site_out)
    with getattr(model.saes, op)(values) as handle:
        (got,), logits = outcome(model, sae.site_out)
    assert relative(got, want) < 1e-5
    assert relative(logits, want_logits) < 1e-5
    assert relative(got, clean) > 1e-3
    chosen = ordinary(IDS, MASK)
    assert handle.positions_edited == chosen.sum()
    special = (~chosen).reshape(got.shape[:-1]) if got.ndim == 3 else (~chosen).flatten()
    assert torch.equal(got[special], clean[special])
