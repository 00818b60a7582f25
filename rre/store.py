"""The expert store: expert weights, Adam moments and step counts outside the model's graph.

A step fetches the experts that its batch needs, hands them to the graph as inputs, gets gradients back and applies
them to exactly the experts that received a token. An expert that received none keeps every bit: weights, moments and
its own step count. That is what "never forgets" rests on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from mindspore import Tensor

from parallel.compiled import HostKernels
from rre.adamw import AdamWHyper, decays, square_sum, update_in_place
from rre.counted import generator

Shapes = Mapping[str, tuple[int, ...]]


class DeviceStore:
    """All experts resident, as one table [experts, …] per (place, tensor) with two tables of moments beside it.

    `shapes`: place (a sparse layer, or the embedding slots) -> tensor name -> shape of one expert's tensor.
    `experts`: place -> how many. `kernels`: compiled updates, else NumPy's.
    Tables are zero until `initialise` or `load`.
    """

    def __init__(
        self, shapes: Mapping[str, Shapes], experts: Mapping[str, int], kernels: HostKernels | None = None
    ) -> None:
        self._kernels = kernels
        self.shapes = {place: dict(tensors) for place, tensors in shapes.items()}
        self.experts = dict(experts)
        self._tables = {
            kind: {
                place: {name: np.zeros((experts[place], *shape), np.float32) for name, shape in tensors.items()}
                for place, tensors in self.shapes.items()
            }
            for kind in ("weight", "m", "v")
        }
        self.steps = {place: np.zeros(count, np.int64) for place, count in experts.items()}
        # Tensors that share memory with rows of the tables; made on first use, valid as long as the tables stand.
        self._views: dict[tuple[str, str, str, int], Tensor] = {}
        # Updates under way, each with the gradient whose memory it reads; threads, because NumPy works outside the GIL.
        self._workers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "expert-update")
        self._running: list[tuple[Future, Tensor]] = []

    def initialise(self, seed: int, std: Mapping[str, float]) -> None:
        """Draw every weight table: Normal(std[tensor name]), or 0 where no std is given.

        An expert's numbers depend on (seed, place, expert) alone, not on how many others there are.
        """
        for place, tensors in self.shapes.items():
            for name, shape in tensors.items():
                if std.get(name):
                    for expert in range(self.experts[place]):
                        rng = generator(seed, f"initial {place} {name}", expert)
                        self.table(place, name)[expert] = rng.standard_normal(shape, np.float32) * std[name]

    def table(self, place: str, name: str, kind: str = "weight") -> np.ndarray:
        """The table of one tensor, [experts, …]; `kind` is weight, m or v. Writing to it changes the store."""
        return self._tables[kind][place][name]

    def tables(self) -> Iterator[tuple[str, str, str, np.ndarray]]:
        """(kind, place, tensor name, table) of everything but the step counts."""
        for kind, places in self._tables.items():
            for place, tensors in places.items():
                for name, table in tensors.items():
                    yield kind, place, name, table

    def whole(self, place: str, name: str) -> Tensor:
        """One weight table as a tensor that shares its memory."""
        self.settle()
        return self._view("weight", place, name, -1)

    def fetch(self, place: str, experts: Sequence[int]) -> list[Tensor]:
        """Weights of `experts` (repeats allowed), flat: all tensors of the first, of the second, …; no copies."""
        self.settle()
        return [self._view("weight", place, name, int(e)) for e in experts for name in self.shapes[place]]

    def apply(
        self, place: str, expert: int, gradients: Sequence[Tensor], hyper: AdamWHyper, scale: float = 1.0
    ) -> None:
        """Update one expert by gradients * scale (in the order of `fetch`); nobody else's bits change.

        Returns at once; `settle` waits.
        """
        self.steps[place][expert] += 1
        step = int(self.steps[place][expert])
        for name, gradient in zip(self.shapes[place], gradients, strict=True):
            rows = (self._tables[kind][place][name][expert] for kind in ("weight", "m", "v"))
            task = self._workers.submit(
                update_in_place, *rows, gradient.asnumpy(), hyper, step, scale, decays("." + name),
                self._kernels,
            )
            self._running.append((task, gradient))

    def square_sum(self, gradients: Sequence[Tensor]) -> float:
        """Sum of squares over expert gradients, as the clipping norm needs it."""
        work = square_sum if self._kernels is None else self._kernels.square_sum
        return sum(self._workers.map(work, (g.asnumpy() for g in gradients)))

    def settle(self) -> None:
        """Wait until every update that was asked for stands in the tables."""
        running, self._running = self._running, []
        for task, _ in running:
            task.result()

    def _view(self, kind: str, place: str, name: str, expert: int) -> Tensor:
        key = (kind, place, name, expert)
        if key not in self._views:
            table = self._tables[kind][place][name]
            self._views[key] = Tensor.from_numpy(table if expert < 0 else table[expert])
        return self._views[key]
