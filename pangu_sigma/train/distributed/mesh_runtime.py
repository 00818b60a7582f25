"""How the graphs of a mesh run: compiled by MindSpore for its devices, or computed by processes that emulate it.

What the two take and give is the same; which one a model needs is chosen here and in `build_model`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindspore import Parameter, Tensor, nn

from pangu_sigma.model.batch_planner import fixed_inputs
from pangu_sigma.model.graph_inputs import GraphSignature
from pangu_sigma.model.model import Model
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.tensor_names import parse_name
from pangu_sigma.train.distributed.device_pipeline import DevicePipeline
from pangu_sigma.train.distributed.pipeline_step import UnpipelinedTrainStep, pipeline_inputs
from pangu_sigma.train.distributed.spmd_step import CompileContext, CompileContextCell, spmd_train_step
from pangu_sigma.train.objective import TrainingObjective
from pangu_sigma.train.step import GradientStep
from parallel.emulation.emulated_mesh import square_sums_of
from parallel.emulation.emulated_parameters import EmulatedParameterStorage
from parallel.emulation.emulated_steps import EmulatedPipeline, EmulatedStep
from parallel.partition_spec import PartitionSpec, StageTensor, shard_slices
from rre.dispatch.capacity_dispatch import PARAMETER_SPECS

Step = Callable[..., tuple]


class DeviceMeshRuntime:
    """Graphs that MindSpore shards over devices as it compiles them."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def gradient_step(self, signature: GraphSignature, with_shared: bool, objective: TrainingObjective) -> Step:
        """A `GradientStep` of this rank's shards, compiled at once."""
        context, model = CompileContext(self.model, signature), self.model
        with context:
            step = spmd_train_step(model, model.net, signature, model.processes.rank, with_shared, objective)
            step.compile()
        return CompileContextCell(step.cell, context)

    def pipeline(self, signature: GraphSignature) -> DevicePipeline:
        """The step of this rank's pipeline stage, compiled at once."""
        return DevicePipeline(self.model, signature)

    def evaluation(self, signature: GraphSignature, cell: nn.Cell) -> CompileContextCell:
        """An evaluation's cell, of this rank's shards of its inputs; it is compiled when it is first called."""
        return CompileContextCell(cell, CompileContext(self.model, signature))


class EmulatedMeshRuntime:
    """The same graphs over full tensors in every process of an emulated mesh."""

    def __init__(self, model: Model, storage: EmulatedParameterStorage) -> None:
        self.model, self.storage, self.mesh = model, storage, storage.mesh

    def gradient_step(self, signature: GraphSignature, with_shared: bool, objective: TrainingObjective) -> EmulatedStep:
        """A `GradientStep` of this rank's shards."""
        step = GradientStep(self.model.net, signature, self.model.layout, with_shared, objective)
        specs = [spec for _, _, spec in signature.sharded_inputs()]
        expert_specs = [specs[i] for i in signature.differentiated]
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

        return EmulatedStep(step, self.storage, _inputs(signature), shard_outputs)

    def pipeline(self, signature: GraphSignature) -> EmulatedPipeline:
        """The step of this rank's pipeline stage."""
        config, model = self.model.config, self.model
        micro_batches, domains = config.train.gradient_accumulation_steps, len(config.domains)
        cell = UnpipelinedTrainStep(model.net, signature, model.layout, micro_batches, domains)
        experts = [(parameter, self._expert_tensor(parameter)) for parameter in cell.experts]
        shared = [model.shared.stage_tensor(name) for name in model.shared.trained]
        inputs = pipeline_inputs(signature, micro_batches, domains)
        return EmulatedPipeline(cell, self.storage, inputs, micro_batches, experts, shared)

    def evaluation(self, signature: GraphSignature, cell: nn.Cell) -> EmulatedStep:
        """An evaluation's cell, of this rank's shards of its inputs."""
        return EmulatedStep(cell, self.storage, _inputs(signature))

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


def _inputs(signature: GraphSignature) -> list[tuple[tuple[int, ...], PartitionSpec]]:
    """Full shape and partition spec of every input of a micro-batch's graph."""
    fixed = fixed_inputs(signature.batch, signature.length).values()
    return [(tuple(shape), spec) for shape, _, spec in (*fixed, *signature.sharded_inputs())]
