"""Weights are read at first use of a site, once."""

import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import process_time

import numpy
import pytest
import torch
from robust.as_found import unchanged

from sae_hooks import SaeError, SaeMismatchError, SaeWarning, attach_saes
from sae_hooks.hub import SaeFile

LAYERS, WIDTH = 26, 16


def write_gemma_scope(folder, layers, d_in, width=WIDTH):
    """A folder as Gemma Scope publishes them, layer_L/width_W/average_l0_N/params.npz, with two L0s a layer."""
    made = numpy.random.default_rng(0)
    W_dec = made.normal(size=(width, d_in)).astype(numpy.float32)
    W_dec /= numpy.linalg.norm(W_dec, axis=1, keepdims=True)
    parts = {"W_enc": numpy.ascontiguousarray(W_dec.T), "W_dec": W_dec, "b_enc": numpy.zeros(width, numpy.float32),
             "b_dec": numpy.zeros(d_in, numpy.float32), "threshold": numpy.full(width, 0.5, numpy.float32)}
    for layer in range(layers):
        for l0 in (71, 154):
            path = folder / f"layer_{layer}" / f"width_{width}" / f"average_l0_{l0}" / "params.npz"
            path.parent.mkdir(parents=True)
            numpy.savez(path, **parts)
    return folder


@pytest.fixture(scope="module")
def scope_2b(tmp_path_factory):
    """Gemma Scope for 26 layers of width 2304: 16 MB."""
    return write_gemma_scope(tmp_path_factory.mktemp("scope") / "gemma-scope-2b-pt-res", LAYERS, 2304)


@pytest.fixture
def scope_tiny(tmp_path):
    """Gemma Scope for the 3 layers of the tiny model."""
    return write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res", 3, 32)


@pytest.fixture(scope="module")
def gemma_2_2b():
    """A model of Gemma 2 2B's shape without its weights."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.device("meta"):
        return Gemma2ForCausalLM(Gemma2Config())


class Loads:
    """What was loaded, as a list of layers."""

    def __init__(self, monkeypatch):
        self.layers, load = [], SaeFile.load

        def counted(file, *args, **kwargs):
            self.layers.append(file.entry.layer)
            return load(file, *args, **kwargs)
        monkeypatch.setattr(SaeFile, "load", counted)


@pytest.fixture
def loads(monkeypatch):
    """The layers whose weights were loaded, in order."""
    return Loads(monkeypatch).layers


def bytes_read():
    """Bytes that this process has read by system calls."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.fixture
def opened():
    """Paths of params.npz opened while the fixture lives."""
    paths, alive = [], [True]

    def hook(event, args):
        if alive and event == "open" and str(args[0]).endswith("params.npz"):
            paths.append(str(args[0]))
    sys.addaudithook(hook)
    yield paths
    alive.clear()


def test_attaching_26_layers_takes_under_two_seconds_and_reads_no_weights(gemma_2_2b, scope_2b, loads):
    start = process_time()
    attach_saes(gemma_2_2b, str(scope_2b))
    took = process_time() - start
    assert took < 2
    assert len(gemma_2_2b.saes) == LAYERS
    assert loads == []
    assert "not loaded yet" in repr(gemma_2_2b.saes)
    assert list(gemma_2_2b.saes)[20] == "model.layers.20.output"
    gemma_2_2b.saes.detach()


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="only Linux counts what a process reads")
def test_attaching_reads_only_headers(gemma_2_2b, scope_2b):
    size = sum(path.stat().st_size for path in scope_2b.rglob("*.npz"))
    before = bytes_read()
    attach_saes(gemma_2_2b, str(scope_2b))
    assert bytes_read() - before < size / 20
    before = bytes_read()
    gemma_2_2b.saes["model.layers.20.output"]
    assert bytes_read() - before > size / LAYERS / 3  # so that it is known to be counted
    gemma_2_2b.saes.detach()


def test_the_first_use_reads_one_site_and_no_other_file(gemma_2_2b, scope_2b, loads, opened):
    attach_saes(gemma_2_2b, str(scope_2b))
    opened.clear()
    sae = gemma_2_2b.saes["model.layers.20.output"]
    assert loads == [20]
    assert sae.d_in == 2304
    assert {path.split("/")[-4] for path in opened} == {"layer_20"}
    assert {path.split("/")[-2] for path in opened} == {"average_l0_71"}
    assert repr(gemma_2_2b.saes).count("not loaded yet") == LAYERS - 1
    gemma_2_2b.saes.detach()


