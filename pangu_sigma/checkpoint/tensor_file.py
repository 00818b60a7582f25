"""Safetensors file: written as a stream without a copy of its tensors, read tensor by tensor with its hash checked.

The format: 8 bytes header length (little endian), a JSON header padded with spaces to 8 bytes, the tensors' bytes. The
same tensors always give the same bytes: widest elements first (so that every tensor is aligned), then by name, and
fixed metadata. The safetensors library reads these files; its own writer would need a second copy of it all in memory.
"""

import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.errors import CheckpointError
from pangu_sigma.regular_file import regular

# NumPy has no bfloat16: its raw bits travel as uint16 that carries this mark. Views keep the mark, arithmetic drops it.
BFLOAT16 = np.dtype(np.uint16, metadata={"element": "bfloat16"})

# name in the manifest -> (name in safetensors, NumPy type)
_TYPES: dict[str, tuple[str, np.dtype]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", BFLOAT16),
    "int64": ("I64", np.dtype(np.int64)),
    "int32": ("I32", np.dtype(np.int32)),
    "uint16": ("U16", np.dtype(np.uint16)),
    "uint8": ("U8", np.dtype(np.uint8)),
    "bool": ("BOOL", np.dtype(np.bool_)),
}
_CHUNK = 8 << 20
_FILE_CHUNK = 4 << 20  # whole files are copied a few at a time, with two pieces each in memory
# Larger writes make Linux keep the file in 2 MB pieces of memory, which it may first have to find: 2 GB copied and
# hashed took 3.6 s on a virtual machine in writes of 4 MiB, 2.2 s in writes of 256 KiB; `cp` and `sync` 1.5 s.
_WRITE = 256 << 10
_SMALL = 64 << 10
# Safetensors' name of a type -> ours.
SAFETENSORS_NAMES = {short: name for name, (short, _) in _TYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (such as `float32`) and shape of a tensor, without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return count_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class WrittenFile:
    """Sizes and hashes of a written tensor file; `tensors` maps each tensor to the sha256 of its bytes."""

    bytes: int
    sha256: str
    header_bytes: int
    header_sha256: str
    tensors: dict[str, str]


def count_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises ValueError for a type that checkpoints do not hold."""
    if dtype not in _TYPES:
        raise ValueError(f"type {dtype!r} is none of {', '.join(_TYPES)}")
    return math.prod(shape) * _TYPES[dtype][1].itemsize


def numpy_type(dtype: str) -> np.dtype:
    """The NumPy type that a tensor of the manifest's type `dtype` is loaded as."""
    return _TYPES[dtype][1]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read on demand, so that no process holds all of a model at once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def spec_of(name: str, array: np.ndarray | LazyTensor) -> TensorSpec:
    """Describes `array`; raises ValueError naming the tensor when its element type is not one that checkpoints hold."""
    if isinstance(array, LazyTensor):
        array = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"tensor {name!r} is a {type(array).__name__}, not a NumPy array")
    metadata = array.dtype.metadata or {}
    dtype = metadata.get("element", array.dtype.name)
    if dtype not in _TYPES or array.dtype.itemsize != _TYPES[dtype][1].itemsize or not array.dtype.isnative:
        raise ValueError(f"tensor {name!r} has type {array.dtype}; a checkpoint holds {', '.join(_TYPES)}")
    return TensorSpec(name, dtype, tuple(int(size) for size in array.shape))


