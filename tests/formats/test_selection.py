"""Which SAEs are meant by layer=, site=, width=, l0=."""

import numpy as np
import pytest

from sae_hooks.errors import SaeFormatError, SaeMismatchError, SaeNotFoundError
from sae_hooks.formats import gemma_scope, gemma_scope_2
from sae_hooks.formats.entry import Entry
from sae_hooks.formats.hook_names import kind_of
from sae_hooks.formats.selection import choose, may_match, placed, same_site, spans, wanted


def offer(layer=20, l0=71.0, width=16384, kind="resid_post", **more):
    read, write = gemma_scope.sites(kind, layer) or (None, None)
    fields = {"site": read, "site_out": write, "weights": f"{layer}/{width}/{l0}", **more}
    return Entry(dialect="gemma_scope", kind=kind, layer=layer, width=width, l0=l0, **fields)


def pick(found, **asked):
    want = wanted(asked.get("layer"), asked.get("site"), asked.get("width"), asked.get("l0"))
    return choose([placed(e, want) for e in found if may_match(e, want)], want, "here", found)


# Gemma Scope 2b and 9b, and which SAE the registry calls canonical
@pytest.mark.parametrize(("offered", "canonical"), [
    ((22, 41, 82, 176, 445), 82), ((11, 20, 36, 58, 68, 138, 310, 408), 68), ((11, 19, 34, 53, 62, 114, 221, 276), 114),
    ((19, 71, 139), 71), ((90, 110), 90)])
def test_canonical_is_the_l0_nearest_to_100_and_ties_go_to_the_smaller(offered, canonical):
    found = [offer(l0=float(l0)) for l0 in offered]
    assert [e.l0 for e in pick(found)] == [e.l0 for e in pick(found, l0="canonical")] == [canonical]


@pytest.mark.parametrize(("asked", "given"), [(1, 22), (30, 22), (33, 41), ("170", 176), (1e6, 445)])
def test_a_number_for_l0_takes_the_nearest(asked, given):
    assert [e.l0 for e in pick([offer(l0=float(n)) for n in (445, 22, 176, 41, 82)], l0=asked)] == [given]


def test_a_number_for_l0_needs_one_that_is_known_where_a_site_has_several():
    found = [offer(l0=None, weights=name) for name in ("b", "a")]
    with pytest.raises(SaeNotFoundError, match=r"l0=20 chooses none of several SAEs .* the folder of one: b, a"):
        pick(found, l0=20)
    assert [e.weights for e in pick(found)] == [e.weights for e in pick(found, l0="canonical")] == ["a"]
    assert [e.weights for e in pick(found[:1], l0=20)] == ["b"]
    assert [e.weights for e in pick([*found, offer(l0=300.0)], l0=20)] == ["20/16384/300.0"]
    assert [e.width for e in pick([*found, offer(l0=None, width=8)], l0=20)] == [8]


def test_without_a_width_each_site_has_its_smallest():
    found = [offer(1, width=65536), offer(1, width=16384), offer(2, width=65536)]
    assert [(e.layer, e.width) for e in pick(found)] == [(1, 16384), (2, 65536)]


def test_the_smallest_width_comes_before_the_better_l0():
    found = [offer(width=65536, l0=100.0), offer(width=16384, l0=300.0)]
    assert [e.width for e in pick(found)] == [e.width for e in pick(found, l0=100)] == [16384]


@pytest.mark.parametrize("width", [65536, "65k"])
def test_a_width_is_a_number_or_a_label(width):
    assert [e.width for e in pick([offer(width=65536), offer(width=16384)], width=width)] == [65536]


def test_layers_come_in_order_and_one_for_each_site():
    found = [offer(n, l0=float(l0)) for n in (10, 2, 0) for l0 in (71, 300)]
    assert [e.layer for e in pick(found)] == [0, 2, 10]
    assert [e.layer for e in pick(found, layer=[10, 0])] == [0, 10]
    assert [e.layer for e in pick(found, layer=2)] == [e.layer for e in pick(found, layer=np.int64(2))] == [2]
    assert [e.layer for e in pick(found, layer=np.array([10, 0]))] == [0, 10]


