"""Files that are broken, cut, hostile or something else: refused with the reason, cheaply, and nothing is run.

The numbers name the kinds of faults, one a kind.
"""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hub.files import D, F, arrays, safetensors_file, write_npz
from safetensors.torch import save_file

from sae_hooks import FeatureStatistics, attach_saes
from sae_hooks.errors import SaeFormatError, SaeNotFoundError, UnsafeFileError
from sae_hooks.hub import load_sae, save_pretrained

SITE = "model.layers.1.output"
INFO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def saved(tmp_path, random_sae, d=D, **more):
    return save_pretrained(random_sae(d, F, SITE, **more), tmp_path / "sae")


# --- 1 to 10: safetensors -------------------------------------------------------------------------

HEADERS = {
    "1 empty": (b"", "the file is empty (0 bytes); download it again"),
    "1 three bytes": (b"\x01\x02\x03", "cut short: 3 bytes"),
    "3 header longer than the file": (safetensors_file({"a": INFO}, b"x" * 8, length=5000),
                                      "declares a header of 5000 bytes"),
    "3 header of 2^64 - 1 bytes": (safetensors_file({"a": INFO}, b"x" * 8, length=2**64 - 1),
                                   f"declares a header of {2**64 - 1} bytes"),
    "3 header of 200 MB": (safetensors_file(b" " * 2**20, length=200 * 2**20), "declares a header of 209715200 bytes"),
    "4 many tensors": (safetensors_file({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                                         for i in range(5000)}), "5000 tensors; an SAE has at most 1000"),
    "5 not JSON": (safetensors_file(b"{nonsense}"), "the safetensors header is not JSON"),
    "5 not UTF-8": (safetensors_file(b'{"\xff\xfe": 1}'), "the safetensors header is not JSON"),
    "5 a list": (safetensors_file([1, 2]), "is a JSON list, expected an object"),
    "5 200k nesting": (safetensors_file(b"[" * 200_000), "the safetensors header is nested too deeply"),
    "6 duplicate key": (safetensors_file(b'{"a": %b, "a": %b}' % ((json.dumps(INFO).encode(),) * 2), b"x" * 8),
                        "the key 'a' twice"),
    "6 hole": (safetensors_file({"a": INFO, "b": INFO | {"data_offsets": [12, 20]}}, b"x" * 20),
               "tensor 'b': bytes 12 to 20, expected 8 bytes from 8 on"),
    "6 overlap": (safetensors_file({"a": INFO, "b": INFO | {"data_offsets": [4, 12]}}, b"x" * 12),
                  "tensor 'b': bytes 4 to 12, expected 8 bytes from 8 on"),
    "6 reversed": (safetensors_file({"a": INFO | {"data_offsets": [8, 0]}}, b"x" * 8), "tensor 'a': bytes 8 to 0"),
    "6 beyond the end": (safetensors_file({"a": INFO}, b"x" * 4), "cut short: has 4 bytes of data, needs 8"),
    "6 trailing bytes": (safetensors_file({"a": INFO}, b"x" * 9), "1 bytes follow the last tensor"),
    "7 shape and size differ": (safetensors_file({"a": INFO | {"shape": [3]}}, b"x" * 8), "expected 12 bytes from 0"),
    "7 2^62 times 4": (safetensors_file({"a": INFO | {"shape": [2**62, 4]}}, b"x" * 8),
                       f"expected {2**62 * 16} bytes"),
    "7 negative": (safetensors_file({"a": INFO | {"shape": [-2]}}, b"x" * 8), "are no whole numbers"),
    "7 true for a size": (safetensors_file({"a": INFO | {"shape": [True, 2]}}, b"x" * 8), "are no whole numbers"),
    "7 a size beyond 64 bits": (safetensors_file({"a": INFO | {"shape": [0, 10**19], "data_offsets": [0, 0]}}),
                                "are no whole numbers that can be"),
    "7 unknown dtype": (safetensors_file({"a": INFO | {"dtype": "F99"}}, b"x" * 8), "dtype 'F99', expected one of"),
    "8 no tensors": (safetensors_file({}), "no W_enc; no b_enc; no W_dec; no b_dec; no threshold (tensors: none)"),
    "8 an empty name": (safetensors_file({"": INFO}, b"x" * 8), "tensor ''"),
    "8 a foreign name": (safetensors_file({"../../evil": INFO}, b"x" * 8), "does not know: '../../evil'"),
    "10 an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "run `git lfs pull`"),
    "10 an HTML page": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "this is an HTML page"),
    "10 an HTML page without a doctype": (b"<HTML><head></head></HTML>", "this is an HTML page"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_safetensors_file_is_refused_with_its_name_and_the_reason(case, tmp_path, random_sae, cheap):
    content, tells = HEADERS[case]
    folder = saved(tmp_path, random_sae)
    (folder / "sae_weights.safetensors").write_bytes(content)
    with cheap(), pytest.raises(SaeFormatError) as caught:
        load_sae(folder)
    assert tells in str(caught.value)
    assert str(folder / "sae_weights.safetensors") in str(caught.value)


def test_2_a_truncated_file_says_what_it_has_and_what_it_needs(tmp_path, random_sae):
    path = saved(tmp_path, random_sae, d=64) / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SaeFormatError, match=r"cut short: has \d+ bytes of data, needs \d+; download it again"):
        load_sae(path.parent)


