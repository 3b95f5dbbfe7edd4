"""Files of torch.save that are hostile, broken or something else: refused in words, cheaply, and nothing is run.

Read is what the caller allows; whether that is asked for is in test_pickles_on_request.py.
"""

import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sae_hooks.errors import SaeFormatError, UnsafeFileError
from sae_hooks.hub import load_sae, pickles

D, F, K = 6, 16, 4
REPO = f"SAE-Res-Tiny-W1K-L0_{K}"  # the name says 1,024 features; REPO is used where the file is refused before


def tensors(d=D, d_sae=F):
    """What a file of Qwen Scope holds."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_sae, d), "W_dec": (d, d_sae), "b_enc": (d_sae,), "b_dec": (d,)}
    return {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}


def saved(folder, content, name="layer1.sae.pt", **options):
    """The path of a file that torch.save wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name, **options)
    return folder / name


def rewritten(path, change=lambda name, raw: raw, extra=(), **options):
    """The zip file written anew, every member changed, some added."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, raw in members:
            archive.writestr(name, change(name, raw))
        for name, raw in extra:
            archive.writestr(name, raw)
    return path


def read(path):
    return pickles.read_pickle(path, {"W_enc", "W_dec", "b_enc", "b_dec", "k"})


class Calls:
    """An object whose unpickling calls something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Rebuilt:
    """A tensor whose pickle states any offset, sizes and strides over a storage of four floats."""

    def __init__(self, offset, sizes, strides):
        storage = torch.storage.TypedStorage(wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32,
                                             _internal=True)
        own = tuple(map(int, strides))  # not the one tuple of two equal constants: torch writes no such
        self.call = torch._utils._rebuild_tensor_v2, (storage, offset, sizes, own, False, OrderedDict())

    def __reduce__(self):
        return self.call


def test_plain_tensors_and_numbers_are_read(tmp_path):
    found = read(saved(tmp_path, tensors() | {"k": 4}))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert (found["k"].dtype, found["k"].tolist()) == (torch.int64, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_every_dtype_is_kept(dtype, tmp_path):
    found = read(saved(tmp_path, {"W_enc": tensors()["W_enc"].to(dtype)}))
    assert found["W_enc"].dtype == dtype
    assert torch.equal(found["W_enc"], tensors()["W_enc"].to(dtype))


def test_the_state_dict_of_a_module_and_its_parameters_are_read(tmp_path):
    module = nn.Module()
    module.W_enc = nn.Parameter(tensors()["W_enc"])
    for content in (module.state_dict(), dict(module.named_parameters())):
        found = read(saved(tmp_path, content))["W_enc"]
        assert type(found) is torch.Tensor
        assert not found.requires_grad
        assert torch.equal(found, tensors()["W_enc"])


def test_a_view_becomes_a_contiguous_copy_without_the_memory_around_it(tmp_path):
    large = torch.arange(1000.0).reshape(50, 20)
    found = read(saved(tmp_path, {"W_enc": large.T, "W_dec": large[10:12], "b_enc": large[3], "b_dec": large[3]}))
    assert torch.equal(found["W_enc"], large.T)
    assert torch.equal(found["W_dec"], large[10:12])
    for tensor in found.values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    found["b_enc"].zero_()
    assert torch.equal(found["b_dec"], large[3])


def test_two_tensors_of_one_memory_are_each_on_its_own(tmp_path):
    both = torch.arange(16.0)
    found = read(saved(tmp_path, {"W_enc": both.view(4, 4), "W_dec": both.view(2, 8)}))
    found["W_enc"].zero_()
    assert torch.equal(found["W_dec"], both.view(2, 8))


def test_a_tensor_that_is_only_marked_as_negated_is_negated(tmp_path):
    found = read(saved(tmp_path, {"b_dec": torch._neg_view(tensors()["b_dec"])}))
    assert not found["b_dec"].is_neg()
    assert torch.equal(found["b_dec"], -tensors()["b_dec"])


def test_files_are_read_into_memory_whatever_the_defaults_of_torch_are(tmp_path):
    path = saved(tmp_path, tensors() | {"k": 4})
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = read(path)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}
    assert found["W_enc"].dtype == torch.float32


