"""A store with a missing, foreign, swapped, cut or changed file: told, by name, and never read as if it were whole."""

import json
import shutil

import numpy as np
import pytest
from extract.stores import SITE, made, stored, write

from sae_hooks import SaeError, SaeFormatError, SaeNotFoundError
from sae_hooks.store import open_features
from sae_hooks.store.format import canonical, digest
from sae_hooks.store.writing import read_entry

USES = {"csr": lambda s: s.csr(), "column": lambda s: s.column(3), "pooled": lambda s: s.pooled("max"),
        "rows": lambda s: s.rows([30]), "shards": lambda s: list(s.shards()), "verify": lambda s: s.verify(),
        "top": lambda s: s.top(3)}


def shard(folder, number):
    return folder / f"shard-0000{number}.safetensors"


def test_an_export_without_manifest_is_told_as_unfinished(tmp_path):
    write(tmp_path, made(), manifest=False)
    with pytest.raises(SaeFormatError, match=r"not finished: 7 shards are there; run it again with resume"):
        open_features(tmp_path)


def test_a_folder_without_an_export_is_not_found(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SaeNotFoundError, match=r"there is no export\.json"):
            open_features(folder)


@pytest.mark.parametrize("name", ["shard-00003.safetensors", "documents-00003.jsonl"])
def test_a_missing_file_is_named_when_the_store_is_opened(tmp_path, name):
    write(tmp_path, made())
    (tmp_path / name).unlink()
    with pytest.raises(SaeFormatError, match=f"{name} is missing"):
        open_features(tmp_path)


def test_a_cut_shard_is_named_when_the_store_is_opened_and_when_it_is_cut_later(tmp_path):
    store, _ = stored(tmp_path)
    shard(tmp_path, 3).write_bytes(shard(tmp_path, 3).read_bytes()[:-1])
    for use in (lambda: open_features(tmp_path), store.csr, lambda: store.column(3), store.verify):
        with pytest.raises(SaeFormatError, match=r"shard-00003.safetensors"):
            use()


@pytest.mark.parametrize("use", USES)
def test_two_shards_that_were_swapped_are_told_when_they_are_used(tmp_path, use):
    dense = made(density=1.0)
    dense.ordinary[:], dense.features[:] = True, 1
    write(tmp_path, dense)
    shard(tmp_path, 3).rename(tmp_path / "x")
    shard(tmp_path, 2).rename(shard(tmp_path, 3))
    (tmp_path / "x").rename(shard(tmp_path, 2))
    store = open_features(tmp_path)  # the sizes are equal
    with pytest.raises(SaeFormatError, match=r"shard-0000[23]"):
        USES[use](store)


@pytest.mark.parametrize("use", USES)
def test_a_shard_of_another_export_is_told_when_it_is_used(tmp_path, use):
    write(tmp_path / "mine", made())
    write(tmp_path / "theirs", made(d_in=7))
    raw = shard(tmp_path / "theirs", 3).read_bytes()
    shard(tmp_path / "mine", 3).write_bytes(raw)
    manifest = json.loads((tmp_path / "mine/manifest.json").read_text())
    manifest["shards"][3]["bytes"] = len(raw)
    (tmp_path / "mine/manifest.json").write_bytes(canonical(manifest))
    store = open_features(tmp_path / "mine")
    with pytest.raises(SaeFormatError, match="shard-00003"):
        USES[use](store)


@pytest.mark.parametrize("name", ["export.json", "manifest.json"])
def test_the_json_of_another_export_is_refused(tmp_path, name):
    write(tmp_path / "mine", made())
    write(tmp_path / "theirs", made(d_sae=41))
    shutil.copy(tmp_path / "theirs" / name, tmp_path / "mine" / name)
    with pytest.raises(SaeFormatError, match=r"not of this export"):
        open_features(tmp_path / "mine")


@pytest.mark.parametrize("name", ["export.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": "sae_hooks.features/2"}',
                                     b'{"format": "sae_hooks.features/1"}', b'{"format": NaN}'])
def test_json_that_is_not_the_formats_is_refused(tmp_path, name, content):
    write(tmp_path, made())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SaeFormatError, match=name.replace(".", r"\.")):
        open_features(tmp_path)


def changed_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_bytes(canonical(manifest))


def lie(key, number):
    """A change of a manifest: shard 3 has so many more, and so have all together."""
    def change(manifest):
        manifest["shards"][3][key] += number
        manifest[key] += number
    return change


@pytest.mark.parametrize(("change", "told"), [
    (lie("rows", 10**19), "more than its files can hold"), (lie("documents", 10**19), "more than its files can hold"),
    (lie("documents", 2**31), "more than its files can hold"), (lambda m: m.update(rows=61), "its shards have"),
    (lambda m: m["shards"][3]["nonzeros"].update({SITE: 10**19}), "more than its files can hold"),
    (lambda m: m.pop("documents"), r"it states {'documents': None}, its shards have {'rows': 60, 'documents': 10}"),
    (lambda m: m["shards"].pop(), r"it states {'rows': 60, .*}, its shards have {'rows': 54")])
