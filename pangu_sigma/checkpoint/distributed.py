"""Distributed checkpoint save: every process writes its own shards of the tensors into the same files.

The result is what one process would have written, byte for byte: the same files, tensors and hashes, whichever rank had
which shard. No process holds more than its own shards and a buffer. The stages, which `save_distributed` numbers:

1. every rank computes the same plan of files from the tensors' names, types and full shapes;
2. rank 0 removes what killed saves left, checks the disk's space and lays out the files under a hidden name, full size;
3. each rank writes its shards at their offsets and syncs them;
4. the files are hashed where they lie, each by one of the ranks;
5. rank 0 links files that the previous checkpoint has already and that are sound, writes the manifest, renames the
   folder;
6. rank 0 deletes old checkpoints.

A failure in a stage is raised on every rank at its end (`raise_on_all_ranks`), so no rank waits for one that gave up.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint.checkpoint_contents import CheckpointContents
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.file_plan import PlannedFile, plan_tensor_files
from pangu_sigma.checkpoint.folder_writer import FolderWriter
from pangu_sigma.checkpoint.manifest import FileEntry
from pangu_sigma.checkpoint.retention import prune_checkpoints, remove_stale
from pangu_sigma.checkpoint.save_checkpoint import SaveResult, move_into_place, open_previous, step_folder
from pangu_sigma.checkpoint.tensor_file import (
    LazyTensor,
    WrittenFile,
    digests_of_tensor_file,
    make_header,
    raw_bytes,
    spec_of,
)
from pangu_sigma.checkpoint.verified_files import VerifiedFiles, inode_of, mend_older
from pangu_sigma.errors import CheckpointError
from parallel.comm.atomic_folder import atomic_folder
from parallel.comm.processes import Processes

_CHUNK = 8 << 20  # bytes written at once; between two of them the watchdog gets this process's sign of life


@dataclass(frozen=True)
class TensorShard:
    """A box of a tensor: its values, and the offset at which they begin, one number for each of the tensor's axes."""

    offset: tuple[int, ...]
    data: np.ndarray | LazyTensor


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of a checkpoint by its full shape, and the shards of it that this process writes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    local_shards: tuple[TensorShard, ...] = ()

    @classmethod
    def unsharded(cls, array: np.ndarray, is_writer: bool) -> ShardedTensor:
        """A tensor that one process writes as a whole: this one if it `is_writer`."""
        return cls(array.shape, array.dtype, (TensorShard((0,) * array.ndim, array),) if is_writer else ())


def save_distributed(
    processes: Processes,
    run_dir: Path | str,
    contents: CheckpointContents,
    tensors: Mapping[str, ShardedTensor],
    *,
    keep: int,
    max_shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
    verified: VerifiedFiles | None = None,
    read_everything: bool = False,
) -> SaveResult:
    """As `save_checkpoint`, called by all processes together, each with its shards of `tensors`; the rest counts from
    rank 0.

    All ranks' shards together must be every tensor exactly once. Raises CheckpointError on every process when it fails
    on any.
    """
    run_dir, step = Path(run_dir), contents.step

    # 1. The plan: the same on every rank, since names, types and full shapes are.
    is_writer, probe = processes.first, contents.probe_arrays
    specs = [spec_of(name, LazyTensor(t.shape, t.dtype, lambda: None)) for name, t in tensors.items()]
    cells = contents.expert_groups_of(specs)
    specs += [spec_of(name, array) for name, array in probe.items()]
    tensors = {**tensors, **{name: ShardedTensor.unsharded(array, is_writer) for name, array in probe.items()}}
    tensor_files, small_files = plan_tensor_files(specs, max_shard_bytes), contents.small_files()

    final, disk_write = step_folder(run_dir, step)
    folder = final  # of rank 0; the others are told the hidden one
    messages: list[str] = []
    previous: Checkpoint | None = None
    with ExitStack() as stack:
        # 2. The files under a hidden name, at full size, so that every rank can write anywhere in them.
        with raise_on_all_ranks(processes), disk_write.explain_errors():
            if is_writer:
                messages += remove_stale(run_dir)
                previous, new_messages = open_previous(run_dir, step)
                messages += new_messages
                folder = stack.enter_context(atomic_folder(final, move_into_place))
                disk_write.check_space((file.size for file in (*tensor_files, *small_files)), len(specs))
                _lay_out(folder, tensor_files)
        folder = Path(processes.texts(str(folder))[0])

        # 3. The shards, each at its offsets.
        with raise_on_all_ranks(processes), disk_write.explain_errors():
            _write_shards(folder, tensor_files, tensors, progress, processes.mark)

        # 4. The hashes: a file may hold several ranks' shards, so it is read back, by one rank, once all have written.
        with raise_on_all_ranks(processes), disk_write.explain_errors():
            own_hashes = _hash_share(folder, tensor_files, processes)
        hashes = {
            path: entry for text in processes.texts(json.dumps(own_hashes)) for path, entry in json.loads(text).items()
        }

        linked: list[str] = []
        files: Mapping[str, FileEntry] = {}
        with raise_on_all_ranks(processes), disk_write.explain_errors():
            if is_writer:
                # 5. Links, small files, the manifest, the name.
                with stack.pop_all(), ThreadPoolExecutor(2) as threads:
                    writer = FolderWriter(folder, lambda spec: (), threads, 0, None)
                    for file in tensor_files:
                        writer.record(file, WrittenFile(**hashes[file.path]))
                    for file in small_files:
                        writer.write(file)
                    verified, files = verified or VerifiedFiles(), writer.files
                    linked, damaged, inodes = _link_unchanged(
                        folder, files, previous, verified, read_everything, processes.mark
                    )
                    writer.finish(contents.manifest(cells, files, writer.tensors))
                # 6. Retention.
                messages += prune_checkpoints(run_dir, keep, final)
                messages += mend_older(run_dir, final, damaged, inodes)
                verified.saved(final, linked, files)
    bytes_linked = sum(files[path].bytes for path in linked)
    written = sum(file.size for file in (*tensor_files, *small_files)) - bytes_linked
    return SaveResult(
        path=final,
        bytes_written=written,
        bytes_linked=bytes_linked,
        links_refused=0,
        messages=tuple(messages),
    )