def test_two_kinds_at_one_layer_are_two_sites():
    found = [offer(3), offer(3, kind="mlp_out"), offer(3, kind="transcoder")]
    assert len(pick(found)) == 3
    assert [e.kind for e in pick(found, site="mlp_out")] == ["mlp_out"]


@pytest.mark.parametrize("path", [
    "model.layers.3.post_feedforward_layernorm.output", "layers.3.post_feedforward_layernorm.output",
    "model.language_model.layers.3.post_feedforward_layernorm.output"])
def test_a_module_path_picks_its_site_by_suffix_or_from_the_layer_on(path):
    found = [offer(3, kind="mlp_out"), offer(3), offer(13, kind="mlp_out")]
    assert [(e.kind, e.layer) for e in pick(found, site=path)] == [("mlp_out", 3)]


@pytest.mark.parametrize(("one", "other", "same"), [
    ("model.layers.3.output", "model.layers.3.output", True), ("model.layers.3.output", "layers.3.output", True),
    ("model.layers.3.output", "model.layers.13.output", False), ("model.layers.3.output", "layers.3.mlp.output", False),
    ("transformer.h.3.output", "h.3.output", True), ("model.layers.3.output", "model.layers.3.input", False),
    ("embed_tokens.output", "model.embed_tokens.output", True), ("wte.output", "embed.output", False),
    ("language_model.model.layers.3.output", "model.language_model.layers.3.output", True),
    ("model.decoder.layers.3.output", "model.layers.3.output", True),
    ("model.decoder.layers.3.output", "model.encoder.layers.3.output", False),
    ("model.layers.3.output", "model.encoder.layers.3.output", False),
    ("thinker.model.layers.3.output", "talker.model.layers.3.output", False)])
def test_two_paths_mean_the_same_place_or_not(one, other, same):
    assert same_site(one, other) == same_site(other, one) == same


def test_of_several_that_a_path_may_mean_the_one_at_exactly_that_path_is_taken():
    paths = [f"{model}.layers.3.output" for model in ("model.language_model", "model", "model.visual.encoder")]
    found = [offer(3, site=path, site_out=path) for path in paths]
    assert [[e.site for e in pick(found, site=path)] for path in paths] == [[path] for path in paths]
    assert [e.site for e in pick(found, site="language_model.model.layers.3.output")] == sorted(paths[:2])


@pytest.mark.parametrize("asked", [{"layer": 99}, {"layer": [20, 99]}, {"site": "mlp_out"}, {"width": 5},
                                   {"site": "model.layers.9.output"}, {"site": "nonsense"}])
def test_what_is_not_there_is_not_found_and_what_is_there_is_listed(asked):
    with pytest.raises(SaeNotFoundError, match=r"(?s)here: no.*resid_post: layers 19-20; widths 16384, 65536"):
        pick([offer(20), offer(19), offer(20, width=65536)], **asked)


@pytest.mark.parametrize(("asked", "tells"), [
    ({"layer": True}, "whole number from 0"), ({"layer": -1}, "whole number from 0"),
    ({"layer": ["1"]}, "whole number from 0"), ({"layer": 1.0}, "whole number from 0"), ({"l0": [3]}, "l0 a number or"),
    ({"site": "model.layers.3"}, "do you mean 'model.layers.3.output'"), ({"width": "wide"}, "a label such as '16k'"),
    ({"l0": float("nan")}, "l0 a number or 'canonical'"), ({"l0": "few"}, "l0 a number or 'canonical'")])
def test_a_selector_that_means_nothing_says_what_it_takes(asked, tells):
    with pytest.raises(SaeNotFoundError, match=tells):
        pick([offer()], **asked)


