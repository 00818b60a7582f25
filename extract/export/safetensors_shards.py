"""Tensors into safetensors files with an index, as transformers reads them; memory holds one tensor or less."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint.folder_layout import cut_into_shards, shard_paths
from pangu_sigma.checkpoint.tensor_file import TensorSpec, in_file_order, make_header, raw_bytes, write_all
from pangu_sigma.monitor.progress import progress


@dataclass(frozen=True)
class TargetTensor(TensorSpec):
    """One tensor of the output: its name there, type and shape, and its numbers in C order, in as many arrays as its
    reader likes."""

    read: Callable[[], Iterable[np.ndarray]]


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
        for file, names in zip(shard_paths(stem, len(shards)), shards, strict=True):
            _write_shard(folder / file, [by_name[name] for name in names], job.advance)
            file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, targets: Sequence[TargetTensor], advance: Callable[[int], None]) -> None:
    with open(path, "xb", buffering=0) as stream:
        # transformers refuses files that do not say which framework's layout they have; its own is "pt".
        write_all(stream, memoryview(make_header(targets, framework="pt")))
        for target in in_file_order(targets):
            written = 0
            for array in target.read():
                data = raw_bytes(array)
                write_all(stream, data)
                written += len(data)
                advance(len(data))
            if written != target.nbytes:
                raise ValueError(f"tensor {target.name} has {written} bytes, not {target.nbytes}")
        os.fsync(stream.fileno())
