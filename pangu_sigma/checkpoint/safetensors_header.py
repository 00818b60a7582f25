"""Header of a safetensors file: 8 bytes length (little endian), JSON of every tensor's type, shape and place.

The one reader of such headers, our own checkpoints' and foreign files': a tensor is only described where its bytes are
as many as its shape says and all tensors together fill the file, none over another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint.tensor_file import SAFETENSORS_NAMES, TensorSpec, damaged, numpy_type, open_plain
from pangu_sigma.errors import CheckpointError, UserError
from pangu_sigma.json_reader import LARGE, parse_object
from pangu_sigma.regular_file import regular

_MAX_HEADER = 100 << 20  # the safetensors library's own limit
_MOST_DIMENSIONS = 8  # MindSpore's own limit
# Bytes of an element; types beside those of `SAFETENSORS_NAMES` are described and never loaded.
_ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a foreign file lies; `dtype` is our name of its type, or safetensors' for one we have not."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def read(self, name: str) -> np.ndarray:
        """Its values, of a type of ours. Raises UserError where the file cannot be read any more."""
        array = np.empty(self.shape, numpy_type(self.dtype))
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.begin)
                expected = array.reshape(-1).view(np.uint8)
                if stream.readinto(expected) != expected.size:
                    raise UserError(f"{self.file} ends inside tensor {name}: fetch the file again")
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}): restore it") from error
        return array


def read_header(path: Path, header_bytes: int, header_sha256: str) -> dict[str, tuple[TensorSpec, int]]:
    """Reads the header of a checkpoint's file; returns each tensor's description and where its bytes begin in the file.

    Raises CheckpointError, naming the file, unless the header is, bit for bit, the one whose hash is given.
    """
    if not 8 < header_bytes <= _MAX_HEADER:
        raise CheckpointError(f"{path} has no header of a sensible length: restore it or use another checkpoint")
    with open_plain(path) as stream:
        header = stream.read(header_bytes)
    if len(header) != header_bytes or hashlib.sha256(header).hexdigest() != header_sha256:
        raise damaged(path, "its header is not the one that was written")
    try:
        if int.from_bytes(header[:8], "little") != header_bytes - 8:
            raise ValueError("it has another length")
        described = described_tensors(header[8:])
    except ValueError as error:
        raise damaged(path, f"its header cannot be read ({error})") from error
    return {spec.name: (spec, header_bytes + begin) for spec, begin in described}


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a foreign file by name. Raises UserError, naming the file, for one that is not whole."""
    try:
        with open(regular(path), "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"its first 8 bytes say that its header has {length} bytes, and the file has {size}")
            described = described_tensors(stream.read(length), size - 8 - length)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fetch the file again") from error
    except ValueError as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): fetch it again") from error
    return {spec.name: StoredTensor(path, spec.dtype, spec.shape, 8 + length + begin) for spec, begin in described}


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a small file. Raises UserError, naming the file, for one that is not whole or of foreign types."""
    tensors = open_safetensors(path)
    if foreign := [name for name, stored in tensors.items() if stored.dtype not in SAFETENSORS_NAMES.values()]:
        raise UserError(f"{path} holds {foreign[0]} as {tensors[foreign[0]].dtype}: restore the file that was written")
    return {name: stored.read(name) for name, stored in tensors.items()}


def described_tensors(text: bytes, data_bytes: int | None = None) -> list[tuple[TensorSpec, int]]:
    """The tensors that a header's JSON describes and where each begins behind it, in that order; they must fill
    `data_bytes`, where the size of the file is not known from elsewhere.

    A type that checkpoints do not hold keeps its name in safetensors. Raises ValueError, naming the tensor.
    """
    entries = parse_object(text, LARGE)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no mapping of texts")
    described = sorted((_described(name, entry) for name, entry in entries.items()), key=lambda found: found[1:])
    behind = 0
    for spec, begin, end in described:
        if begin != behind:
            raise ValueError(f"tensor {spec.name[:200]!r} begins at byte {begin} where {behind} bytes are taken")
        behind = end
    if data_bytes is not None and behind != data_bytes:
        raise ValueError(f"its tensors take {behind} bytes, and {data_bytes} follow the header")
    return [(spec, begin) for spec, begin, _ in described]


def _described(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    where = f"tensor {name[:200]!r}"
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} has not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise ValueError(f"{where} is of an unknown type")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"the shape of {where} is no list of up to {_MOST_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of {where} are not two byte counts")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ELEMENT_BYTES[dtype]:
        raise ValueError(f"{where} has {end - begin} bytes, which its shape and type do not need")
    if math.prod(max(1, size) for size in shape) >= 1 << 56:  # of an empty tensor: NumPy refuses it
        raise ValueError(f"the shape of {where} is too large")
    return TensorSpec(name, SAFETENSORS_NAMES.get(dtype, dtype), tuple(shape)), begin, end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
