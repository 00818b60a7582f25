"""Pipeline runner: the gradients of a whole step from a pipeline-parallel graph, of which a process has one stage.

`pipeline_step` makes all micro-batches of a step one graph. Around it a rank does what it does without stages:
1. it gives its rows, 2. sets its experts, 3. runs the graph, 4. takes the gradients of what it stores. Losses by domain
are known on the last stage alone; all processes read them from one of its ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import ReservedRowsPlan, RoutedBatch
from pangu_sigma.training.gradient_reducer import GradientReducer
from pangu_sigma.training.gradients import ExpertGradients, Gradients, trained_experts
from pangu_sigma.training.objective import BatchLoss, TrainingObjective
from pangu_sigma.training.schedule import Phase
from pangu_sigma.training.step_metrics import BatchMetrics

# One rank's stage, on a device (`device_pipeline`) or emulated (`parallel.emulation.emulated_steps`): its inputs and
# experts -> `PipelineTrainStep`'s outputs, of this rank's shards.
Pipeline = Callable[
    [Sequence[np.ndarray], Sequence[np.ndarray]], tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor]
]


class PipelineRunner:
    """`ForwardBackward` over a pipeline; `inputs` are of one micro-batch. All processes call it together."""

    one_graph = True

    def __init__(self, model: Model, reducer: GradientReducer, inputs: GraphInputs, pipeline: Pipeline) -> None:
        self.model, self.reducer, self.inputs, self.pipeline = model, reducer, inputs, pipeline
        self.processes = model.processes
        self.stage_inputs = inputs.of_layers(model.layer_names)
        mesh = self.processes.mesh
        # Every rank of the last stage has the sums over all rows; the first of them reports.
        self.reports_loss = self.processes.rank == (mesh.pipeline - 1) * mesh.stage_size

    def __call__(
        self, batches: Sequence[RoutedBatch], phase: Phase, objective: TrainingObjective, scale: float, total: float
    ) -> tuple[Gradients, list[BatchMetrics]]:
        """See `ForwardBackward`; losses of the whole step are the first micro-batch's. The graph's own objective is the
        mean loss per token."""
        weight = float(np.float32(scale / total))  # as the graph has it
        # 1. to 3.
        rows = self.inputs.pack_pipeline(batches, weight, len(self.model.groups.names))
        by_domain, by_expert, shared, squares = self.pipeline(rows, self.local_experts(batches[0]))
        metrics = self._metrics(batches, by_domain, weight)
        # 4. Gradients.
        gradients = Gradients()
        if phase.shared:
            gradients.shared, gradients.shared_squares = tuple(shared), squares.asnumpy().astype(np.float64)
        gradients.experts = self._expert_gradients(batches, phase, by_expert)
        return gradients, metrics

    def local_experts(self, batch: RoutedBatch) -> list[np.ndarray]:
        """This rank's shards of the activated experts of its stage, stacked as the graph takes them; the slots of a
        step are the same in all its micro-batches."""
        store = self.model.store
        store.start_step()
        by_layer = zip(self.stage_inputs.layers, self._stage_plans(batch), strict=True)
        return [
            array for layer, plan in by_layer
            for array in self.stage_inputs.stacked_weights(layer, plan.experts, store)
        ]  # fmt: skip

    def _stage_plans(self, batch: RoutedBatch) -> list[ReservedRowsPlan]:
        """The plans of this stage's sparse layers."""
        by_layer = zip(self.inputs.layers, batch.plans, strict=True)
        return [plan for layer, plan in by_layer if layer in self.stage_inputs.layers]

    def _metrics(self, batches: Sequence[RoutedBatch], objective: Tensor, weight: float) -> list[BatchMetrics]:
        of_each = []
        for index, batch in enumerate(batches):
            no_losses = np.zeros(len(batch.mask))
            measured = BatchLoss(no_losses, batch.mask.sum(axis=1, dtype=np.float64))
            own = BatchMetrics.from_loss(batch, len(self.model.groups.names), measured, (), 0.0)
            if index == 0 and self.reports_loss:
                own = replace(own, loss=objective.asnumpy().astype(np.float64) / weight)
            of_each.append(self.reducer.sum_metrics(own)[1])
        return of_each

    def _expert_gradients(
        self, batches: Sequence[RoutedBatch], phase: Phase, by_expert: Sequence[Tensor]
    ) -> ExpertGradients:
        """Gradients of the experts of this stage that received a row and train."""
        by_layer = zip(*(self._stage_plans(batch) for batch in batches), strict=True)
        plans = [replace(plans[0], counts=sum(plan.counts for plan in plans)) for plans in by_layer]
        trains = np.tile(trained_experts(self.model.groups, phase.domains), (len(plans), 1))
        return self.stage_inputs.expert_gradients(by_expert, plans, trains)

