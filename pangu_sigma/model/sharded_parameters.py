"""Shared parameters as a process stores them: all of each, or a rank's shards on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import numpy as np
from mindspore import Parameter, Tensor

from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.model.tensor_parallel_layout import stored_slices_of, storing_ranks_of
from parallel.mesh import Mesh
from parallel.partition_spec import Slices, StageTensor, full_slices


class SharedParameters:
    """The parameters of `net` as one process stores them: all of each.

    `shapes`: the full shape of every parameter; `trained`: the names of those that an optimizer updates, `trainable`:
    those of them that are stored here; `deferred_init`: whether values can be written only when the training step's
    graph is compiled.
    """

    deferred_init = False

    def __init__(self, net: PanGuSigma) -> None:
        self.shapes = {p.name: tuple(p.shape) for p in net.get_parameters()}
        self._local: dict[str, Parameter] = {p.name: p for p in net.get_parameters()}
        self.trainable: list[Parameter] = net.trainable_params()
        self.trained = tuple(p.name for p in self.trainable)

    @property
    def local_names(self) -> tuple[str, ...]:
        """The names of the parameters of which this process stores a shard."""
        return tuple(self._local)

    def stored_slices(self, name: str) -> Slices:
        """The slices of the parameter that this process stores."""
        return full_slices(self.shapes[name])

    def storing_ranks(self, name: str) -> tuple[int, ...] | None:
        """The ranks that store the same slices; None for all."""
        return None

    def write(self, name: str, values: np.ndarray) -> None:
        """Set what is stored here from the full tensor's `values`."""
        self._assign(self._local[name], Tensor(np.ascontiguousarray(values[self.stored_slices(name)])))

    def _assign(self, parameter: Parameter, shard: Tensor) -> None:
        parameter.set_data(shard)

    def values(self) -> dict[str, np.ndarray]:
        """What is stored here, by name."""
        return {name: parameter.asnumpy() for name, parameter in self._local.items()}


class ParameterStorage(Protocol):
    """Where a rank's shards lie: on a device, or on an emulated mesh (`parallel.emulation.emulated_parameters`)."""

    deferred_init: bool

    def local_parameters(
        self, full: Mapping[str, Parameter], tensors: Mapping[str, StageTensor]
    ) -> dict[str, Parameter]:
        """The parameters for this rank's shards of the network's `full` ones of its pipeline stage, by name."""

    def assign(self, parameter: Parameter, shard: Tensor) -> None:
        """Set one of the local parameters."""


class DeviceParameterStorage:
    """Storage of an SPMD graph: the network's own parameters, which become this rank's shards when MindSpore compiles
    the graph, and have no values until then."""

    deferred_init = True

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def local_parameters(
        self, full: Mapping[str, Parameter], tensors: Mapping[str, StageTensor]
    ) -> dict[str, Parameter]:
        """The network's own parameters of this rank's stage."""
        return {name: full[name] for name, tensor in tensors.items() if tensor.stage == self.stage}

    def assign(self, parameter: Parameter, shard: Tensor) -> None:
        """Set one of the local parameters."""
        if tuple(parameter.shape) != shard.shape:
            raise RuntimeError(f"{parameter.name} was cut to {tuple(parameter.shape)}, not to {shard.shape}")
        parameter.init_data()
        # What says that it is cut already stays as it is when another graph of the network is compiled.
        parameter.set_data(shard, slice_shape=True)


class ShardedParameters(SharedParameters):
    """The shards of a rank of a mesh, of the parameters of its pipeline stage.

    `optimizer_parallel`: the configuration's key of that name; `storage`: where the shards lie, on devices or on an
    emulated mesh. A parameter of another stage has the slices and storing ranks that it has on the rank of that stage
    which stands where this one does in its own.
    """

    def __init__(
        self, net: PanGuSigma, mesh: Mesh, rank: int, optimizer_parallel: bool, storage: ParameterStorage
    ) -> None:
        super().__init__(net)
        self.mesh, self.rank, self.optimizer_parallel, self._layers = mesh, rank, optimizer_parallel, net.layers
        self.storage, self.deferred_init = storage, storage.deferred_init
        tensors = {name: self.stage_tensor(name) for name in self.shapes}
        self._local = storage.local_parameters(self._local, tensors)
        self.trainable = [self._local[name] for name in self.trained if name in self._local]

    def stage(self, name: str) -> int:
        """The pipeline stage of a parameter."""
        return stage_of(name, self._layers, self.mesh)

    def stage_tensor(self, name: str) -> StageTensor:
        """Which stage stores a parameter, and which slices of it each of its ranks stores."""
        return StageTensor(self.shapes[name], self.stage(name), partial(self._slices_on, name))

    def stored_slices(self, name: str) -> Slices:
        return self._slices_on(name, self._counterpart(name))

    def storing_ranks(self, name: str) -> tuple[int, ...]:
        return storing_ranks_of(name, self.shapes[name], self.mesh, self._counterpart(name), self.optimizer_parallel)

    def _slices_on(self, name: str, rank: int) -> Slices:
        return stored_slices_of(name, self.shapes[name], self.mesh, rank, self.optimizer_parallel)

    def _counterpart(self, name: str) -> int:
        """The rank of the parameter's stage that stands where this one does in its own."""
        return self.stage(name) * self.mesh.stage_size + self.rank % self.mesh.stage_size

    def _assign(self, parameter: Parameter, shard: Tensor) -> None:
        self.storage.assign(parameter, shard)
