"""Emulated sharded parameters: a process stores a rank's shards beside a network whose parameters stay full."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor

from parallel.emulation.emulated_mesh import EmulatedMesh
from parallel.partition_spec import StageTensor, slices_shape


class EmulatedParameterStorage:
    """Where the parameters of an emulated mesh lie. `gather_in_place` fills the network from all ranks' shards."""

    deferred_init = False

    def __init__(self, mesh: EmulatedMesh) -> None:
        self.mesh = mesh
        self._full: dict[str, Parameter] = {}
        self._tensors: dict[str, StageTensor] = {}
        self._shards: dict[str, Parameter] = {}

    def local_parameters(
        self, full: Mapping[str, Parameter], tensors: Mapping[str, StageTensor]
    ) -> dict[str, Parameter]:
        """Parameters for this rank's shards of those of its stage, by name: zeros until they are assigned."""
        self._full, self._tensors = dict(full), dict(tensors)
        for name, tensor in tensors.items():
            if tensor.stage == self.mesh.stage:
                shape = slices_shape(tensor.slices_of(self.mesh.rank))
                self._shards[name] = Parameter(Tensor(np.zeros(shape, np.float32)), name=name)
        return dict(self._shards)

    def assign(self, parameter: Parameter, shard: Tensor) -> None:
        """Set one of the local parameters."""
        parameter.set_data(shard)

    def gather_in_place(self) -> None:
        """Give the network's full parameters what the ranks store; all call it together."""
        for name, tensor in self._tensors.items():
            shard = self._shards[name].asnumpy() if name in self._shards else None
            self._full[name].set_data(Tensor(self.mesh.gather_tensor(shard, tensor)))
