"""Configs, links and values that are broken or hostile: refused by file and key, and nothing is imported or followed.

The numbers name the kinds of faults, one a kind.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub.files import D, F, arrays, write_npz

from sae_hooks import attach_saes
from sae_hooks.errors import (
    SaeFormatError,
    SaeMismatchError,
    SaeNotFoundError,
    SaeWarning,
    SiteError,
    UnsafeFileError,
)
from sae_hooks.formats import gemma_scope
from sae_hooks.formats.entry import d_in_from_size
from sae_hooks.hub import find_saes, list_saes, load_sae, save_pretrained
from sae_hooks.hub.parsing import read_config
from sae_hooks.hub.weight_files import check_finite, read_tensors

SITE = "model.layers.1.output"


def saved(tmp_path, random_sae, d=D, **more):
    return save_pretrained(random_sae(d, F, SITE, **more), tmp_path / "sae")


# --- 18 to 21: configs and links --------------------------------------------------------------------

CONFIGS = {
    "NaN": (b'{"l0": NaN}', "the config has NaN, which is no finite number"),
    "minus infinity": (b'{"l0": -Infinity}', "-Infinity"),
    "1e999": (b'{"l0": 1e999}', "1e999, which is no finite number"),
    "5000 digits": (b'{"d_in": 1' + b"0" * 5000 + b"}", "a whole number of 5001 digits"),
    "deep nesting": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "UTF-16": (json.dumps({"d_in": 1}).encode("utf-16"), "the config is not JSON in UTF-8"),
    "empty": (b"", "the file is empty (0 bytes)"),
    "only blanks": (b"  \n", "the file is empty (3 bytes)"),
    "duplicate keys": (b'{"d_in": 1, "d_in": 2}', "the key 'd_in' twice"),
    "nested duplicate keys": (b'{"metadata": {"l0": 1, "l0": 2}}', "the key 'l0' twice"),
    "lone surrogate": (b'{"architecture": "\\ud800"}', "the config is not JSON in UTF-8"),
    "a list": (b"[1]", "the config is a JSON list, expected an object"),
    "2 MB": (b'{"a": "' + b"x" * 2**21 + b'"}', "larger than 1048576 bytes"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "run `git lfs pull`"),
    "HTML": (b"<!DOCTYPE HTML><p>", "this is an HTML page"),
    "cut": (b'{"d_in": 1', "the config is not JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_18_a_config_that_is_not_strict_json_is_refused_by_file_and_flaw(case, tmp_path, random_sae, cheap):
    content, tells = CONFIGS[case]
    folder = saved(tmp_path, random_sae)
    (folder / "cfg.json").write_bytes(content)
    with cheap(), pytest.raises(SaeFormatError) as caught:
        load_sae(folder)
    assert tells in str(caught.value)
    assert str(folder / "cfg.json") in str(caught.value)


YAML = {
    "alias": (b"a: *b", "the config has the alias or anchor 'b'"),
    "bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "the alias or anchor 'a'"),
    "anchor at a key": (b"&b c: 1", "the alias or anchor 'b'"),
    "code": (b"a: !!python/object/apply:os.system ['false']", "the tag 'tag:yaml.org,2002:python/object/apply:os.sys"),
    "tag": (b"a: !!str 1", "the tag 'tag:yaml.org,2002:str'"),
    "long tag": (b"a: !" + b"x" * 9_000, "the tag '!xxxx"),
    "long anchor": (b"a: &" + b"x" * 9_000 + b" 1", "the alias or anchor 'xxxx"),
    "duplicate keys": (b"a: 1\na: 2", "the key 'a' twice"),
    "nested duplicate keys": (b"x: {a: 1, 'a': 2}", "the key 'a' twice"),
    "merge": (b"<<: {a: 1}", "the config has a merge (<<)"),
    "a number for a key": (b"on: 1\n2: 3", "the key 'on', which is no text"),
    "a list for a key": (b"[1]: 2", "a list or mapping for a key"),
    "NaN": (b"l0: .nan", ".nan, which is no finite number"),
    "minus infinity": (b"l0: -.INF", "-.INF, which is no finite number"),
    "1e999": (b"l0: 1.0e+999", "1.0e+999, which is no finite number"),
    "5000 digits": (b"k: 1" + b"0" * 5000, "a whole number of 5001 digits"),
    "deep nesting": (b"a: " + b"[" * 400, "nested too deeply"),
    "deep mappings": (b"{a: " * 100_000, "nested too deeply"),
    "many values": (b"a: [" + b"1," * 400_000 + b"]", "more than 5000 keys, values and brackets"),
    "two documents": (b"a: 1\n---\nb: 2", "the config has a second document"),
    "a list": (b"- 1", "the config is a YAML list, expected a mapping"),
    "text": (b"hello", "the config is a YAML str, expected a mapping"),
    "comments alone": (b"# nothing", "the config is a YAML NoneType, expected a mapping"),
    "UTF-16": ("a: 1".encode("utf-16"), "the config is not YAML in UTF-8"),
    "lone surrogate": (b'a: "\\ud800"', "the config is not YAML in UTF-8"),
    "control characters": (b"a: \x01", "the config is not YAML in UTF-8"),
    "cut": (b"a: [1", "the config is not YAML in UTF-8: while parsing a flow sequence"),
    "half a number": (b"a: 0b_", "the config is not YAML in UTF-8"),
    "an angle of 200 parts": (b"a: " + b"1:" * 200 + b"1.5", "the config is not YAML in UTF-8: int too large"),
    "no character": (b'a: "\\UFFFFFFFF"', "the config is not YAML in UTF-8: Python int too large"),
    "empty": (b"", "the file is empty (0 bytes)"),
    "2 MB": (b"a: " + b"x" * 2**21, "larger than 1048576 bytes"),
}


@pytest.mark.parametrize("case", YAML)
def test_18_a_yaml_config_that_is_more_than_plain_values_is_refused_by_file_and_flaw(case, tmp_path, cheap):
    content, tells = YAML[case]
    (tmp_path / "layer_0.safetensors").write_bytes(b"never looked at")
    (tmp_path / "config.yaml").write_bytes(content)
    with cheap(), pytest.raises(SaeFormatError) as caught:
        load_sae(tmp_path)
    assert tells in str(caught.value)
    assert str(tmp_path / "config.yaml") in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) == 1


def test_18_yaml_is_read_as_plain_values_and_a_date_is_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: Qwen/Qwen3-4B  # whose\n'5': [1, -2.5, 0x1F, yes, ~, '1', 1e3, =]\n"
                     b"day: 2026-01-02\nempty:\ninner: {a: [], b: {}}\n")
    assert read_config(path) == {"name": "Qwen/Qwen3-4B", "5": [1, -2.5, 31, True, None, "1", "1e3", "="],
                                 "day": "2026-01-02", "empty": None, "inner": {"a": [], "b": {}}}
    assert type(read_config(path)["5"][3]) is bool


@pytest.fixture(params=["{", '{"architecture": "matching_pursuit"}', '{"normalize_activations": "layer_norm"}'])
def one_broken(request, tmp_path, random_sae):
    """SAEs of layers 1 to 3 in folders of no telling names, the config of layer 1's broken."""
    for n in (1, 2, 3):
        save_pretrained(random_sae(D, F, f"model.layers.{n}.output"), tmp_path / "all" / f"run{n}")
    (tmp_path / "all/run1/cfg.json").write_text(request.param)
    return tmp_path / "all"


