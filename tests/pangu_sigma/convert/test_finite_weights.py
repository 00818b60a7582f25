"""NaN and infinite weights are found in every type that weights are stored in, and named with their place."""

from __future__ import annotations

import numpy as np
import pytest

from pangu_sigma.checkpoint.float_types import convert_float
from pangu_sigma.convert import finite_weights
from pangu_sigma.convert.finite_weights import check_finite
from pangu_sigma.errors import UserError


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_named(dtype, value, monkeypatch):
    monkeypatch.setattr(finite_weights, "_PIECE", 7)
    exact = np.linspace(-6e4, 6e4, 30, dtype=np.float32).reshape(5, 6)
    whole = convert_float("w", exact, dtype)
    assert check_finite("the file", "w", whole) is whole
    exact[1, 4] = exact[3, 2] = value
    message = r"the file holds w with 2 of 30 values NaN or infinite, one at \[1, 4\]"
    with pytest.raises(UserError, match=message):
        check_finite("the file", "w", convert_float("w", exact, dtype))


def test_a_turned_tensor_is_looked_at_as_it_is_read():
    tensor = np.zeros((3, 4), np.float32).T
    tensor[2, 1] = np.nan
    with pytest.raises(UserError, match=r"1 of 12 values NaN or infinite, one at \[2, 1\]"):
        check_finite("the file", "w", tensor)


@pytest.mark.parametrize("tensor", [np.zeros((0, 3), np.float32), np.float32(1).reshape(()), np.arange(3)])
def test_the_empty_the_scalar_and_whole_numbers_are_fine(tensor):
    assert check_finite("the file", "w", tensor) is tensor