def test_a_site_that_cannot_be_told_must_be_given():
    lost = offer(site=None, site_out=None, kind=None)
    with pytest.raises(SaeFormatError, match=r"neither its name nor a config tells.*give site="):
        pick([lost])
    with pytest.raises(SaeFormatError, match=r"give site="):
        pick([lost], layer=20)
    [found] = pick([lost], site="model.layers.20.output")
    assert (found.site, found.site_out, found.layer) == ("model.layers.20.output",) * 2 + (20,)


@pytest.mark.parametrize(("layer", "asked", "kind", "read", "write"), [
    (20, {"site": "resid_post"}, "resid_post", "output", "output"),
    (None, {"site": "mlp_out", "layer": 7}, "mlp_out", "post_feedforward_layernorm.output",
     "post_feedforward_layernorm.output"),
    (3, {"site": "transcoder"}, "transcoder", "pre_feedforward_layernorm.normalized",
     "post_feedforward_layernorm.output")])
def test_a_kind_and_a_layer_place_an_entry_that_tells_neither(layer, asked, kind, read, write):
    [found] = pick([offer(layer, site=None, site_out=None, kind=None)], **asked)
    at = f"model.layers.{layer or 7}."
    assert (found.kind, found.site, found.site_out, found.layer) == (kind, at + read, at + write, layer or 7)


def test_a_site_given_for_a_transcoder_is_where_it_reads():
    lost = Entry(dialect="saelens", weights="w", kind="transcoder", site_out="model.layers.3.mlp.output", layer=3)
    [found] = pick([lost], site="model.layers.3.mlp.input")
    assert (found.site, found.site_out) == ("model.layers.3.mlp.input", "model.layers.3.mlp.output")


def test_a_crosscoder_is_not_placed_at_a_site():
    lost = Entry(dialect="gemma_scope_2", weights="w", kind="crosscoder")
    with pytest.raises(SaeNotFoundError):
        pick([lost], site="model.layers.3.output")


def test_a_kind_without_a_layer_places_nothing():
    with pytest.raises(SaeNotFoundError):
        pick([offer(None, site=None, site_out=None, kind=None)], site="mlp_out")


def test_a_given_site_of_another_layer_does_not_place_an_entry_of_a_known_one():
    with pytest.raises(SaeNotFoundError):
        pick([offer(20, site=None, site_out=None, kind=None)], site="model.layers.21.output")


def hooked(hook, layer=3, **more):
    """What cfg.json of a folder in the SAELens dialect says, where its model is unknown."""
    return Entry(dialect="saelens", weights=hook, config="cfg.json", hook=hook, layer=layer, width=64,
                 kind=kind_of(hook), **more)


@pytest.mark.parametrize("asked", [
    {"site": "resid_post"}, {"site": "resid_post", "layer": 3}, {"site": "model.layers.3.output"},
    {"site": "model.layers.2.mlp.output"}, {"site": "model.layers.11.mlp.output"}], ids=str)
def test_a_hook_of_an_unknown_model_is_not_handed_out_as_another_layer_or_hook(asked):
    with pytest.raises(SaeNotFoundError, match="mlp_out: layers 3; widths 64"):
        pick([hooked("blocks.3.hook_mlp_out")], **asked)


def test_a_hook_of_an_unknown_model_is_told_by_its_layer_where_a_path_is_given():
    found = [hooked(f"blocks.{n}.hook_mlp_out", n) for n in (7, 3, 5)]
    for n in (3, 5, 7):
        [one] = pick(found, site=f"model.layers.{n}.mlp.output")
        assert (one.weights, one.layer, one.site) == (f"blocks.{n}.hook_mlp_out", n, f"model.layers.{n}.mlp.output")


