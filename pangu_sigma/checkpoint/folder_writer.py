"""Checkpoint folder writer: each file is linked, copied or written and synced to disk, the manifest last.

Threads: files are written in the caller's thread while the pool `threads` hashes what is written; copies run in threads
of their own and report their progress through a queue, so that `progress` is called in the caller's thread alone.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.file_plan import PlannedFile
from pangu_sigma.checkpoint.manifest import FileEntry, Manifest, TensorEntry, TensorSlice, manifest_bytes
from pangu_sigma.checkpoint.tensor_file import (
    TensorSpec,
    WrittenFile,
    copy_file,
    digest_of_file,
    write_all,
    write_tensor_file,
)
from parallel.comm.atomic_folder import sync_folder

# what file systems answer that have no hard links, or no more of them for this file
_NO_LINK = {errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}

# two that keep two cores busy, and one that waits for the disk
_COPIERS = 3


class FolderWriter:
    """Writes the planned files of one checkpoint and collects what its manifest says about them.

    `read(spec)` gives a tensor's bytes in C order, chunk by chunk; a chunk may be overwritten once the next is asked
    for. Raises OSError, and CheckpointError where a copied file is not what its manifest says.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[TensorSpec], Iterable[bytes | memoryview]],
        threads: Executor,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.folder = folder
        self.files: dict[str, FileEntry] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self.bytes_written = 0
        self.bytes_linked = 0
        self.links_refused = 0
        self.linked: list[str] = []
        self._read = read
        self._threads = threads
        self._total = total
        self._done = 0
        self._progress = progress

    def write(self, file: PlannedFile) -> None:
        """Links the file if it is unchanged, else writes and syncs it."""
        target = self.folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.link is None or not self._link(file, target):
            if file.content is not None:
                self.files[file.path] = FileEntry(bytes=file.size, sha256=write_synced(target, file.content))
                self._advance(file.size)
            else:
                self._enter(
                    file, write_tensor_file(target, file.specs, self._read, file.known, self._threads, self._advance)
                )
            self.bytes_written += file.size
        self._record_tensors(file)

    def record(self, file: PlannedFile, written: WrittenFile) -> None:
        """Take a tensor file into the manifest that was written in another way."""
        self._enter(file, written)
        self._record_tensors(file)

    def _enter(self, file: PlannedFile, written: WrittenFile) -> None:
        file.known.update(written.tensors)
        self.files[file.path] = FileEntry(
            bytes=written.bytes,
            sha256=written.sha256,
            header_bytes=written.header_bytes,
            header_sha256=written.header_sha256,
        )

    def _record_tensors(self, file: PlannedFile) -> None:
        for spec in file.specs:
            origin = (0,) * len(spec.shape)
            piece = TensorSlice(file=file.path, offset=origin, shape=spec.shape, sha256=file.known[spec.name])
            self.tensors[spec.name] = TensorEntry(dtype=spec.dtype, shape=spec.shape, slices=(piece,))

    def copy(self, files: Sequence[PlannedFile]) -> None:
        """Copies other folders' files, a few at a time, hashing what was read while it is written."""
        stop = Event()
        copied_bytes: SimpleQueue[int | None] = SimpleQueue()  # None: a copy has ended

        def advance(count: int) -> None:
            if stop.is_set():
                raise CancelledError
            copied_bytes.put(count)

        def ended(job: Future) -> None:
            if not job.cancelled() and job.exception() is not None:
                stop.set()
            copied_bytes.put(None)

        # Large files first, so that all threads end at about the same time.
        ordered = sorted(files, key=lambda file: -file.size)
        with ThreadPoolExecutor(_COPIERS) as copiers:
            jobs = []
            try:
                for file in ordered:
                    target = self.folder / file.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    jobs.append(copiers.submit(self._copy_one, file, target, advance))
                    jobs[-1].add_done_callback(ended)
                running = len(jobs)
                while running:
                    count = copied_bytes.get()
                    if count is None:
                        running -= 1
                    else:
                        self._advance(count)
            finally:
                stop.set()
                for job in jobs:
                    job.cancel()
        failures = [job.exception() for job in jobs if not job.cancelled()]
        for failure in failures:
            if failure is not None and not isinstance(failure, CancelledError):
                raise failure
        for file in ordered:
            self.files[file.path] = file.entry
            self.tensors.update(file.copied)
            self.bytes_written += file.size

    def adopt(self, files: Sequence[PlannedFile]) -> None:
        """Links other folders' files after checking their hashes; copies those that the file system will not link."""
        hashes = self._threads.map(lambda file: digest_of_file(file.copy), files)
        copied = []
        for file, digest in zip(files, hashes, strict=True):
            file.entry.check(file.copy, digest)
            target = self.folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            file.link = file.copy
            if self._link(file, target):
                self.tensors.update(file.copied)
            else:
                copied.append(file)
        self.copy(copied)

    def _copy_one(self, file: PlannedFile, target: Path, advance: Callable[[int], None]) -> None:
        file.entry.check(file.copy, copy_file(file.copy, target, self._threads, advance))
        # The whole file's hash holds, so those of its header and tensors, taken from the same bytes, hold too.

    def finish(self, manifest: Manifest) -> None:
        """Syncs the folders, then writes the manifest and syncs once more."""
        folders = {self.folder / parent for path in self.files for parent in Path(path).parents}
        for folder in sorted(folders, reverse=True):
            sync_folder(folder)
        write_synced(self.folder / folder_layout.MANIFEST, manifest_bytes(manifest))
        sync_folder(self.folder)

    def _link(self, file: PlannedFile, target: Path) -> bool:
        try:
            os.link(file.link, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            self.links_refused += 1
            return False
        self.files[file.path] = file.entry
        self.bytes_linked += file.size
        self.linked.append(file.path)
        self._advance(file.size)
        return True

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def write_synced(path: Path, content: bytes) -> str:
    """Writes a new file, syncs it, and returns its sha256."""
    with open(path, "xb", buffering=0) as stream:
        write_all(stream, memoryview(content))
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()
