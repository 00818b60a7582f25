"""MindSpore's `.ckpt` files, read tensor by tensor.

A file is one Protocol Buffers message (mindspore/train/checkpoint.proto), no pickle:

    Checkpoint { repeated Value value = 1 }
    Value { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

A tensor of more than 512 MB comes as several values of the same tag, one after the other, each with the whole tensor's
dims. A file that was saved with `crc_check` ends with the letters `crc_num` and the CRC-32 of everything before them.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.convert.protobuf_wire import BYTES, VARINT, WireError, numbers, read_varint
from pangu_sigma.errors import UserError
from pangu_sigma.regular_file import regular

_TYPES = {
    "Float64": np.dtype("<f8"),
    "Float32": np.dtype("<f4"),
    "Float16": np.dtype("<f2"),
    "BFloat16": np.dtype("<u2"),  # NumPy has none: its bits, which `as_float32` widens
    "Int64": np.dtype("<i8"),
    "Int32": np.dtype("<i4"),
    "Int16": np.dtype("<i2"),
    "Int8": np.dtype("<i1"),
    "UInt64": np.dtype("<u8"),
    "UInt32": np.dtype("<u4"),
    "UInt16": np.dtype("<u2"),
    "UInt8": np.dtype("<u1"),
    "Bool": np.dtype("?"),
}
_MOST_DIMENSIONS = 8  # MindSpore's own limit
_WEIGHTS = ("Float32", "Float16", "BFloat16")
_FOOTER = 17  # "crc_num" and ten bytes
_WINDOW = 4096  # bytes read at a time while the index is made; a value's names and sizes are far shorter
_FIELD_HEAD = 20  # two varints
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class CkptTensor:
    """A tensor's description in the file; `type` is MindSpore's name, such as `Float32`."""

    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * _TYPES[self.type].itemsize


class CkptFile:
    """The index of one file: which tensors it holds and where their bytes lie; a tensor is read when it is asked for.

    Raises UserError, naming the file, for one that is no MindSpore checkpoint, is cut off, or fails its CRC.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.tensors: dict[str, CkptTensor] = {}
        # Of every tensor: its first and behind its last number in `_numbers`, which are offset, size, offset, size, …
        self._spans: dict[str, tuple[int, int]] = {}
        self._numbers = array("Q")
        with self._open() as handle:
            end = self._without_footer(handle, os.fstat(handle).st_size)
            self._index(handle, end)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def share(self, other: CkptFile) -> None:
        """Keep one index of names with `other`, a file of the same tensors: hundreds of shards would fill memory."""
        if self.tensors == other.tensors and self._spans == other._spans:
            self.tensors, self._spans = other.tensors, other._spans

    def fill(self, name: str, target: np.ndarray) -> None:
        """Read a tensor of floats into `target`, float32 of its shape (a view will do); in blocks of whole rows.

        Float16 and BFloat16 are widened, which is exact. UserError for any other type.
        """
        tensor = self.tensors[name]
        if tensor.type not in _WEIGHTS:
            raise UserError(
                f"{self.path}: tensor {name} is {tensor.type}: save the model with weights of {', '.join(_WEIGHTS)}"
            )
        kind = _TYPES[tensor.type]
        with self._open() as handle:
            if not tensor.shape:
                target[...] = as_float32(self._block(handle, name, kind, 0, 1), tensor.type)[0]
                return
            row = math.prod(tensor.shape[1:])
            rows = max(1, _CHUNK // max(1, row * kind.itemsize))
            for begin in range(0, tensor.shape[0], rows):
                end = min(begin + rows, tensor.shape[0])
                block = self._block(handle, name, kind, begin * row, (end - begin) * row)
                target[begin:end] = as_float32(block, tensor.type).reshape(end - begin, *tensor.shape[1:])

    def _block(self, handle: int, name: str, kind: np.dtype, begin: int, count: int) -> np.ndarray:
        """`count` elements of a tensor, flat, from element `begin`."""
        values = np.empty(count, kind)
        data = values.view(np.uint8).data
        skip, done = begin * kind.itemsize, 0
        for offset, size in self._pieces(name):
            take = min(size - skip, len(data) - done)
            if take > 0:
                self._read_into(handle, data[done : done + take], offset + skip)
                done, skip = done + take, 0
            else:
                skip = max(0, skip - size)
        return values

    def _pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """(offset, size) of the parts of the file that hold a tensor."""
        numbers = self._numbers[slice(*self._spans[name])]
        return zip(numbers[::2], numbers[1::2], strict=True)

    def _read_into(self, handle: int, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(handle, [target[done:]], offset + done)
            if not count:
                raise UserError(f"{self.path} became shorter while it was read: give the original .ckpt file")
            done += count

    # --- the index

    def _index(self, handle: int, end: int) -> None:
        window = _Window(handle, end)
        offset, last = 0, None
        while offset < end:
            try:
                field_number, kind, start, size = window.field(offset, end)
                if field_number != 1 or kind != BYTES:
                    raise WireError("is not a list of values")
                tag, content = self._value(window, start, size)
            except (WireError, UnicodeDecodeError) as error:
                what = str(error) if isinstance(error, WireError) else "holds a name that is no text"
                raise UserError(
                    f"{self.path} {what} (at byte {offset} of {end}), so it is "
                    f"{'no MindSpore checkpoint' if last is None else 'damaged'}: give the original .ckpt file"
                ) from error
            if tag != last and tag in self._spans:
                raise UserError(f"{self.path} holds tensor {tag} twice: give the original .ckpt file")
            begin, _ = self._spans.get(tag, (len(self._numbers), 0))
            self._numbers.extend(content)
            self._spans[tag] = begin, len(self._numbers)
            last = tag
            offset = start + size
        if not self.tensors:
            raise UserError(f"{self.path} holds no tensors: give a MindSpore .ckpt file")
        for name, tensor in self.tensors.items():
            stored = sum(size for _, size in self._pieces(name))
            if stored != tensor.nbytes:
                raise UserError(
                    f"{self.path} is damaged: tensor {name} has {stored} bytes where {tensor.type} "
                    f"{list(tensor.shape)} needs {tensor.nbytes}; give the original .ckpt file"
                )

    def _value(self, window: _Window, begin: int, size: int) -> tuple[str, tuple[int, int]]:
        """Notes one value of the file; returns its tag and (offset, size) of its content."""
        tag, tensor = None, None
        for field_number, kind, start, length in window.fields(begin, size):
            if field_number == 1 and kind == BYTES:
                # The same names stand in every shard.
                tag = sys.intern(window.read(start, length).decode())
            elif field_number == 2 and kind == BYTES:
                tensor = (start, length)
            elif field_number == 3:
                raise WireError(f"holds the hash table {tag}, which cannot be imported")
        if tag is None or tensor is None:
            raise WireError("has a value without a name or without a tensor")
        dims: list[int] = []
        type_name, content = "", None
        for field_number, kind, start, length in window.fields(*tensor):
            if field_number == 1:
                if len(dims) > _MOST_DIMENSIONS:
                    raise WireError(f"has a tensor {tag} of more than {_MOST_DIMENSIONS} dimensions")
                dims += numbers(kind, length if kind == VARINT else window.read(start, length))
            elif field_number == 2 and kind == BYTES:
                type_name = window.read(start, length).decode()
            elif field_number == 3 and kind == BYTES:
                content = (start, length)
        if content is None or min(dims, default=0) < 0:
            raise WireError(f"has no bytes or no shape for tensor {tag}")
        if type_name == "str":  # a text of `append_dict`; its length is that of its content
            described = CkptTensor("UInt8", (content[1],))
        elif type_name not in _TYPES:
            raise WireError(f"has a tensor {tag} of the unknown type {type_name!r}")
        else:
            # MindSpore writes the shape [0] for a scalar.
            described = CkptTensor(type_name, () if dims == [0] and content[1] else tuple(dims))
        if self.tensors.setdefault(tag, described) != described:
            raise WireError(f"describes tensor {tag} twice, and differently")
        return tag, content

    def _without_footer(self, handle: int, size: int) -> int:
        """Where the message ends; a CRC behind it is checked, which reads the file once more."""
        footer = os.pread(handle, _FOOTER, max(0, size - _FOOTER))
        if len(footer) < _FOOTER or not footer.startswith(b"crc_num"):
            return size
        end = size - _FOOTER
        crc, offset = 0, 0
        while offset < end:
            piece = os.pread(handle, min(_CHUNK, end - offset), offset)
            crc = zlib.crc32(piece, crc)
            offset += len(piece)
        if crc != int.from_bytes(footer[7:], "big"):
            raise UserError(f"{self.path} is damaged: its CRC does not match its content; give the original .ckpt file")
        return end

    @contextmanager
    def _open(self) -> Iterator[int]:
        handle = None
        try:
            handle = os.open(regular(self.path), os.O_RDONLY)
            yield handle
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): give a MindSpore .ckpt file") from error
        finally:
            if handle is not None:
                os.close(handle)


class _Window:
    """A moving view of a file, for fields that lie anywhere in it and are too large to hold."""

    def __init__(self, handle: int, end: int) -> None:
        self._handle, self._end = handle, end
        self._begin, self._buffer = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `at`, fewer at the end of the file."""
        if size > _WINDOW:
            raise WireError("has a name or a shape of impossible length")
        if not self._begin <= offset or offset + size > self._begin + len(self._buffer):
            self._begin, self._buffer = offset, os.pread(self._handle, min(_WINDOW, self._end - offset), offset)
        return self._buffer[offset - self._begin : offset - self._begin + size]

    def field(self, offset: int, end: int) -> tuple[int, int, int, int]:
        """(field number, wire type, start, length) of the field at `at`.

        A number's field has the number as its length, and starts behind it.
        """
        head = self.read(offset, min(_FIELD_HEAD, end - offset))
        key, behind = read_varint(head, 0)
        if key & 7 not in (VARINT, BYTES):
            raise WireError(f"has a field of the type {key & 7}, which such files do not use")
        length, behind = read_varint(head, behind)
        if key & 7 == BYTES and offset + behind + length > end:
            raise WireError("ends inside a field")
        return key >> 3, key & 7, offset + behind, length

    def fields(self, begin: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Every field of the message of `size` bytes at `begin`."""
        offset, end = begin, begin + size
        while offset < end:
            field_number, kind, start, length = self.field(offset, end)
            yield field_number, kind, start, length
            offset = start if kind == VARINT else start + length


def as_float32(values: np.ndarray, kind: str) -> np.ndarray:
    """Values of MindSpore's type `kind` (BFloat16 as its bits) in float32."""
    if kind == "BFloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)