@contextmanager
def raise_on_all_ranks(processes: Processes) -> Iterator[None]:
    """Raise on every rank what fails with a CheckpointError on one; the others get the first failed rank's sentence.

    Every rank must enter and leave it: its end is a collective.
    """
    sentence, own_error = "", None
    try:
        yield
    except CheckpointError as error:
        sentence, own_error = str(error), error
    failures = [text for text in processes.texts(sentence) if text]
    if failures:
        raise own_error or CheckpointError(failures[0])


def _lay_out(folder: Path, files: Sequence[PlannedFile]) -> None:
    """Make the tensor files with their headers, at full size."""
    for file in files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb", buffering=0) as stream:
            stream.write(make_header(file.specs))
            stream.truncate(file.size)


def _write_shards(
    folder: Path,
    files: Sequence[PlannedFile],
    tensors: Mapping[str, ShardedTensor],
    progress: Callable[[int, int], None] | None,
    mark: Callable[[], None],
) -> None:
    """Write this process's shards at their offsets in the files, and sync them."""
    total = sum(
        math.prod(shard.data.shape) * tensor.dtype.itemsize
        for tensor in tensors.values()
        for shard in tensor.local_shards
    )
    done = 0
    for file in files:
        if not any(tensors[spec.name].local_shards for spec in file.specs):
            continue
        with open(folder / file.path, "r+b", buffering=0) as stream:
            tensor_offset = len(make_header(file.specs))
            for spec in file.specs:
                tensor = tensors[spec.name]
                for shard in tensor.local_shards:
                    data = raw_bytes(shard.data.read() if isinstance(shard.data, LazyTensor) else shard.data)
                    for run_offset, size in _contiguous_runs(tensor.shape, shard, tensor.dtype.itemsize):
                        offset = tensor_offset + run_offset
                        for start in range(0, size, _CHUNK):
                            _write_at(stream.fileno(), data[start : min(start + _CHUNK, size)], offset + start)
                            mark()
                        data, done = data[size:], done + size
                        if progress is not None:
                            progress(done, total)
                tensor_offset += spec.nbytes
            os.fsync(stream.fileno())


def _contiguous_runs(shape: tuple[int, ...], shard: TensorShard, itemsize: int) -> Iterator[tuple[int, int]]:
    """(offset in the tensor, size) in bytes of each contiguous run of a shard's values, in C order."""
    shard_shape = shard.data.shape
    # Axes from this one on are complete in the shard, so one run covers all of them.
    complete = len(shape)
    while complete and shard_shape[complete - 1] == shape[complete - 1]:
        complete -= 1
    outer = max(0, complete - 1)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    size = math.prod(shard_shape[outer:]) * itemsize
    first = sum(begin * stride for begin, stride in zip(shard.offset, strides, strict=True))
    for index in np.ndindex(*shard_shape[:outer]) if size else ():
        element = first + sum(i * stride for i, stride in zip(index, strides[:outer], strict=True))
        yield element * itemsize, size


def _write_at(handle: int, data: memoryview, offset: int) -> int:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
    return offset


def _hash_share(folder: Path, files: Sequence[PlannedFile], processes: Processes) -> dict[str, dict]:
    """Hash this process's share of the files, the large ones dealt out first: path -> what was written."""
    hashes = {}
    load = [0] * processes.size
    for file in sorted(files, key=lambda file: (-file.size, file.path)):
        rank = load.index(min(load))
        load[rank] += file.size
        if rank == processes.rank:
            hashes[file.path] = vars(digests_of_tensor_file(folder / file.path, file.specs, processes.mark))
    return hashes


def _link_unchanged(
    folder: Path,
    files: Mapping[str, FileEntry],
    previous: Checkpoint | None,
    verified: VerifiedFiles,
    read_everything: bool,
    mark: Callable[[], None],
) -> tuple[list[str], dict[str, Path], dict[str, int | None]]:
    """Put the previous checkpoint's files in the place of equal ones, where they are sound and the file system links.

    Returns what was linked, and the damaged ones with their inodes.
    """
    before = {} if previous is None else previous.manifest.files
    links = {path: previous.path / path for path, entry in files.items() if before.get(path) == entry}
    bad = verified.damaged(links, files, everything=read_everything, advance=lambda count: mark())
    damaged = {path: links[path] for path in bad}
    linked = []
    for path in links:
        if path in damaged:
            continue
        aside = folder / f"{path}.link"
        try:
            os.link(links[path], aside)
        except OSError:
            break  # no links here: the copies stay
        os.replace(aside, folder / path)
        linked.append(path)
    return linked, damaged, {path: inode_of(file) for path, file in damaged.items()}
