"""Emulated steps: a step over full tensors behind the interface of one that is sharded over devices.

In both: 1. the network's parameters are gathered, 2. the inputs are, 3. the step computes, 4. a rank keeps its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel.emulation.emulated_mesh import square_sums_of
from parallel.emulation.emulated_parameters import EmulatedParameterStorage
from parallel.partition_spec import PartitionSpec, StageTensor


class EmulatedStep:
    """SPMD step of an emulated mesh: a rank gives its shards of the inputs and gets its shards of the outputs.

    `inputs`: full shape, type and partition spec of each input, a scalar the same on every rank; `shard_outputs`: from
    the full outputs to a rank's own, None where every rank gets all of them.
    """

    def __init__(
        self, step: nn.Cell, storage: EmulatedParameterStorage,
        inputs: Sequence[tuple[tuple[int, ...], ms.dtype, PartitionSpec]],
        shard_outputs: Callable[..., tuple] | None = None,
    ) -> None:  # fmt: skip
        self.step, self.storage, self.mesh = step, storage, storage.mesh
        self.inputs, self.shard_outputs = inputs, shard_outputs

    def set_train(self, mode: bool) -> EmulatedStep:
        """As the step's own."""
        self.step.set_train(mode)
        return self

    def __call__(self, *shards: Tensor) -> Any:
        self.storage.gather_in_place()
        full = [
            Tensor(self.mesh.gather_input(tensor.asnumpy(), shape, spec)) if shape else tensor
            for tensor, (shape, _, spec) in zip(shards, self.inputs, strict=True)
        ]
        outputs = self.step(*full)
        return outputs if self.shard_outputs is None else self.shard_outputs(*outputs)


class EmulatedPipeline:
    """Pipeline-parallel step of an emulated mesh: every process computes all stages, and keeps its own stage's results.

    `step`: the full inputs of a whole step -> (objective, gradients of all `experts`, gradients of all `shared`).
    `inputs`: full shape, type and partition spec of each input of the step, which has so many `micro_batches`;
    `experts`: the step's own parameters, set anew for each step; `shared`: the tensors of the network that it trains.
    """

    def __init__(
        self, step: nn.Cell, storage: EmulatedParameterStorage,
        inputs: Sequence[tuple[tuple[int, ...], ms.dtype, PartitionSpec]], micro_batches: int,
        experts: Sequence[tuple[Parameter, StageTensor]], shared: Sequence[StageTensor],
    ) -> None:  # fmt: skip
        self.step, self.storage, self.mesh = step, storage, storage.mesh
        self.inputs, self.micro_batches = inputs, micro_batches
        self.experts, self.shared = experts, shared

    def __call__(
        self, shards: Sequence[np.ndarray], expert_shards: Sequence[np.ndarray]
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """(this rank's shards of the inputs, and of its stage's experts) -> (objective, which is 0 but on the last
        stage, gradients of the stage's experts and of its shared parameters, square sums of the latter)."""
        self.storage.gather_in_place()
        local_experts = iter(expert_shards)
        for parameter, tensor in self.experts:
            shard = next(local_experts) if tensor.stage == self.mesh.stage else None
            parameter.set_data(Tensor(self.mesh.gather_tensor(shard, tensor)))
        full = [
            Tensor(self.mesh.gather_micro_batches(shard, shape, spec, self.micro_batches), dtype)
            for shard, (shape, dtype, spec) in zip(shards, self.inputs, strict=True)
        ]
        objective, expert_gradients, shared_gradients = self.step.set_train(True)(*full)
        if self.mesh.stage < self.mesh.mesh.pipeline - 1:
            objective = Tensor(np.zeros(objective.shape, np.float32))
        by_expert = self._local_gradients(expert_gradients, [tensor for _, tensor in self.experts])
        shared = self._local_gradients(shared_gradients, self.shared)
        return objective, by_expert, shared, square_sums_of(shared)

    def _local_gradients(self, gradients: Sequence[Tensor], tensors: Sequence[StageTensor]) -> list[Tensor]:
        """This rank's shards of the gradients of its stage's tensors."""
        return [
            self.mesh.take(gradient, tensor.slices_of(self.mesh.rank))
            for gradient, tensor in zip(gradients, tensors, strict=True)
            if tensor.stage == self.mesh.stage
        ]