@pytest.mark.parametrize("site", ["net.3.output", "model.layers.3.fc2.output", "model.layers.3.mlp.output"])
def test_a_hook_of_an_unknown_model_goes_where_a_path_says_it_is(site):
    [one] = pick([hooked("blocks.3.hook_mlp_out")], site=site)
    assert (one.site, one.site_out, one.kind) == (site, site, "mlp_out")
    [one] = pick([hooked("resid_3", None)], site="model.layers.3.output")
    assert (one.site, one.layer) == ("model.layers.3.output", 3)


@pytest.mark.parametrize("asked", [{}, {"site": "mlp_out"}, {"site": "mlp_out", "layer": 3}], ids=str)
def test_a_hook_that_cannot_be_translated_is_named_and_a_path_asked_for(asked):
    with pytest.raises(SaeFormatError, match=r"cfg\.json calls the site 'blocks\.3\.hook_mlp_out'.*give site="):
        pick([hooked("blocks.3.hook_mlp_out")], **asked)


def test_what_tells_its_site_itself_comes_before_what_was_placed_there():
    own = Entry(dialect="saelens", weights="own", kind="mlp_out", layer=3, width=64, l0=300.0,
                site="model.layers.3.mlp.output", site_out="model.layers.3.mlp.output")
    for path in ("model.layers.3.mlp.output", "layers.3.mlp.output"):
        assert [e.weights for e in pick([hooked("blocks.3.hook_mlp_out", l0=100.0), own], site=path)] == ["own"]


def test_of_two_hooks_that_may_both_be_the_path_none_is_guessed():
    with pytest.raises(SaeMismatchError, match=r"which of blocks\.3\.hook_mlp_in, blocks\.3\.hook_mlp_out is .*expert"):
        pick([hooked("blocks.3.hook_mlp_out"), hooked("blocks.3.hook_mlp_in")], site="model.layers.3.experts.output")


def gemma_3(*folders, repo="google/gemma-scope-2-1b-pt"):
    return gemma_scope_2.entries({f"{folder}/params.safetensors": 1 for folder in folders}, repo)


def test_gemma_scope_2_without_a_site_means_the_residual_stream():
    found = gemma_3("resid_post/layer_7_width_16k_l0_big", "mlp_out/layer_7_width_16k_l0_big")
    assert [e.kind for e in gemma_scope_2.default(found)] == ["resid_post"]


def test_gemma_scope_2_takes_one_family_for_all_layers_and_no_seeds():
    found = gemma_3("resid_post_all/layer_7_width_16k_l0_small", "resid_post_all/layer_7_width_16k_l0_big",
                    "resid_post/layer_7_width_16k_l0_big", "resid_post/layer_7_width_16k_l0_medium_seed_1",
                    "resid_post/layer_7_width_16k_l0_medium", "resid_post_all/layer_8_width_16k_l0_big")
    assert [e.weights.split("/")[:2] for e in pick(found)] == [
        ["resid_post_all", "layer_7_width_16k_l0_big"], ["resid_post_all", "layer_8_width_16k_l0_big"]]
    assert [e.weights for e in pick(found, layer=7, l0=55)] == [
        "resid_post/layer_7_width_16k_l0_medium/params.safetensors"]


def test_a_plain_transcoder_comes_before_an_affine_one():
    found = gemma_3("transcoder/layer_7_width_16k_l0_big_affine", "transcoder/layer_7_width_16k_l0_big")
    assert [e.weights for e in pick(found)] == ["transcoder/layer_7_width_16k_l0_big/params.safetensors"]


def test_multi_layer_saes_are_refused_when_asked_for_and_passed_over_otherwise():
    crosscoder = Entry(dialect="gemma_scope_2", weights="c", kind="crosscoder", width=65536)
    with pytest.raises(SaeFormatError, match=r"(?s)crosscoder SAEs span several layers.*not supported"):
        pick([crosscoder], site="crosscoder")
    assert [e.kind for e in pick([crosscoder, offer()])] == ["resid_post"]


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_layers_are_listed_in_spans(numbers, text):
    assert spans(numbers) == text