def test_4_half_a_million_tensors_cost_nothing(tmp_path, random_sae, cheap):
    header = ",".join(f'"t{i:06}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(500_000))
    content = safetensors_file(b"{" + header.encode() + b"}")
    folder = saved(tmp_path, random_sae)
    (folder / "sae_weights.safetensors").write_bytes(content)
    with cheap(), pytest.raises(SaeFormatError, match=r"declares a header of \d+ bytes \(at most 1048576\)"):
        load_sae(folder)


@pytest.mark.parametrize("sizes", [{"d_sae": 0}, {"d_in": 0}], ids=str)
def test_8_tensors_without_a_single_value_are_refused(sizes, tmp_path, random_sae):
    path = write_npz(tmp_path / "params.npz", arrays(**sizes))
    folder = saved(tmp_path, random_sae)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | dict.fromkeys(("d_in", "d_sae"))))
    save_file({name: torch.from_numpy(array) for name, array in arrays(**sizes).items()},
              folder / "sae_weights.safetensors")
    for source in (path, folder):
        with pytest.raises(SaeFormatError, match=r"W_\w+ has no values; W_\w+ has no values; b_"):
            load_sae(source, site=SITE)


@pytest.mark.parametrize(("make", "tells"), [
    (lambda p: p.mkdir(), "no SAE here"),
    (lambda p: None, "does not exist"),
    (lambda p: os.mkfifo(p), "neither a folder nor a regular file"),
    (lambda p: p.symlink_to("/dev/zero"), "neither a folder nor a regular file"),
], ids=["directory", "missing", "fifo", "device"])
def test_9_what_is_no_file_is_not_found_and_never_waited_for(make, tells, tmp_path, cheap):
    path = tmp_path / "params.npz"
    make(path)
    with cheap(), pytest.raises(SaeNotFoundError, match=tells):
        load_sae(path)


def test_9_an_empty_source_is_not_the_current_folder(tmp_path, random_sae, monkeypatch):
    monkeypatch.chdir(saved(tmp_path, random_sae))
    with pytest.raises(SaeNotFoundError, match="the source is empty"):
        load_sae("")
    assert load_sae(".").d_in == D


def test_9_a_folder_has_no_revisions(tmp_path, random_sae):
    folder = random_sae(4, 8, "model.layers.1.output").save_pretrained(tmp_path / "mine")
    with pytest.raises(SaeNotFoundError, match="mine is local and has no revision 'v1'; leave revision out"):
        load_sae(folder, revision="v1")


def test_9_a_device_behind_a_link_in_a_folder_is_not_read(tmp_path, cheap):
    (tmp_path / "params.npz").symlink_to("/dev/zero")
    with cheap(), pytest.raises(UnsafeFileError, match="a link to /dev/zero, outside"):
        load_sae(tmp_path, site=SITE)


