"""The cache changes nothing: logits equal those of the whole window at every position, whatever is in the batch."""

from dataclasses import replace

import numpy as np
import pytest

from tests.pangu_sigma.generation.conftest import CASES, SLOTS, VOCAB, WINDOW

CLOSE = {"rtol": 0, "atol": 1e-5}


def some_ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(3, VOCAB, count))


def widest(logits: np.ndarray) -> float:
    return float(np.abs(logits).max())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, WINDOW - 1, WINDOW])
def test_prompts_at_the_borders_of_the_compiled_lengths(kind, length):
    both = kind("rre")
    ids = some_ids(length, seed=length)
    np.testing.assert_allclose(both.cached.begin(0, ids, 0), both.plain.begin(0, ids, 0), **CLOSE)
    np.testing.assert_allclose(both.cached.score(ids, 0), both.plain.score(ids, 0), **CLOSE)
    both.cached.end(0)


@pytest.mark.parametrize(("case", "where"), [*((case, "cached") for case in CASES), ("rre", "on_device")])
def test_every_position_of_a_text_that_grows_token_by_token(kind, case, where):
    """From one token to the full window, across every size of the cache."""
    both = replace(kind(case), cached=getattr(kind(case), where))
    ids = some_ids(WINDOW, seed=1)
    expected = both.plain.score(ids, 0)
    assert widest(expected) > 1.0
    np.testing.assert_allclose(both.cached.score(ids, 0), expected, **CLOSE)
    logits = [both.cached.begin(2, ids[:1], 0)]
    logits += [both.cached.step({2: token})[2] for token in ids[1:]]
    both.cached.end(2)
    np.testing.assert_allclose(np.stack(logits), expected, **CLOSE)


@pytest.mark.parametrize(
    ("case", "where"), [("rre", "cached"), ("slots", "cached"), ("switch", "cached"), ("slots", "on_device")]
)
def test_texts_of_all_domains_join_stop_and_leave(kind, case, where, tokenizer):
    """Prompts of different lengths, an end of document on the way, a text that waits, rows that are used again."""
    both = replace(kind(case), cached=getattr(kind(case), where))
    texts = [some_ids(20, seed=n) for n in range(5)]
    texts[1] = (*texts[1][:9], tokenizer.eod_id, *texts[1][10:])

    def begin(slot: int, text: int, length: int) -> None:
        ids = texts[text][:length]
        for decoder in (both.cached, both.plain):
            decoder.end(slot)
        logits = both.cached.begin(slot, ids, text % 3)
        np.testing.assert_allclose(logits, both.plain.begin(slot, ids, text % 3), **CLOSE)

    def step(**tokens: int) -> None:
        fed = {int(slot[1:]): token for slot, token in tokens.items()}
        logits, expected = both.cached.step(fed), both.plain.step(fed)
        assert set(logits) == set(fed)
        for slot in fed:
            np.testing.assert_allclose(logits[slot], expected[slot], **CLOSE)

    begin(0, 0, 3)
    step(s0=texts[0][3])
    begin(1, 1, 7)
    begin(3, 2, 1)
    for position in range(7, 12):  # text 1 passes its end of document
        step(s0=texts[0][position], s1=texts[1][position], s3=texts[2][position])
    step(s3=texts[2][12])  # the others stand still
    step(s0=texts[0][12], s1=texts[1][12])
    both.cached.end(0)
    begin(0, 3, 10)
    begin(2, 4, 18)
    for position in range(13, 16):
        step(s0=texts[3][position], s1=texts[1][position], s2=texts[4][position], s3=texts[2][position])
    for slot in (0, 1, 2):
        both.cached.end(slot)
    for position in range(16, 20):  # alone again, for a while in the wide batch
        step(s3=texts[2][position])
    for token in some_ids(9, seed=9):
        step(s3=token)
    both.cached.end(3)


def test_an_end_of_document_at_the_end_of_a_prompt(kind, tokenizer):
    both = kind("rre")
    ids = (*some_ids(4), tokenizer.eod_id)
    np.testing.assert_allclose(both.cached.begin(0, ids, 2), both.plain.begin(0, ids, 2), **CLOSE)
    for token in some_ids(3, seed=7):
        np.testing.assert_allclose(both.cached.step({0: token})[0], both.plain.step({0: token})[0], **CLOSE)
    both.cached.end(0)


@pytest.mark.parametrize("case", ["rre", "slots"])
def test_neighbours_change_no_bit_where_the_batch_has_the_same_size(kind, case):
    """Rows, and prompts always, are computed in shapes that follow from their own text and the number of rows."""
    cached = kind(case).cached
    ids = some_ids(12, seed=3)

    def beside(other: tuple[int, ...], domain: int) -> list[np.ndarray]:
        for slot in range(SLOTS):
            cached.end(slot)
        logits = [cached.begin(0, ids[:6], 0)]
        cached.begin(1, other, domain)
        logits += [cached.step({0: token, 1: 5 + position})[0] for position, token in enumerate(ids[6:])]
        return logits

    for one, two in zip(beside(some_ids(3, seed=4), 1), beside(some_ids(3, seed=5), 2), strict=True):
        np.testing.assert_array_equal(one, two)
    cached.end(0), cached.end(1)


@pytest.mark.parametrize("case", ["rre", "slots"])
def test_with_compiled_kernels_a_text_is_the_same_to_the_bit_alone_and_beside_any_others(kind, case):
    both = kind(case)
    if both.model.layout.kernels is None:
        pytest.skip("the kernels are not built here")
    ids = some_ids(12, seed=3)

    def beside(others: int) -> np.ndarray:
        for slot in range(others):  # they come first, so the text's place in the batch differs too
            both.cached.begin(slot, some_ids(2 + slot, seed=slot), slot % 3)
        logits = [both.cached.begin(3, ids[:6], 1)]
        for position, token in enumerate(ids[6:]):
            logits.append(both.cached.step({3: token} | {slot: 5 + position for slot in range(others)})[3])
        for slot in range(SLOTS):
            both.cached.end(slot)
        return np.stack(logits)

    alone = beside(0)
    for others in (1, 3):
        np.testing.assert_array_equal(beside(others), alone)


def test_trained_weights_show_at_once(kind):
    """The cells share the network's parameters and the store's rows: nothing is copied when a decoder is made."""
    both = kind("rre")
    layer_name = both.model.config.model.sparse_prefixes[0]
    weight = both.model.store.table(layer_name, "up.weight")
    ids = some_ids(10, seed=6)
    before = both.cached.score(ids, 0)
    kept = weight.copy()
    weight *= 1.5
    try:
        changed = both.cached.score(ids, 0)
        np.testing.assert_allclose(changed, both.plain.score(ids, 0), **CLOSE)
    finally:
        weight[:] = kept
    assert widest(changed - before) > 1e-3
    np.testing.assert_array_equal(both.cached.score(ids, 0), before)


def test_names_of_the_network_stay(kind):
    both = kind("rre")
    names = {parameter.name for parameter in both.model.net.get_parameters()}
    assert "blocks.0.attention.query.weight" in names and "embedding.word" in names
    assert not any(name.startswith("cache.") for name in names)