def raw_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in C order, without a copy unless the array is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def byte_chunks(array: np.ndarray | LazyTensor) -> Iterator[memoryview]:
    """The array's bytes in C order in chunks of a good size to hash and write; no copy, as in `raw_bytes`."""
    data = raw_bytes(array.read() if isinstance(array, LazyTensor) else array)
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def digest_of(array: np.ndarray | LazyTensor) -> str:
    """sha256 of the array's bytes in C order."""
    return hashlib.sha256(raw_bytes(array.read() if isinstance(array, LazyTensor) else array)).hexdigest()


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors inside a file."""
    return sorted(specs, key=lambda spec: (-_TYPES[spec.dtype][1].itemsize, spec.name))


def make_header(specs: Iterable[TensorSpec], framework: str = "np") -> bytes:
    """Length and JSON header of a file that holds `specs`, ready to be followed by their bytes in `in_file_order`."""
    entries: dict[str, object] = {"__metadata__": {"format": framework}}
    begin = 0
    for spec in in_file_order(specs):
        end = begin + spec.nbytes
        entries[spec.name] = {
            "dtype": _TYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensor_file(
    path: Path,
    specs: Iterable[TensorSpec],
    read: Callable[[TensorSpec], Iterable[bytes | memoryview]],
    known: Mapping[str, str],
    threads: Executor,
    advance: Callable[[int], None],
) -> WrittenFile:
    """Writes and fsyncs a new file; hashes run in `threads` while the bytes are written, each byte is touched once.

    `read(spec)` gives a tensor's bytes piece by piece; a piece may be overwritten once the next one is asked for.
    `known` holds tensor hashes that need not be computed again; `advance(bytes)` is called after every piece.
    Raises ValueError when `read` gives another number of bytes than the tensor has.
    Raises OSError as the file system does, FileExistsError when the file is there already.
    """
    specs = in_file_order(specs)
    header = make_header(specs)
    file_hash = hashlib.sha256(header)
    digests = dict(known)
    with open(path, "xb", buffering=0) as stream:
        write_all(stream, memoryview(header))
        advance(len(header))
        for spec in specs:
            own = None if spec.name in digests else hashlib.sha256()
            hashes = [file_hash] if own is None else [file_hash, own]
            begin = stream.tell()
            for given in read(spec):
                piece = memoryview(given).cast("B")
                if len(piece) <= _SMALL:
                    for running in hashes:
                        running.update(piece)
                    write_all(stream, piece)
                else:
                    jobs = [threads.submit(running.update, piece) for running in hashes]
                    try:
                        write_all(stream, piece)
                    finally:
                        for job in jobs:
                            job.result()
                advance(len(piece))
            if stream.tell() - begin != spec.nbytes:
                raise ValueError(
                    f"tensor {spec.name!r} came with {stream.tell() - begin} bytes; {spec.dtype} {list(spec.shape)} "
                    f"needs {spec.nbytes}"
                )
            if own is not None:
                digests[spec.name] = own.hexdigest()
        size = stream.tell()
        os.fsync(stream.fileno())
    return WrittenFile(size, file_hash.hexdigest(), len(header), hashlib.sha256(header).hexdigest(), digests)


def copy_file(source: Path, target: Path, threads: Executor, advance: Callable[[int], None]) -> tuple[int, str]:
    """Copies a file of a checkpoint to a new file, synced; returns (bytes, sha256) of what was read.

    Each byte is read once: it is hashed in `threads` while it is written and the next piece is read.
    Raises OSError where the target fails, CheckpointError naming the source where that cannot be read.
    """
    running = hashlib.sha256()
    size = 0
    hashing: Future | None = None
    with open(target, "xb", buffering=0) as stream:
        try:
            for piece in file_pieces(source):
                if hashing is not None:
                    hashing.result()
                hashing = threads.submit(running.update, piece)
                write_all(stream, piece)
                size += len(piece)
                advance(len(piece))
        finally:
            if hashing is not None:
                hashing.result()
        os.fsync(stream.fileno())
    return size, running.hexdigest()


def file_pieces(path: Path) -> Iterator[memoryview]:
    """A file's bytes piece by piece; a piece is overwritten when the next but one is asked for.

    Raises CheckpointError, naming the file, when it cannot be read.
    """
    buffers = [memoryview(bytearray(_FILE_CHUNK)) for _ in range(2)]
    with open_plain(path) as stream:
        for buffer in itertools.cycle(buffers):
            count = stream.readinto(buffer)
            if not count:
                return
            yield buffer[:count]


def write_all(stream: io.FileIO, data: memoryview) -> None:
    """Writes all of `data` to an unbuffered stream."""
    while data:  # an unbuffered write may take less than it was given, for example when the disk is nearly full
        data = data[stream.write(data[:_WRITE]) :]


def read_tensor(path: Path, spec: TensorSpec, begin: int, sha256: str) -> np.ndarray:
    """Reads one tensor of a file into a new array, in pieces, hashing as it reads.

    Raises CheckpointError, naming the file and the tensor, when the file ends early or the bytes are not those written.
    """
    array = np.empty(spec.shape, numpy_type(spec.dtype))
    for _ in stream_tensor(path, spec, begin, sha256, into=raw_bytes(array)):
        pass
    return array


def stream_tensor(
    path: Path, spec: TensorSpec, begin: int, sha256: str, into: memoryview | None = None
) -> Iterator[memoryview]:
    """Like `read_tensor`, piece by piece (whole elements): consecutive pieces of `into`, or of one buffer, where one
    is overwritten when the next is asked for.

    Whether the bytes are those written shows only after the last piece.
    """
    running = hashlib.sha256()
    with open_plain(path) as stream:
        stream.seek(begin)
        for piece in _read_exactly(path, stream, spec.nbytes, f"tensor {spec.name!r}", into):
            running.update(piece)
            yield piece
    if running.hexdigest() != sha256:
        raise damaged(path, f"the bytes of tensor {spec.name!r} are not those that were written")


def _read_exactly(
    path: Path, stream: io.FileIO, count: int, what: str, into: memoryview | None = None
) -> Iterator[memoryview]:
    """So many bytes of `what`, as pieces of `into` or in one buffer again and again."""
    buffer = memoryview(bytearray(min(_CHUNK, count))) if into is None else None
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        piece = into[start : start + size] if buffer is None else buffer[:size]
        filled = 0
        while filled < size:
            read = stream.readinto(piece[filled:])
            if not read:
                raise damaged(path, f"it ends inside {what}")
            filled += read
        yield piece


def digests_of_tensor_file(path: Path, specs: Iterable[TensorSpec], advance: Callable[[], None]) -> WrittenFile:
    """Hashes a whole tensor file of `specs`, its header and each of its tensors in one pass; `advance()` after pieces.

    Raises CheckpointError, naming the file, when it cannot be read or is not as long as its tensors make it.
    """
    ordered = in_file_order(specs)
    header_bytes = len(make_header(ordered))
    file_hash, digests = hashlib.sha256(), {}
    with open_plain(path) as stream:
        for name, count in [("", header_bytes), *((spec.name, spec.nbytes) for spec in ordered)]:
            running = hashlib.sha256()
            for piece in _read_exactly(path, stream, count, f"tensor {name!r}"):
                file_hash.update(piece)
                running.update(piece)
                advance()
            digests[name] = running.hexdigest()
        size = stream.tell()
        if stream.read(1):
            raise damaged(path, "it is longer than what was written")
    return WrittenFile(size, file_hash.hexdigest(), header_bytes, digests.pop(""), digests)


def digest_of_file(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file, read in pieces."""
    running = hashlib.sha256()
    size = 0
    for piece in file_pieces(path):
        running.update(piece)
        size += len(piece)
    return size, running.hexdigest()


@contextmanager
def open_plain(path: Path) -> Iterator[io.FileIO]:
    """Opens a file of a checkpoint for unbuffered reading; never follows a link.

    Raises CheckpointError, naming the file, for every failure of the file system while it is open.
    """
    try:
        with open(os.open(regular(path), os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(
            f"{path} of the checkpoint cannot be read ({error.strerror}): restore it or use another checkpoint"
        ) from error


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that is not what was saved."""
    return CheckpointError(f"{path} is damaged: {what}; restore the file or use another checkpoint")