def test_18_one_broken_config_takes_no_other_sae_along(one_broken):
    for asked in ({"layer": 3}, {"site": "model.layers.3.output"}, {"site": "resid_post", "layer": 3}):
        assert load_sae(one_broken, **asked).site == "model.layers.3.output"
    table = list_saes(one_broken)
    assert [bool(entry.flaw) for entry in table] == [True, False, False]
    assert "run1/cfg.json: " in table[0].flaw
    assert str(table).splitlines()[1].split() == ["(unreadable)", "-", "-", "-", "run1/sae_weights.safetensors"]
    with pytest.warns(SaeWarning, match=r"1 left out, as its config cannot be read: .*run1.cfg\.json"):
        assert [file.entry.layer for file in find_saes(one_broken)] == [2, 3]


def test_18_a_broken_config_is_told_where_its_sae_is_meant_or_nothing_else_fits(one_broken, tmp_path):
    for source, asked in ((one_broken / "run1", {}), (one_broken, {"layer": 1}),
                          (one_broken, {"site": "model.layers.1.output"})):
        with pytest.raises(SaeFormatError, match=r"run1.cfg\.json: "):
            load_sae(source, **asked)
    (one_broken / "run1").rename(one_broken / "model.layers.1.output")
    for asked in ({}, {"layer": 1}, {"site": "resid_post"}):
        with pytest.raises(SaeFormatError, match=r"model\.layers\.1\.output.cfg\.json: "):
            find_saes(one_broken, **asked)
    (one_broken / "run2").rename(one_broken / "model.layers.2.output")
    shutil.copytree(one_broken / "model.layers.1.output", tmp_path / "all/old/model.layers.2.output")
    assert load_sae(one_broken, layer=2).site == "model.layers.2.output"


