"""Process group of a job: which rank this process is, and collectives over values outside any graph.

MindSpore's CPU backend has AllGather (of 32-bit numbers) and AllReduce (float32) over all processes, and nothing else:
everything here is made of those, also where processes have devices of their own. A job of one process never comes near
them. All processes must call the same functions in the same order, from their main threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parallel.comm.watchdog import Watchdog
from parallel.mesh import Mesh

WORKER, SCHEDULER = "MS_WORKER", "MS_SCHED"
# Environment: seconds after which a collective, and the scheduler on a process, gives up. MindSpore's own choice, 30,
# is less than a process may be busy; the watchdog says who hangs.
PATIENCE, WEEK = "MS_NODE_TIMEOUT", str(7 * 24 * 3600)


@dataclass(frozen=True)
class LaunchEnvironment:
    """Rank and size that the launcher (`parallel.comm.launch` or msrun) set in this process's environment."""

    rank: int
    size: int

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> LaunchEnvironment | None:
        """None in a process that nobody started as one of several. Raises ValueError for half an environment."""
        variables = os.environ if environment is None else environment
        if variables.get("MS_ROLE") != WORKER:
            return None
        try:
            launched = cls(int(variables.get("MS_NODE_ID") or variables["RANK_ID"]), int(variables["MS_WORKER_NUM"]))
        except (KeyError, ValueError):
            raise ValueError(
                "MS_ROLE is MS_WORKER, but MS_NODE_ID or MS_WORKER_NUM is no number: start the job with several "
                "workers, or with msrun"
            ) from None
        if not 0 <= launched.rank < launched.size:
            raise ValueError(f"MS_NODE_ID = {launched.rank} is no rank of MS_WORKER_NUM = {launched.size} processes")
        return launched


class Processes:
    """The ranks of a `mesh` as processes, seen from `rank`; alone every function gives back what it was given."""

    def __init__(self, mesh: Mesh | None = None, rank: int = 0, watch: Watchdog | None = None) -> None:
        self.mesh = mesh or Mesh()
        self.rank = rank
        self.watch = watch
        self._all_gather = self._all_reduce = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.mesh.size

    @property
    def first(self) -> bool:
        """Whether this process writes for all: terminal, metrics, manifest."""
        return self.rank == 0

    def connect(self) -> None:
        """Meet the others; MindSpore's device must be set, and no tensor made yet. Returns when all are there."""
        if self.size == 1:
            return
        from mindspore import get_context, ops
        from mindspore.communication import get_group_size, get_rank, init

        os.environ.setdefault(PATIENCE, WEEK)
        init("hccl" if get_context("device_target") == "Ascend" else "mccl")
        if (get_rank(), get_group_size()) != (self.rank, self.size):
            raise RuntimeError(f"rank {self.rank} of {self.size} was made rank {get_rank()} of {get_group_size()}")
        self._all_gather, self._all_reduce = ops.AllGather(), ops.AllReduce()
        if self.watch is not None:
            self.watch.mark()
            self.watch.start()

    def mark(self) -> None:
        """Tell the others that this process goes on, in long work of its own."""
        if self.watch is not None:
            self.watch.mark()

    def leave(self) -> None:
        """Part when all have come here: what the job had to do is done."""
        # Not by a collective: whoever had heard of everybody would end, and take down a connection that a slower one
        # still gets the others' words over.
        if self.watch is not None:
            self.watch.leave()
            self.watch = None

    def gather(self, values: np.ndarray) -> np.ndarray:
        """values (float32, float64 or int64, one shape everywhere) of every rank, [ranks, …]."""
        if self.size == 1:
            return values[None]
        from mindspore import Tensor

        self.mark()
        # As whole numbers of 32 bits, which arrive as they are; float64 and int64 come back cut to 32 bits, unsaid.
        flat = np.ascontiguousarray(values).reshape(-1).view(np.int32).reshape(1, -1)
        gathered = self._copied(self._all_gather(Tensor.from_numpy(flat)))
        self.mark()
        return gathered.view(values.dtype).reshape(self.size, *values.shape)

    def sum_float32(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks of float32 values of one shape; the same bits everywhere."""
        if self.size == 1:
            return values
        from mindspore import Tensor

        self.mark()
        total = self._copied(self._all_reduce(Tensor.from_numpy(np.ascontiguousarray(values))))
        self.mark()
        return total

    @staticmethod
    def _copied(tensor) -> np.ndarray:
        # An array that shares a tensor's memory does not keep that from being used for something else.
        return tensor.asnumpy().copy()

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks of values as float64, in the order of the ranks: the same bits everywhere."""
        return self.gather(np.asarray(values, np.float64)).sum(axis=0)

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on any rank."""
        return bool(self.gather(np.array([int(condition)])).any())

    def texts(self, text: str) -> list[str]:
        """A text of every rank."""
        if self.size == 1:
            return [text]
        data = np.frombuffer(text.encode(), np.uint8)
        sizes = self.gather(np.array([data.size]))[:, 0]
        padded = np.zeros(-(-int(sizes.max()) // 8) * 8, np.uint8)
        padded[: data.size] = data
        rows = self.gather(padded.view(np.int64)).view(np.uint8).reshape(self.size, -1)
        return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.any(False)
