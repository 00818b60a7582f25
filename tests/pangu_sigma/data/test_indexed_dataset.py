import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_sigma.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, token_dtype
from pangu_sigma.errors import UserError


def read_like_megatron(prefix):
    """An independent reader after Megatron-LM's description of the format: documents as lists of ids."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<Q", raw[9:17]) == (1,)
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[raw[17]]
    sequences, bounds = struct.unpack("<QQ", raw[18:34])
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + lengths.nbytes)
    index = np.frombuffer(raw, "<i8", bounds, 34 + lengths.nbytes + pointers.nbytes)
    assert 34 + lengths.nbytes + pointers.nbytes + index.nbytes == len(raw)
    data = Path(f"{prefix}.bin").read_bytes()
    rows = [np.frombuffer(data, dtype, n, p).tolist() for n, p in zip(lengths, pointers, strict=True)]
    return [sum(rows[a:b], []) for a, b in zip(index[:-1], index[1:], strict=True)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 69_999), max_size=9), max_size=6), st.sampled_from([70_000, 300]))
def test_a_reader_of_megatrons_format_finds_every_document(tmp_path_factory, documents, vocab_size):
    documents = [[token % vocab_size for token in ids] for ids in documents]
    prefix = tmp_path_factory.mktemp("store") / "x"
    with IndexedDatasetBuilder(prefix, vocab_size, eod_id=1) as writer:
        for ids in documents:
            writer.add(ids)
    expected = [[*ids, 1] for ids in documents]
    assert read_like_megatron(prefix) == expected
    store = IndexedDataset(prefix)
    assert [store.document(index).tolist() for index in range(store.documents)] == expected
    assert store.read(0, store.tokens).tolist() == sum(expected, [])
    assert store.counts(vocab_size).tolist() == np.bincount(sum(expected, []), minlength=vocab_size).tolist()


def test_the_bytes_are_megatrons(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "x", 300, eod_id=2) as writer:
        writer.add([257, 3])
        writer.add([])
    assert (tmp_path / "x.bin").read_bytes() == bytes([1, 1, 3, 0, 2, 0, 2, 0])
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 2, 3)
        + struct.pack("<2i", 3, 1)
        + struct.pack("<2q", 0, 6)
        + struct.pack("<3q", 0, 1, 2)
    )


def test_wide_ids_are_cast_and_ids_that_do_not_fit_are_refused(tmp_path):
    assert (token_dtype(65_499), token_dtype(65_500)) == (np.dtype(np.uint16), np.dtype(np.int32))
    with IndexedDatasetBuilder(tmp_path / "x", 100, eod_id=2) as writer:
        writer.add(np.array([5, 6], dtype=np.int64))
        for bad in ([100], [-1], [2**40]):
            with pytest.raises(ValueError, match="outside the vocabulary of 100"):
                writer.add(bad)
        with pytest.raises(ValueError, match="row of integers"):
            writer.add(np.array([0.5]))
    assert IndexedDataset(tmp_path / "x").document(0).tolist() == [5, 6, 2]


def test_an_unfinished_store_has_no_index(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetBuilder(tmp_path / "x", 100, eod_id=2) as writer:
        writer.add([1])
        raise RuntimeError
    assert not (tmp_path / "x.idx").exists()


def test_documents_of_several_sequences_are_read_whole(tmp_path):
    (tmp_path / "x.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, 3, 3)
        + struct.pack("<3i", 1, 2, 3)
        + struct.pack("<3q", 0, 4, 12)
        + struct.pack("<3q", 0, 2, 3)
    )
    store = IndexedDataset(tmp_path / "x")
    assert [store.document(index).tolist() for index in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_reading_beyond_the_end_is_an_error(make_store):
    store = make_store("x", [[1, 2], [3]])
    for call in (
        lambda: store.document(2),
        lambda: store.document(-1),
        lambda: store.read(4, 2),
        lambda: store.read(-1, 1),
    ):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(UserError, match="x.bin holds ids outside the vocabulary of 3"):
        store.counts(3)


@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        ("bin", lambda data: data[:-1], "x.bin has 9 bytes where its index says 10"),
        ("bin", lambda data: data + b"\0", "x.bin has 11 bytes"),
        ("idx", lambda data: data[:20], "x.idx is shorter than its header"),
        ("idx", lambda data: data[:-4], "x.idx has .* bytes, not what 2 sequences"),
        ("idx", lambda data: b"X" + data[1:], "x.idx does not begin like"),
        ("idx", lambda data: data[:17] + b"\x06" + data[18:], "x.idx names the type code 6"),
        ("idx", lambda data: data[:17] + b"\x63" + data[18:], "x.idx names the type code 99"),
        ("idx", lambda data: data[:34] + struct.pack("<2i", 2, 3) + data[42:], "x.idx has offsets that do not follow"),
        ("idx", lambda data: data[:-8] + struct.pack("<q", 7), "x.idx has negative lengths or a document index"),
        ("idx", None, "x.idx is missing"),
        ("bin", None, "x.bin is missing"),
    ],
)
def test_a_damaged_store_is_refused_by_name(make_store, tmp_path, suffix, spoil, message):
    make_store("x", [[1, 2], [3]])
    path = tmp_path / f"x.{suffix}"
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "x")
