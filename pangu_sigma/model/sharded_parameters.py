"""The shared parameters as a process holds them: whole, or the part that a mesh leaves it."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor

from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.model.tensor_parallel_layout import stored_slices_of, storing_ranks_of
from parallel.comm.processes import Processes
from parallel.mesh import Mesh
from parallel.partition_spec import Slices, full_slices, slices_shape


class SharedParameters:
    """The parameters of `net` as one process holds them: all of each.

    `shapes`: every whole parameter's; `trained`: the names of those that an optimizer updates, `trainable`: those of
    them that are held here; `deferred_init`: whether values can be written only when the training step's graph is
    compiled.
    """

    deferred_init = False

    def __init__(self, net: PanGuSigma) -> None:
        self.shapes = {p.name: tuple(p.shape) for p in net.get_parameters()}
        self._held: dict[str, Parameter] = {p.name: p for p in net.get_parameters()}
        self.trainable: list[Parameter] = net.trainable_params()
        self.trained = tuple(p.name for p in self.trainable)

    @property
    def local_names(self) -> tuple[str, ...]:
        """The names of the parameters of which this process holds a part."""
        return tuple(self._held)

    def stored_slices(self, name: str) -> Slices:
        """Which part of the parameter this process holds."""
        return full_slices(self.shapes[name])

    def storing_ranks(self, name: str) -> tuple[int, ...] | None:
        """The ranks that hold the same part; None for all."""
        return None

    def write(self, name: str, values: np.ndarray) -> None:
        """Set what is held to its part of the whole tensor's `values`."""
        self._set(self._held[name], Tensor(np.ascontiguousarray(values[self.stored_slices(name)])))

    def _set(self, parameter: Parameter, value: Tensor) -> None:
        parameter.set_data(value)

    def values(self) -> dict[str, np.ndarray]:
        """What is held, by name."""
        return {name: parameter.asnumpy() for name, parameter in self._held.items()}


class PartedParameters(SharedParameters):
    """The parts of a rank of a mesh, of its pipeline stage's parameters; `optimizer_parallel`: whether
    `parallel.optimizer_parallel` is on. A parameter of another stage has the part and the holders that it has on the
    rank of that stage which stands where this one does in its own."""

    def __init__(self, net: PanGuSigma, mesh: Mesh, rank: int, optimizer_parallel: bool) -> None:
        super().__init__(net)
        self.mesh, self.rank, self.optimizer_parallel, self._layers = mesh, rank, optimizer_parallel, net.layers
        mine = mesh.coordinates(rank).stage
        self._held = {name: p for name, p in self._held.items() if self.stage(name) == mine}
        self.trainable = [p for p in self.trainable if p.name in self._held]

    def stage(self, name: str) -> int:
        """The pipeline stage of a parameter."""
        return stage_of(name, self._layers, self.mesh)

    def stored_slices(self, name: str) -> Slices:
        return stored_slices_of(name, self.shapes[name], self.mesh, self._rank_there(name), self.optimizer_parallel)

    def storing_ranks(self, name: str) -> tuple[int, ...]:
        return storing_ranks_of(name, self.shapes[name], self.mesh, self._rank_there(name), self.optimizer_parallel)

    def _rank_there(self, name: str) -> int:
        return self.stage(name) * self.mesh.stage_size + self.rank % self.mesh.stage_size


class CutParameters(PartedParameters):
    """Of a graph that is cut over devices: when MindSpore compiles it, it makes this rank's parts of the network's own
    parameters, which have no values until then."""

    deferred_init = True

    def _set(self, parameter: Parameter, value: Tensor) -> None:
        if tuple(parameter.shape) != value.shape:
            raise RuntimeError(f"{parameter.name} was cut to {tuple(parameter.shape)}, not to {value.shape}")
        parameter.init_data()
        # What says that it is cut already stays as it is when another graph of the network is compiled.
        parameter.set_data(value, slice_shape=True)


class RehearsedParameters(PartedParameters):
    """The same parts beside a network whose parameters stay whole, which `fill` sets from all ranks' parts."""

    def __init__(self, net: PanGuSigma, processes: Processes, optimizer_parallel: bool) -> None:
        super().__init__(net, processes.mesh, processes.rank, optimizer_parallel)
        self._whole, self._processes = {p.name: p for p in net.get_parameters()}, processes
        shapes = {name: slices_shape(self.stored_slices(name)) for name in self._held}
        self._held = {n: Parameter(Tensor(np.zeros(shape, np.float32)), name=n) for n, shape in shapes.items()}
        self.trainable = [self._held[p.name] for p in self.trainable]

    def fill(self) -> None:
        """Give the network what the ranks hold; all call it together."""
        for name, shape in self.shapes.items():
            found = np.empty(shape, np.float32)
            # Ranks of other stages have nothing to give.
            empty = np.zeros(slices_shape(self.stored_slices(name)), np.float32)
            mine = self._held[name].asnumpy() if name in self._held else empty
            for rank, values in enumerate(self._processes.gather(mine)):
                if self.mesh.coordinates(rank).stage == self.stage(name):
                    found[stored_slices_of(name, shape, self.mesh, rank, self.optimizer_parallel)] = values
            self._whole[name].set_data(Tensor(found))