@pytest.mark.parametrize("harm", ["overwrite", "truncate"])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_12_what_is_loaded_does_not_change_with_the_file(harm, kind, tmp_path, random_sae):
    path = (write_npz(tmp_path / "params.npz") if kind == "npz"
            else saved(tmp_path, random_sae) / "sae_weights.safetensors")
    sae = load_sae(path, site=SITE)
    before = {name: p.clone() for name, p in sae.named_parameters()}
    size = path.stat().st_size
    with path.open("r+b") as file:
        _ = file.truncate(10) if harm == "truncate" else file.write(b"\xff" * size)
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, before[name]), name


# --- 13 to 17: npz and pickles ----------------------------------------------------------------------

class Canary:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)


def npy(array):
    raw = io.BytesIO()
    np.save(raw, array)
    return raw.getvalue()


def npy_header(text, body=b""):
    raw = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + body


def good():
    return [(f"{name}.npy", npy(array)) for name, array in arrays().items()]


def test_13_an_object_array_is_unsafe_and_its_canary_stays_silent(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "params.npz"
    np.savez(path, **arrays() | {"b_dec": np.array([Canary(canary)], dtype=object)})
    with pytest.raises(UnsafeFileError, match="holds Python objects: reading it could run code"):
        load_sae(path, site=SITE)
    assert not canary.exists()
    with np.load(path, allow_pickle=True) as archive:  # the canary is alive: numpy, told to, would set it off
        _ = archive["b_dec"]
    assert canary.exists()


def test_13_a_bare_pickle_named_npz_is_no_npz(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(SaeFormatError, match="not a readable npz file"):
        load_sae(tmp_path / "params.npz", site=SITE)
    assert not canary.exists()


def test_14_a_zip_bomb_is_told_from_the_directory(tmp_path, cheap):
    path = tmp_path / "params.npz"
    zipped(path, [*good()[1:], ("W_enc.npy", npy(np.zeros((2**9, 2**17), np.uint8)))],
           compression=zipfile.ZIP_DEFLATED)
    with cheap(), pytest.raises(UnsafeFileError, match=r"'W_enc\.npy': 67108992 bytes declared"):
        load_sae(path, site=SITE)


def test_14_a_vector_of_zeros_is_no_bomb(tmp_path):
    found = arrays(d_in=16, d_sae=2**15) | {"b_enc": np.zeros(2**15, np.float32)}
    np.savez_compressed(tmp_path / "params.npz", **found)
    assert (tmp_path / "params.npz").stat().st_size > 2**20
    assert load_sae(tmp_path / "params.npz", site=SITE).b_enc.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(2**20, 2**20), (2**16, 2**16)], ids=["4 TB", "16 GB"])
def test_14_a_member_that_declares_more_than_it_has_is_unsafe(shape, tmp_path, cheap):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    path = tmp_path / "params.npz"
    zipped(path, [*good()[1:], ("W_enc.npy", npy_header(header, b"x" * 16))])
    with cheap(), pytest.raises(UnsafeFileError, match=r"W_enc\.npy: .* bytes, the directory says"):
        load_sae(path, site=SITE)