def test_what_was_saved_on_a_gpu_is_read_into_memory(tmp_path):
    path = rewritten(saved(tmp_path, tensors()), lambda name, raw: raw.replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:7"))
    found = read(path)
    assert torch.equal(found["W_enc"], tensors()["W_enc"])
    assert found["W_enc"].device.type == "cpu"


def test_what_is_read_does_not_change_with_the_file(tmp_path):
    path = saved(tmp_path, tensors())
    found = read(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


# --- what would run, or take memory -----------------------------------------------------------------


def test_a_pickle_that_calls_something_is_unsafe_and_its_canary_stays_silent(tmp_path):
    canary = tmp_path / "canary"
    path = saved(tmp_path / REPO, tensors() | {"b_dec": Calls(os.mkdir, str(canary))})
    with pytest.raises(UnsafeFileError, match=r"calls for posix\.mkdir, which plain tensors do not need.*run code"):
        load_sae(path, allow_pickle=True)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the canary is alive: torch, told to, would set it off
    assert canary.exists()


def test_where_the_first_look_is_fooled_the_weights_only_loader_still_runs_nothing(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    path = saved(tmp_path, tensors() | {"b_dec": Calls(os.mkdir, str(canary))})
    monkeypatch.setattr(pickles, "_check_pickle", lambda raw: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UnsafeFileError, match="torch's weights_only loader refuses it"):
        read(path)
    assert not canary.exists()


def test_what_torch_has_been_told_to_trust_is_not_trusted_here(tmp_path):
    canary = tmp_path / "canary"
    path = saved(tmp_path, tensors() | {"b_dec": Calls(os.mkdir, str(canary))})
    with torch.serialization.safe_globals([os.mkdir]), pytest.raises(UnsafeFileError, match=r"posix\.mkdir"):
        read(path)
    assert not canary.exists()


@pytest.mark.parametrize(("value", "tells"), [
    (lambda: tensors()["W_enc"].to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
    (lambda: torch.empty(2, device="meta"), r"torch\._utils\._rebuild_meta_tensor_no_storage"),
    (lambda: torch.zeros(2, dtype=torch.complex64), r"torch\.ComplexFloatStorage"),
    (lambda: torch.zeros(2).to(torch.float8_e5m2), r"torch\._utils\._rebuild_tensor_v3"),
    (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    (lambda: torch.device("cpu"), r"torch\.device"),
    (lambda: Calls(bytearray, 10**12), r"__builtin__\.bytearray|builtins\.bytearray"),
    (lambda: {1, 2}, r"set"),
], ids=["sparse", "meta", "complex", "float8", "a module", "a device", "a terabyte of zeros", "a set"])
def test_anything_but_plain_tensors_is_refused_before_torch_opens_it(value, tells, tmp_path, monkeypatch, cheap):
    path = saved(tmp_path, {"W_enc": value()})
    monkeypatch.setattr(pickles, "_loaded", lambda file: pytest.fail("torch.load was reached"))
    with cheap(), pytest.raises(UnsafeFileError, match=tells):
        read(path)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_a_quantised_tensor_is_refused(tmp_path):
    path = saved(tmp_path, {"W_enc": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)})
    with pytest.raises(UnsafeFileError, match=r"calls for torch\._utils\._rebuild_qtensor|QInt8Storage"):
        read(path)


class Sub(torch.Tensor):
    """A subclass."""


def test_a_tensor_of_a_subclass_is_refused(tmp_path):
    with pytest.raises(UnsafeFileError, match=r"calls for torch\._tensor\._rebuild_from_type_v2"):
        read(saved(tmp_path, {"W_enc": tensors()["W_enc"].as_subclass(Sub)}))


def test_a_pickle_of_a_later_protocol_is_refused(tmp_path):
    path = saved(tmp_path, tensors() | {"b_dec": Calls(os.mkdir, "canary")}, pickle_protocol=4)
    with pytest.raises(UnsafeFileError, match="calls for the opcode"):
        read(path)


def test_a_zip_bomb_is_told_from_the_directory(tmp_path, cheap):
    path = saved(tmp_path, {"W_enc": torch.zeros(2**20)})
    bomb = rewritten(path, lambda name, raw: bytes(2**26) if name.endswith("data/0") else raw,
                     compression=zipfile.ZIP_DEFLATED)
    with cheap(), pytest.raises(UnsafeFileError, match=r"data/0': 67108864 bytes declared, .* over 100 to 1"):
        read(bomb)


def test_compressed_members_are_refused_though_they_unpack_little(tmp_path):
    path = rewritten(saved(tmp_path, tensors()), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFileError, match=r"or are compressed, which torch\.save never does"):
        read(path)


def test_members_that_lie_over_each_other_are_refused(tmp_path, cheap):
    path = saved(tmp_path, tensors(d=64, d_sae=512))
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    entries = content[at:].partition(b"PK\x06\x06")[0]  # PyTorch ends it with records of 64 bits, too
    both = entries + entries.replace(b"layer1.sae/", b"layer2.sae/")
    count = 2 * len(zipfile.ZipFile(path).namelist())
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(both), at, 0)
    path.write_bytes(content[:at] + both + end)
    with cheap(), pytest.raises(UnsafeFileError, match=r"its parts have \d+ bytes in a file of \d+"):
        read(path)


@pytest.mark.parametrize(("offset", "sizes", "strides"), [
    (0, (2**16, 2**16), (2**16, 1)), (2, (4,), (1,)), (0, (4,), (3,)), (3, (4,), (-1,)), (-2, (2,), (1,)),
    (2**62, (1,), (1,)), (0, (2**62, 4), (4, 1)),
], ids=["16 GB", "offset", "stride", "backwards", "before it", "far away", "overflow"])
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(offset, sizes, strides, tmp_path, cheap):
    path = saved(tmp_path, {"W_enc": Rebuilt(offset, sizes, strides)})
    with cheap(), pytest.raises(SaeFormatError, match="torch cannot read it"):
        read(path)


@pytest.mark.parametrize("sizes", [(2**20, 2**20), (5,)], ids=["4 TB", "one more than there are"])
def test_a_view_that_repeats_its_values_is_unsafe(sizes, tmp_path, cheap):
    path = saved(tmp_path, {"W_enc": Rebuilt(0, sizes, (0,) * len(sizes))})
    with cheap(), pytest.raises(UnsafeFileError, match=r"of which the file holds 16: a view that repeats its values"):
        read(path)


@pytest.mark.parametrize("numel", [b"K\xff", b"J\xff\xff\xff\x7f"], ids=["255", "2^31 - 1"])
def test_a_storage_that_states_more_than_the_file_has_is_refused(numel, tmp_path, cheap):
    path = saved(tmp_path, {"b_dec": torch.arange(4.0)})
    rewritten(path, lambda name, raw: raw.replace(b"K\x04", numel) if name.endswith("data.pkl") else raw)
    with cheap(), pytest.raises(SaeFormatError, match="torch cannot read it"):
        read(path)


def test_a_foreign_name_is_unsafe(tmp_path):
    with pytest.raises(UnsafeFileError, match=r"does not know: '../../evil'"):
        read(saved(tmp_path, {"../../evil": torch.zeros(2)}))


# --- what is broken, or something else --------------------------------------------------------------


@pytest.mark.parametrize(("change", "tells"), [
    (lambda b: b[: len(b) // 2], "cut short, or something follows its zip directory"),
    (lambda b: b[:-1], "cut short, or something follows"),
    (lambda b: b + b"x", "cut short, or something follows"),
    (lambda b: b"", "the file is empty"),
    (lambda b: b"PK\x03\x04", "cut short"),
    (lambda b: b"PK\x03\x04" + b[-22:], "its zip directory is not where its last bytes say"),
    (lambda b: b"<!doctype html><p>404", "this is an HTML page"),
    (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    (lambda b: b"\x80\x02}q\x00.", "not a zip file, which torch.save has written since PyTorch 1.6"),
    (lambda b: b[: b.index(torch.arange(4.0).numpy().tobytes()) + 5] + b"\xff" + b[b.index(
        torch.arange(4.0).numpy().tobytes()) + 6:], "data/0' in it is damaged: its checksum is wrong"),
], ids=["half", "a byte less", "a byte more", "empty", "four bytes", "ends only", "HTML", "LFS", "a bare pickle",
        "one byte wrong"])
def test_a_broken_file_says_what_is_wrong(change, tells, tmp_path):
    path = saved(tmp_path / REPO, {"b_dec": torch.arange(4.0)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SaeFormatError) as caught:
        load_sae(path, allow_pickle=True)
    assert tells in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_format_of_before_pytorch_1_6_is_refused_with_the_way_out(tmp_path):
    path = saved(tmp_path, tensors(), _use_new_zipfile_serialization=False)
    with pytest.raises(SaeFormatError, match=r"torch\.save\(torch\.load\(path, weights_only=True\), path\)"):
        read(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert torch.equal(read(path)["W_enc"], tensors()["W_enc"])


@pytest.mark.parametrize(("extra", "tells"), [
    ([("other/data.pkl", pickle.dumps({}, 2))], "expected one data.pkl"),
    ([("archive/DATA.PKL", pickle.dumps({}, 2))], "expected one data.pkl"),
    ([("archive/data/0", b"x")], "occur twice"),
], ids=["a second pickle", "one that torch takes for the first", "a member twice"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_ambiguous_archive_is_unsafe(extra, tells, tmp_path):
    path = tmp_path / "archive.pt"
    torch.save(tensors(), path)
    with pytest.raises(UnsafeFileError, match=tells):
        read(rewritten(path, extra=extra))


def test_a_huge_pickle_is_unsafe(tmp_path, cheap):
    path = rewritten(saved(tmp_path, tensors()),
                     lambda name, raw: raw + bytes(2**20) if name.endswith("data.pkl") else raw)
    with cheap(), pytest.raises(UnsafeFileError, match=r"one data\.pkl of at most 1048576 bytes, found .*\(104\d+"):
        read(path)


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02}q\x00(X\xff\xff\xff\x7f", b"\x80\x02K\x05.",
                                 b"\x80\x02}Q.", b"\x80\x02h\x05.", b"\xfe\xfd"],
                         ids=["nothing", "no end", "an empty stack", "a short string", "a number", "a bare storage",
                              "an unknown memory", "noise"])
def test_a_pickle_that_makes_no_sense_is_a_format_error(raw, tmp_path):
    path = rewritten(saved(tmp_path, tensors()), lambda name, old: raw if name.endswith("data.pkl") else old)
    with pytest.raises(SaeFormatError, match=r"not a readable|torch cannot read|refuses it|holds a int|several places"):
        read(path)


@pytest.mark.parametrize(("content", "tells"), [
    ([torch.zeros(2)], "holds a list, expected a dict of tensors"),
    (torch.zeros(2), "holds a Tensor, expected a dict"),
    ({"step": 3, "ae": {"W_enc": torch.zeros(2)}, "config": {}},
     "'ae' is a dict, 'config' is a dict: a checkpoint from the middle of a training"),
    ({"b_dec": torch.zeros(2), "k": True}, "'k' is a bool"),
    ({"b_dec": torch.zeros(2), "k": None}, "'k' is a NoneType"),
    ({"b_dec": torch.zeros(2), "k": "4"}, "'k' is a str"),
    ({5: torch.zeros(2)}, "5 is a Tensor"),
    ({"k": 2**70}, "k is no number that fits 64 bits"),
], ids=["a list", "a tensor", "a checkpoint", "true", "none", "text", "a number for a name", "2^70"])
def test_only_a_flat_dict_of_tensors_and_numbers_is_read(content, tells, tmp_path):
    with pytest.raises(SaeFormatError, match=tells):
        read(saved(tmp_path, content))


def test_a_torchscript_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "layer1.sae.pt")
    with pytest.raises(SaeFormatError, match="its parts have"):
        read(tmp_path / "layer1.sae.pt")


def test_values_that_are_not_finite_are_refused(tmp_path):
    content = tensors(d_sae=1024)
    content["W_enc"][3, 2] = float("nan")
    path = saved(tmp_path / REPO, content)
    with pytest.raises(SaeFormatError, match=r"W_enc has 1 NaN or infinite values, the first at \(3, 2\)"):
        load_sae(path, allow_pickle=True)
