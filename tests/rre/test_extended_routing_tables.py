"""Routing tables for a larger vocabulary: old entries stay, the rule of the table goes on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rre.routing_tables import draw_table, extend_table


@given(st.integers(1, 300), st.integers(0, 200), st.integers(1, 17), st.integers(0, 5))
def test_a_uniform_table_stays_balanced_and_keeps_its_entries(old, more, experts, seed):
    table = draw_table("uniform", seed, "blocks.0", "code", old, experts, None)
    longer = extend_table("uniform", seed, "blocks.0", "code", table, old + more, experts, None)
    assert longer.dtype == np.int32 and longer[:old].tobytes() == table.tobytes() and longer.size == old + more
    ids = np.bincount(longer, minlength=experts)
    assert ids.size == experts and ids.max() - ids.min() <= 1


def test_extending_twice_stays_balanced():
    table = draw_table("uniform", 1, "blocks.0", "code", 100, 7, None)
    for vocab in (103, 111, 140):
        table = extend_table("uniform", 1, "blocks.0", "code", table, vocab, 7, None)
    ids = np.bincount(table, minlength=7)
    assert ids.sum() == 140 and ids.max() - ids.min() <= 1


@given(st.integers(0, 1000))
def test_a_frequency_table_gives_each_new_id_to_the_expert_with_the_fewest_rows(seed):
    draw = np.random.default_rng(seed)
    counts = draw.zipf(1.3, 80).clip(max=10_000)
    table = draw_table("frequency", seed, "blocks.0", "code", 50, 4, counts[:50])
    longer = extend_table("frequency", seed, "blocks.0", "code", table, 80, 4, counts)
    assert longer[:50].tobytes() == table.tobytes()
    # whatever the ties: when an id was placed, no expert had fewer rows than the one that it went to
    rows = np.bincount(table, counts[:50], minlength=4)
    new = sorted(range(50, 80), key=lambda token: -counts[token])
    for count in sorted(set(counts[50:]), reverse=True):
        same = [token for token in new if counts[token] == count]
        after = rows + np.bincount(longer[same], minlength=4) * count
        took = np.flatnonzero(after > rows)
        assert (after[took] - count <= after.min()).all()
        rows = after


def test_layers_domains_and_seeds_differ():
    table = draw_table("uniform", 1, "blocks.0", "code", 64, 4, None)

    def new(seed: int, layer_name: str, domain: str) -> bytes:
        return extend_table("uniform", seed, layer_name, domain, table, 256, 4, None)[64:].tobytes()

    one = new(1, "blocks.0", "code")
    assert len({one, new(2, "blocks.0", "code"), new(1, "blocks.1", "code"), new(1, "blocks.0", "law")}) == 4
    assert new(1, "blocks.0", "code") == one


def test_a_frequency_table_needs_counts():
    with pytest.raises(ValueError, match="token counts"):
        extend_table("frequency", 1, "blocks.0", "code", np.zeros(4, np.int32), 8, 2, None)
