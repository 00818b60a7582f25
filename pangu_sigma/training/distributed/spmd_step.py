"""SPMD train step: its cell, the partition specs of its inputs, and the parallel context that MindSpore compiles it in.

`train` runs this on a mesh of devices and `pangu-sigma plan --compile` compiles it without one. No NPU has run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.training.distributed.pipeline_step import PipelineTrainStep
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.step import GradientStep, SharedUpdate
from parallel.operator_layout import MeshLayout


@dataclass(frozen=True)
class SpmdTrainStep:
    """SPMD train step of one rank, to compile. `cell`: the gradients of a micro-batch, or of a rank's stage of a whole
    step. `experts`: every expert tensor's index among the cell's inputs (None where it is a parameter of the cell) and
    its full shape."""

    cell: GradientStep | PipelineTrainStep
    net: PanGuSigma
    layout: MeshLayout
    experts: dict[str, tuple[int | None, tuple[int, ...]]]

    def compile(self) -> None:
        """Have MindSpore shard it; from now on the parameters are this rank's shards."""
        self.cell.compile(*self.cell.get_inputs())

    def update(self) -> SharedUpdate:
        """The optimizer of the shared parameters that this rank trains, on its own shards of them: a graph without
        communication. Call it when the step is compiled and the parallel context is reset."""
        pipelined = isinstance(self.cell, PipelineTrainStep)
        local = self.cell.shared if pipelined else self.net.trainable_params()
        with no_init_parameters():
            return SharedUpdate(local, self.layout)



def parallel_context(model: ModelStructure, inputs: GraphInputs) -> dict[str, Any]:
    """Arguments of `mindspore.set_auto_parallel_context`, to be set before the step is made."""
    config, layout, parallel = model.config, model.layout, model.config.parallel
    if parallel.pipeline > 1:
        specs = inputs.pipeline_specs(config.train.gradient_accumulation_steps, len(config.domains))
    else:
        specs = inputs.specs()
    return {
        "parallel_mode": "semi_auto_parallel",
        # Turns an axis that is sharded over other ranks into an AllToAll.
        "enable_alltoall": True,
        "dataset_strategy": tuple(layout.device_layout(spec) for _, _, spec in specs),
        "enable_parallel_optimizer": parallel.optimizer_parallel,
        "gradients_mean": False,
        "pipeline_stages": parallel.pipeline,
    }


class CompileContext:
    """While it is entered, graphs of `inputs` are sharded over the model's mesh as they are compiled."""

    def __init__(self, model: ModelStructure, inputs: GraphInputs) -> None:
        self.values = parallel_context(model, inputs)

    def __enter__(self) -> None:
        ms.set_auto_parallel_context(**self.values)

    def __exit__(self, *exception: object) -> None:
        ms.reset_auto_parallel_context()


class CompileContextCell:
    """A cell that is compiled and run in its compile context."""

    def __init__(self, cell: nn.Cell, context: CompileContext) -> None:
        self.cell, self.context = cell, context

    def set_train(self, mode: bool) -> CompileContextCell:
        """As the cell's own."""
        self.cell.set_train(mode)
        return self

    def __call__(self, *inputs: Tensor) -> Any:
        with self.context:
            return self.cell(*inputs)


def spmd_train_step(
    model: ModelStructure, net: PanGuSigma, inputs: GraphInputs, rank: int, with_shared: bool = True,
    objective: TrainingObjective | None = None,
) -> SpmdTrainStep:  # fmt: skip
    """The step of one rank; its parallel context must be set."""
    config, parallel, layout = model.config, model.config.parallel, model.layout
    experts = inputs.expert_tensors()
    if parallel.pipeline > 1:
        stage, domains = parallel.mesh.coordinates(rank).stage, len(config.domains)
        # Experts and sums of gradients come to be, as shards, when the graph is compiled.
        with no_init_parameters():
            cell = PipelineTrainStep(
                net, inputs, layout, config.train.gradient_accumulation_steps, stage,
                parallel.optimizer_parallel, domains,
            )  # fmt: skip
        return SpmdTrainStep(cell, net, layout, {name: (None, shape) for name, (_, shape) in experts.items()})
    cell = GradientStep(net, inputs, layout, with_shared, objective or TrainingObjective())
    return SpmdTrainStep(cell, net, layout, experts)
