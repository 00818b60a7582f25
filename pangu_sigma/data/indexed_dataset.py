"""Indexed dataset: a token store in Megatron-LM's memory-mapped format, which MindFormers reads and writes too.

``NAME.bin`` holds the token ids of all documents end to end. ``NAME.idx`` holds, little-endian and without padding:
``b"MMIDIDX\\0\\0"``, version (uint64, 1), type code (uint8), number of sequences N (uint64), length of the document
index (uint64, M + 1), sequence lengths (int32 [N]), byte offsets of the sequences (int64 [N]), document index (int64
[M + 1]: document m is the sequences from entry m to entry m + 1). Written here, a document is one sequence and ends
with the end-of-document id; read here, documents of several sequences are understood as well.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pangu_sigma.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPE_CODES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary under 65,500 ids, else int32: Megatron's rule."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDatasetBuilder:
    """Builder of ``prefix.bin`` and ``prefix.idx``, the index last: without it there is no dataset."""

    def __init__(self, prefix: str | Path, vocab_size: int, eod_id: int):
        if not 0 <= eod_id < vocab_size:
            raise ValueError(f"eod_id {eod_id} is outside the vocabulary of {vocab_size} ids")
        self._prefix = Path(prefix)
        self._vocab_size = vocab_size
        self._eod_id = eod_id
        self.dtype = token_dtype(vocab_size)
        self._lengths: list[int] = []
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115 - closed by close()

    def add(self, ids: Iterable[int] | np.ndarray) -> None:
        """Append one document [n] without its end: the end-of-document id is added. ValueError when an id does not
        fit.
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(f"a document must be a row of integers, not {tokens.dtype} {tokens.shape}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(
                f"document {len(self._lengths)} has ids {tokens.min()} to {tokens.max()}, "
                f"outside the vocabulary of {self._vocab_size}"
            )
        # The cast is explicit: Megatron's own builder writes wider arrays unchanged, and the file is then silently
        # wrong.
        stored = np.empty(tokens.size + 1, dtype=self.dtype)
        stored[:-1] = tokens
        stored[-1] = self._eod_id
        self._bin.write(stored.tobytes())
        self._lengths.append(stored.size)

    def close(self) -> None:
        """Write the index."""
        _flush(self._bin)
        lengths = np.asarray(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, kind in TYPE_CODES.items() if np.dtype(kind) == self.dtype)
        with open(f"{self._prefix}.idx", "wb") as index:
            index.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4").tobytes())
            index.write(pointers.astype("<i8").tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _flush(index)

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()


def _flush(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


class IndexedDataset:
    """Reader of a store; tokens stay on disk. ``lengths`` int64 [M] tokens per document, ``offsets`` int64 [M + 1]
    their running sum, ``documents`` = M, ``tokens`` their number.

    Raises UserError with the file's name when a file is missing, truncated or not in this format.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, bin_path):
            if not path.is_file():
                raise _damaged(path, "is missing")
        self.dtype, lengths, pointers, bounds = _read_index(index_path)
        expected = int(lengths.sum()) * self.dtype.itemsize
        size = bin_path.stat().st_size
        if size != expected:
            raise _damaged(bin_path, f"has {size} bytes where its index says {expected}")
        ends = np.concatenate(([0], np.cumsum(lengths)))
        if not np.array_equal(pointers, ends[:-1] * self.dtype.itemsize):
            raise _damaged(index_path, "has offsets that do not follow from its lengths")
        self.offsets = ends[bounds]
        self.lengths = np.diff(self.offsets)
        self.documents = len(self.lengths)
        self.tokens = int(self.offsets[-1])
        # An empty file cannot be mapped.
        self._ids = np.memmap(bin_path, dtype=self.dtype, mode="r") if size else np.empty(0, dtype=self.dtype)

    def document(self, index: int) -> np.ndarray:
        """Token ids int32 [n] of one document, its end-of-document id included. IndexError outside 0 … M - 1."""
        if not 0 <= index < self.documents:
            raise IndexError(f"{self.prefix} has {self.documents} documents, no number {index}")
        return self.read(int(self.offsets[index]), int(self.lengths[index]))

    def read(self, start: int, count: int) -> np.ndarray:
        """Token ids int32 [count] from position ``start`` on, in stored order. IndexError beyond the end."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"{self.prefix} has {self.tokens} tokens, not {start} to {start + count}")
        return np.asarray(self._ids[start : start + count], dtype=np.int32)

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often every vocabulary id occurs: int64 [vocab_size]. UserError when an id is not in the vocabulary."""
        total = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, self.tokens, 1 << 22):
            part = self.read(start, min(1 << 22, self.tokens - start))
            if part.min() < 0 or part.max() >= vocab_size:
                raise _damaged(Path(f"{self.prefix}.bin"), f"holds ids outside the vocabulary of {vocab_size}")
            total += np.bincount(part, minlength=vocab_size)
        return total


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype, lengths int64 [N], byte offsets int64 [N], document index int64 [M + 1]) of an ``.idx`` file."""
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise _damaged(path, "is shorter than its header")
    magic, version, code, count, document_count = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise _damaged(path, "does not begin like a Megatron index of version 1")
    if code not in TYPE_CODES or np.dtype(TYPE_CODES[code]).kind == "f":
        raise _damaged(path, f"names the type code {code}, which is no integer type")
    if len(data) != _HEADER.size + 12 * count + 8 * document_count or document_count < 1:
        raise _damaged(
            path, f"has {len(data)} bytes, not what {count} sequences and {document_count - 1} documents take"
        )
    lengths = np.frombuffer(data, "<i4", count, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", count, _HEADER.size + 4 * count)
    bounds = np.frombuffer(data, "<i8", document_count, _HEADER.size + 12 * count)
    if (lengths < 0).any() or bounds[0] != 0 or bounds[-1] != count or (np.diff(bounds) < 0).any():
        raise _damaged(path, "has negative lengths or a document index out of order")
    return np.dtype(TYPE_CODES[code]), lengths, pointers, bounds


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the token store {path} {what}; remove the folder {path.parent} and start again to tokenise anew")
