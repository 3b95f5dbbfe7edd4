"""SparseFeatures: rows of features with where each came from."""

import numpy as np
import pytest
import torch

from sae_hooks import SaeMismatchError, SparseFeatures
from sae_hooks.sparse import concatenate

DENSE = torch.tensor([
    [0.0, 2.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [3.0, 4.0, 5.0, 0.0, 6.0],
    [0.0, 0.0, 7.0, 0.0, 0.0],
])


def made(dense=DENSE, doc=0):
    rows, columns = dense.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    n = torch.arange(len(dense))
    return SparseFeatures(indptr, columns, dense[rows, columns], dense.shape[1], n * 0 + doc, n, n + 100)


@pytest.fixture
def features():
    return made()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # torch says so once a process
def test_to_dense_to_torch_and_to_scipy_hold_the_same_values(features):
    assert torch.equal(features.to_dense(), DENSE)
    assert torch.equal(features.to_torch().to_dense(), DENSE)
    with torch.device("meta"):  # whatever torch's default device is
        assert features.to_torch().device.type == "cpu"
        assert torch.equal(features[1].to_dense()[0], DENSE[1])
    scipy = features.to_scipy()
    assert scipy.shape == (4, 5)
    assert np.array_equal(scipy.toarray(), DENSE.numpy())


@pytest.mark.parametrize(("dtype", "kept"), [
    (torch.float64, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float32")])
def test_to_scipy_keeps_the_values_as_they_are_also_of_a_graph(dtype, kept):
    values = made((DENSE / 3).to(dtype).requires_grad_())
    scipy = values.to_scipy()
    assert scipy.dtype == kept
    assert np.array_equal(scipy.data, values.values.detach().double().numpy())


def test_top_of_fewer_than_none_is_an_error(features):
    assert features.top(0) == [[]] * 4
    with pytest.raises(ValueError, match="k of 0 or more"):
        features.top(-1)


@pytest.mark.parametrize("rows", [
    slice(1, 3), slice(None, None, 2), slice(4, 9), slice(3, 1), [2, 0], [3, 3, 1], torch.tensor([2, 1]),
    torch.tensor([-1]), [],
    torch.tensor([True, False, True, False]), [False, True, False, True], torch.zeros(4, dtype=torch.bool),
])
def test_rows_are_chosen_as_torch_chooses_them(features, rows):
    got = features[rows]
    index = torch.tensor(rows, dtype=torch.int64) if rows == [] else rows
    assert torch.equal(got.to_dense(), DENSE[index])
    assert torch.equal(got.token_id, features.token_id[index])
    assert torch.equal(got.position, features.position[index])
    assert len(got) == len(DENSE[index])


@pytest.mark.parametrize("rows", [slice(None, None, -1), slice(3, 0, -2), slice(0, 3, -1)])
def test_rows_are_chosen_backwards_as_numpy_chooses_them(features, rows):
    assert np.array_equal(features[rows].to_dense().numpy(), DENSE.numpy()[rows])


@pytest.mark.parametrize("row", [0, 1, 3, -1, -4])
def test_one_row_is_a_sparse_features_of_one_row(features, row):
    assert torch.equal(features[row].to_dense(), DENSE[row][None])
    assert features[row].token_id.tolist() == [100 + row % 4]


@pytest.mark.parametrize("row", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3), torch.tensor(-1)], ids=repr)
def test_a_row_is_a_number_of_any_kind(features, row):
    assert features[row].token_id.tolist() == [103]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_row_numbers_are_no_mask_in_any_integer_type(features, dtype):
    rows = np.array([1, 0, 0, 1], dtype=dtype)
    for given in (rows, torch.from_numpy(rows)):
        assert features[given].token_id.tolist() == [101, 100, 100, 101]


@pytest.mark.parametrize("rows", [
    True, None, ..., "a", [0, "a"], torch.tensor(False), [1.0, 2.0], [[0, 1]], torch.tensor(4), np.int64(-5)], ids=repr)
def test_what_chooses_no_rows_is_an_index_error(features, rows):
    with pytest.raises(IndexError, match=r"rows are chosen by|row -?\d of 4"):
        features[rows]


@pytest.mark.parametrize("row", [4, -5])
def test_a_row_that_is_not_there_is_an_index_error(features, row):
    with pytest.raises(IndexError):
        features[row]


def test_iteration_ends_after_the_last_row(features):
    assert [row.token_id.item() for row in features] == [100, 101, 102, 103]


def test_top_gives_each_rows_strongest_features_first(features):
    assert features.top(2) == [[(1, 2.0), (3, 1.0)], [], [(4, 6.0), (2, 5.0)], [(2, 7.0)]]
    assert features.top(0) == [[], [], [], []]


def test_l0_and_repr_count_active_features_per_token(features):
    assert features.l0 == 7 / 4
    assert repr(features) == "SparseFeatures(4 tokens x 5 features, 1.8 active per token)"
    assert features[[]].l0 == 0.0


def test_rows_tells_the_row_of_each_entry(features):
    assert features.rows.tolist() == [0, 0, 2, 2, 2, 2, 3]


def test_concatenate_keeps_rows_and_where_they_came_from(features):
    joined = concatenate([features, made(DENSE[:2], doc=1), made(DENSE[:0], doc=2)])
    assert torch.equal(joined.to_dense(), torch.cat([DENSE, DENSE[:2]]))
    assert joined.doc_id.tolist() == [0, 0, 0, 0, 1, 1]
    assert joined.position.tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(joined[4:].to_dense(), DENSE[:2])


def test_features_of_two_widths_or_of_nothing_are_not_joined(features):
    with pytest.raises(SaeMismatchError, match="widths"):
        concatenate([features, made(torch.zeros(1, 6))])
    with pytest.raises(SaeMismatchError):
        concatenate([])


@pytest.mark.parametrize("short", ["doc_id", "position", "token_id", "values"])
def test_columns_of_different_lengths_are_refused(features, short):
    parts = dict(vars(features))
    parts[short] = parts[short][:-1]
    with pytest.raises(SaeMismatchError, match=short if short != "values" else "indices and values"):
        SparseFeatures(**parts)

