"""Checkpoints: whole or not at all, whatever the disk or a signal does; and what is loaded is what was saved."""

import contextlib
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Parameter

from sae_hooks.errors import CheckpointError, SaeWarning
from sae_hooks.training.checkpoint import load_checkpoint, save_checkpoint

from .checkpoints import PARTS, content, names, save_two

ROOT = Path(__file__).parents[2]
DTYPES = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
          and not dtype.is_complex and "q" not in str(dtype) and "bits" not in str(dtype)]


def same(one, other):
    """Equal in keys, order, types, dtypes, shapes, and every bit."""
    if list(one) != list(other):
        return False
    return all(bits(value) == bits(other[key]) for key, value in one.items())


def bits(value):
    if not isinstance(value, torch.Tensor):
        return type(value), value.hex() if isinstance(value, float) else value
    plain = value.detach().resolve_conj().contiguous()
    return value.dtype, value.shape, bytes(plain.reshape(-1).view(torch.uint8).tolist())


def rewrite(path, change):
    """Change a manifest and make its hash right again, as one who means ill would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["content"])
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest["content"]).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def two(tmp_path):
    return save_two(tmp_path)


# --- what goes in comes out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [
    None, True, False, 0, -1, 2**53, 2**128 + 1, -2**200, 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf,
    -math.inf, math.nan, "", "naïve 日本 🙂\n\0", '{"tensor": ["float32", []]}'], ids=repr)
def test_a_scalar_comes_back_as_itself_and_of_its_type(value, tmp_path):
    save_checkpoint(tmp_path, 1, {"part": {"x": value}})
    assert same(load_checkpoint(tmp_path).parts["part"], {"x": value})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
def test_a_tensor_of_any_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    raw = torch.arange(64, dtype=torch.uint8) % 2
    values = {"some": raw.view(dtype).reshape(2, -1), "none": raw.view(dtype)[:0].reshape(0, 3),
              "scalar": raw.view(dtype)[1]}
    save_checkpoint(tmp_path, 1, {"part": values})
    assert same(load_checkpoint(tmp_path).parts["part"], values)


def test_views_transposes_shared_memory_and_parameters_are_saved_as_what_they_show(tmp_path):
    base = torch.randn(6, 8)
    values = {"transposed": base.T, "columns": base[:, ::3], "row": base[2], "base": base, "again": base,
              "expanded": base[0, :1].expand(5), "parameter": Parameter(base[3:]), "nan": torch.tensor(math.nan),
              "conjugate": torch.complex(base, base).conj()}
    save_checkpoint(tmp_path, 1, {"part": values})
    loaded = load_checkpoint(tmp_path).parts["part"]
    assert same(loaded, values)
    assert all(t.is_contiguous() and not t.requires_grad for t in loaded.values())
    assert len({t.untyped_storage().data_ptr() for t in loaded.values()}) == len(values)


def test_parts_and_values_keep_names_and_order_whatever_the_names(tmp_path):
    parts = {"../b/l0=30 µ": {"z": 1, "../x": torch.ones(2), "a": 2.0, "": None}, "../b/l0=30 ∂": {}, "A": {"é": "x"},
             "a": {"model.layers.15.output": torch.zeros(1)}, "": {}, "x" * 300: {"tensor": "no"}}
    path = save_checkpoint(tmp_path / "made" / "for it", 123456789, parts)
    loaded = load_checkpoint(tmp_path / "made" / "for it")
    assert list(loaded.parts) == list(parts)
    assert all(same(loaded.parts[name], parts[name]) for name in parts)
    assert (loaded.step, loaded.path, path.name) == (123456789, path, "step-123456789")
    assert names(tmp_path) == ["made"]


def test_torch_rng_and_adam_go_on_bit_equal(tmp_path):
    weight = torch.randn(5, requires_grad=True)
    adam = torch.optim.Adam([weight])
    weight.sum().backward()
    adam.step()
    save_checkpoint(tmp_path, 1, {"adam": adam.state[weight], "rng": {"torch": torch.get_rng_state()}})
    drawn = torch.randn(3)
    parts = load_checkpoint(tmp_path).parts
    torch.set_rng_state(parts["rng"]["torch"])
    assert torch.equal(torch.randn(3), drawn)
    assert same(parts["adam"], adam.state[weight])


def test_each_part_is_a_plain_safetensors_file_with_every_tensor_aligned(tmp_path):
    values = {"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(2, dtype=torch.float64), "seed": 1,
              "half": torch.ones(3, dtype=torch.bfloat16)}
    path = save_checkpoint(tmp_path, 1, {"sae l0=30": values, "data": {}})
    assert names(path) == ["000-sae-l0-30.safetensors", "001-data.safetensors", "manifest.json"]
    raw = (path / "000-sae-l0-30.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert all((start + header[name]["data_offsets"][0]) % values[name].element_size() == 0
               for name in ("odd", "wide", "half"))
    loaded = load_file(path / "000-sae-l0-30.safetensors")
    assert all(torch.equal(tensor, values[name]) for name, tensor in loaded.items())
    assert len(loaded) == 3


def test_loaded_tensors_outlive_their_file(two):
    checkpoint = load_checkpoint(two)
    for file in checkpoint.path.iterdir():
        file.write_bytes(b"")
    assert same(checkpoint.parts["sae"], PARTS["sae"])


@pytest.mark.parametrize(("value", "kind"), [
    (torch.eye(2).to_sparse(), "sparse_coo"), (torch.empty(2, device="meta"), "meta"), ([1], "list"), (b"x", "bytes"),
    ("\ud800", "str"), (object(), "object"), (torch.float32, "dtype")], ids=lambda v: v if isinstance(v, str) else "")
def test_a_value_that_could_not_come_back_is_refused_before_anything_is_touched(value, kind, tmp_path):
    with pytest.raises(CheckpointError, match=f"(?s)part 'optimizer', value 'state'.*{kind}"):
        save_checkpoint(tmp_path / "new", 1, {"optimizer": {"state": value}})
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (1, 0)])
def test_a_negative_step_and_keeping_none_are_refused(step, keep, tmp_path):
    with pytest.raises(CheckpointError, match="expected step >= 0 and keep >= 1"):
        save_checkpoint(tmp_path, step, PARTS, keep=keep)


def test_a_part_of_too_many_tensors_is_refused_since_it_could_not_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"part 'p' has 1001 tensors.*several parts"):
        save_checkpoint(tmp_path, 1, {"p": {str(n): torch.zeros(1) for n in range(1001)}})


MEMORY = """
import resource, sys, torch
from pathlib import Path
from sae_hooks.training.checkpoint import load_checkpoint, save_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB
x, before = torch.ones(150_000_000, dtype=torch.bfloat16), peak()
save_checkpoint(Path(sys.argv[1]), 1, {"stream": {"x": x}})
saved = peak()
del x
load_checkpoint(Path(sys.argv[1]))
print(saved - before, peak() - before)
"""


def test_a_large_buffer_is_saved_without_more_memory_and_loaded_with_its_own(tmp_path):
    ran = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    saving, loading = map(float, ran.stdout.split())
    assert saving < 30  # MB, of 300
    assert loading < 60


# --- which are kept -----------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (1, 2, 30, 100_000_000, 100_000_001):
        save_checkpoint(tmp_path, step, PARTS, keep=3)
    assert names(tmp_path) == ["step-00000030", "step-100000000", "step-100000001"]
    assert load_checkpoint(tmp_path).step == 100_000_001


def test_a_cut_off_checkpoint_does_not_count_among_those_kept(two):
    (two / "step-00000002" / "000-sae.safetensors").write_bytes(b"cut")
    save_checkpoint(two, 3, PARTS)
    assert names(two) == ["step-00000001", "step-00000003"]


def test_a_damaged_later_step_gives_way_to_the_training_that_went_on_from_an_earlier_one(two):
    flip(two / "step-00000002" / "000-sae.safetensors", -1)
    save_checkpoint(two, 1, {"new": {}}, keep=1)
    assert names(two) == ["step-00000001"]
    assert list(load_checkpoint(two).parts) == ["new"]


def test_a_whole_later_step_is_another_trainings_and_nothing_is_touched(two):
    before = content(two)
    with pytest.raises(CheckpointError, match=r"step-00000002 is of a later step than 0.*another folder"):
        save_checkpoint(two, 0, PARTS)
    assert content(two) == before


def test_the_same_step_may_be_saved_again(two):
    save_checkpoint(two, 2, {"again": {"x": 1}})
    assert names(two) == ["step-00000001", "step-00000002"]
    assert load_checkpoint(two).parts == {"again": {"x": 1}}


def test_what_a_user_put_beside_the_checkpoints_stays(two):
    for name in ("notes.txt", "step-3", "step-best", ".hidden"):
        (two / name).mkdir()
    save_checkpoint(two, 3, PARTS, keep=1)
    assert names(two) == [".hidden", "notes.txt", "step-00000003", "step-3", "step-best"]


@pytest.mark.parametrize("made", [False, True])
def test_without_any_checkpoint_there_is_none(made, tmp_path):
    folder = tmp_path / "run"
    if made:
        (folder / ".step-00000001.1.abcd.tmp").mkdir(parents=True)
    assert load_checkpoint(folder) is None


# --- flaws on the disk --------------------------------------------------------------------------------------


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def unlink_out(path):
    file = path / "000-sae.safetensors"
    file.rename(path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def put_a_pickle(path):
    raw = pickle.dumps(Bomb())
    (path / "000-sae.safetensors").write_bytes(raw)
    rewrite(path, lambda c: c["parts"]["sae"].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))


def in_part(**changes):
    return lambda path: rewrite(path, lambda c: c["parts"]["sae"].update(changes))


def in_values(key, value):
    return lambda path: rewrite(path, lambda c: c["parts"]["sae"]["values"].update({key: value}))


FLAWS = {
    "a flipped byte": (lambda p: flip(p / "000-sae.safetensors", -3), "000-sae.safetensors was changed or damaged"),
    "a cut file": (lambda p: os.truncate(p / "001-data.safetensors", 9), "001-data.safetensors has 9 bytes, expected"),
    "a missing part": (lambda p: (p / "000-sae.safetensors").unlink(), "000-sae.safetensors does not exist"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json does not exist"),
    "an empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), "empty"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 200), "not JSON"),
    "a binary manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "not JSON in UTF-8"),
    "a list for a manifest": (lambda p: (p / "manifest.json").write_text("[]"), "list"),
    "a manifest of another kind": (lambda p: (p / "manifest.json").write_text("{}"), "KeyError"),
    "a folder for a manifest": (lambda p: ((p / "manifest.json").unlink(), (p / "manifest.json").mkdir()), "regular"),
    "a changed scalar": (lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace(
        '"seed": 3', '"seed": 4')), "manifest.json was changed or damaged"),
    "another step": (lambda p: rewrite(p, lambda c: c.update(step=5)), "says step 5, the folder's name 2"),
    "a later format": (lambda p: rewrite(p, lambda c: c.update(format=2)), "format 2, this version .* reads 1"),
    "a file outside": (in_part(file="../step-00000001/000-sae.safetensors"), "does not exist|outside"),
    "an absolute file": (in_part(file="/etc/hostname"), "outside|does not exist"),
    "a link outside": (unlink_out, "is a link to .*elsewhere, outside"),
    "a pickle": (put_a_pickle, "not a safetensors file"),
    "a tensor too many": (in_values("more", {"tensor": ["float32", [1]]}), "no value that this version writes"),
    "a tensor too few": (in_values("W", 1), "tensors that this format does not know: 'W'"),
    "a dtype that is code": (in_values("W", {"tensor": ["load", [3, 4]]}), "'load' is no dtype"),
    "a shape that does not fit": (in_values("W", {"tensor": ["float32", [5, 5]]}), "RuntimeError"),
    "a list for a value": (in_values("W", [1]), "no value that this version writes|does not know"),
    "parts in a list": (lambda p: rewrite(p, lambda c: c.update(parts=[])), "AttributeError"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_broken_checkpoint_is_passed_over_with_a_warning_that_names_it_and_the_flaw(flaw, two, monkeypatch):
    monkeypatch.chdir(two)
    change, told = FLAWS[flaw]
    change(two / "step-00000002")
    with pytest.warns(SaeWarning, match=rf"(?s)step-00000002 \(.*({told}).*\); took step 1") as caught:
        checkpoint = load_checkpoint(two)
    assert checkpoint.step == 1
    assert all(same(checkpoint.parts[name], PARTS[name]) for name in PARTS)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not (two / "exploded").exists()


def test_every_single_flipped_bit_is_either_seen_or_changes_nothing(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"p": {"x": torch.arange(3.0), "lr": 1.5e-3, "n": 12, "s": "text"}})
    parts = load_checkpoint(tmp_path).parts["p"]
    for file in path.iterdir():
        for at in range(file.stat().st_size):
            flip(file, at)
            with contextlib.suppress(CheckpointError):
                assert same(load_checkpoint(tmp_path).parts["p"], parts)
            flip(file, at)


def test_if_all_are_broken_the_error_names_each_and_what_to_do(two):
    (two / "step-00000001" / "manifest.json").unlink()
    flip(two / "step-00000002" / "000-sae.safetensors", -1)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(two)
    told = str(error.value)
    assert f"{two}/step-00000002 (000-sae.safetensors was changed" in told
    assert f"{two}/step-00000001 (" in told
    assert "start anew in another folder" in told
