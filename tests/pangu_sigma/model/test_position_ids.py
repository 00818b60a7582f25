import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_sigma.model.position_ids import positions_and_segments


def test_positions_restart_after_the_end_which_belongs_to_the_document_before():
    positions, segments = positions_and_segments(
        np.array([[5, 5, 9, 5, 9, 9, 5, 5], [9, 5, 5, 5, 5, 5, 5, 9]]), eod_id=9
    )
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert positions.dtype == segments.dtype == np.int32


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_the_mask_is_pangu_alphas(row):
    """For every end at i, no later token sees i or anything before; positions count from the segment's beginning."""
    length = len(row)
    seen = np.tril(np.ones((length, length), dtype=bool))
    expected = []
    for index, token in enumerate(row):
        expected.append(0 if index == 0 or row[index - 1] == 0 else expected[-1] + 1)
        if token == 0:
            seen[index + 1 :, : index + 1] = False
    positions, segments = positions_and_segments(np.array([row]), eod_id=0)
    assert positions[0].tolist() == expected
    same = segments[0][:, None] == segments[0][None, :]
    assert (np.tril(same) == seen).all()


def test_tokens_must_have_rows():
    with pytest.raises(ValueError, match=r"\[B,S\]"):
        positions_and_segments(np.arange(4), 0)
