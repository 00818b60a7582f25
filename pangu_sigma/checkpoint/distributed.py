"""Saving a checkpoint from several processes: each writes its own parts of the tensors into the same files.

What comes of it is what one process would have written, byte for byte: the same files, tensors and hashes, whoever held
what. Rank 0 lays out the files (hidden, as every save does), each process writes its parts at their places, files are
hashed where they lie, each by one of the processes, and rank 0 writes the manifest and gives the folder its name. No
process holds more than its own parts and a buffer.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_contents import Contents
from pangu_sigma.checkpoint.checkpoint_error import CheckpointError
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.disk_space import Writing
from pangu_sigma.checkpoint.file_plan import PlannedFile, plan_tensor_files
from pangu_sigma.checkpoint.folder_writer import FolderWriter
from pangu_sigma.checkpoint.manifest import FileEntry
from pangu_sigma.checkpoint.retention import held, prune, remove_stale
from pangu_sigma.checkpoint.save_checkpoint import SaveResult, move_into_place, newest
from pangu_sigma.checkpoint.tensor_file import (
    LazyTensor,
    WrittenFile,
    digests_of_tensor_file,
    make_header,
    raw_bytes,
    spec_of,
)
from parallel.comm.processes import Processes

_CHUNK = 8 << 20  # bytes written at once; the others hear from this process in between


@dataclass(frozen=True)
class Piece:
    """Values and where they begin in their tensor: one number for each of its axes."""

    begin: tuple[int, ...]
    data: np.ndarray | LazyTensor


@dataclass(frozen=True)
class TensorPart:
    """A tensor of a checkpoint by its whole shape, and the pieces of it that this process writes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def all_of(cls, array: np.ndarray, mine: bool) -> TensorPart:
        """A tensor that one process writes: this one if it is `mine`."""
        return cls(array.shape, array.dtype, (Piece((0,) * array.ndim, array),) if mine else ())


