"""Tensors into safetensors files with an index, as transformers reads them; memory holds one tensor or less."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint.folder_layout import cut_into_shards
from pangu_sigma.checkpoint.tensor_file import raw_bytes, write_all
from pangu_sigma.monitor.progress import progress

# our names of element types -> safetensors'
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the output: its name there, its type in safetensors, its shape, and its numbers, in C order in as
    many arrays as its reader likes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * _BYTES[self.kind]


def total_bytes(targets: Iterable[TargetTensor]) -> int:
    """Bytes of the elements of all."""
    return sum(target.nbytes for target in targets)


def write_shards(folder: Path, stem: str, targets: Sequence[TargetTensor], max_bytes: float) -> None:
    """Write `stem.safetensors`, or numbered shards of at most `max_bytes` with `stem.safetensors.index.json`.

    A tensor larger than a shard gets a file of its own. Raises OSError.
    """
    by_name = {target.name: target for target in targets}
    shards = cut_into_shards([(t.name, t.nbytes) for t in targets], max_bytes)
    file_of: dict[str, str] = {}
    total = total_bytes(targets)
    with progress("export", total, unit="B") as job:
        for number, names in enumerate(shards, 1):
            file = f"{stem}.safetensors"
            if len(shards) > 1:
                file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, [by_name[name] for name in names], job.advance)
            file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, targets: Sequence[TargetTensor], advance: Callable[[int], None]) -> None:
    # Widest elements first, so that every tensor is aligned.
    ordered = sorted(targets, key=lambda t: (-_BYTES[t.kind], t.name))
    # transformers refuses files that do not say which framework's layout they have; its own is "pt".
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for target in ordered:
        header[target.name] = {
            "dtype": target.kind, "shape": list(target.shape), "data_offsets": [begin, begin + target.nbytes],
        }  # fmt: skip
        begin += target.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as stream:
        write_all(stream, memoryview(len(text).to_bytes(8, "little") + text))
        for target in ordered:
            written = 0
            for array in target.read():
                data = raw_bytes(array)
                write_all(stream, data)
                written += len(data)
                advance(len(data))
            if written != target.nbytes:
                raise ValueError(f"tensor {target.name} has {written} bytes, not {target.nbytes}")
        os.fsync(stream.fileno())