def test_18_true_is_not_a_number_and_the_key_is_named(tmp_path, random_sae):
    folder = saved(tmp_path, random_sae)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"d_in": True}))
    with pytest.raises(SaeFormatError, match=r"cfg\.json: d_in must be a whole number from 1 to 65536, got True"):
        load_sae(folder)


def test_18_a_byte_order_mark_is_accepted(tmp_path, random_sae):
    folder = saved(tmp_path, random_sae)
    (folder / "cfg.json").write_bytes(b"\xef\xbb\xbf" + (folder / "cfg.json").read_bytes())
    assert load_sae(folder).site == SITE
    assert read_config(folder / "cfg.json")["d_sae"] == F


@pytest.mark.parametrize("value", ["../../../../../../etc/passwd", "/etc/passwd", "https://example.com/x", "a\0b"])
def test_19_names_in_a_config_never_become_paths(value, tmp_path, random_sae, watched):
    folder = saved(tmp_path, random_sae)
    config = json.loads((folder / "cfg.json").read_text())
    config |= dict.fromkeys(("filename", "weights", "path", "sae_path", "checkpoint_path"), value)
    config["metadata"] |= {"hook_name": value, "dataset_path": value, "neuronpedia_id": value}
    (folder / "cfg.json").write_text(json.dumps(config))
    load_sae(folder)  # everything that is imported late is imported now
    with watched() as opened:
        load_sae(folder)
    files = [line.removeprefix("open ") for line in opened if line.startswith("open ")]
    assert files
    assert [path for path in files if not path.startswith(str(folder))] == []


