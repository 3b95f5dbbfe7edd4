"""Model cards: what they tell, that their usage lines run, and that what is missing is called unknown."""

import json
from pathlib import Path

import numpy as np
import pytest

from sae_hooks import attach_saes
from sae_hooks.errors import SaeFormatError, SaeNotFoundError
from sae_hooks.hub import save_pretrained
from sae_hooks.training.card import is_hub_id, make_card, write_card
from sae_hooks.training.harvest import padded_batches
from sae_hooks.training.metrics import evaluate
from sae_hooks.training.publish import _card as published
from sae_hooks.training.report import make_report, write_report
from sae_hooks.training.text import context_windows

MODELS = Path(__file__).parents[1] / "models"
SITE = "model.layers.2.output"
FACTS = {"model_name": "google/gemma-2-2b", "n_training_tokens": 4_000_000, "dataset_path": "owner/texts:en",
         "data_licence": "ODC-By", "context_size": 256, "prepend_bos": True, "text_epochs": 2,
         "recipe": {"steps": 900, "objective": {"kind": "JumpReLU", "l0": 30.0, "sparsity": 2.0}}}


@pytest.fixture
def trained(tmp_path, random_sae, tiny_gemma2, tiny_tokenizer):
    """A folder with an SAE whose cfg.json and report.json say everything, in an otherwise empty one."""
    sae = random_sae(192, 64, SITE, norm=34.0)
    sae.metadata |= FACTS
    folder = sae.save_pretrained(tmp_path / "made" / "my-sae")
    ids = tiny_tokenizer(["In the beginning God created the heaven and the earth."])["input_ids"]
    result = evaluate(tiny_gemma2, sae, padded_batches(context_windows(ids, 64, seed=0)))
    report = make_report({SITE: result}, {SITE: sae}, model="google/gemma-2-2b", data={"text": "held-out.jsonl"})
    write_report(report, folder / "report.json")
    return folder, result


