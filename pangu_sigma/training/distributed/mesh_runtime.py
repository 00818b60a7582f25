"""How the graphs of a mesh run: compiled by MindSpore for its devices, or computed by processes that emulate it.

What the two take and give is the same; which one a model needs is chosen here and in `build_model`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter, Tensor, nn

from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.tensor_names import parse_name
from pangu_sigma.training.distributed.device_pipeline import DevicePipeline
from pangu_sigma.training.distributed.pipeline_step import UnpipelinedTrainStep
from pangu_sigma.training.distributed.spmd_step import CompileContext, CompileContextCell, spmd_train_step
from pangu_sigma.training.gradient_accumulation import Step
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.step import GradientStep
from parallel.emulation.emulated_mesh import square_sums_of
from parallel.emulation.emulated_parameters import EmulatedParameterStorage
from parallel.emulation.emulated_steps import EmulatedPipeline, EmulatedStep
from parallel.partition_spec import StageTensor, shard_slices
from rre.dispatch.capacity_dispatch import PARAMETER_SPECS


class DeviceMeshRuntime:
    """Graphs that MindSpore shards over devices as it compiles them."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def gradient_step(self, inputs: GraphInputs, with_shared: bool, objective: TrainingObjective) -> Step:
        """A `GradientStep` of this rank's shards, compiled at once."""
        context, model = CompileContext(self.model, inputs), self.model
        with context:
            step = spmd_train_step(model, model.net, inputs, model.processes.rank, with_shared, objective)
            step.compile()
        return CompileContextCell(step.cell, context)

    def pipeline(self, inputs: GraphInputs) -> DevicePipeline:
        """The step of this rank's pipeline stage, compiled at once."""
        return DevicePipeline(self.model, inputs)

    def evaluation(self, inputs: GraphInputs, cell: nn.Cell) -> CompileContextCell:
        """An evaluation's cell, of this rank's shards of its inputs; it is compiled when it is first called."""
        return CompileContextCell(cell, CompileContext(self.model, inputs))


class EmulatedMeshRuntime:
    """The same graphs over full tensors in every process of an emulated mesh."""

    def __init__(self, model: Model, storage: EmulatedParameterStorage) -> None:
        self.model, self.storage, self.mesh = model, storage, storage.mesh

    def gradient_step(self, inputs: GraphInputs, with_shared: bool, objective: TrainingObjective) -> EmulatedStep:
        """A `GradientStep` of this rank's shards."""
        step = GradientStep(self.model.net, inputs, self.model.layout, with_shared, objective)
        expert_specs = [spec for _, _, spec in inputs.weight_specs()]
        shared_slices = [self.model.shared.stored_slices(p.name) for p in self.model.shared.trainable]
        mesh = self.mesh

        def shard_outputs(
            by_sample: Tensor, auxiliary: Tensor, counts: Sequence[Tensor], by_expert: Sequence[Tensor],
            shared: Sequence[Tensor], square_sums: Tensor,
        ) -> tuple:  # fmt: skip
            if self.model.learned:
                counts = [mesh.shard(rows, ("rows", 1)) for rows in counts]
            by_expert = [mesh.shard(g, spec) for g, spec in zip(by_expert, expert_specs, strict=True)]
            # Without shared gradients there are none.
            shared = [mesh.take(g, s) for g, s in zip(shared, shared_slices[: len(shared)], strict=True)]
            return mesh.shard(by_sample, ("rows",)), auxiliary, counts, by_expert, shared, square_sums_of(shared)

        return EmulatedStep(step, self.storage, inputs.specs(), shard_outputs)

    def pipeline(self, inputs: GraphInputs) -> EmulatedPipeline:
        """The step of this rank's pipeline stage."""
        config, model = self.model.config, self.model
        micro_batches, domains = config.train.gradient_accumulation_steps, len(config.domains)
        cell = UnpipelinedTrainStep(model.net, inputs, model.layout, micro_batches, domains)
        experts = [(parameter, self._expert_tensor(parameter)) for parameter in cell.experts]
        shared = [model.shared.stage_tensor(name) for name in model.shared.trained]
        specs = inputs.pipeline_specs(micro_batches, domains)
        return EmulatedPipeline(cell, self.storage, specs, micro_batches, experts, shared)

    def evaluation(self, inputs: GraphInputs, cell: nn.Cell) -> EmulatedStep:
        """An evaluation's cell, of this rank's shards of its inputs."""
        return EmulatedStep(cell, self.storage, inputs.specs())

    def _expert_tensor(self, parameter: Parameter) -> StageTensor:
        mesh, shape = self.mesh.mesh, tuple(parameter.shape)
        spec = PARAMETER_SPECS[parse_name(parameter.name).tensor]
        stage = stage_of(parameter.name, self.model.config.model.layers, mesh)
        return StageTensor(shape, stage, lambda rank: shard_slices(mesh, rank, shape, spec))


def mesh_runtime_of(model: Model) -> DeviceMeshRuntime | EmulatedMeshRuntime:
    """How the graphs of a model with an SPMD layout run."""
    storage = getattr(model.shared, "storage", None)
    if isinstance(storage, EmulatedParameterStorage):
        return EmulatedMeshRuntime(model, storage)
    return DeviceMeshRuntime(model)
