"""What PanGu-α's weights are read from: one merged file, or the shards of a parallel run with its strategy file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Protocol

import numpy as np

from pangu_sigma.convert.ckpt_file import CkptFile
from pangu_sigma.convert.pangu_alpha_names import EMBEDDING_FILES, SKIPPED
from pangu_sigma.convert.strategy_file import Box, ShardedLayout, read_strategy
from pangu_sigma.errors import UserError, argument
from pangu_sigma.regular_file import regular
from pangu_sigma.wording import listed

_SHARD = re.compile(r"(?P<prefix>.*?)_?(?P<rank>\d+)\.ckpt")
Advance = Callable[[int], None]


class Tensors(Protocol):
    """Whole tensors by name; one at a time."""

    shapes: Mapping[str, tuple[int, ...]]

    def fill(self, name: str, target: np.ndarray) -> None:
        """Read a tensor into `target`, float32 of its shape; a view will do."""


class NumpyFile:
    """One tensor as an `.npy` file, under the name that it has in a checkpoint."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        try:
            self._array = np.load(regular(path), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, SyntaxError, RecursionError, TokenError) as error:  # of a damaged header
            raise UserError(f"{path} is no .npy file of numbers ({error}): give the published file") from error
        if self._array.dtype.name not in ("float32", "float16"):
            raise UserError(f"{path} holds {self._array.dtype}, not float32 or float16: give the published file")
        self.shapes = {name: self._array.shape}

    def fill(self, name: str, target: np.ndarray) -> None:
        target[...] = self._array


@dataclass(frozen=True)
class Shards:
    """The shards of one run, ranks 0 to N - 1, and how each tensor is cut over them."""

    files: tuple[CkptFile, ...]
    layouts: Mapping[str, ShardedLayout]
    shapes: Mapping[str, tuple[int, ...]]

    def fill(self, name: str, target: np.ndarray) -> None:
        """Puts the slices together; where several ranks hold the same slice, all of them must be equal to the bit."""
        layout = self.layouts[name]
        first: dict[Box, Path] = {}
        for rank, file in enumerate(self.files):
            box = layout.box(rank, file.tensors[name].shape)
            part = target[tuple(slice(begin, end) for begin, end in box)]
            if box not in first:
                first[box] = file.path
                file.fill(name, part)
                continue
            replica = np.empty(part.shape, np.float32)
            file.fill(name, replica)
            if replica.tobytes() != part.tobytes():
                raise UserError(
                    f"{first[box].name} and {file.path.name} hold different values of {name}, which the strategy file "
                    "says are the same: give the shards of one checkpoint and the strategy file that came with them"
                )


def open_source(path: Path, strategy: Path | None, advance: Advance | None = None) -> list[Tensors]:
    """What holds the weights at `path`: a merged file, or the shards and `.npy` files of a folder.

    `strategy`: the strategy file, or None for the one in the folder. `advance(1)` is called for every shard.
    Raises UserError for what is missing, damaged or does not fit together.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give PanGu-α's merged .ckpt file or the folder of its shards")
    if not path.is_dir():
        return [CkptFile(path)]
    strategies = sorted(file for file in path.iterdir() if "strategy" in file.name and file.is_file())
    others = {file.resolve() for file in (*strategies, *([strategy] if strategy else []))}
    checkpoints = sorted(file for file in path.glob("*.ckpt") if file.resolve() not in others)
    embeddings = [NumpyFile(path / file, name) for file, name in EMBEDDING_FILES.items() if (path / file).exists()]
    if not checkpoints:
        raise UserError(f"{path} holds no .ckpt files: give PanGu-α's merged .ckpt file or the folder of its shards")
    if len(checkpoints) == 1 and strategy is None and not strategies:
        return [CkptFile(checkpoints[0]), *embeddings]
    if strategy is None:
        if len(strategies) != 1:
            count = f"{len(strategies)} of them" if strategies else "none"
            raise UserError(
                f"{path} has {len(checkpoints)} shards, which are put together by their strategy file, and {count}: "
                f"name it as {argument('strategy')}"
            )
        strategy = strategies[0]
    return [_open_shards(path, checkpoints, strategy, advance), *embeddings]


def _open_shards(folder: Path, checkpoints: list[Path], strategy: Path, advance: Advance | None) -> Shards:
    layouts = read_strategy(strategy)
    count = next(iter(layouts.values())).device_count
    by_rank = _by_rank(folder, checkpoints, count)
    files: list[CkptFile] = []
    for rank in range(count):
        file = CkptFile(by_rank[rank])
        if files and file.tensors.keys() != files[0].tensors.keys():
            odd = listed(file.tensors.keys() ^ files[0].tensors.keys())
            raise UserError(
                f"{file.path.name} holds other tensors than {files[0].path.name} ({odd}): give the shards of one "
                "checkpoint"
            )
        for name, tensor in file.tensors.items():
            if files and tensor != files[0].tensors[name]:
                other = files[0].tensors[name]
                raise UserError(
                    f"{name} is {tensor.type} {list(tensor.shape)} in {file.path.name}, but in {files[0].path.name} "
                    f"{other.type} {list(other.shape)}: give the shards of one checkpoint"
                )
        if files:
            file.share(files[0])
        files.append(file)
        if advance is not None:
            advance(1)
    # What is left behind anyway (counters, for example) need not stand in the strategy file.
    tensors = {name: tensor for name, tensor in files[0].tensors.items() if name in layouts or not SKIPPED.rule(name)}
    if unknown := tensors.keys() - layouts.keys():
        raise UserError(f"{strategy} does not say how these tensors are cut: {listed(unknown)}; give the right one")
    for name, tensor in tensors.items():
        if len(tensor.shape) != len(layouts[name].tensor_map):
            raise UserError(
                f"{strategy} cuts {name} along {len(layouts[name].tensor_map)} axes, and the shards have it with "
                f"{len(tensor.shape)}: give the strategy file that came with them"
            )
    full_shapes = {name: layouts[name].full_shape(tensor.shape) for name, tensor in tensors.items()}
    shapes = {name: full_shapes.get(name, tensor.shape) for name, tensor in files[0].tensors.items()}
    return Shards(tuple(files), layouts, shapes)


def _by_rank(folder: Path, checkpoints: list[Path], count: int) -> dict[int, Path]:
    by_rank: dict[int, Path] = {}
    prefixes = set()
    for path in checkpoints:
        match = _SHARD.fullmatch(path.name)
        if match is None or int(match["rank"]) in by_rank:
            raise UserError(f"{path} is no numbered shard of its own: leave only the {count} shards in the folder")
        by_rank[int(match["rank"])] = path
        prefixes.add(match["prefix"])
    if len(prefixes) > 1:
        raise UserError(f"{folder} holds shards of several sets ({listed(prefixes)}): leave only one in the folder")
    missing = [str(rank) for rank in range(count) if rank not in by_rank]
    if missing or len(by_rank) > count:
        complaint = f"shards {listed(missing)} are missing" if missing else f"there are {len(by_rank)}"
        raise UserError(f"{folder} must hold exactly the {count} shards that the strategy file is for: {complaint}")
    return by_rank
