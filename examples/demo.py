"""See, steer and ablate features of SmolLM2-135M with the SAE of this folder: `make demo`, or

    python examples/demo.py
    python examples/demo.py --feature 1234 --prompt "My favourite place is" --out features/

Everything is read from the files: where the SAE belongs, what its features are called, which texts to look at. The
first run unpacks the model (smollm2.py), later ones start at once. Written to be read from top to bottom: each
function below is one thing that sae_hooks can do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_matrix
from smollm2 import load_smollm2
from transformers.utils.logging import disable_progress_bar

from sae_hooks import FeatureStore, SparseFeatures, attach_saes, export_features

HERE = Path(__file__).parent
DOCUMENTS = HERE / "data" / "documents.jsonl"
SENTENCE = "And the king said unto them: if the file is empty, return an error."
PROMPT = "I went for a walk in the city and"
TIMES_MAXIMUM = (0.5, 1.0, 1.5, 2.5)  # strengths of the sweep, in units of the feature's own strongest activation
CHECKED = 8  # documents
TOKENS_PER_DOCUMENT = 40  # so that 288 of them take half a minute on two cores
GEMMA = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
from sae_hooks import attach_saes
model = AutoModelForCausalLM.from_pretrained("google/gemma-2-9b", device_map="auto")
attach_saes(model, "google/gemma-scope-9b-pt-res", layer=20)
with model.saes.clamp({1234: 80.0}): ...  # and model.generate(...) as ever"""

console = Console(highlight=False)


def main() -> None:
    args = arguments().parse_args()
    disable_progress_bar()  # transformers' own
    started = time.monotonic()

    with step("The model, with the SAE attached"):
        model, tokenizer = load(args.sae)
        labels = read_labels(args.sae)
        console.print(model.saes)

    documents = [json.loads(line) for line in DOCUMENTS.read_text(encoding="utf-8").splitlines()]
    with step("What the reconstruction costs the model, on excerpts it was not trained on"):
        show_losses(model, tokenizer, documents)

    with tempfile.TemporaryDirectory() as temporary:
        with step(f"Features of {len(documents)} documents, exported and read back"):
            store = export(model, tokenizer, documents, args.out or Path(temporary))
            catalogue = Catalogue(store, tokenizer, labels)
            show_specific(catalogue)
        show_features(args, model, tokenizer, catalogue)

    model.saes.detach()
    console.rule(f"done in {time.monotonic() - started:.0f} s; the same on Gemma 2 9B")
    console.print(GEMMA, markup=False, soft_wrap=True)


def show_features(args: argparse.Namespace, model: Any, tokenizer: Any, catalogue: Catalogue) -> None:
    """Tokens, a sweep, an ablation, an edit as JSON."""
    with step(f"The strongest features of each token of {SENTENCE!r}"):
        show_tokens(model, tokenizer, catalogue)

    feature = catalogue.showpiece() if args.feature is None else args.feature
    strongest = catalogue.maximum(feature)
    with step(f"One call of generate, a strength a row: feature {feature} ({catalogue.describe(feature)})"):
        strengths = [float("nan"), *(times * strongest for times in TIMES_MAXIMUM)]
        show_texts(args.prompt, strengths, sweep(model, tokenizer, args.prompt, feature, strengths))

    opening = catalogue.opening(feature)
    with step("The same feature ablated, on an opening where it fires"):
        show_ablation(model, tokenizer, opening, feature)

    with step("An edit as JSON: saved, applied again, the same text"):
        share(model, tokenizer, args.prompt, feature, strongest)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sae", type=Path, default=HERE / "sae-smollm2-135m", help="folder of the SAE")
    p.add_argument("--feature", type=int, help="steer with this one (default: the most specific to a domain)")
    p.add_argument("--prompt", default=PROMPT)
    p.add_argument("--out", type=Path, help="keep the exported features here (default: a temporary folder)")
    return p


@contextmanager
def step(title: str) -> Iterator[None]:
    """A headline before the block, and how long it took after it."""
    console.rule(title, align="left", characters="─")
    started = time.monotonic()
    yield
    console.print(f"[dim]{time.monotonic() - started:.1f} s[/]")


