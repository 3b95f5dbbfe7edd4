"""whole: what is a whole number, whatever its type, and what is none."""

import numpy as np
import pytest
import torch

from sae_hooks.errors import DataError
from sae_hooks.sizes import whole


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_whole_number_of_any_type_is_a_plain_int(kind):
    found = whole("window", kind(8))
    assert (found, type(found)) == (8, int)


@pytest.mark.parametrize("value", [
    True, False, np.True_, torch.tensor(True), 8.0, 8.5, np.float64(8), float("nan"), "8", None, [8], np.arange(1),
    torch.tensor([8]), torch.tensor(8.0)],
    ids=repr)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(DataError, match="window must be a whole number, 1 or more; got ") as caught:
        whole("window", value)
    assert repr(value) in str(caught.value)


def test_a_number_is_the_least_or_more():
    assert (whole("window", 1), whole("overlap", 0, 0), whole("row", -3, least=-3)) == (1, 0, -3)
    for value, least in ((0, 1), (-1, 0), (np.int64(-4), -3)):
        with pytest.raises(DataError, match=f"{least} or more"):
            whole("n", value, least)
