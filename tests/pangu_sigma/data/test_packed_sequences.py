import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_sigma.data.domain_store import unigram_loss
from pangu_sigma.data.packed_sequences import HeldoutSequences, PackedSequences
from rre.counted_random import bits64, key64, permutation, uniform


def numbered(lengths):
    """Documents whose tokens are all different, below 99 (the end)."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def test_the_counted_streams_never_change():
    """A checkpoint's data cursor means the same sequences only while these numbers stay."""
    assert key64(1, "order", "code", 0) == 2376717423239660573
    assert bits64(7, np.arange(3)).tolist() == [1346066267577507604, 7191089600892374487, 309689372594955804]
    assert permutation(5, 6).tolist() == [4, 5, 3, 1, 0, 2]


def test_uniform_numbers_are_uniform():
    drawn = uniform(key64("test"), np.arange(20_000))
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] - 2000).max() < 200


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_an_epoch_holds_every_token_once_and_continues_into_the_next(tmp_path_factory, lengths, sequence_length):
    from pangu_sigma.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("store") / "x"
    documents = numbered(lengths)
    with IndexedDatasetBuilder(prefix, 100, 99) as writer:
        for ids in documents:
            writer.add(ids)
    store = IndexedDataset(prefix)
    packed = PackedSequences("code", store, sequence_length, seed=1)
    count = -(-3 * store.tokens // sequence_length)
    rows = [packed.sequence(index) for index in range(count)]
    for row, following in zip(rows[:-1], rows[1:], strict=True):
        assert row[-1] == following[0]
    stream = np.concatenate([row[:-1] for row in rows])[: 3 * store.tokens].reshape(3, store.tokens)
    epoch_documents = sorted([*ids.tolist(), 99] for ids in documents)
    for epoch in stream.tolist():
        ends = [position + 1 for position, token in enumerate(epoch) if token == 99]
        assert sorted(epoch[a:b] for a, b in zip([0, *ends], ends, strict=False)) == epoch_documents


def test_sequences_are_random_access_and_orders_differ_by_epoch_seed_and_domain(make_store):
    store = make_store("x", numbered([3] * 20))
    packed = PackedSequences("code", store, 10, seed=1)
    forward = [packed.sequence(index).tolist() for index in range(24)]
    fresh = PackedSequences("code", store, 10, seed=1)
    assert [fresh.sequence(index).tolist() for index in reversed(range(24))] == forward[::-1]
    assert fresh.sequence(0).dtype == np.int32
    assert forward[0] != forward[8]  # epoch 1
    assert PackedSequences("code", store, 10, seed=2).sequence(0).tolist() != forward[0]
    assert PackedSequences("law", store, 10, seed=1).sequence(0).tolist() != forward[0]
    with pytest.raises(IndexError):
        packed.sequence(-1)


def test_every_heldout_token_is_a_label_once_after_a_true_context(make_store):
    documents = numbered([5, 3, 7, 1])
    store = make_store("x", documents)
    heldout = HeldoutSequences(store, 6, eod_id=99, pad_id=98)
    assert len(heldout) == 4  # 20 tokens
    tokens, mask = heldout.batch(0, 5)
    assert (tokens.dtype, tokens.shape, mask.dtype, mask.shape) == (np.int32, (5, 7), np.float32, (5, 6))
    labels = tokens[:, 1:][mask == 1]
    assert sorted(labels) == sorted([*range(16), 99, 99, 99, 99])
    assert np.concatenate(([99], labels[:-1])).tolist() == tokens[:, :-1][mask == 1].tolist()
    assert (tokens[:, 1:][mask == 0] == 98).all()
    assert mask.sum() == 20 and mask[4].sum() == 0
    with pytest.raises(IndexError):
        heldout.sequence(4)


def test_unusable_lengths_are_refused(make_store):
    with pytest.raises(ValueError):
        PackedSequences("code", make_store("x", [[1]]), 0, seed=1)
    with pytest.raises(ValueError):
        PackedSequences("code", make_store("y", []), 4, seed=1)
    with pytest.raises(ValueError):
        HeldoutSequences(make_store("z", []), 4, 99, 98)


def test_the_unigram_loss_is_that_of_the_smoothed_frequencies(make_store):
    heldout = make_store("x", [[0, 0, 1]], vocab_size=4, eod_id=3)
    counts = np.array([5, 1, 0, 2])
    expected = -(2 * np.log(6 / 12) + np.log(2 / 12) + np.log(3 / 12)) / 4
    assert unigram_loss(counts, heldout.counts(len(counts))) == pytest.approx(expected)


def test_the_unigram_model_is_measured_on_the_labels_of_the_same_sequences(make_store):
    store = make_store("x", [[0, 1, 2], [4, 4], [5], [6, 0, 1, 2, 4]], vocab_size=100, eod_id=99)
    heldout = HeldoutSequences(store, 4, 99, 98)
    for count in (1, 2, 3, 9):
        rows = [heldout.sequence(i) for i in range(min(count, len(heldout)))]
        labels = np.concatenate([ids[1:][mask > 0] for ids, mask in rows])
        assert heldout.label_counts(100, count).tolist() == np.bincount(labels, minlength=100).tolist()
