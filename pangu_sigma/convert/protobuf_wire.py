"""Protocol Buffers' wire format, as far as MindSpore's files use it: varints and length-delimited fields.

MindSpore's own readers parse a whole file into a message, which takes several times its size in memory, and importing
them costs seconds. What stands here reads fields where they lie.

Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST = 10  # bytes of a 64-bit varint
_MOST_NUMBERS = 64  # of a shape, of a device grid
_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}


class WireError(ValueError):
    """Bytes that are no Protocol Buffers message."""


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """(value, position behind it) of the varint at `at`; raises WireError where none is."""
    value = 0
    for count in range(_LONGEST):
        if offset + count >= len(data):
            raise WireError("ends inside a number")
        byte = data[offset + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80 and value < 1 << 64:
            return value, offset + count + 1
    raise WireError("holds a number of more than 64 bits")


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field number, wire type, value) of every field of a message that is in memory.

    Varints come as unsigned numbers, everything else as bytes. Raises WireError.
    """
    offset = 0
    while offset < len(data):
        key, offset = read_varint(data, offset)
        field_number, kind = key >> 3, key & 7
        if field_number == 0:
            raise WireError("has a field number 0")
        if kind == VARINT:
            value, offset = read_varint(data, offset)
        else:
            if kind == BYTES:
                size, offset = read_varint(data, offset)
            elif kind in _FIXED_SIZES:
                size = _FIXED_SIZES[kind]
            else:
                raise WireError(f"has a field of the unknown type {kind}")
            if offset + size > len(data):
                raise WireError("ends inside a field")
            value, offset = data[offset : offset + size], offset + size
        yield field_number, kind, value


def numbers(kind: int, value: int | bytes) -> list[int]:
    """The numbers of one occurrence of a repeated integer field, packed or not, read as signed 64-bit integers."""
    if kind == VARINT:
        return [signed(value)]
    if kind != BYTES:
        raise WireError("has a list of numbers in an unknown form")
    values, offset = [], 0
    while offset < len(value):
        item, offset = read_varint(value, offset)
        values.append(signed(item))
        if len(values) > _MOST_NUMBERS:
            raise WireError("has a shape of impossible length")
    return values


def signed(value: int) -> int:
    """An int32 or int64 field's value: negative numbers are stored as their 64-bit complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def varint(value: int) -> bytes:
    """The encoding of a number of 0 or more."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(field_number: int, value: int | bytes) -> bytes:
    """The encoding of one field: a varint for a number, length-delimited for bytes."""
    if isinstance(value, int):
        return varint(field_number << 3 | VARINT) + varint(value)
    return varint(field_number << 3 | BYTES) + varint(len(value)) + value
