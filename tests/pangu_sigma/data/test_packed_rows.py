"""Sequences packed into rows: what fits goes in, in order, and only the labels of answers count."""

import numpy as np

from pangu_sigma.data.packed_rows import TokenSequence, pack_in_order, packed_row

EOD, PAD = 1, 0


def test_the_labels_that_count_are_the_answers_and_their_ends():
    one, two = TokenSequence(np.array([5, 6, 7, EOD]), 2), TokenSequence(np.array([8, 9, EOD]), 1)
    tokens, mask, padding = packed_row([one, two], 8, PAD)
    assert tokens.tolist() == [5, 6, 7, EOD, 8, 9, EOD, PAD, PAD]
    assert mask.tolist() == [0, 1, 1, 0, 1, 1, 0, 0]  # labels 7, EOD, 9, EOD
    assert padding.tolist() == [False] * 6 + [True] * 2


def test_rows_take_what_fits_in_order():
    assert pack_in_order(np.array([4, 4, 2, 8, 1]), 8).tolist() == [0, 2, 3, 4, 5]
