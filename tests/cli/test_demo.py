"""examples/demo.py on SmolLM2-135M with the SAE that is shipped: what the demo shows is true."""

import importlib.metadata
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SAE = EXAMPLES / "sae-smollm2-135m"
DOCUMENTS = [json.loads(line) for line in (EXAMPLES / "data" / "documents.jsonl").read_text().splitlines()]
STRENGTHS = [math.nan, 0.0, 1.0, 1.5]  # of the feature's maximum


def test_the_documents_are_few_short_and_of_known_origin():
    counts = Counter(d["domain"] for d in DOCUMENTS)
    licences = (EXAMPLES / "data" / "LICENCES.md").read_text()
    assert set(counts.values()) == {32}
    assert all(f"| {domain} |" in licences for domain in counts)
    assert all(set(d) == {"text", "domain"} and 300 <= len(d["text"]) <= 500 for d in DOCUMENTS)
    assert (EXAMPLES / "data" / "documents.jsonl").stat().st_size <= 150_000


@pytest.fixture(scope="module")
def demo():
    """The demo as a module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("sae_hooks_demo", EXAMPLES / "demo.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_model_is_unpacked_anew_for_another_version_of_transformers(demo, monkeypatch, tmp_path):
    example, version = sys.modules["smollm2"], importlib.metadata.version
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(example, "unpack", lambda gguf, folder: (folder / "made").write_text(version("transformers")))
    older = {"transformers": "5.17.0"}
    monkeypatch.setattr(example.importlib.metadata, "version", lambda name: older.get(name) or version(name))
    before = example.unpacked_folder()
    monkeypatch.setattr(example.importlib.metadata, "version", version)
    now = example.unpacked_folder()
    assert before != now
    assert (before / "made").exists()
    assert (now / "made").exists()
    (now / "made").write_text("kept")
    assert (example.unpacked_folder() / "made").read_text() == "kept"


@pytest.fixture(scope="module")
def loaded(demo):
    """(model with the SAE attached, tokenizer)."""
    if not SAE.exists():
        pytest.skip("no SAE is shipped")
    return demo.load(SAE)


@pytest.fixture(scope="module")
def catalogue(demo, loaded, tmp_path_factory):
    """What a third of the documents tells about the features."""
    documents = DOCUMENTS[::3]
    store = demo.export(*loaded, documents, tmp_path_factory.mktemp("features"))
    return demo.Catalogue(store, loaded[1], demo.read_labels(SAE))


@pytest.mark.real
@pytest.mark.slow
def test_the_reconstruction_keeps_what_the_model_needs(demo, loaded):
    model, tokenizer = loaded
    row = model.saes.check(demo.tokenize(tokenizer, [d["text"] for d in DOCUMENTS[::36]]))[0]
    assert row.verdict == "fits"
    assert row.loss_clean < row.loss_spliced < row.loss_zero
    assert row.loss_recovered > 0.94
    assert row.l0 < 60


@pytest.mark.real
@pytest.mark.slow
def test_features_are_aligned_with_the_tokens_of_the_documents(demo, loaded, catalogue):
    _, tokenizer = loaded
    for number in (0, 17, 95):
        ids = tokenizer(DOCUMENTS[::3][number]["text"])["input_ids"][: demo.TOKENS_PER_DOCUMENT]
        rows = catalogue.features.doc_id == number
        assert catalogue.features.token_id[rows].tolist() == ids
        assert catalogue.features.position[rows].tolist() == list(range(len(ids)))


@pytest.mark.real
@pytest.mark.slow
def test_some_features_belong_to_a_domain(catalogue):
    found = catalogue.most_specific()
    assert {domain for domain, *_ in found} == set(catalogue.domains)
    _, _, here, elsewhere = found[0]
    assert here > 3 * elsewhere


@pytest.mark.real
@pytest.mark.slow
def test_a_clamped_feature_brings_its_own_domain_into_the_text(demo, loaded, catalogue):
    feature = catalogue.showpiece()
    here, there = catalogue.rates()
    domain = catalogue.names[int((here - there)[:, feature].argmax())]
    strengths = [s * catalogue.maximum(feature) for s in STRENGTHS]
    plain, _, *clamped = demo.sweep(*loaded, demo.PROMPT, feature, strengths)
    assert plain == demo.write(*loaded, [demo.PROMPT] * len(strengths))[0], "a NaN row is left alone"
    assert all(text != plain for text in clamped)
    assert max(resemblance(text, domain) for text in clamped) > resemblance(plain, domain) + 0.1


@pytest.mark.real
@pytest.mark.slow
def test_an_edit_that_was_saved_writes_the_same_text(demo, loaded, catalogue):
    feature = catalogue.showpiece()
    demo.share(*loaded, demo.PROMPT, feature, catalogue.maximum(feature))
    assert not loaded[0].saes._runtime.requests()


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_reads_its_labels_from_the_file(demo, tmp_path):
    assert demo.read_labels(tmp_path) == {}
    (tmp_path / "labels.json").write_text('{"7": "days of the week"}')
    assert demo.read_labels(tmp_path) == {7: "days of the week"}


@pytest.mark.real
def test_gemma_9b_takes_five_lines_that_compile(demo):
    assert len(demo.GEMMA.splitlines()) == 5
    compile(demo.GEMMA, "gemma", "exec")


def resemblance(text, domain):
    """Mean over a text's words of log p(word in this domain) / p(word in the others), add-one smoothed."""
    mine, others = Counter(), Counter()
    for document in DOCUMENTS:
        (mine if document["domain"] == domain else others).update(words(document["text"]))
    vocabulary = len(mine | others) + 1
    found = words(text)
    scores = [math.log((mine[w] + 1) / (mine.total() + vocabulary)) - math.log(
        (others[w] + 1) / (others.total() + vocabulary)) for w in found]
    return sum(scores) / max(len(found), 1)


def words(text):
    return re.findall(r"\w+|[^\w\s]|\n +", text.lower())


def test_resemblance_tells_domains_apart():
    assert resemblance("And the children of Israel said unto the LORD", "bible_kjv") > 0.5
    assert resemblance("And the children of Israel said unto the LORD", "go") < 0
    assert torch.tensor([resemblance(d["text"], d["domain"]) for d in DOCUMENTS[::9]]).mean() > 0.5
