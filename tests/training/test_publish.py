"""push_folder: what goes up, what stays here, and what becomes of a README.md that is there."""

import itertools

import pytest
import torch

from sae_hooks import FeatureStatistics
from sae_hooks.errors import DataError, UnsafeFileError
from sae_hooks.training.publish import push_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's LFS upload
SITE = "model.layers.2.output"
NUMBERS = itertools.count()


@pytest.fixture
def folder(tmp_path, random_sae):
    """A folder with an SAE and nothing else."""
    return random_sae(8, 16, SITE).save_pretrained(tmp_path / "mine")


@pytest.fixture
def push(hub):
    """push(folder, name=a new one, **how): the repository to which it was pushed."""
    def run(folder, name=None, **how):
        name = name or f"alice/published-{next(NUMBERS)}"
        push_folder(folder, name, token="hf_alice", **how)
        return hub.repo(name)
    return run


@pytest.mark.filterwarnings("ignore:.*Links to folders are not followed")
@pytest.mark.parametrize("name", ["plots", "plots/x.png", "report.json", "README.md", "cfg.json"])
def test_a_link_out_of_the_folder_is_refused_before_anything_goes_up(name, folder, push, hub, tmp_path):
    secret = tmp_path / "secret"
    (secret / "plots").mkdir(parents=True)
    for path in ("plots/x.png", "report.json", "README.md", "cfg.json"):
        (secret / path).write_bytes((folder / "cfg.json").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(secret / name)
    before = set(hub.repos)
    with pytest.raises(UnsafeFileError, match=rf"{name}.* is a link to .*secret"):
        push(folder)
    assert set(hub.repos) == before


def test_a_link_inside_the_folder_goes_up_as_what_it_leads_to(folder, push, tmp_path):
    (folder / "plots").mkdir()
    (folder / "a-picture").write_bytes(b"drawn")
    (folder / "plots" / "x.png").symlink_to(folder / "a-picture")
    assert (push(folder).dir / "plots" / "x.png").read_bytes() == b"drawn"


def test_a_card_that_is_not_utf_8_is_refused_by_name(folder, push, hub):
    (folder / "README.md").write_bytes("café".encode("latin-1"))
    before = set(hub.repos)
    with pytest.raises(DataError, match=r"README\.md is not UTF-8 text: .*; save it as such"):
        push(folder)
    assert set(hub.repos) == before


def test_statistics_of_the_sae_before_do_not_stay_beside_weights_that_have_none(folder, push, random_sae, tmp_path):
    measured = random_sae(8, 16, SITE, seed=1)
    measured.statistics = FeatureStatistics(9, *[torch.ones(16)] * 3, torch.ones(3, 16))
    repo = push(measured.save_pretrained(tmp_path / "measured"))
    assert "feature_statistics.safetensors" in repo.files()
    push(folder, repo.id)
    assert "feature_statistics.safetensors" not in repo.files()