def test_a_manifest_that_says_what_cannot_be_is_refused_when_the_store_is_opened(tmp_path, change, told):
    write(tmp_path, made())
    changed_manifest(tmp_path, change)
    with pytest.raises(SaeFormatError, match=rf"manifest\.json: .*{told}"):
        open_features(tmp_path)


def test_a_shard_beyond_the_manifest_is_found_by_verify(tmp_path):
    write(tmp_path, made())

    def without_the_last(manifest):
        for key in ("rows", "documents"):
            manifest[key] -= manifest["shards"][-1][key]
        manifest["shards"].pop()

    changed_manifest(tmp_path, without_the_last)
    with pytest.raises(SaeFormatError, match=r"shard-00006\.safetensors is there, but the manifest ends before it"):
        open_features(tmp_path).verify()


def test_a_folder_that_was_moved_is_missed_by_name(tmp_path):
    store, _ = stored(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    uses = {"documents-00000.jsonl": lambda: store.labels("label"), "tokenizer": lambda: store.text(3),
            "shard-00000.safetensors": store.csr}
    for name, use in uses.items():
        with pytest.raises(SaeFormatError, match=rf"here/{name} is missing"):
            use()


def test_a_tokenizer_that_was_written_and_is_gone_is_missed_by_name(tmp_path):
    store, _ = stored(tmp_path)
    store.export["tokenizer"] = {"class": "Any"}
    with pytest.raises(SaeFormatError, match="tokenizer is missing; the export wrote it"):
        store.text(3)


def test_one_flipped_byte_anywhere_is_found_by_verify_and_never_ends_in_another_error(tmp_path):
    store, _ = stored(tmp_path)
    for name in ("shard-00003.safetensors", "documents-00003.jsonl"):
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole), 7):
            (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
            again = open_features(tmp_path)
            with pytest.raises(SaeFormatError, match=name):
                again.verify()
            for use in USES.values():
                try:
                    use(again)
                except SaeError:
                    continue
        (tmp_path / name).write_bytes(whole)
    store.verify()


def test_an_index_beyond_d_sae_is_refused_before_anything_is_looked_up_by_it(tmp_path):
    dense = made(density=0.0)
    dense.features[30, 39] = 1
    write(tmp_path, dense)
    raw = bytearray(shard(tmp_path, 3).read_bytes())
    length = int.from_bytes(raw[:8], "little")
    at = 8 + length + json.loads(raw[8 : 8 + length])[f"{SITE}/indices"]["data_offsets"][0]
    assert raw[at] == 39
    raw[at] = 40
    shard(tmp_path, 3).write_bytes(raw)
    for use in ("csr", "pooled", "rows", "shards"):
        with pytest.raises(SaeFormatError, match="a feature index of 40, d_sae is 40"):
            USES[use](open_features(tmp_path))


@pytest.mark.parametrize("fault", ["cut", "flipped", "documents", "no documents", "export", "number"])
def test_a_broken_shard_has_no_entry(tmp_path, fault):
    write(tmp_path, made(), manifest=False)
    path, lines = shard(tmp_path, 3), tmp_path / "documents-00003.jsonl"
    export, raw = digest((tmp_path / "export.json").read_bytes()), path.read_bytes()
    if fault == "cut":
        path.write_bytes(raw[:-5])
    if fault == "flipped":
        at = raw.index(made().token_id[27:36].astype("<i4").tobytes())
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    if fault == "documents":
        lines.write_bytes(lines.read_bytes().replace(b'"label": "1"', b'"label": "2"'))
    if fault == "no documents":
        lines.unlink()
    if fault == "number":
        shutil.copy(shard(tmp_path, 2), path)
    with pytest.raises(SaeFormatError, match=r"export\.json" if fault == "export" else "00003"):
        read_entry(tmp_path, 3, "0" * 64 if fault == "export" else export)


def test_a_file_that_is_no_shard_is_refused(tmp_path):
    from safetensors.numpy import save

    write(tmp_path, made(), manifest=False)
    export = digest((tmp_path / "export.json").read_bytes())
    whole = shard(tmp_path, 3).read_bytes()
    for raw in (b"", b"\xff" * 50, b"version https://git-lfs.github.com", save({"x": np.zeros(3)}),
                save({f"{SITE}/indices": np.zeros(3)}, {"sae_hooks.features/1": "{}"}), whole + b"x"):
        shard(tmp_path, 3).write_bytes(raw)
        with pytest.raises(SaeFormatError, match="shard-00003"):
            read_entry(tmp_path, 3, export)
