"""Files of torch.save that fool the first looks: torch would read another part of them, or never end."""

import io
import struct
import zipfile

import pytest
import torch
from hub.test_hostile_pickles import read, rewritten, saved, tensors

from sae_hooks.errors import SaeFormatError, UnsafeFileError
from sae_hooks.hub import pickles


def with_pickle(path, raw):
    """The file with other bytes for its pickle."""
    return rewritten(path, lambda name, old: raw if name.endswith("data.pkl") else old)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


NESTED = b"K\x01" + b"\x85" * 500_000  # ((((1,),),),)
DOUBLED = b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
COPIED = (b"ccollections\nOrderedDict\nq\x01(" + b"".join(b"(" + text(b"%d" % i) + b"Nt" for i in range(80)) + b"t"
          b"\x85q\x02(" + b"h\x01h\x02R" * 100_000 + b"t")


def stored(key):
    return b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + key + text(b"cpu") + b"K\x04tQ"


@pytest.mark.parametrize(("raw", "tells"), [
    (b"\x80\x02}" + NESTED + b"K\x01s.", "more than 500 tuples"),
    (b"\x80\x02" + stored(NESTED) + b".", "more than 500 tuples"),
    (b"\x80\x02}" + DOUBLED + b"K\x01s.", "one value in several places"),
    (b"\x80\x02" + stored(DOUBLED) + b".", "one value in several places"),
    (b"\x80\x02" + COPIED + b".", "one value in several places"),
    (b"\x80\x02" + text(b"a") + b"q\x01)q\x01h\x01\x86.", "one value in several places"),
], ids=["nested names", "nested keys", "names of 2^60 parts", "keys of 2^60 parts", "100,000 copies", "put anew"])
def test_a_short_pickle_that_takes_time_or_memory_without_end_is_unsafe(raw, tells, tmp_path, monkeypatch, cheap):
    path = with_pickle(saved(tmp_path, tensors()), raw)
    monkeypatch.setattr(pickles, "_loaded", lambda file: pytest.fail("torch.load was reached"))
    with cheap(), pytest.raises(UnsafeFileError, match=tells):
        read(path)


def test_an_ordered_dict_with_an_items_of_its_own_is_read_by_what_it_holds(tmp_path):
    state = b"}" + text(b"items") + text(b"x") + b"s"
    path = with_pickle(saved(tmp_path, tensors()), b"\x80\x02ccollections\nOrderedDict\n)R" + text(b"k") + b"K\x04s"
                       + state + b"b.")
    assert read(path)["k"].tolist() == 4


def of_members(members):
    """The bytes of a zip file, its records of 32 bits, and where its directory begins."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, raw in members:
            archive.writestr(name, raw)
    content = held.getvalue()
    return content, struct.unpack("<I", content[-6:-2])[0]


@pytest.fixture
def two(tmp_path):
    """Members of a file with the numbers 0 to 3, and those of one as long with 100 to 103."""
    found = []
    for first in (0.0, 100.0):
        path = saved(tmp_path, {"b_dec": torch.arange(4.0) + first})
        with zipfile.ZipFile(path) as archive:
            found.append([(name, archive.read(name)) for name in archive.namelist()])
    return found


def test_a_file_behind_another_whose_directory_torch_would_read_instead_is_refused(two, tmp_path):
    (seen, at), (hidden, also_at) = map(of_members, two)
    assert (len(seen), at) == (len(hidden), also_at)
    path = tmp_path / "both.pt"
    path.write_bytes(hidden[:-22] + seen)
    assert torch.load(path)["b_dec"].tolist() == [100, 101, 102, 103]  # Python's zipfile would show the other
    with pytest.raises(SaeFormatError, match="its zip directory is not where its last bytes say"):
        read(path)


@pytest.mark.parametrize(("signature", "record", "locator", "tells"), [
    (b"PK\x06\x06", 0, 0, None), (b"PK\x06\x06", 0, 8, "is not where"), (b"PK\x06\x06", 8, 0, "is not where"),
    (b"PK\x05\x05", 0, 0, "is not where"), (b"", 0, 0, "is not where"),
], ids=["as it is", "a locator that points elsewhere", "a directory elsewhere", "another record", "no record"])
def test_records_of_64_bits_are_those_that_torch_reads(signature, record, locator, tells, two, tmp_path):
    content, at = of_members(two[0])
    ends, count = len(content) - 22, len(two[0])
    of_64 = struct.pack("<4sQ2H2L4Q", signature, 44, 45, 45, 0, 0, count, count, ends - at, at + record)
    path = tmp_path / "records.pt"
    path.write_bytes(content[:-22] + (of_64 if signature else b"")
                     + struct.pack("<4sLQL", b"PK\x06\x07", 0, ends + locator, 1) + content[-22:])
    if tells is None:
        assert read(path)["b_dec"].tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(SaeFormatError, match=tells):
        read(path)
