"""Emulated mesh: CPU processes in the place of devices, which gather full tensors from all ranks' shards.

On devices MindSpore's pass shards a graph and moves its tensors. Here every process computes the full graph, so before
it the shards are gathered, and after it a rank keeps its own. All processes call the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from parallel.comm.processes import Processes
from parallel.mesh import Mesh
from parallel.operator_layout import Layout, MeshLayout
from parallel.partition_spec import PartitionSpec, Slices, StageTensor, shard_slices, slices_shape, unshard


class EmulatedLayout(MeshLayout):
    """The layout of a mesh without its devices: cells of an SPMD graph whose operators compute full tensors."""

    def __init__(self, mesh: Mesh) -> None:
        Layout.__init__(self, "CPU")
        self.mesh = mesh

    def __call__(self, primitive, *specs: PartitionSpec, out: PartitionSpec | None = None):
        return primitive

    def local_shape(self, shape: Sequence[int], spec: PartitionSpec) -> list[int]:
        return list(shape)


class EmulatedMesh:
    """Gathers and shards tensors over the processes of a mesh, seen from one of them."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.mesh, self.rank = processes, processes.mesh, processes.rank
        self.stage = self.mesh.coordinates(self.rank).stage

    def gather_input(self, shard: np.ndarray, shape: Sequence[int], spec: PartitionSpec) -> np.ndarray:
        """The full input of this `shape` of which each rank gives its shard."""
        return unshard(self.processes.gather(shard), self.mesh, shape, spec)

    def gather_micro_batches(
        self, shard: np.ndarray, shape: Sequence[int], spec: PartitionSpec, micro_batches: int
    ) -> np.ndarray:
        """The full input [A n, …] of a whole step, of which each rank gives its shard of every one of the A
        micro-batches, one behind the other."""
        of_one = (shape[0] // micro_batches, *shape[1:])
        by_rank = self.processes.gather(shard).reshape(self.mesh.size, micro_batches, -1, *shard.shape[1:])
        full = np.empty((micro_batches, *of_one), shard.dtype)
        for rank, values in enumerate(by_rank):
            full[(slice(None), *shard_slices(self.mesh, rank, of_one, spec))] = values
        return full.reshape(shape)

    def gather_tensor(self, shard: np.ndarray | None, tensor: StageTensor) -> np.ndarray:
        """The full float32 tensor from the shards of its stage's ranks; a rank of another stage gives None."""
        if shard is None:
            # Collectives are of all processes and of one shape.
            counterpart = tensor.stage * self.mesh.stage_size + self.rank % self.mesh.stage_size
            shard = np.zeros(slices_shape(tensor.slices_of(counterpart)), np.float32)
        full = np.empty(tensor.shape, np.float32)
        for rank, values in enumerate(self.processes.gather(shard)):
            if self.mesh.coordinates(rank).stage == tensor.stage:
                full[tensor.slices_of(rank)] = values
        return full

    def shard(self, full: Tensor, spec: PartitionSpec) -> Tensor:
        """This rank's shard of a full tensor."""
        return self.take(full, shard_slices(self.mesh, self.rank, full.shape, spec))

    @staticmethod
    def take(full: Tensor, slices: Slices) -> Tensor:
        """These slices of a full tensor."""
        return Tensor(np.ascontiguousarray(full.asnumpy()[slices]))


def square_sums_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, float64 [n]."""
    return Tensor(np.array([np.square(t.asnumpy(), dtype=np.float64).sum() for t in tensors]))