def test_20_code_that_a_config_asks_for_is_not_imported(tmp_path, random_sae, watched, caplog):
    folder = saved(tmp_path, random_sae)
    (tmp_path / "evil.py").write_text("raise SystemExit")
    config = json.loads((folder / "cfg.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
    config["metadata"]["model_from_pretrained_kwargs"] = {"trust_remote_code": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    load_sae(folder)
    with watched() as events, caplog.at_level("INFO", "sae_hooks"):
        sae = load_sae(folder)
    assert not [line for line in events if line.startswith(("import", "exec", "os.system", "subprocess"))]
    assert "auto_map, trust_remote_code, model_from_pretrained_kwargs read as text and not used" in caplog.text
    assert not {"auto_map", "trust_remote_code", "model_from_pretrained_kwargs"} & set(sae.metadata)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_21_a_link_out_of_the_folder_is_unsafe(name, tmp_path, random_sae):
    folder = saved(tmp_path, random_sae)
    outside = tmp_path / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(UnsafeFileError, match=f"{name} is a link to .*outside, outside"):
        load_sae(folder)


def test_21_a_link_inside_the_folder_works(tmp_path, random_sae):
    folder = saved(tmp_path, random_sae)
    (folder / "real").mkdir()
    shutil.move(folder / "sae_weights.safetensors", folder / "real/w")
    (folder / "sae_weights.safetensors").symlink_to("real/w")
    assert load_sae(folder).site == SITE


def test_21_links_to_folders_are_not_followed_and_are_told_where_nothing_else_is_there(tmp_path, random_sae):
    outside = saved(tmp_path, random_sae)
    (tmp_path / "many/layer_1").mkdir(parents=True)
    (tmp_path / "many/layer_1/mine").symlink_to(outside)
    with pytest.raises(SaeNotFoundError, match=r"found no files\. Links to folders are not .*: layer_1/mine$"):
        load_sae(tmp_path / "many")
    assert load_sae(tmp_path / "many/layer_1/mine").site == SITE


def test_21_in_a_hub_cache_links_lead_to_the_blobs_and_the_shared_blobs_and_nowhere_else(tmp_path, random_sae):
    repo = tmp_path / "hub/models--me--mine"
    folder = save_pretrained(random_sae(D, F, SITE), repo / "snapshots/abc")
    weights = folder / "sae_weights.safetensors"
    for home in (repo / "blobs", tmp_path / "hub/blobs/12"):
        home.mkdir(parents=True)
        shutil.move(weights.resolve(), home / "1234")
        weights.unlink(missing_ok=True)
        weights.symlink_to(home / "1234")
        assert load_sae(folder).site == SITE
    outside = tmp_path / "hub/models--me--other"
    shutil.move(weights.resolve(), outside)
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(UnsafeFileError, match=r"a link to .*models--me--other, outside .*models--me--mine"):
        load_sae(folder)


def test_21_a_loop_of_links_is_a_format_error_and_a_dead_link_is_not_found(tmp_path, random_sae):
    folder = saved(tmp_path, random_sae)
    path = folder / "sae_weights.safetensors"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(SaeFormatError, match="cannot be followed"):
        load_sae(folder)
    path.unlink()
    path.symlink_to("nothing")
    with pytest.raises(SaeNotFoundError, match="a link to nothing"):
        load_sae(folder)


# --- 23, 24, 27: what is in the tensors -----------------------------------------------------------------

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_23_a_value_that_is_not_finite_is_named_counted_and_placed(name, value, tmp_path):
    found = arrays()
    found[name].reshape(-1)[-2:] = value
    first = tuple(int(n) for n in np.argwhere(~np.isfinite(found[name]))[0])
    path = write_npz(tmp_path / "params.npz", found)
    with pytest.raises(SaeFormatError) as caught:
        load_sae(path, site=SITE)
    assert f"{path}: {name} has 2 NaN or infinite values, the first at {first}" in str(caught.value)


def test_23_every_tensor_with_nan_is_named_at_once(tmp_path):
    found = arrays()
    found["W_enc"][0, 0] = found["b_dec"][1] = np.nan
    with pytest.raises(SaeFormatError, match=r"W_enc has 1 NaN.*; b_dec has 1 NaN .* \(1,\)"):
        load_sae(write_npz(tmp_path / "params.npz", found), site=SITE)


def test_23_large_finite_values_are_not_taken_for_infinite():
    check_finite({"W_enc": torch.full((1000,), 6e4, dtype=torch.float16), "b": torch.full((8,), 3e38)})


def test_24_a_transposed_encoder_in_a_file_is_turned(tmp_path):
    found = arrays()
    straight = load_sae(write_npz(tmp_path / "a/params.npz", found), site=SITE)
    turned = load_sae(write_npz(tmp_path / "b/params.npz", found | {"W_enc": found["W_enc"].T.copy()}), site=SITE)
    assert torch.equal(straight.W_enc, turned.W_enc)


def test_24_a_file_of_another_width_than_its_folder_says_is_refused(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-res/layer_3/width_4k/average_l0_9/params.npz"
    write_npz(path)
    with pytest.raises(SaeFormatError, match="says 4096 features, its header 32"):
        find_saes(path)


def test_24_a_file_on_the_hub_that_is_not_what_its_path_says_is_refused_when_it_comes(repo, cache):
    made = repo()
    write_npz(made.dir / "layer_1/width_4k/average_l0_82/params.npz")
    [found] = find_saes(made.id, cache_dir=cache)
    with pytest.raises(SaeFormatError, match="not what its name or config says: width is 32, expected 4096"):
        found.load()


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_24_a_file_on_the_hub_of_another_dtype_than_its_size_was_taken_for_is_read(dtype, repo, cache):
    made = repo()
    found = {name: array.astype(dtype) for name, array in arrays(d_in=64, d_sae=2048).items()}
    write_npz(made.dir / "layer_1/width_2k/average_l0_82/params.npz", found)
    sizes = d_in_from_size(4 * (2 * 6 * 2048 + 2 * 2048 + 6), 2048)
    [file] = find_saes(made.id, cache_dir=cache)
    assert (sizes, file.entry.d_in) == (6, None)
    assert file.load().d_in == 64
    assert replace(file, entry=replace(file.entry, d_in=sizes)).load().d_in == 64  # compressed, it may look like any


def test_24_a_width_that_a_label_leaves_open_is_told_by_the_file(tmp_path):
    write_npz(tmp_path / "gemma-scope-2b-pt-res/layer_1/width_3k/average_l0_82/params.npz", d_sae=3072)
    [file] = find_saes(tmp_path / "gemma-scope-2b-pt-res")
    assert (file.entry.width, file.load().d_sae) == (3072, 3072)


def test_24_tensors_that_do_not_fit_are_a_mismatch_that_names_the_file(tmp_path):
    path = write_npz(tmp_path / "params.npz", arrays() | {"b_dec": np.zeros(D + 1, np.float32)})
    with pytest.raises(SaeMismatchError, match=r"params.npz: tensors do not fit together: W_dec is \(32, 4\)"):
        load_sae(path, site=SITE)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_])
def test_27_integer_weights_are_refused_by_name(dtype, tmp_path):
    path = write_npz(tmp_path / "params.npz", arrays() | {"W_dec": np.ones((F, D), dtype)})
    with pytest.raises(SaeFormatError, match=r"W_dec is (int8|int32|bool); an SAE has float16, bfloat16, float32"):
        load_sae(path, site=SITE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_27_every_float_is_read_as_it_is(dtype, tmp_path):
    found = arrays()
    path = write_npz(tmp_path / "params.npz", {name: array.astype(dtype) for name, array in found.items()})
    sae = load_sae(path, site=SITE)
    assert sae.W_enc.dtype == {np.float16: torch.float16, np.float64: torch.float64}.get(dtype, torch.float32)
    np.testing.assert_allclose(sae.W_dec.float().numpy(), found["W_dec"], rtol=1e-3)


@pytest.mark.parametrize(("rows", "norm", "tells"), [
    (slice(3, 5), 0, "2 of 32 decoder rows are zero"), (slice(7, 8), 1e6, "decoder row 7 has norm 1e.06")])
def test_27_decoder_rows_of_no_length_or_an_absurd_one_are_warned_about(rows, norm, tells, tmp_path):
    found = arrays()
    found["W_dec"] /= np.linalg.norm(found["W_dec"], axis=1, keepdims=True)
    found["W_dec"][rows] *= norm
    path = write_npz(tmp_path / "params.npz", found)
    with pytest.warns(SaeWarning, match=tells):
        load_sae(path, site=SITE)


def test_read_tensors_refuses_names_before_it_reads_data(tmp_path, cheap):
    path = tmp_path / "big.npz"
    np.savez(path, W_enc=np.zeros(2), extra=np.zeros(2**21))
    with cheap(megabytes=4), pytest.raises(UnsafeFileError, match="'extra'"):
        read_tensors(path, gemma_scope.NAMES)


LONG = "1" * 5000  # Python makes no number of more than 4,300 digits


@pytest.mark.parametrize(("name", "content", "weights"), [
    ("cfg.json", {"hook_name": f"blocks.{LONG}.hook_resid_post", "d_in": D, "d_sae": F}, "sae_weights.safetensors"),
    ("cfg.json", {"hook_name": "hook_mlp", "sae_lens_version": LONG, "d_in": D, "d_sae": F}, "sae_weights.safetensors"),
    ("config.json", {"trainer": {"dict_class": "AutoEncoder", "submodule_name": f"a_layer_{LONG}"}}, "ae.pt"),
], ids=["a hook", "a version", "a submodule"])
def test_18_a_layer_of_thousands_of_digits_is_none_and_does_not_take_the_other_saes_along(name, content, weights,
                                                                                          tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / weights).write_bytes(b"never looked at")
    assert [entry.layer for entry in list_saes(tmp_path)] == [None]


def test_18_a_site_in_a_layer_of_thousands_of_digits_is_none_of_a_model(random_model, random_sae):
    with pytest.raises(SiteError, match="has no module"):
        attach_saes(random_model("Llama"), random_sae(32, 64, f"model.layers.{LONG}.output"))