def test_each_site_is_loaded_once_and_only_when_it_is_used(model, ids, scope_tiny, loads):
    attach_saes(model, str(scope_tiny))
    with torch.no_grad():
        model(ids)
        model.generate(ids, max_new_tokens=2)
    assert loads == []
    for _ in range(2):
        with model.saes.clamp({3: 9.0}, layer=1), torch.no_grad():
            model(ids)
    assert loads == [1]
    with model.saes.capture(layer=2), torch.no_grad():
        model(ids)
    assert loads == [1, 2]
    with model.saes.splice(), torch.no_grad():
        model(ids)
    assert sorted(loads) == [0, 1, 2]


def test_looking_around_loads_nothing(model, scope_tiny, loads):
    attach_saes(model, str(scope_tiny))
    names = list(model.saes)
    assert names[0] in model.saes
    assert len(names) == 3
    assert "not loaded" in str(model.saes)
    with pytest.raises(SaeError):
        model.saes.clamp({3: 9.0})  # of three sites, which?
    with pytest.raises(SaeError):
        model.saes.clamp({3: 9.0}, layer=7)
    assert loads == []


def test_preload_reads_everything_at_attach(model, scope_tiny, loads):
    attach_saes(model, str(scope_tiny), preload=True)
    assert sorted(loads) == [0, 1, 2]


def test_threads_that_come_at_once_load_a_site_once(model, ids, scope_tiny, loads):
    attach_saes(model, str(scope_tiny))
    start = threading.Barrier(4)

    def use(feature):
        start.wait(20)
        with model.saes.clamp({feature: 9.0}, layer=1, scope="context"), torch.no_grad():
            return model(ids).logits

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(use, range(4)))
    assert loads == [1]
    assert not torch.equal(results[0], results[1])


def test_a_file_that_breaks_before_its_first_use_raises_then_and_again_and_works_once_repaired(model, ids, scope_tiny):
    path = scope_tiny / "layer_1" / f"width_{WIDTH}" / "average_l0_71" / "params.npz"
    whole = path.read_bytes()
    attach_saes(model, str(scope_tiny))
    path.write_bytes(whole[: len(whole) // 2])
    with unchanged(model, ids):
        for _ in range(2):
            with pytest.raises(SaeError, match="layer_1"):
                model.saes.clamp({3: 9.0}, layer=1)
    path.write_bytes(whole)
    with model.saes.clamp({3: 9.0}, layer=1) as clamp, torch.no_grad():
        model(ids)
    assert clamp.positions_edited == ids.numel()


def test_a_splice_of_all_sites_opens_none_if_one_cannot_be_loaded(model, ids, scope_tiny):
    attach_saes(model, str(scope_tiny))
    (scope_tiny / "layer_2" / f"width_{WIDTH}" / "average_l0_71" / "params.npz").write_bytes(b"")
    with unchanged(model, ids), pytest.raises(SaeError, match="layer_2"):
        model.saes.splice()


@pytest.mark.parametrize("preload", [True, False])
def test_a_folder_with_an_empty_file_is_refused_at_attach(model, ids, scope_tiny, preload):
    (scope_tiny / "layer_2" / f"width_{WIDTH}" / "average_l0_71" / "params.npz").write_bytes(b"")
    with unchanged(model, ids), pytest.raises(SaeError, match="layer_2"):
        attach_saes(model, str(scope_tiny), preload=preload)


def test_a_folder_for_a_wider_model_is_refused_at_attach_by_its_headers(model, ids, tmp_path, loads):
    wide = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res", 3, 48)
    with unchanged(model, ids), pytest.raises(SaeMismatchError) as raised:
        attach_saes(model, str(wide))
    assert str(raised.value).count("48") >= 3
    assert loads == []


def test_a_folder_for_a_deeper_model_is_refused_at_attach(model, ids, tmp_path, loads):
    deep = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res", 5, 32)
    with unchanged(model, ids), pytest.raises(SaeMismatchError, match="layers 0 to 2"):
        attach_saes(model, str(deep))
    attach_saes(model, str(deep), layer=2)
    assert len(model.saes) == 1
    assert loads == []


def test_an_edit_of_the_wrong_feature_is_refused_when_the_file_has_told_its_width(model, ids, scope_tiny):
    attach_saes(model, str(scope_tiny))
    with pytest.raises(SaeError, match=f"0 to {WIDTH - 1}"):
        model.saes.clamp({WIDTH: 9.0}, layer=1)
    with pytest.warns(SaeWarning, match="no position"):
        model.saes.clamp({WIDTH - 1: 9.0}, layer=1).remove()
