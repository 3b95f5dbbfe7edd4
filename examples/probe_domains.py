"""Probes on SAE features, against the same probes on raw activations: which domain is a text of?

    python examples/probe_domains.py                                    # the 288 short documents of examples/data
    python examples/probe_domains.py --train train.jsonl --test held-out.jsonl --out probe

Each line of the files is {"text": ..., "domain": ...}. One pass of the model exports the features of every token, and
the activations beside them; a document is the mean over its tokens. Logistic regression sees all features, or k of
them, the best of each domain in turn (by ANOVA's F in training), and the same is done with the activations. Written to
--out: probe.md (accuracy for each k, what the probe reads and where that is strongest) and the confusion matrix.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from smollm2 import load_smollm2
from tqdm import tqdm

from sae_hooks import FeatureStore, attach_saes, export_features

HERE = Path(__file__).parent
SAE = HERE / "sae-smollm2-135m"
DOCUMENTS = HERE / "data" / "documents.jsonl"
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, None)  # features that a probe may read; None: all
STRONGEST = 3  # contexts shown of a feature

Set = tuple[Any, list[str]]  # pooled rows, and the domain of each


def main() -> None:
    """Export, probe, report."""
    args = arguments().parse_args()
    model, tokenizer = load_smollm2()
    attach_saes(model, SAE)
    train, test = documents(args)
    with tempfile.TemporaryDirectory() as scratch:
        stores = [exported(model, tokenizer, part, Path(args.out or scratch) / name)
                  for name, part in (("train", train), ("test", test))]
        page = report(stores, args.seed)
        print(page)
        if args.out:
            (args.out / "probe.md").write_text(page)
            draw_confusion(stores, args.out / "confusion", args.seed)


def arguments() -> argparse.ArgumentParser:
    """What can be asked for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=Path, default=DOCUMENTS, help="labelled texts")
    p.add_argument("--test", type=Path, help="labelled texts, never trained on (default: a third of --train)")
    p.add_argument("--per-domain", type=int, default=60, help="texts of a domain, at most")
    p.add_argument("--characters", type=int, default=400, help="of each text")
    p.add_argument("--out", type=Path, help="keep the features, and the report")
    p.add_argument("--seed", type=int, default=0)
    return p


def documents(args: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training documents, test documents)."""
    train = list(labelled(args.train, args))
    if args.test is not None:
        return train, list(labelled(args.test, args))
    return [d for i, d in enumerate(train) if i % 3], train[::3]


def labelled(path: Path, args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The first texts of each domain, cut short."""
    taken: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            taken[row["domain"]] += 1
            if taken[row["domain"]] <= args.per_domain:
                yield {"text": row["text"][:args.characters], "domain": row["domain"]}


def exported(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], folder: Path) -> FeatureStore:
    """Features and activations of every token. The same command goes on where it was cut off."""
    with tqdm(desc=folder.name, unit=" tokens") as bar:
        return export_features(model, rows, folder, tokenizer=tokenizer, activations=True, tokens_per_shard=8192,
                               progress=lambda rows, documents: bar.update(rows))


# --- probes -------------------------------------------------------------------------------------------------

def pooled(stores: Sequence[FeatureStore], of: str) -> tuple[Set, Set]:
    """(training, test): the mean of each document's features, or activations, and its domain."""
    train, test = ((store.pooled("mean", of=of), store.labels("domain")) for store in stores)
    return train, test


def probe(k: int | None, seed: int) -> Pipeline:
    """Logistic regression on the k columns that tell each class from the rest best, in turn; on all for None."""
    chosen = [] if k is None else [SelectKBest(best_of_each, k=k)]
    return make_pipeline(MaxAbsScaler(), *chosen, LogisticRegression(C=10.0, max_iter=2000, random_state=seed))