def corrupt(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


@pytest.mark.parametrize("change", [
    lambda b: bytes(b[: len(b) // 2]), lambda b: bytes(b[:400]) + bytes([b[400] ^ 255]) + bytes(b[401:]),
    lambda b: b"", lambda b: b"PK\x03\x04", lambda b: b"<!doctype html><p>404", lambda b: bytes(b[:-1]),
], ids=["cut in half", "one byte wrong: CRC", "empty", "four bytes", "HTML", "cut by one byte"])
def test_15_a_broken_npz_is_a_format_error(change, tmp_path):
    path = write_npz(tmp_path / "params.npz")
    corrupt(path, change)
    with pytest.raises(SaeFormatError, match=r"npz|empty|HTML") as caught:
        load_sae(path, site=SITE)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("members", "tells"), [
    (lambda: [*good(), ("../../evil.npy", npy(np.zeros(2)))], "'../../evil'"),
    (lambda: [*good(), ("/tmp/evil.npy", npy(np.zeros(2)))], "'/tmp/evil'"),
    (lambda: [*good(), ("W_enc.npy", npy(np.zeros(2)))], "members that occur twice: 'W_enc.npy'"),
    (lambda: [*good()[1:], ("W_enc.npy", npy_header("__import__('os').system('touch canary')"))], "npz"),
    (lambda: [*good()[1:], ("W_enc.npy", npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"))],
     "Python objects"),
    (lambda: [*good()[1:], ("W_enc.npy", b"\x93NUMPY\x09\x00xxxxxxxx")], "npy version"),
    (lambda: [*good()[1:], ("W_enc.npy", npy(np.array(["a", "b"])))], "weights are floating-point numbers"),
    (lambda: [*good()[1:], ("W_enc.npy", npy(np.zeros(2, [("x", "f4")])))], "weights are floating-point numbers"),
], ids=["dots", "absolute", "twice", "code in the header", "objects", "version 9", "text", "records"])
def test_16_hostile_members_are_refused_and_nothing_is_written_or_run(members, tells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zipped(tmp_path / "params.npz", members())
    with pytest.raises(SaeFormatError) as caught:
        load_sae(tmp_path / "params.npz", site=SITE)
    assert tells in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.npz"]
    assert not (tmp_path / "../../evil.npy").exists()


@pytest.mark.parametrize("name", ["ae.pt", "sae.pth", "model.bin", "final.ckpt"])
def test_17_pickles_of_no_known_format_are_never_opened(name, tmp_path, watched):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
    for source in (tmp_path, tmp_path / name):
        tells = f"{name} is a pickle.*(no format that|has no config.json)"
        with watched() as opened, pytest.raises(UnsafeFileError, match=tells):
            load_sae(source, allow_pickle=True)
        assert not [line for line in opened if line.startswith("open ") and name in line]
    assert not canary.exists()


def test_27_values_that_a_dtype_cannot_hold_are_refused_not_infinite(random_model, random_sae, tmp_path):
    model = random_model("Llama")
    sae = random_sae(32, 64, "model.layers.1.output")
    sae.W_enc[7, 3] = 1e5
    save_pretrained(sae, tmp_path)
    for load in (lambda: load_sae(tmp_path, dtype=torch.float16),
                 lambda: attach_saes(model, sae, dtype=torch.float16).saes["model.layers.1.output"]):
        with pytest.raises(SaeFormatError, match=r"float16 cannot hold these weights \(W_enc has 1 .*\(7, 3\)"):
            load()
    assert load_sae(tmp_path, dtype=torch.bfloat16).W_enc.isfinite().all()


def test_27_finite_weights_whose_gains_make_them_infinite_are_refused(tmp_path):
    config = {"architecture": "gated", "d_in": 4, "d_sae": 8, "apply_b_dec_to_input": False,
              "normalize_activations": "none", "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = {"W_enc": torch.ones(4, 8), "b_gate": torch.ones(8), "b_mag": torch.ones(8), "r_mag": torch.zeros(8),
               "W_dec": torch.ones(8, 4), "b_dec": torch.ones(4)}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    assert load_sae(tmp_path).d_sae == 8
    save_file(tensors | {"r_mag": torch.arange(8.0) * 14}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(SaeFormatError, match=r"sae_weights.*gains folded in, W_enc has 4 NaN or infinite.*\(0, 7\)"):
        load_sae(tmp_path)


def test_weights_and_statistics_are_read_and_written_whatever_the_default_device_is(random_sae, tmp_path):
    sae = random_sae(32, 64, "model.layers.1.output")
    sae.statistics = FeatureStatistics(9, *[torch.ones(64)] * 3, torch.ones(3, 64))
    with torch.device("meta"):
        save_pretrained(sae, tmp_path)
        found = load_sae(tmp_path)
    assert found.statistics.tokens == 9
    assert torch.equal(found.statistics.max, torch.ones(64))
    assert torch.equal(found.W_enc, sae.W_enc)
    assert torch.equal(found.threshold, sae.threshold)
