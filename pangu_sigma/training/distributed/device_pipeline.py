"""Pipeline-parallel step on a device: this rank's stage of the graph, as MindSpore compiles it, and its experts."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.training.distributed.spmd_step import CompileContext, CompileContextCell, spmd_train_step
from parallel.operator_layout import LOCAL_SLICES


class DevicePipeline:
    """This rank's stage; MindSpore shards and compiles it when this is made."""

    def __init__(self, model: Model, inputs: GraphInputs) -> None:
        if any(os.environ.get(name) != value for name, value in LOCAL_SLICES.items()):
            raise RuntimeError(f"a process of a pipeline stage needs {LOCAL_SLICES} in its environment")
        context = CompileContext(model, inputs)
        with context:
            step = spmd_train_step(model, model.net, inputs, model.processes.rank)
            step.compile()
        self.cell = step.cell
        for parameter in self.cell.transient_parameters:
            parameter.init_data()
        self._graph = CompileContextCell(step.cell, context)

    def __call__(
        self, inputs: Sequence[np.ndarray], experts: Sequence[np.ndarray]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Set this stage's `experts` and run: see `PipelineTrainStep`, of this rank's shards."""
        self.set_experts(experts)
        return self._graph.set_train(True)(*(Tensor(array) for array in inputs))

    def set_experts(self, experts: Sequence[np.ndarray]) -> None:
        """Put the shards of a step's experts where the graph has them."""
        for parameter, values in zip(self.cell.experts, experts, strict=True):
            if tuple(parameter.shape) != values.shape:
                raise RuntimeError(f"{parameter.name} was cut to {tuple(parameter.shape)}, not to {values.shape}")
            parameter.set_data(Tensor(values), slice_shape=True)
