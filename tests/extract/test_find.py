"""find_features: numbers equal to a dense reference, the right features on a real model, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_hooks import attach_saes
from sae_hooks.errors import DataError, EditError, SaeAttachError
from sae_hooks.find import FoundFeature, find_features

ROOT = Path(__file__).parents[2]
SITE, LOWER = "model.layers.2.output", "model.layers.0.output"
BIBLE = ["In the beginning God created the heaven and the earth.", "And God saw the light, that it was good.", "",
         "And the earth was without form, and void; and darkness was upon the face of the deep. " * 4]
CODE = ["def f(x):\n    return x + 1", "for i in range(10):\n    print(i)\n", "import os\n\nclass A:\n    pass"]


@pytest.fixture
def model(tiny_gemma2, random_sae):
    return attach_saes(tiny_gemma2, random_sae(192, 512, SITE, norm=34))


def dense(model, tokenizer, texts):
    """Feature activations (tokens, d_sae) of each text without its BOS, a text at a time by capture."""
    found = []
    for text in texts:
        if not text:
            found.append(np.zeros((0, 512)))
            continue
        with torch.no_grad(), model.saes.capture() as captured:
            model(**tokenizer(text, return_tensors="pt"))
        found.append(captured[SITE].to_dense().double().numpy()[1:])
    return found


def auroc(positive, negative):
    """Of one feature, pair by pair."""
    return np.mean([[(p > n) + 0.5 * (p == n) for n in negative] for p in positive])


def reference(model, tokenizer, positive, negative):
    """The FoundFeature of every feature, from dense arrays."""
    sides = [dense(model, tokenizer, texts) for texts in (positive, negative)]
    pooled = [np.array([acts.max(axis=0, initial=0) for acts in side]) for side in sides]
    tokens = [np.concatenate(side) for side in sides]
    norms = model.saes[SITE].W_dec.double().norm(dim=1).numpy()
    return [FoundFeature(
        feature=f, auroc=auroc(pooled[0][:, f], pooled[1][:, f]),
        contrast=(tokens[0][:, f].mean() - tokens[1][:, f].mean()) * norms[f],
        mean_positive=tokens[0][:, f].mean(), mean_negative=tokens[1][:, f].mean(),
        density_positive=(tokens[0][:, f] > 0).mean(), density_negative=(tokens[1][:, f] > 0).mean(),
        share_positive=(pooled[0][:, f] > 0).mean(), share_negative=(pooled[1][:, f] > 0).mean()) for f in range(512)]


@pytest.mark.parametrize("cut", [{}, {"tokens_per_part": 8, "window": 16}], ids=["one part", "parts and windows"])
def test_every_number_is_that_of_a_dense_reference(model, tiny_tokenizer, cut):
    model.saes[SITE].W_dec.data *= torch.linspace(0.5, 2, 512)[:, None]
    if cut:  # a window reads less context: keep to texts that fit into one
        positive, negative = BIBLE[:3], CODE[:2]
    else:
        positive, negative = BIBLE, CODE
    found = find_features(model, positive, negative, tokenizer=tiny_tokenizer, n=512, **cut)
    expected = reference(model, tiny_tokenizer, positive, negative)
    fires = {e.feature for e in expected if e.mean_positive > 0}
    assert {f.feature for f in found} == fires
    assert 50 < len(fires) < 512
    for one in found:
        told, right = ([getattr(x, n) for n in FoundFeature.__dataclass_fields__]
                       for x in (one, expected[one.feature]))
        assert told == pytest.approx(right, rel=1e-4, abs=1e-4)


def test_features_are_ranked_by_auroc_in_hundredths_then_by_contrast(model, tiny_tokenizer):
    found = find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer, n=512)
    keys = [(round(f.auroc, 2), f.contrast) for f in found]
    assert keys == sorted(keys, reverse=True)
    assert keys[-1][0] < 0.5 < keys[0][0] < 1  # one of the positive texts is empty
    assert find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer, n=3) == found[:3]


def test_one_text_a_side_ranks_by_contrast(model, tiny_tokenizer):
    found = find_features(model, BIBLE[:1], CODE[:1], tokenizer=tiny_tokenizer, n=10)
    assert {f.auroc for f in found} == {1.0}
    assert found[0].contrast > 0


def test_equal_sides_tell_nothing(model, tiny_tokenizer):
    found = find_features(model, CODE, CODE, tokenizer=tiny_tokenizer)
    assert {(f.auroc, f.contrast) for f in found} == {(0.5, 0.0)}


def test_rows_of_token_ids_need_no_tokenizer(model, tiny_tokenizer):
    def rows(texts):
        return [{"input_ids": tiny_tokenizer(text)["input_ids"]} for text in texts]

    found = find_features(model, rows(BIBLE[:2]), rows(CODE))
    assert found == find_features(model, BIBLE[:2], CODE, tokenizer=tiny_tokenizer)


def test_the_table_has_a_line_for_each_feature(model, tiny_tokenizer):
    found = find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer, n=5)
    head, *lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert head.split() == ["feature", "AUROC", "contrast", "mean", "tokens", "texts"]
    assert [int(line.split()[0]) for line in lines] == [f.feature for f in found]


def test_nothing_found_is_a_table_without_lines(tiny_gemma2, random_sae, tiny_tokenizer):
    sae = random_sae(192, 64, SITE)
    sae.threshold.data.fill_(1e6)
    found = find_features(attach_saes(tiny_gemma2, sae), BIBLE, CODE, tokenizer=tiny_tokenizer)
    assert list(found) == []
    assert len(str(found).splitlines()) == 1


def test_with_several_saes_the_site_is_needed(model, tiny_tokenizer, random_sae):
    attach_saes(model, random_sae(192, 320, LOWER, seed=1, norm=23))
    with pytest.raises(EditError, match=f"2 SAEs are attached; say which, by site=: {SITE}, {LOWER}"):
        find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer)
    found = find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer, site=LOWER, n=400)
    assert max(f.feature for f in found) < 320
    with pytest.raises(EditError, match="no SAE with name='nowhere'"):
        find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer, site="nowhere")


@pytest.mark.parametrize(("positive", "negative", "called"), [
    ([], CODE, "positive"), (BIBLE, [""], "negative"), (["", None], CODE, "positive")])
def test_a_side_without_an_ordinary_token_is_refused_by_name(model, tiny_tokenizer, positive, negative, called):
    with pytest.raises(DataError, match=f"the {called} texts hold no ordinary token"):
        find_features(model, positive, negative, tokenizer=tiny_tokenizer)


def test_a_model_without_saes_and_an_n_of_nothing_are_refused(tiny_gemma2, model, tiny_tokenizer):
    for n in (0, 2.5):
        with pytest.raises(DataError, match=f"1 or more; got {n}"):
            find_features(model, BIBLE, CODE, tokenizer=tiny_tokenizer, n=n)
    model.saes.detach()
    with pytest.raises(SaeAttachError, match="no SAE is attached"):
        find_features(tiny_gemma2, BIBLE, CODE, tokenizer=tiny_tokenizer)


# --- a real model and the shipped SAE -----------------------------------------------------

GERMAN = ["Der Hund lief gestern durch den Garten und suchte seinen Ball.",
          "Wir fahren morgen mit dem Zug nach Berlin, um unsere Freunde zu besuchen.",
          "Das Programm liest die Datei und gibt eine Liste der Namen aus."]
ENGLISH = ["The dog ran through the garden yesterday and looked for its ball.",
           "Tomorrow we take the train to Boston to visit our friends.",
           "The program reads the file and prints a list of the names."]


@pytest.fixture(scope="module")
def smollm2():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import load_smollm2
    finally:
        sys.path.pop(0)
    model, tokenizer = load_smollm2()
    return attach_saes(model, ROOT / "examples/sae-smollm2-135m"), tokenizer


def documents(domain, others=False):
    rows = map(json.loads, (ROOT / "examples/data/documents.jsonl").read_text().splitlines())
    return [row["text"] for row in rows if (row["domain"] == domain) != others]


def labels(found):
    known = json.loads((ROOT / "examples/sae-smollm2-135m/labels.json").read_text())
    return [known.get(str(f.feature)) for f in found]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("texts", [1, 3])
def test_german_texts_lead_to_the_feature_of_that_label(smollm2, texts):
    model, tokenizer = smollm2
    found = find_features(model, GERMAN[:texts], ENGLISH[:texts], tokenizer=tokenizer, n=5)
    assert labels(found)[0] == "German"
    assert found[0].density_positive > 0.8 > 0.1 > found[0].density_negative


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("domain", "label"), [
    ("bible_kjv", "the language of the King James Bible"), ("dictionary", "the definition in a dictionary entry")])
def test_some_documents_of_a_kind_lead_to_the_feature_of_that_label(smollm2, domain, label):
    model, tokenizer = smollm2
    others = documents(domain, others=True)[::16]
    found = find_features(model, documents(domain)[:4], others, tokenizer=tokenizer, n=5)
    assert labels(found)[0] == label
    assert found[0].auroc > 0.99
