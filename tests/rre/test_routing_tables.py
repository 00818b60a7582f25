"""Routing tables: even, independent, repeatable; counted generators behind them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rre.counted_random import generator, sample_keys
from rre.routing_tables import draw_frequency_table, draw_table, draw_uniform_table

VOCAB = 4096


def loads(table: np.ndarray, counts: np.ndarray, experts: int) -> np.ndarray:
    return np.bincount(table, weights=counts, minlength=experts)


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 3000), experts=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_a_uniform_table_gives_every_expert_the_same_number_of_ids_give_or_take_one(vocab, experts, seed):
    table = draw_uniform_table(vocab, experts, np.random.default_rng(seed))
    assert table.shape == (vocab,) and table.dtype == np.int32
    shares = np.bincount(table, minlength=experts)
    assert shares.size == experts and shares.max() - shares.min() <= 1


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=400), experts=st.integers(1, 16),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_a_frequency_table_is_as_even_as_greedy_balance_promises(counts, experts, seed):
    counts = np.array(counts)
    table = draw_frequency_table(counts, experts, np.random.default_rng(seed))
    assert table.shape == counts.shape and table.dtype == np.int32
    assert table.min() >= 0 and table.max() < experts
    rows = loads(table, counts, experts)
    # The fullest expert was the emptiest when it got its last id.
    assert rows.max() - rows.min() <= counts.max()


def test_ids_that_never_occur_are_dealt_out_evenly():
    table = draw_frequency_table(np.zeros(1000, int), 7, np.random.default_rng(0))
    shares = np.bincount(table)
    assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize("experts", [4, 16])
def test_under_zipf_the_frequency_table_beats_the_uniform_one(experts):
    counts = (1e7 / np.arange(1, VOCAB + 1) ** 1.0).astype(int)
    fullest = {}
    for kind in ("uniform", "frequency"):
        tables = [draw_table(kind, seed, "blocks.3", "code", VOCAB, experts, counts) for seed in range(5)]
        fullest[kind] = np.mean([loads(t, counts, experts).max() / counts.sum() * experts for t in tables])
    # No table can split the most frequent id, which alone is more than a share among 16 experts.
    best = max(1.0, counts.max() / counts.sum() * experts)
    assert fullest["frequency"] < 1.001 * best
    assert fullest["uniform"] > 1.15 * fullest["frequency"]


@pytest.mark.parametrize("kind", ["uniform", "frequency"])
def test_tables_are_repeatable_and_independent_of_each_other(kind):
    counts = np.random.default_rng(0).integers(1, 50, VOCAB)

    def draw(seed: int = 1, layer_name: str = "blocks.3", domain: str = "code") -> np.ndarray:
        return draw_table(kind, seed, layer_name, domain, VOCAB, 8, counts)

    first = draw()
    np.testing.assert_array_equal(first, draw())
    for other in (draw(seed=2), draw(layer_name="query_layer"), draw(domain="law")):
        # Independent tables of 8 experts agree on an eighth of the ids (6 standard deviations around it).
        assert abs((first == other).mean() - 1 / 8) < 6 * np.sqrt(7 / 64 / VOCAB)
        joint = np.histogram2d(first, other, bins=8)[0]
        assert np.abs(joint / VOCAB - 1 / 64).max() < 6 * np.sqrt(1 / 64 / VOCAB)


def test_a_frequency_table_without_counts_is_an_error():
    with pytest.raises(ValueError, match="token counts"):
        draw_table("frequency", 1, "blocks.3", "code", VOCAB, 8, None)


def test_counted_generators_repeat_and_differ_by_every_argument():
    def draw(*arguments) -> np.ndarray:
        return generator(*arguments).random(8)

    first = draw(1, "resample", 3, 5, 7)
    np.testing.assert_array_equal(first, draw(1, "resample", 3, 5, 7))
    for other in [(2, "resample", 3, 5, 7), (1, "jitter", 3, 5, 7), (1, "resample", 4, 5, 7), (1, "resample", 3, 6, 7),
                  (1, "resample", 3, 5, 8), (1, "resample", 35, 7), (1, "resample", 3, 5)]:  # fmt: skip
        assert not np.array_equal(first, draw(*other))


def test_counted_streams_never_change():
    """A resumed run's masks and a repeated run's tables rest on it."""
    assert sample_keys(1, "dropout", 3, np.array([0, 1, 2**40])).tolist() == [-909884193, 932950392, -1923594369]
    assert generator(1, "routing table blocks.3 code").integers(0, 1000, 4).tolist() == [479, 415, 375, 110]


def test_sample_keys_belong_to_the_sample_and_not_to_its_place():
    samples = np.array([4, 9, 2, 7])
    keys = sample_keys(1, "dropout", 3, samples)
    assert keys.dtype == np.int32
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(sample_keys(1, "dropout", 3, samples[order]), keys[order])
    assert len({*keys.tolist(), *sample_keys(1, "dropout", 4, samples).tolist()}) == 8
    spread = sample_keys(1, "dropout", 0, np.arange(400))
    assert abs((spread < 0).mean() - 0.5) < 0.15
