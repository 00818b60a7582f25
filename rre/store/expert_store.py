"""Expert store: expert weights, Adam moments and step counts outside the model's graph.

A training step goes through it in this order:

1. `prefetch`, from the thread that plans batches: a store on disk begins to read what the step will fetch.
2. `start_step`: waits for the last step's updates; what that step fetched may go.
3. `fetch`: weights of the batch's experts as tensors that share the tables' memory, inputs of the graph.
4. `apply`, once per expert that received a token: queues its AdamW update, one task per tensor, on the store's update
   threads and returns at once. Each task alone writes its expert's weight, m and v.
5. `flush`: waits for all queued updates and raises what one of them raised. Everything that hands out weights
   (`start_step`, `fetch`, `full_table`) does so first; `tables`, `read` and `write` do not.

A step fetches the experts that its batch needs, hands them to the graph as inputs, gets gradients back and applies
them to exactly the experts that received a token. An expert that received none keeps every bit: weights, moments and
its own step count. That is what "never forgets" rests on, and what makes a step cost what it activates, whatever is
stored (the paper's Expert Computation and Storage Separation).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields

import numpy as np
from mindspore import Tensor

from parallel.ops.compiled_kernels import HostKernels
from parallel.partition_spec import Shard, full_slices
from rre.adamw import AdamWHyperparameters, has_weight_decay, square_sum, update_in_place
from rre.counted_random import generator, normal

Shapes = Mapping[str, tuple[int, ...]]
STATE_TENSORS = ("weight", "m", "v")


@dataclass
class StoreStats:
    """Transfer counters of an expert store, since the last `take`.

    fetched: experts handed to steps; hits: those of them that were ready when asked for; updated: experts that got an
    update; bytes_to_step, bytes_from_step: weights handed out and gradients taken in; bytes_read, bytes_written:
    between memory and disk; update_seconds: work of all update threads together.
    """

    fetched: int = 0
    hits: int = 0
    updated: int = 0
    bytes_to_step: int = 0
    bytes_from_step: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    update_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counted: float) -> None:
        """Add to counters by name; from any thread."""
        with self._lock:
            for name, value in counted.items():
                setattr(self, name, getattr(self, name) + value)

    def take(self) -> dict[str, float]:
        """Return the counters by name and set them to zero."""
        figures = [f for f in fields(self) if not f.name.startswith("_")]
        with self._lock:
            counts = {f.name: getattr(self, f.name) for f in figures}
            for f in figures:
                setattr(self, f.name, f.default)
        return counts


class ExpertStore:
    """Expert store: float32 tables [experts, …] per (kind, layer name, tensor), kind being weight, m or v.

    `shapes`: layer name (or that of the embedding slots) -> tensor name -> shape of one expert's tensor. `experts`:
    layer name -> how many. `kernels`: compiled updates, else NumPy's. Tables are zero until `initialise` or until they
    are written to. A subclass may keep tables elsewhere. A process of several holds some of a
    layer's experts, which it counts from 0, and in a graph that is cut over devices a part of each of their tensors.
    """

    # Whether a training step's graph takes every stored expert, or only those that its batch activates.
    all_resident = False

    def __init__(
        self, shapes: Mapping[str, Shapes], experts: Mapping[str, int], kernels: HostKernels | None = None
    ) -> None:
        self.shapes = {layer_name: dict(tensors) for layer_name, tensors in shapes.items()}
        self.experts = dict(experts)
        self.steps = {layer_name: np.zeros(count, np.int64) for layer_name, count in experts.items()}
        self.stats = StoreStats()
        self._kernels = kernels
        self._tables = self._make_tables()
        self._bytes = {p: sum(4 * int(np.prod(s)) for s in tensors.values()) for p, tensors in self.shapes.items()}
        # Tensors that share memory with rows of the tables; made on first use, valid as long as the tables stand.
        self._views: dict[tuple[str, str, int], Tensor] = {}
        # Updates under way, each with the gradient whose memory it reads; threads, because NumPy works outside the GIL.
        self._workers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "expert-update")
        self._running: list[tuple[Future, Tensor]] = []

    # --- what a subclass changes

    def _make_tables(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """Make tables: kind -> layer name -> tensor name -> float32 [experts, …], one expert's tensor contiguous."""
        return {
            kind: {
                layer_name: {name: np.zeros((self.experts[layer_name], *s), np.float32) for name, s in tensors.items()}
                for layer_name, tensors in self.shapes.items()
                if self.in_memory(layer_name)
            }
            for kind in STATE_TENSORS
        }

    def _make_ready(self, layer_name: str, experts: Sequence[int]) -> int:
        """Bring experts into memory; return how many were there already."""
        return len(experts)

    def prefetch(self, layer_name: str, experts: Sequence[int]) -> None:
        """Begin to bring experts into memory that a coming step will fetch. May be called from another thread."""

    def in_memory(self, layer_name: str) -> bool:
        """Whether a layer's tables lie in memory as a whole."""
        return True

    def close(self) -> None:
        """Flush and give back threads and files."""
        self.flush()
        self._workers.shutdown()

    # --- the tables

    def initialise(
        self,
        seed: int,
        std: Mapping[str, float],
        local_experts: Mapping[str, range] | None = None,
        cutoff: float | None = None,
        shards: Mapping[str, Shard] | None = None,
    ) -> None:
        """Draw every weight table: Normal(std[tensor name]), cut off as `normal` says, or 0 where no std is given.

        An expert's numbers depend on (seed, layer, expert) alone, not on how many others there are. `local_experts`:
        layer name -> ids of the experts in this store, where other processes have more; `shards`: tensor name -> the
        shard of each expert's tensor in this store, where others have the rest.
        """
        local_experts, shards = local_experts or {}, shards or {}
        for layer_name, tensors in self.shapes.items():
            for row, expert_id in enumerate(local_experts.get(layer_name, range(self.experts[layer_name]))):
                for name, shape in tensors.items():
                    if std.get(name):
                        shard = shards.get(name) or Shard(shape, full_slices(shape))
                        rng = generator(seed, f"initial {layer_name} {name}", expert_id)
                        drawn = normal(rng, (1, *shard.shape), std[name], cutoff)[0][shard.slices]
                        self.write("weight", layer_name, name, slice(row, row + 1), drawn[None])

    def table(self, layer_name: str, name: str, kind: str = "weight") -> np.ndarray:
        """The table of one tensor, [experts, …]; `kind` is weight, m or v. Writing to it changes the store."""
        return self._tables[kind][layer_name][name]

    def tables(self) -> Iterator[tuple[str, str, str, np.ndarray]]:
        """(kind, layer name, tensor name, table) of everything but the step counts."""
        for kind, by_layer in self._tables.items():
            for layer_name, tensors in by_layer.items():
                for name, table in tensors.items():
                    yield kind, layer_name, name, table

    def read(self, kind: str, layer_name: str, name: str, experts: slice) -> np.ndarray:
        """A range of experts of one table; memory of the table where it lies in memory anyway, else a copy."""
        return self._tables[kind][layer_name][name][experts]

    def write(self, kind: str, layer_name: str, name: str, experts: slice, values: np.ndarray) -> None:
        """Set a range of experts of one table, between steps; where tables lie elsewhere no memory is held for it."""
        self._tables[kind][layer_name][name][experts] = values

    # --- a step

    def start_step(self) -> None:
        """Start a step: wait for the updates so far; what earlier steps fetched may leave memory."""
        self.flush()

    def full_table(self, layer_name: str, name: str) -> Tensor:
        """Return one weight table as a tensor that shares its memory, all updates in it."""
        self.flush()
        return self._view(layer_name, name, -1)

    def fetch(self, layer_name: str, experts: Sequence[int]) -> list[Tensor]:
        """Return weights of `experts` (repeats allowed), flat: the tensors of the first, of the second, …."""
        self.flush()
        distinct = np.unique(np.asarray(experts)).tolist()
        ready = self._make_ready(layer_name, distinct)
        self.stats.add(fetched=len(distinct), hits=ready, bytes_to_step=len(distinct) * self._bytes[layer_name])
        return [self._view(layer_name, name, int(e)) for e in experts for name in self.shapes[layer_name]]

    def apply(
        self, layer_name: str, expert: int, gradients: Sequence[Tensor], hyper: AdamWHyperparameters, scale: float = 1.0
    ) -> None:
        """Update one expert by gradients * scale (in the order of `fetch`); nobody else's bits change.

        Returns at once; `flush` waits.
        """
        self.steps[layer_name][expert] += 1
        step = int(self.steps[layer_name][expert])
        self.stats.add(updated=1, bytes_from_step=self._bytes[layer_name])
        for name, gradient in zip(self.shapes[layer_name], gradients, strict=True):
            rows = (self._tables[kind][layer_name][name][expert] for kind in STATE_TENSORS)
            task = self._workers.submit(
                _timed_update, *rows, gradient.asnumpy(), hyper, step, scale, has_weight_decay("." + name),
                self._kernels,
            )  # fmt: skip
            self._running.append((task, gradient))

    def square_sums(self, gradients: Sequence[Tensor]) -> np.ndarray:
        """Sum of squares of each gradient, float64 [n], as the clipping norm needs it."""
        work = square_sum if self._kernels is None else self._kernels.square_sum
        return np.array(list(self._workers.map(work, (g.asnumpy() for g in gradients))), np.float64)

    def flush(self) -> None:
        """Wait for all queued updates; raise the first error among them."""
        running, self._running = self._running, []
        # All end before an error of one is raised: no thread may still write while the caller handles it.
        wait([task for task, _ in running])
        self.stats.add(update_seconds=sum(task.result() for task, _ in running))

    def _view(self, layer_name: str, name: str, expert: int) -> Tensor:
        key = (layer_name, name, expert)
        if key not in self._views:
            table = self._tables["weight"][layer_name][name]
            self._views[key] = Tensor.from_numpy(table if expert < 0 else table[expert])
        return self._views[key]


def _timed_update(*arguments: object) -> float:
    started = time.perf_counter()
    update_in_place(*arguments)
    return time.perf_counter() - started