# --- attach ---------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[Any, Any]:
    """The model with the SAE attached, and its tokenizer. The SAE's own files say which layer it belongs to."""
    with console.status("loading SmolLM2-135M (the first time it is unpacked, tens of seconds)"):
        model, tokenizer = load_smollm2()
    tokenizer.padding_side = "left"
    return attach_saes(model, folder), tokenizer


def read_labels(folder: Path) -> dict[int, str]:
    """What people called the features: {feature: label}; empty where nobody did."""
    path = folder / "labels.json"
    if not path.exists():
        return {}
    return {int(feature): label for feature, label in json.loads(path.read_text(encoding="utf-8")).items()}


# --- check ----------------------------------------------------------------------------------------------------


def show_losses(model: Any, tokenizer: Any, documents: Sequence[dict[str, str]]) -> None:
    """One batch through `check`: the model as it is, with x_hat in place of x, and with zeros there."""
    texts = [d["text"] for d in documents[:: len(documents) // CHECKED]]
    with console.status("three forward passes"):
        row = model.saes.check(tokenize(tokenizer, texts))[0]
    table = Table("loss, nats a token", "", "", box=box.SIMPLE)
    table.add_row("clean", f"{row.loss_clean:.3f}", "")
    table.add_row("spliced", f"{row.loss_spliced:.3f}", f"{row.loss_recovered:.1%} recovered")
    table.add_row("zero-ablated", f"{row.loss_zero:.3f}", "")
    console.print(table)
    console.print(f"{row.tokens} tokens, {row.l0:.1f} features active on each, FVU {row.fvu:.3f}; {row.verdict}")


# --- export ---------------------------------------------------------------------------------------------------


def export(model: Any, tokenizer: Any, documents: Sequence[dict[str, str]], folder: Path) -> FeatureStore:
    """The features of the first tokens of every document, with its domain, on disk; long texts need no care."""
    ids = [tokenizer(d["text"])["input_ids"][:TOKENS_PER_DOCUMENT] for d in documents]
    rows = [{"input_ids": row, "domain": d["domain"]} for row, d in zip(ids, documents, strict=True)]
    with console.status("forward passes, as deep as the SAE's layer"):
        store = export_features(model, rows, folder, tokenizer=tokenizer)
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    dense = len(store) * store.d_sae() * 4
    console.print(store, f"{size / 1e6:.1f} MB ({dense / 1e6:.0f} MB dense)", markup=False, soft_wrap=True)
    return store


@dataclass(frozen=True)
class Catalogue:
    """What the documents tell about each feature."""

    store: FeatureStore
    tokenizer: Any
    labels: dict[int, str]

    @cached_property
    def domains(self) -> list[str]:
        """One a document."""
        return self.store.labels("domain")

    @cached_property
    def features(self) -> SparseFeatures:
        """All rows in memory."""
        return self.store.rows(slice(None))

    @cached_property
    def acts(self) -> csr_matrix:
        """(tokens, d_sae)."""
        return self.store.csr()

    @property
    def names(self) -> list[str]:
        return sorted(set(self.domains))

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Two (domains, d_sae): the share of a domain's tokens on which a feature fires, and the highest such share
        in any other domain."""
        of_token = np.array([self.names.index(d) for d in self.domains])[self.features.doc_id.numpy()]
        fires = self.acts > 0
        here = np.stack([np.asarray(fires[of_token == i].mean(axis=0)).ravel() for i in range(len(self.names))])
        return here, np.stack([np.delete(here, i, axis=0).max(axis=0) for i in range(len(here))])

    def most_specific(self) -> list[tuple[str, int, float, float]]:
        """(domain, feature, rate there, highest rate elsewhere) of the feature that stands out most in each domain,
        the clearest first."""
        here, there = self.rates()
        best = (here - there).argmax(axis=1).tolist()
        found = [(self.names[i], k, float(here[i, k]), float(there[i, k])) for i, k in enumerate(best)]
        return sorted(found, key=lambda one: one[3] - one[2])

    def showpiece(self) -> int:
        """The feature that stands out most of all."""
        return self.most_specific()[0][1]

    def maximum(self, feature: int) -> float:
        """The strongest activation in these documents, in the site's own units."""
        return float(self.store.column(feature)[1].max(initial=0.0))

    def describe(self, feature: int) -> str:
        """Its label, or else the tokens on which it fires most."""
        if feature in self.labels:
            return self.labels[feature]
        rows, acts = self.store.column(feature)
        strongest = rows[acts.argsort()[::-1][:40]]
        seen = Counter(readable(self.tokenizer.decode(int(self.features.token_id[row]))) for row in strongest)
        return "fires on " + "  ".join(token for token, _ in seen.most_common(4)) if seen else "fires on nothing here"

    def opening(self, feature: int, tokens: int = 24) -> str:
        """The first words of the document on which it fires most often."""
        rows = self.features.doc_id[self.store.column(feature)[0]]
        document = int(rows.bincount().argmax()) if len(rows) else 0
        ids = self.features.token_id[self.features.doc_id == document][:tokens]
        text: str = self.tokenizer.decode(ids)
        return text


def readable(token: str) -> str:
    return token.strip() or ("line break" if "\n" in token else "spaces")


def show_specific(catalogue: Catalogue) -> None:
    table = Table("domain", "feature", "what it is", "on tokens here", "at most elsewhere", box=box.SIMPLE)
    for domain, feature, here, elsewhere in catalogue.most_specific():
        table.add_row(domain, str(feature), catalogue.describe(feature), f"{here:.0%}", f"{elsewhere:.1%}")
    console.print(table)


def show_tokens(model: Any, tokenizer: Any, catalogue: Catalogue) -> None:
    """`capture` around a single pass; row i of the features is token i."""
    with torch.no_grad(), model.saes.capture() as captured:
        model(**tokenize(tokenizer, [SENTENCE]))
    features = captured[next(iter(model.saes))]
    table = Table("token", "strongest features (activation)", box=box.SIMPLE)
    for token, best in zip(features.token_id.tolist(), features.top(2), strict=True):
        told = "; ".join(f"{feature} ({act:.0f}) {catalogue.describe(feature)}" for feature, act in best)
        table.add_row(readable(tokenizer.decode(token)), told or "none (attention sinks are left alone)")
    console.print(table)


# --- steer, ablate, share -------------------------------------------------------------------------------------


def sweep(model: Any, tokenizer: Any, prompt: str, feature: int, strengths: Sequence[float]) -> list[str]:
    """One batch, one strength a row; NaN leaves a row as it is."""
    with model.saes.clamp({feature: torch.tensor(strengths)}):
        return write(model, tokenizer, [prompt] * len(strengths))


def show_texts(prompt: str, strengths: Sequence[float], texts: Sequence[str]) -> None:
    table = Table("clamped to", f"{prompt} ...", box=box.SIMPLE)
    for strength, text in zip(strengths, texts, strict=True):
        table.add_row("plain" if np.isnan(strength) else f"{strength:.0f}", text)
    console.print(table)


def show_ablation(model: Any, tokenizer: Any, opening: str, feature: int) -> None:
    table = Table("", f"{opening} ...", box=box.SIMPLE)
    table.add_row("plain", write(model, tokenizer, [opening])[0])
    with model.saes.ablate([feature]) as handle:
        table.add_row("ablated", write(model, tokenizer, [opening])[0])
    console.print(table)
    console.print(f"{handle.positions_edited} tokens edited, {handle.positions_skipped} left alone (attention sinks)")


def share(model: Any, tokenizer: Any, prompt: str, feature: int, strength: float) -> None:
    """`handle.to_json()` on one side, `model.saes.apply` on the other."""
    with model.saes.clamp({feature: strength}, tokens="generated") as handle:
        first = write(model, tokenizer, [prompt])
        document = handle.to_json()
    with model.saes.apply(document):
        again = write(model, tokenizer, [prompt])
    assert first == again
    console.print(document, markup=False, soft_wrap=True)
    console.print(f"twice the same: {first[0]!r}", markup=False)


def write(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """What the model goes on with, likeliest token by likeliest token; a penalty keeps a small model from loops."""
    inputs = tokenize(tokenizer, prompts)
    with console.status("generating"), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2,
                             pad_token_id=tokenizer.pad_token_id)
    texts: list[str] = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def tokenize(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> Any:
    """Token ids and attention mask (batch, tokens), padded; the first `most` tokens of each text."""
    return tokenizer(list(texts), return_tensors="pt", padding=True, truncation=most is not None, max_length=most)


if __name__ == "__main__":
    main()
