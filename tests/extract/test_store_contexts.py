"""Text from a store: contexts cut at characters and at documents, and the strongest of a feature."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from extract.stores import made, write

from sae_hooks import DataError
from sae_hooks.store import open_features

TEXTS = ("He said 😀👍🏽 twice, naïvely.", "", "The 🐘 came back.", "Nothing \ufffd odd here", "👍🏽")


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_tokenizer):
    """A store of TEXTS with shards of four rows: emojis are split over tokens, and over shards; and its Dense."""
    folder = tmp_path_factory.mktemp("texts")
    ids = [tiny_tokenizer(text)["input_ids"] if text else [] for text in TEXTS]
    dense = made(lengths=[len(each) for each in ids], token_id=list(chain(*ids)), density=0.3)
    write(folder, dense, 4)
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    return open_features(folder), dense


def spoken(tokenizer, dense, rows):
    return tokenizer.decode(dense.token_id[rows], clean_up_tokenization_spaces=False)


def test_a_document_is_read_back_as_its_text(texts):
    store, _ = texts
    assert [store.document_text(number) for number in range(5)] == [f"<bos>{text}" if text else "" for text in TEXTS]
    with pytest.raises(IndexError, match="document 5 of 5"):
        store.document_text(5)


@pytest.mark.parametrize("context", [0, 1, 2, 3, 5, 10, 100])
def test_before_token_and_after_are_a_piece_of_the_text_without_broken_characters(texts, context):
    store, dense = texts
    for row in range(len(store)):
        found = store.text(row, context)
        whole = store.document_text(found.doc_id)
        assert found.before + found.token + found.after in whole
        assert found.token or "\ufffd" in whole  # a real U+FFFD looks finished after its first byte
        if context == 100:
            assert found.before + found.token + found.after == whole
        assert (found.row, found.doc_id, found.position) == (row, dense.doc_id[row], dense.position[row])
        assert found.activation is None


def test_a_token_that_is_part_of_a_character_shows_as_the_whole_character(texts):
    store, _ = texts
    shown = [store.text(row).token for row in range(25)]
    assert shown == ["<bos>", "He", " said", " ", *["😀"] * 4, *["👍"] * 4, *["🏽"] * 4, " tw", "ice", ",", " n", "aï",
                     "ï", "v", "ely", "."]


def test_plain_tokens_get_as_many_neighbours_as_asked(texts, tiny_tokenizer):
    store, dense = texts
    first = int(np.flatnonzero(dense.doc_id == 3)[0])
    for row in range(first, first + 4):
        found = store.text(row, 1)
        assert found.before + found.token == spoken(tiny_tokenizer, dense, slice(max(row - 1, first), row + 1))
    assert str(store.text(first + 1, 1)) == f"<bos>«{found_token(store, first + 1)}»{found_token(store, first + 2)}"


def found_token(store, row):
    return store.text(row, 0).token


def test_a_context_ends_where_tokens_of_the_document_were_left_out(tmp_path, tiny_tokenizer):
    ids = tiny_tokenizer("one two three four five six")["input_ids"]
    dense = made(lengths=[len(ids)], token_id=ids)
    dense.position[4:] += 10
    write(tmp_path, dense, 3)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    store = open_features(tmp_path)
    left, right = store.text(3), store.text(4)
    assert left.before + left.token + left.after == spoken(tiny_tokenizer, dense, slice(0, 4))
    assert right.before == ""
    assert right.token + right.after == spoken(tiny_tokenizer, dense, slice(4, None))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("feature", range(0, 40, 3))
def test_top_is_the_strongest_token_of_each_document_strongest_first(texts, n, feature):
    store, dense = texts
    acts = dense.features[:, feature]
    best = [max(np.flatnonzero((dense.doc_id == d) & (acts > 0)), key=lambda row: (acts[row], -row), default=None)
            for d in range(5)]
    expected = sorted((row for row in best if row is not None), key=lambda row: (-acts[row], row))[:n]
    found = store.top(feature, n)
    assert [context.row for context in found] == expected
    assert [context.activation for context in found] == acts[expected].tolist()
    assert all(context == replace(store.text(context.row), activation=context.activation) for context in found)


def test_a_number_of_contexts_or_tokens_below_none_is_refused(texts):
    store, _ = texts
    for ask in (lambda: store.top(3, context=-9), lambda: store.text(3, context=-1), lambda: store.top(3, n=-1),
                lambda: store.top(3, n=2.5), lambda: store.text(3, context=True)):
        with pytest.raises(DataError, match=r"(n|context) must be a whole number, 0 or more; got"):
            ask()
    assert store.top(3, n=0) == []


def test_the_text_of_one_row_is_given_and_of_no_other_number(texts):
    store, _ = texts
    n = len(store)
    assert store.text(np.int64(3)) == store.text(torch.tensor(3)) == store.text(3)
    assert store.text(-1) == store.text(n - 1)
    for wrong in ([1, 2], [1], [], slice(0, 3), np.array([1]), torch.tensor([1]), np.ones(n, bool), True, 1.5, "1",
                  None, n, -n - 1):
        with pytest.raises(IndexError, match=rf"(?s)row .* of {n}; give one whole number, -{n} to {n - 1}"):
            store.text(wrong)


def test_equal_activations_are_ordered_by_row(tmp_path, tiny_tokenizer):
    dense = made(lengths=[3, 6, 3])
    dense.features[:] = dense.ordinary[:, None]
    dense.features[:, 1] *= [1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    write(tmp_path, dense, 5)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    store = open_features(tmp_path)
    assert [context.row for context in store.top(0)] == [1, 4]  # of document 2 no token is ordinary
    assert [context.row for context in store.top(1)] == [6, 1]


def test_a_store_of_token_ids_has_no_text(tmp_path):
    write(tmp_path, made())
    for ask in (lambda s: s.text(3), lambda s: s.top(3), lambda s: s.document_text(0)):
        with pytest.raises(DataError, match="has no tokenizer"):
            ask(open_features(tmp_path))


def test_a_context_ends_with_its_document_also_where_positions_go_on(tmp_path, tiny_tokenizer):
    dense = made(lengths=[4, 4])
    dense.position[4:] += 4
    write(tmp_path, dense, 3)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    left, right = (open_features(tmp_path).text(row) for row in (3, 4))
    assert (left.after, right.before) == ("", "")