def best_of_each(x: Any, y: Any) -> np.ndarray:
    """Scores of columns: those that are the best at telling some class from the rest come first, then those that are
    the second best, and so on."""
    with np.errstate(divide="ignore"):  # infinitely far apart where a column is constant on either side
        apart = np.stack([f_classif(x, np.asarray(y) == one)[0] for one in np.unique(y)])
        best = apart.max(axis=0)
        share = 1 / (1 + 1 / best)
    places = (-apart).argsort(axis=1).argsort(axis=1)
    return -places.min(axis=0) + share


def accuracies(sets: tuple[Set, Set], seed: int) -> list[float]:
    """Share of the test documents that are told right, for each of COUNTS, of the columns that vary in training."""
    (x, y), (x_test, y_test) = sets
    low, high = (np.asarray(end.todense() if hasattr(end, "todense") else end).ravel()
                 for end in (x.min(axis=0), x.max(axis=0)))
    vary = np.flatnonzero(high > low)
    return [float(probe(k, seed).fit(x[:, vary], y).score(x_test[:, vary], y_test)) for k in COUNTS]


# --- the report ---------------------------------------------------------------------------------------------

def report(stores: Sequence[FeatureStore], seed: int) -> str:
    """The result as Markdown."""
    train, test = stores
    domains = sorted(set(train.labels("domain")))
    head = (f"# Which domain? Probes on features and on activations\n\n`python examples/probe_domains.py`: "
            f"{train.sites[0]} of SmolLM2-135M, {train.d_sae():,} features; {train.documents} training and "
            f"{test.documents} test documents of {len(domains)} domains, {len(train) + len(test):,} tokens; mean over "
            "a document's tokens. Share of the test documents that are told right:\n")
    features, activations = (accuracies(pooled(stores, of), seed) for of in ("features", "activations"))
    lines = ["| the probe reads | of the features | of the activations |", "|---|---|---|"]
    for k, mine, theirs in zip(COUNTS, features, activations, strict=True):
        lines.append(f"| {'all' if k is None else k} | {mine:.3f} | {theirs:.3f} |")
    return "\n".join([head, *lines, "", *read_by(stores, domains, seed)]) + "\n"


def read_by(stores: Sequence[FeatureStore], domains: Sequence[str], seed: int) -> Iterator[str]:
    """For each domain the feature of the full probe that speaks for it most, and where it fires most."""
    (x, of), _ = pooled(stores, "features")
    fitted = probe(None, seed).fit(x, of)
    scaled = fitted[0].transform(x).toarray()
    labels = json.loads((SAE / "labels.json").read_text())
    yield ("## What the probe on all features reads\n\nThe feature that adds most to its own domain's score, above "
           "what it adds elsewhere, and its strongest contexts in the test documents:\n")
    for domain, weights in zip(fitted[-1].classes_, fitted[-1].coef_, strict=True):
        here = np.asarray(of) == domain
        feature = int((weights * (scaled[here].mean(axis=0) - scaled[~here].mean(axis=0))).argmax())
        yield f"- **{domain}**: feature {feature} ({labels.get(str(feature), 'no label')})"
        for context in stores[1].top(feature, STRONGEST):
            yield f"  - {context.activation:.0f}: `{str(context)!r}`"


def draw_confusion(stores: Sequence[FeatureStore], stem: Path, seed: int) -> None:
    """stem.png and stem.svg: which domain the probe on all features takes for which."""
    import matplotlib

    matplotlib.use("Agg")
    from sklearn.metrics import ConfusionMatrixDisplay

    train, test = pooled(stores, "features")
    fitted = probe(None, seed).fit(*train)
    matrix = confusion_matrix(test[1], fitted.predict(test[0]), labels=fitted.classes_)
    with matplotlib.rc_context({"svg.hashsalt": "sae_hooks", "font.size": 9}):
        shown = ConfusionMatrixDisplay(matrix, display_labels=fitted.classes_).plot(
            cmap="Blues", xticks_rotation="vertical", colorbar=False)
        shown.figure_.set_size_inches(7, 7)
        shown.figure_.tight_layout()
        for end, facts in (("png", {}), ("svg", {"Date": None})):
            shown.figure_.savefig(stem.with_suffix(f".{end}"), dpi=160, metadata=facts)


if __name__ == "__main__":
    main()