def save_together(
    processes: Processes,
    run_dir: Path | str,
    contents: Contents,
    parts: Mapping[str, TensorPart],
    *,
    keep: int,
    max_shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> SaveResult:
    """As `save_checkpoint`, called by all processes together, each with its `parts`; the rest counts from rank 0.

    All parts together must be every tensor once. Raises CheckpointError on every process when it fails on any.
    """
    started = time.perf_counter()
    run_dir, step = Path(run_dir), contents.step
    contents.check_names(parts)
    first = processes.first
    parts = {
        **parts,
        **{n: TensorPart.all_of(a, first) for n, a in contents.probe_arrays.items()},
    }
    specs = [spec_of(name, LazyTensor(p.shape, p.dtype, lambda: None)) for name, p in parts.items()]
    cells = contents.cells(specs)
    tensor_files, small = plan_tensor_files(specs, max_shard_bytes), contents.small_files()

    root = run_dir / folder_layout.CHECKPOINTS
    save = Writing(f"step {step}", "saved", root, "choose another run.dir", " (the last checkpoint is whole)")
    temporary = root / folder_layout.working_name("tmp", step, os.getpid())
    messages: list[str] = []
    previous: Checkpoint | None = None
    needed = None
    with ExitStack() as stack:
        with agreed(processes), save.explained():
            if first:
                root.mkdir(parents=True, exist_ok=True)
                messages += remove_stale(run_dir)
                previous, said = newest(run_dir, step)
                messages += said
                needed = save.check_space((file.size for file in (*tensor_files, *small)), len(specs))
                temporary.mkdir()
                stack.enter_context(held(temporary))
                stack.callback(shutil.rmtree, temporary, ignore_errors=True)
                _lay_out(temporary, tensor_files)
        temporary = Path(processes.texts(str(temporary))[0])
        with agreed(processes), save.explained(needed):
            _write_parts(temporary, tensor_files, parts, progress, processes.mark)
        with agreed(processes), save.explained():
            mine = _hash_share(temporary, tensor_files, processes)
        hashed = {path: entry for text in processes.texts(json.dumps(mine)) for path, entry in json.loads(text).items()}
        final, deleted, linked = root / folder_layout.step_name(step), [], 0
        with agreed(processes), save.explained(needed):
            if first:
                with ThreadPoolExecutor(2) as threads:
                    writer = FolderWriter(temporary, lambda spec: (), threads, 0, None)
                    for file in tensor_files:
                        writer.record(file, WrittenFile(**hashed[file.path]))
                    for file in small:
                        writer.write(file)
                    linked = _link_unchanged(temporary, writer.files, previous)
                    writer.finish(contents.manifest(cells, writer.files, writer.tensors))
                    final = move_into_place(temporary, final)
                deleted, said = prune(run_dir, keep, final)
                messages += said
    written = sum(file.size for file in (*tensor_files, *small)) - linked
    return SaveResult(
        path=final,
        bytes_written=written,
        bytes_linked=linked,
        links_refused=0,
        seconds=time.perf_counter() - started,
        deleted=tuple(deleted),
        messages=tuple(messages),
    )


@contextmanager
def agreed(processes: Processes) -> Iterator[None]:
    """What fails with a CheckpointError on one process fails on all, with the first one's sentence."""
    sentence, here = "", None
    try:
        yield
    except CheckpointError as error:
        sentence, here = str(error), error
    failures = [text for text in processes.texts(sentence) if text]
    if failures:
        raise here or CheckpointError(failures[0])


def _lay_out(folder: Path, files: Sequence[PlannedFile]) -> None:
    """Make the tensor files with their headers, at full size."""
    for file in files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb", buffering=0) as stream:
            stream.write(make_header(file.specs))
            stream.truncate(file.size)


def _write_parts(
    folder: Path,
    files: Sequence[PlannedFile],
    parts: Mapping[str, TensorPart],
    progress: Callable[[int, int], None] | None,
    mark: Callable[[], None],
) -> None:
    """Write this process's parts at their places in the files, and sync them."""
    total = sum(math.prod(p.data.shape) * part.dtype.itemsize for part in parts.values() for p in part.pieces)
    done = 0
    for file in files:
        if not any(parts[spec.name].pieces for spec in file.specs):
            continue
        with open(folder / file.path, "r+b", buffering=0) as stream:
            at = len(make_header(file.specs))
            for spec in file.specs:
                part = parts[spec.name]
                for piece in part.pieces:
                    data = raw_bytes(piece.data.read() if isinstance(piece.data, LazyTensor) else piece.data)
                    for place, size in _runs(part.shape, piece, part.dtype.itemsize):
                        for start in range(0, size, _CHUNK):
                            _write_at(stream.fileno(), data[start : min(start + _CHUNK, size)], at + place + start)
                            mark()
                        data, done = data[size:], done + size
                        if progress is not None:
                            progress(done, total)
                at += spec.nbytes
            os.fsync(stream.fileno())


def _runs(shape: tuple[int, ...], piece: Piece, itemsize: int) -> Iterator[tuple[int, int]]:
    """Where each run of a piece's bytes, in C order, begins in its tensor, and how long it is."""
    inner = piece.data.shape
    # Axes from here on are whole, so one run holds all of them.
    whole = len(shape)
    while whole and inner[whole - 1] == shape[whole - 1]:
        whole -= 1
    outer = max(0, whole - 1)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    size = math.prod(inner[outer:]) * itemsize
    first = sum(begin * stride for begin, stride in zip(piece.begin, strides, strict=True))
    for index in np.ndindex(*inner[:outer]) if size else ():
        at = first + sum(i * stride for i, stride in zip(index, strides[:outer], strict=True))
        yield at * itemsize, size


def _write_at(handle: int, data: memoryview, place: int) -> int:
    while data:
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count
    return place


def _hash_share(folder: Path, files: Sequence[PlannedFile], processes: Processes) -> dict[str, dict]:
    """Hash this process's share of the files, the large ones dealt out first: path -> what was written."""
    found = {}
    load = [0] * processes.size
    for file in sorted(files, key=lambda file: (-file.size, file.path)):
        rank = load.index(min(load))
        load[rank] += file.size
        if rank == processes.rank:
            found[file.path] = vars(digests_of_tensor_file(folder / file.path, file.specs, processes.mark))
    return found


def _link_unchanged(folder: Path, files: Mapping[str, FileEntry], previous: Checkpoint | None) -> int:
    """Put the previous checkpoint's files in the place of equal ones, where the file system links; the bytes saved."""
    saved = 0
    for path, entry in files.items():
        if previous is not None and previous.manifest.files.get(path) == entry:
            aside = folder / f"{path}.link"
            try:
                os.link(previous.path / path, aside)
            except OSError:
                return saved  # no links here: the copies stay
            os.replace(aside, folder / path)
            saved += entry.bytes
    return saved
