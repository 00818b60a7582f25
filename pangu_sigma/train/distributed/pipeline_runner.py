"""Pipeline runner: the gradients of a whole step from a pipeline-parallel graph, of which a process has one stage.

`pipeline_step` makes all micro-batches of a step one graph. Around it a rank does what it does without stages:
1. it gives its rows, 2. sets its experts, 3. runs the graph, 4. takes the gradients of what it stores. Losses by domain
are known on the last stage alone; all processes read them from one of its ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.batch_planner import RoutedBatch
from pangu_sigma.model.graph_inputs import GraphSignature
from pangu_sigma.model.model import Model
from pangu_sigma.train.distributed.mesh_runtime import mesh_runtime_of
from pangu_sigma.train.gradients import Gradients, unstack_slot_gradients
from pangu_sigma.train.objective import BatchLoss
from pangu_sigma.train.schedule import Phase
from pangu_sigma.train.step_metrics import BatchMetrics


class Pipeline(Protocol):
    """One rank's stage: on a device (`device_pipeline`) or emulated (`parallel.emulation.emulated_steps`)."""

    def __call__(
        self, inputs: Sequence[np.ndarray], experts: Sequence[np.ndarray]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Inputs and experts of this rank -> objective by domain, gradients of the experts and of the shared
        parameters, square sums of the latter: `PipelineTrainStep`'s outputs, of this rank's shards."""


class PipelineRunner:
    """Runs a step over a pipeline; `signature` is of one micro-batch. All processes call it together."""

    def __init__(self, model: Model, signature: GraphSignature, pipeline: Pipeline) -> None:
        self.model, self.signature, self.pipeline = model, signature, pipeline
        self.processes = model.processes
        self.layers = [layer for layer in signature.layers if layer.name in model.layer_names]
        mesh = self.processes.mesh
        # Every rank of the last stage has the sums over all rows; the first of them reports.
        self.reports_loss = self.processes.rank == (mesh.pipeline - 1) * mesh.stage_size

    def gradients(
        self, batches: Sequence[RoutedBatch], phase: Phase, weight: float, reader_ranks: Sequence[int]
    ) -> tuple[Gradients, list[BatchMetrics]]:
        """The gradients of what this process stores, and the figures of every micro-batch: losses of the whole step are
        the first one's. `weight`: of each token that counts (loss scale by tokens of the step); `reader_ranks`: ranks
        that together have read each row once."""
        weight = float(np.float32(weight))  # as the graph has it
        # 1. to 3.
        inputs, experts = self.local_inputs(batches, weight), self.local_experts(batches[0])
        objective, by_expert, shared, squares = self.pipeline(inputs, experts)
        figures = self._figures(batches, objective, weight, reader_ranks)
        # 4. Gradients.
        gradients = Gradients()
        if phase.shared:
            gradients.shared, gradients.shared_squares = tuple(shared), squares.asnumpy().astype(np.float64)
        gradients.experts = self._expert_gradients(batches, phase, by_expert)
        return gradients, figures

    def local_inputs(self, batches: Sequence[RoutedBatch], weight: float) -> list[np.ndarray]:
        """This rank's rows of every micro-batch, one behind the other."""
        domains = np.eye(len(self.model.groups.names), dtype=np.float32)
        of_each = [
            (
                b.tokens, b.labels, b.mask * np.float32(weight), b.positions, b.segments, domains[b.domain],
                *(array for plan in b.plans for array in plan.plan.inputs),
            )
            for b in batches
        ]  # fmt: skip
        return [np.concatenate(parts) for parts in zip(*of_each, strict=True)]

    def local_experts(self, batch: RoutedBatch) -> list[np.ndarray]:
        """This rank's shards of the activated experts of its stage, stacked as the graph takes them; the slots of a
        step are the same in all its micro-batches."""
        store, stacked = self.model.store, []
        store.start_step()
        for layer_signature, plan in zip(self.signature.layers, batch.plans, strict=True):
            if layer_signature not in self.layers:
                continue
            for slots in layer_signature.capacity_spec.by_chunk(self.signature.expert_part):
                fetched = store.fetch(layer_signature.name, self.signature.stored(plan.experts[slots]))
                tensors = len(layer_signature.network.tensors)
                stacked += [np.stack([t.asnumpy() for t in fetched[i::tensors]]) for i in range(tensors)]
        return stacked

    def _figures(
        self, batches: Sequence[RoutedBatch], objective: Tensor, weight: float, reader_ranks: Sequence[int]
    ) -> list[BatchMetrics]:
        figures = []
        for index, batch in enumerate(batches):
            no_losses = np.zeros(len(batch.mask))
            measured = BatchLoss(no_losses, batch.mask.sum(axis=1, dtype=np.float64))
            own = BatchMetrics.from_loss(batch, len(self.model.groups.names), measured, (), 0.0)
            if index == 0 and self.reports_loss:
                own = replace(own, loss=objective.asnumpy().astype(np.float64) / weight)
            figures.append(own.sum_ranks(own.gather(self.processes)[list(reader_ranks)]))
        return figures

    def _expert_gradients(
        self, batches: Sequence[RoutedBatch], phase: Phase, by_expert: Sequence[Tensor]
    ) -> dict[tuple[str, int], list[Tensor]]:
        """Gradients of the experts of this stage that received a row and train."""
        groups = self.model.groups
        gradients, owner, offset = {}, np.repeat(groups.names, groups.sizes), 0
        layers = {layer_signature.name: layer for layer, layer_signature in enumerate(self.signature.layers)}
        for layer_signature in self.layers:
            plans = [batch.plans[layers[layer_signature.name]] for batch in batches]
            experts = plans[0].experts
            trains = np.isin(owner[experts], list(phase.domains)) & (sum(plan.counts for plan in plans) > 0)
            stacked = by_expert[offset : offset + layer_signature.weights]
            offset += layer_signature.weights
            gradients |= unstack_slot_gradients(self.signature, layer_signature, experts, trains, stacked)
        return gradients


def pipeline_runner_of(model: Model, signature: GraphSignature) -> PipelineRunner:
    """The runner of a model with pipeline stages."""
    return PipelineRunner(model, signature, mesh_runtime_of(model).pipeline(signature))
