"""Prefetcher: reads batches ahead of the train step, in the thread ``data-prefetch``.

Each batch carries the sampler's state that holds once it is used, so a checkpoint stores what the trainer consumed,
however far the thread has read. Weights are a function of the step (``mixture_sampler.Weights``), so reading ahead
across a change of phase is right.
"""

import queue
import threading
from collections.abc import Callable

import numpy as np

from pangu_sigma.data.mixture_sampler import Batch, MixtureSampler

_POLL_SECONDS = 0.1  # how long a full queue may delay the thread's notice of close()


class Prefetcher:
    """Iterator over the sampler's batches without end; ``ahead`` of them are ready or being read (0: read when asked).

    ``transform`` is applied to each batch in the thread (positions, device copies). The sampler belongs to the
    prefetcher from here on. An error while reading is raised by ``next``, after the good batches before it. Use as a
    context manager, or call ``close``.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        batch_size: int,
        ahead: int,
        rows: slice | np.ndarray | None = None,
        transform: Callable[[Batch], object] | None = None,
    ):
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}; it must be 0 or more")
        self._sampler = sampler
        self._batch_size = batch_size
        self._rows = rows
        self._transform = transform
        self._state = sampler.state()
        self._closed = threading.Event()
        self._ready: queue.Queue = queue.Queue(maxsize=max(ahead, 1))
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._next: tuple | None = None
        if ahead:
            self._thread = threading.Thread(target=self._read_ahead, name="data-prefetch", daemon=True)
            self._thread.start()

    def state(self) -> dict:
        """The sampler's state after the last batch that ``next`` gave: what a checkpoint stores."""
        return self._state

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self):
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise StopIteration
        if self._next is not None:
            (batch, state, error), self._next = self._next, None
        elif self._thread is None:
            batch, state, error = self._read()
        else:
            batch, state, error = self._ready.get()
        if error is not None:
            self._error = error
            raise error
        self._state = state
        return batch

    def wait(self, seconds: float) -> bool:
        """Whether ``next`` has something to give at once; waits for it so long. Always true when reading when asked."""
        if self._next is None and self._thread is not None:
            try:
                self._next = self._ready.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    @property
    def failure(self) -> BaseException | None:
        """The error that ``next`` will raise, after ``wait`` was true; None where it gives a batch."""
        return self._next[2] if self._next is not None else self._error

    def close(self) -> None:
        """Stop reading and wait for the thread; may be called twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> tuple:
        try:
            batch = self._sampler.next_batch(self._batch_size, self._rows)
            return (batch if self._transform is None else self._transform(batch)), self._sampler.state(), None
        except Exception as error:  # handed to the consumer, who raises it
            return None, None, error

    def _read_ahead(self) -> None:
        """What the thread runs: a full queue is looked at again and again, so that ``close`` is noticed."""
        while not self._closed.is_set():
            item = self._read()
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if item[2] is not None:
                return
