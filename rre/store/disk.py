"""A store whose tables are memory-mapped files, for models that exceed memory.

All tensors of one expert, weights and moments, are one record of whole pages in its sparse layer's file, so that an
expert comes and goes as one contiguous range. At most `resident_bytes` of records are mapped in: the least recently
used are written back and let go, from this process and from the system's cache. The files are a working copy: what a
checkpoint holds is written into the checkpoint, and resuming fills the files anew from it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from parallel.compiled import HostKernels
from rre.store.base import KINDS, ExpertStore, Shapes

PAGE = mmap.ALLOCATIONGRANULARITY
MS_SYNC = 4  # of sys/mman.h on Linux
Unit = tuple[str, int]


class StoreFull(Exception):
    """One step needs more than the store may hold at once; the message says what to change."""


class DiskStore(ExpertStore):
    """Tables as files under `folder`; `in_memory` names places that stay in memory (tables that are no experts)."""

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
        self.resident_bytes = resident_bytes
        self.mapped_bytes = 0  # of the records that are resident now
        self._whole = frozenset(in_memory)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._maps: dict[str, mmap.mmap] = {}
        self._addresses: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._record: dict[str, int] = {}
        # Resident records, the least recently used first; a record of a step under way is in `_pinned` too.
        self._resident: OrderedDict[Unit, None] = OrderedDict()
        self._pinned: set[Unit] = set()
        self._dirty: set[Unit] = set()
        self._lock = threading.RLock()
        self._reader = ThreadPoolExecutor(1, "expert-prefetch")
        self._reading: dict[Unit, Future] = {}
        super().__init__(shapes, experts, kernels)

    def _make_tables(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        tables: dict[str, dict[str, dict[str, np.ndarray]]] = {kind: {} for kind in KINDS}
        for place, tensors in self.shapes.items():
            count = self.experts[place]
            if self.in_memory(place):
                for kind in KINDS:
                    tables[kind][place] = {n: np.zeros((count, *s), np.float32) for n, s in tensors.items()}
                continue
            sizes = {name: 4 * int(np.prod(shape)) for name, shape in tensors.items()}
            record = -(-len(KINDS) * sum(sizes.values()) // PAGE) * PAGE
            self._record[place] = record
            buffer = self._map(place, max(1, count) * record)
            at = 0
            for kind in KINDS:
                tables[kind][place] = {}
                for name, shape in tensors.items():
                    inner = np.empty(shape, np.float32).strides if shape else ()
                    tables[kind][place][name] = np.ndarray(
                        (count, *shape), np.float32, buffer, offset=at, strides=(record, *inner)
                    )
                    at += sizes[name]
        return tables

    def _map(self, place: str, size: int) -> mmap.mmap:
        """A file of `size` zero bytes that exist on the disk (so that a full disk shows now), mapped."""
        path = self.folder / f"{place}.table"
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.posix_fallocate(handle, 0, size)
        self._files[place] = handle
        self._maps[place] = mmap.mmap(handle, size)
        self._addresses[place] = np.frombuffer(self._maps[place], np.uint8).ctypes.data
        # Experts are whole ranges: reading ahead of them would bring in their neighbours.
        self._maps[place].madvise(mmap.MADV_RANDOM)
        return self._maps[place]

    def in_memory(self, place: str) -> bool:
        return place in self._whole

    # --- coming and going

    def prefetch(self, place: str, experts: Sequence[int]) -> None:
        if self.in_memory(place):
            return
        with self._lock:
            for expert in {int(e) for e in experts}:
                unit = (place, expert)
                if unit not in self._resident and unit not in self._reading:
                    self._reading[unit] = self._reader.submit(self._bring_if_room, unit)

    def _make_ready(self, place: str, experts: Sequence[int]) -> int:
        if self.in_memory(place):
            return len(experts)
        units = [(place, e) for e in experts]
        ready = 0
        for unit in units:
            with self._lock:
                reading = self._reading.pop(unit, None)
                self._pinned.add(unit)
            if reading is not None:
                ready += reading.done()
                reading.result()
            with self._lock:
                if unit in self._resident:
                    ready += reading is None
                    self._resident.move_to_end(unit)
                    continue
            self._bring(unit)
        return ready

    def _bring_if_room(self, unit: Unit) -> None:
        with suppress(StoreFull):  # the step that fetches it tells, if it cannot be helped then either
            self._bring(unit)

    def _bring(self, unit: Unit) -> None:
        """Make room for a record and read it in."""
        place, expert = unit
        size = self._record[place]
        with self._lock:
            if unit in self._resident:
                return
            self._make_room(size)
            self._resident[unit] = None
            self.mapped_bytes += size
            self.traffic.bytes_read += size
        self._maps[place].madvise(mmap.MADV_WILLNEED, expert * size, size)
        # One byte of each page: the kernel has the record in memory when this returns.
        np.frombuffer(self._maps[place], np.uint8, size, expert * size)[:: mmap.PAGESIZE].sum()

    def _make_room(self, size: int) -> None:
        while self.mapped_bytes + size > self.resident_bytes:
            unit = next((u for u in self._resident if u not in self._pinned), None)
            if unit is None:
                raise StoreFull(
                    f"a step activates more than experts.resident_gib = {self.resident_bytes / 2**30:.3g}: raise it, "
                    "or lower data.domains_per_step or train.batch_size"
                )
            self._let_go(unit)

    def _let_go(self, unit: Unit) -> None:
        place, expert = unit
        size = self._record[place]
        start = expert * size
        if unit in self._dirty:
            self._write_back(place, start, size)
            self._dirty.discard(unit)
            self.traffic.bytes_written += size
        self._maps[place].madvise(mmap.MADV_DONTNEED, start, size)
        with suppress(OSError):
            os.posix_fadvise(self._files[place], start, size, os.POSIX_FADV_DONTNEED)
        del self._resident[unit]
        self.mapped_bytes -= size

    def _write_back(self, place: str, start: int, size: int) -> None:
        # mmap.flush would keep all other threads waiting for the disk.
        if self._libc.msync(self._addresses[place] + start, ctypes.c_size_t(size), MS_SYNC):
            raise OSError(ctypes.get_errno(), "writing an expert table failed", str(self.folder / f"{place}.table"))

    def begin(self) -> None:
        super().begin()
        with self._lock:
            self._pinned.clear()

    def apply(self, place: str, expert: int, *arguments: object, **named: object) -> None:
        if not self.in_memory(place):
            self._make_ready(place, [expert])  # an earlier micro-batch's expert may have gone meanwhile
            self._dirty.add((place, expert))
        super().apply(place, expert, *arguments, **named)

    def release(self) -> None:
        """Write back and let go of everything: after the tables were filled or read from outside a step."""
        self.settle()
        with self._lock:
            for unit in list(self._resident):
                self._let_go(unit)
            for place, buffer in self._maps.items():
                self._write_back(place, 0, len(buffer))
                buffer.madvise(mmap.MADV_DONTNEED)
                with suppress(OSError):
                    os.posix_fadvise(self._files[place], 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, kind: str, place: str, name: str, experts: slice) -> np.ndarray:
        if self.in_memory(place):
            return super().read(kind, place, name, experts)
        table = self._tables[kind][place][name]
        first, last, _ = experts.indices(table.shape[0])
        found = np.empty((last - first, *table.shape[1:]), np.float32)
        offset = table.__array_interface__["data"][0] - self._addresses[place]
        for expert in range(first, last):
            # Through the file, not the map: what is read for a checkpoint must not count as resident.
            data = memoryview(found[expert - first].reshape(-1)).cast("B")
            start = offset + expert * self._record[place]
            done = 0
            while done < len(data):
                done += os.preadv(self._files[place], [data[done:]], start + done)
            if (place, expert) not in self._resident:
                with suppress(OSError):
                    os.posix_fadvise(self._files[place], start, len(data), os.POSIX_FADV_DONTNEED)
        return found

    def close(self) -> None:
        super().close()
        self._reader.shutdown()
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