def header(card):
    """The YAML at the top, as the Hub's client reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def test_the_header_is_what_the_hub_sorts_by(trained):
    found = header(make_card(trained[0], licence="cc-by-4.0"))
    assert found["license"] == "cc-by-4.0"
    assert found["library_name"] == "sae_hooks"
    assert found["base_model"] == ["google/gemma-2-2b"]
    assert found["datasets"] == ["owner/texts"]
    assert {"sparse-autoencoder", "sae", "saelens", "jumprelu"} <= set(found["tags"])


def test_the_card_tells_metrics_recipe_data_and_limits(trained):
    folder, result = trained
    card = make_card(folder)
    assert "A sparse autoencoder for google/gemma-2-2b" in card
    assert f"| `{SITE}` | {result.l0:.1f} | {result.fvu:.4f} | {result.delta_loss:.4f} |" in card
    assert f"{result.tokens:,} tokens of held-out.jsonl" in card
    assert '| objective.kind | "JumpReLU" |' in card
    assert "4,000,000 tokens" in card
    assert "| its licence | ODC-By |" in card
    assert "| begins with a special token (BOS) | yes |" in card
    assert "## Limits" in card


def test_what_is_not_known_is_called_unknown(tmp_path, random_sae):
    folder = random_sae(8, 16, SITE).save_pretrained(tmp_path / "bare")
    card = make_card(folder)
    assert header(card)["license"] == "unknown"
    assert "base_model" not in header(card)
    assert "A sparse autoencoder for unknown" in card
    assert "Nothing was measured" in card
    assert "The recipe is unknown" in card
    assert "| its licence | unknown |" in card


def test_a_model_on_somebodys_disk_is_no_base_model(tmp_path, random_sae):
    sae = random_sae(8, 16, SITE)
    sae.metadata |= {"model_name": "tiny-gemma2", "dataset_path": "texts.jsonl"}
    found = header(make_card(sae.save_pretrained(tmp_path / "local")))
    assert "base_model" not in found
    assert "datasets" not in found
    assert [is_hub_id(name) for name in ("a/b", "a", "/a/b", "./b", "a/b/c", "~/b")] == [True] + 5 * [False]


def test_metadata_stand_in_for_a_report(tmp_path, random_sae):
    sae = random_sae(8, 16, SITE)
    sae.metadata |= {"l0": 27.0, "fvu": 0.1563}
    card = make_card(sae.save_pretrained(tmp_path / "told"))
    assert f"| `{SITE}` | 27.0 | 0.1563 | unknown |" in card


def test_a_folder_of_several_has_a_row_each(tmp_path, random_sae):
    for l0 in (10, 30):
        sae = random_sae(8, 16, SITE, seed=l0)
        sae.metadata |= {"l0": float(l0), "recipe": {"objective": {"kind": "JumpReLU", "l0": l0}}}
        sae.save_pretrained(tmp_path / "sweep" / f"l0_{l0}")
    card = make_card(tmp_path / "sweep")
    assert "2 sparse autoencoders" in card
    assert "| `l0_10` | `model.layers.2.output` | 8 | 16 | jumprelu |" in card
    assert "| objective.l0 | 10, 30 |" in card
    assert 'attach_saes(model, "sweep", l0=10)' in card


def test_several_of_a_site_whose_l0_is_not_known_are_named_by_their_folders(tmp_path, random_sae, tiny_gemma2):
    for seed in range(2):
        random_sae(192, 16, SITE, seed=seed).save_pretrained(tmp_path / "sweep" / f"l0_{seed}")
    card = write_card(tmp_path / "sweep").read_text()
    assert 'attach_saes(model, "sweep/l0_0")' in card
    assert "`l0=` takes" not in card
    assert 'attach_saes(model, "me/x/l0_0")' in published(tmp_path / "sweep", "me/x", None)
    with pytest.raises(SaeNotFoundError, match=r"l0_0/sae_weights.safetensors, l0_1/sae_weights.safetensors"):
        attach_saes(tiny_gemma2, tmp_path / "sweep", l0=1)
    attach_saes(tiny_gemma2, tmp_path / "sweep" / "l0_1")


def test_several_sites_are_chosen_by_site(tmp_path, random_sae):
    sites = [f"model.layers.{layer}.output" for layer in range(2)]
    save_pretrained({site: random_sae(8, 16, site) for site in sites}, tmp_path / "two")
    assert f'attach_saes(model, "two", site="{sites[0]}")' in make_card(tmp_path / "two")


def test_foreign_formats_get_a_card_too(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-res/layer_3/width_4k/average_l0_80/params.npz"
    path.parent.mkdir(parents=True)
    shapes = {"W_enc": (8, 4096), "W_dec": (4096, 8), "b_enc": 4096, "b_dec": 8, "threshold": 4096}
    np.savez(path, **{name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()})
    assert "`model.layers.3.output` | 8 | 4,096 | unknown |" in make_card(tmp_path / "gemma-scope-2b-pt-res")


def test_values_cannot_break_out_of_the_header(tmp_path, random_sae):
    sae = random_sae(8, 16, SITE)
    sae.metadata |= {"model_name": 'owner/x"\n---\nlicense: mit'}
    card = make_card(sae.save_pretrained(tmp_path / "sly"), licence='a: "b"\n#')
    assert header(card)["license"] == 'a: "b"\n#'


def test_the_usage_lines_run(trained, monkeypatch):
    folder, _ = trained
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["model_name"] = "tiny-gemma2"
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder.parent / "tiny-gemma2").symlink_to(MODELS / "tiny-gemma2")
    monkeypatch.chdir(folder.parent)
    code = make_card(folder).split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["out"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_card_is_written_into_the_folder(trained):
    folder, _ = trained
    assert write_card(folder, source="me/mine") == folder / "README.md"
    assert 'attach_saes(model, "me/mine")' in (folder / "README.md").read_text()


@pytest.mark.parametrize("licence", ["Lizenz für alle", r"a\1b\q", "cc-by-4.0"])
def test_a_licence_given_when_it_is_pushed_stands_in_the_header(licence, trained):
    write_card(trained[0], licence="mit")
    assert header(published(trained[0], "me/mine", licence))["license"] == licence


@pytest.mark.parametrize(("card", "kept"), [
    ("# hello\n", {}), ("---\n\nA rule, and no header.\n", {}),
    ("---\ntags:\n- sae\n---\n# hello\n", {"tags": ["sae"]}),
    ("---\nlicense:\n- mit\n- apache-2.0\nlicense_name: x\n---\n# hello\n", {"license_name": "x"})])
def test_a_licence_given_when_it_is_pushed_stands_in_the_header_of_any_card(card, kept, trained):
    (trained[0] / "README.md").write_text(card)
    shown = published(trained[0], "me/mine", "cc-by-4.0")
    assert header(shown) == {"license": "cc-by-4.0"} | kept
    assert shown.endswith(card[-8:])


def test_a_folder_without_saes_or_with_a_broken_report_is_refused(trained):
    with pytest.raises(SaeNotFoundError, match="no SAE here"):
        make_card(MODELS / "tiny-gemma2")
    folder, _ = trained
    (folder / "report.json").write_text('{"format": 99}')
    with pytest.raises(SaeFormatError, match="no report of an evaluation"):
        make_card(folder)
