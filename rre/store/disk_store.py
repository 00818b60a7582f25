"""Expert store on disk: tables are memory-mapped files, for models that exceed memory.

All tensors of one expert, weights and moments, are one record of whole pages in its sparse layer's file, so that an
expert comes and goes as one contiguous range. At most `resident_bytes` of records are mapped in: the least recently
used are written back and let go, from this process and from the system's cache; what a planned step waits for goes
last.

The files are a working copy, made anew when the store is made and removed when it closes: what a checkpoint holds is
written into the checkpoint, and resuming fills the files from it. So the state that a checkpoint names never depends on
how far the tables had moved on. The price: beside the checkpoints (12 bytes a parameter each; the file of a domain that
did not train since the last one is a hard link) the disk holds the tables (12 bytes a parameter, rounded up to pages);
a checkpoint reads and writes every changed domain in full; resuming reads a checkpoint and writes the tables once.
A step writes back the records that it updated: 12 bytes a parameter, all of which AdamW changes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from parallel.ops.compiled_kernels import HostKernels
from rre.store.expert_store import STATE_TENSORS, ExpertStore, Shapes

PAGE = mmap.ALLOCATIONGRANULARITY
WRITE_AND_WAIT = 1 | 2 | 4  # sync_file_range: wait for writes under way, write, wait
FILL_BYTES = 64 << 20  # written past the maps before they are sent to the disk and leave the system's cache
SUFFIX = ".table"
ExpertKey = tuple[str, int]


class StoreFull(Exception):
    """One step needs more than the store may hold at once; the message says what to change."""


class DiskStore(ExpertStore):
    """Expert store on disk with an LRU cache of expert records in memory.

    Tables are files under `folder`; at most `resident_bytes` of records are in memory, beside the layers that
    `in_memory` names (tables that are no experts), which are there whole. Raises StoreFull if a step needs more.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shapes],
        experts: Mapping[str, int],
        folder: Path,
        resident_bytes: int,
        kernels: HostKernels | None = None,
        in_memory: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        remove_tables(folder)
        self.resident_bytes = resident_bytes
        self.mapped_bytes = 0  # of the records that are resident now
        self._in_memory = frozenset(in_memory)
        # Through ctypes, because mmap's own methods keep all other threads waiting.
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        self._maps: dict[str, mmap.mmap] = {}
        self._addresses: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._record: dict[str, int] = {}
        # Resident records, the least recently used first; a record of a step under way is in `_pinned` too.
        self._resident: OrderedDict[ExpertKey, None] = OrderedDict()
        self._pinned: set[ExpertKey] = set()
        self._dirty: set[ExpertKey] = set()
        self._awaited: Counter[ExpertKey] = Counter()  # steps that are planned and have not fetched it yet
        self._filled = 0
        self._lock = threading.RLock()
        self._reader = ThreadPoolExecutor(1, "expert-prefetch")
        self._reading: dict[ExpertKey, Future] = {}
        try:
            super().__init__(shapes, experts, kernels)
        except BaseException:
            self._remove_files()
            raise

    def _make_tables(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = super()._make_tables()
        for layer_name, tensors in self.shapes.items():
            if self.in_memory(layer_name):
                continue
            count = self.experts[layer_name]
            sizes = {name: 4 * int(np.prod(shape)) for name, shape in tensors.items()}
            record = -(-len(STATE_TENSORS) * sum(sizes.values()) // PAGE) * PAGE
            self._record[layer_name] = record
            buffer = self._map(layer_name, max(1, count) * record)
            offset = 0
            for kind in STATE_TENSORS:
                tables[kind][layer_name] = {}
                for name, shape in tensors.items():
                    inner = np.empty(shape, np.float32).strides if shape else ()
                    tables[kind][layer_name][name] = np.ndarray(
                        (count, *shape), np.float32, buffer, offset=offset, strides=(record, *inner)
                    )
                    offset += sizes[name]
        return tables

    def _map(self, layer_name: str, size: int) -> mmap.mmap:
        """A file of `size` zero bytes that exist on the disk (so that a full disk shows now), mapped."""
        handle = os.open(self.folder / f"{layer_name}{SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._files[layer_name] = handle
        os.posix_fallocate(handle, 0, size)
        self._maps[layer_name] = mmap.mmap(handle, size)
        self._addresses[layer_name] = np.frombuffer(self._maps[layer_name], np.uint8).ctypes.data
        # Experts are whole ranges: reading ahead of them would bring in their neighbours.
        self._maps[layer_name].madvise(mmap.MADV_RANDOM)
        return self._maps[layer_name]

    def in_memory(self, layer_name: str) -> bool:
        return layer_name in self._in_memory

    # --- the cache of records

    def prefetch(self, layer_name: str, experts: Sequence[int]) -> None:
        """Begin to read what a planned step will fetch, as far as memory is left by what other steps wait for.

        The reading is done by the store's one reader thread.
        """
        if self.in_memory(layer_name):
            return
        with self._lock:
            for expert in {int(e): None for e in experts}:
                key = (layer_name, expert)
                self._awaited[key] += 1
                if key not in self._resident and key not in self._reading:
                    self._reading[key] = self._reader.submit(self._read_in_if_room, key)

    def _make_ready(self, layer_name: str, experts: Sequence[int]) -> int:
        if self.in_memory(layer_name):
            return len(experts)
        keys = [(layer_name, int(e)) for e in experts]
        ready = self._pin(keys)
        with self._lock:
            for key in keys:
                self._awaited[key] -= 1
                if self._awaited[key] <= 0:
                    del self._awaited[key]
        return ready

    def _pin(self, keys: Sequence[ExpertKey]) -> int:
        """Read records in and pin them until the next `start_step`; return how many were in memory already."""
        with self._lock:
            self._pinned.update(keys)
        ready = 0
        for key in keys:
            with self._lock:
                reading = self._reading.pop(key, None)
                ready += key in self._resident and (reading is None or reading.done())
            if reading is not None:
                reading.result()
            self._read_in(key, for_step=True)
            with self._lock:
                self._resident.move_to_end(key)
        return ready

    def _read_in_if_room(self, key: ExpertKey) -> None:
        with suppress(StoreFull):  # the step that fetches it brings it, and tells if it cannot
            self._read_in(key, for_step=False)

    def _read_in(self, key: ExpertKey, for_step: bool) -> None:
        """Read a record into memory, evicting others for it."""
        layer_name, expert = key
        size = self._record[layer_name]
        with self._lock:
            if key in self._resident:
                return
            self._make_room(size, for_step)
            self._resident[key] = None
            self.mapped_bytes += size
            self.stats.add(bytes_read=size)
        self._advise(layer_name, expert * size, size, mmap.MADV_WILLNEED)
        # One byte of each page: the kernel has the record in memory when this returns.
        np.frombuffer(self._maps[layer_name], np.uint8, size, expert * size)[:: mmap.PAGESIZE].sum()

    def _make_room(self, size: int, for_step: bool) -> None:
        """Evict records until `size` bytes fit; what planned steps wait for goes last, and only for a step.

        Raises StoreFull if all that is left belongs to the step under way.
        """
        while self.mapped_bytes + size > self.resident_bytes:
            free = (u for u in self._resident if u not in self._pinned)
            key = next((u for u in free if u not in self._awaited), None)
            if key is None and for_step:
                # The one that was brought in last is needed last.
                key = next((u for u in reversed(self._resident) if u not in self._pinned), None)
            if key is None:
                raise StoreFull(
                    f"a batch activates more than experts.resident_gib = {self.resident_bytes / 2**30:.3g} holds: "
                    "raise it, or lower data.max_domains_per_batch or the batch size"
                )
            self._evict(key)

    def _evict(self, key: ExpertKey) -> None:
        layer_name, expert = key
        size = self._record[layer_name]
        start = expert * size
        if key in self._dirty:
            self._write_back(layer_name, start, size)
            self._dirty.discard(key)
            self.stats.add(bytes_written=size)
        self._advise(layer_name, start, size, mmap.MADV_DONTNEED)
        self._drop_cached(layer_name, start, size)
        del self._resident[key]
        self.mapped_bytes -= size

    def _advise(self, layer_name: str, start: int, size: int, advice: int) -> None:
        if self._libc.madvise(self._addresses[layer_name] + start, size, advice):
            raise OSError(ctypes.get_errno(), "an expert table cannot be mapped", str(self._path(layer_name)))

    def _write_back(self, layer_name: str, start: int, size: int) -> None:
        # Out of memory, without journal or flush of the disk's own cache: nobody reads the files after a crash.
        if self._libc.sync_file_range(self._files[layer_name], start, size, WRITE_AND_WAIT):
            raise OSError(ctypes.get_errno(), "writing an expert table failed", str(self._path(layer_name)))

    def _drop_cached(self, layer_name: str, start: int, size: int) -> None:
        with suppress(OSError):  # advice: some file systems take none
            os.posix_fadvise(self._files[layer_name], start, size, os.POSIX_FADV_DONTNEED)

    def _path(self, layer_name: str) -> Path:
        return self.folder / f"{layer_name}{SUFFIX}"

    def start_step(self) -> None:
        super().start_step()
        with self._lock:
            self._pinned.clear()

    def apply(self, layer_name: str, expert: int, *arguments: object, **named: object) -> None:
        if not self.in_memory(layer_name):
            key = (layer_name, expert)
            try:
                self._pin([key])  # an earlier micro-batch's expert may have gone meanwhile
            except StoreFull:
                # All micro-batches together touch more than fits: what is updated may go.
                self.start_step()
                self._pin([key])
            self._dirty.add(key)
        super().apply(layer_name, expert, *arguments, **named)

    def write(self, kind: str, layer_name: str, name: str, experts: slice, values: np.ndarray) -> None:
        if self.in_memory(layer_name):
            super().write(kind, layer_name, name, experts, values)
            return
        for row, expert in enumerate(range(*experts.indices(self.experts[layer_name]))):
            # Through the file, not the map: what fills the tables must not count as resident.
            data = memoryview(np.ascontiguousarray(values[row], np.float32).reshape(-1)).cast("B")
            start, done = self._offset(kind, layer_name, name, expert), 0
            while done < len(data):
                done += os.pwrite(self._files[layer_name], data[done:], start + done)
            self._filled += len(data)
            if self._filled >= FILL_BYTES:
                self._filled = 0
                for changed in self._files:
                    self._write_back(changed, 0, 0)
                    self._drop_cached(changed, 0, 0)

    def _offset(self, kind: str, layer_name: str, name: str, expert: int) -> int:
        """Where an expert's tensor begins in its file."""
        table = self._tables[kind][layer_name][name]
        return table.__array_interface__["data"][0] - self._addresses[layer_name] + expert * self._record[layer_name]

    def read(self, kind: str, layer_name: str, name: str, experts: slice) -> np.ndarray:
        if self.in_memory(layer_name):
            return super().read(kind, layer_name, name, experts)
        table = self._tables[kind][layer_name][name]
        first, last, _ = experts.indices(table.shape[0])
        values = np.empty((last - first, *table.shape[1:]), np.float32)
        for expert in range(first, last):
            # Through the file, not the map: what is read for a checkpoint must not count as resident.
            data = memoryview(values[expert - first].reshape(-1)).cast("B")
            start, done = self._offset(kind, layer_name, name, expert), 0
            while done < len(data):
                done += os.preadv(self._files[layer_name], [data[done:]], start + done)
            if (layer_name, expert) not in self._resident:
                self._drop_cached(layer_name, start, len(data))
        return values

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        try:
            super().close()
        finally:
            self._remove_files()

    def _remove_files(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
        remove_tables(self.folder)


def remove_tables(folder: Path) -> None:
    """Remove the working copy of a process that was killed; a checkpoint has all that counts."""
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or somebody else's files are in it
        folder.rmdir()
