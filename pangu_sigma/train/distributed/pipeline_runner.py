"""The gradients of a whole step from a graph that is cut into pipeline stages, of which a process has one.

`parallel.pipeline` makes all micro-batches of a step one graph (`distributed.pipeline_step`). Around it a rank does
what it does without stages: it gives its rows, sets its experts and takes back the gradients of what it holds. Losses
by domain are the last stage's to know, and everybody hears of them from one of its ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from mindspore import Parameter, Tensor

from pangu_sigma.model.batch_planner import RoutedBatch
from pangu_sigma.model.graph_inputs import GraphSignature
from pangu_sigma.model.model import Model
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.model.sharded_parameters import RehearsedParameters
from pangu_sigma.train.distributed.pipeline_step import WholeStep, step_inputs
from pangu_sigma.train.distributed.spmd_step import InContext, MeshContext, meshed_step
from pangu_sigma.train.gradients import Gradients, unstack_slot_gradients
from pangu_sigma.train.objective import BatchLoss
from pangu_sigma.train.schedule import Phase
from pangu_sigma.train.step_metrics import BatchMetrics
from parallel.operator_layout import LOCAL_SLICES
from parallel.partition_spec import shard_slices
from rre.dispatch.capacity_dispatch import PARAMETER_SPECS


class StagedStep:
    """The face of a step's graph; `signature` is of one micro-batch. All processes call it together."""

    def __init__(self, model: Model, signature: GraphSignature) -> None:
        self.model, self.signature = model, signature
        self.processes, self.mesh = model.processes, model.processes.mesh
        self.layers = [layer for layer in signature.layers if layer.name in model.layer_names]
        last = (self.mesh.pipeline - 1) * self.mesh.stage_size
        # Every rank of the last stage has the sums over all rows; one of them tells.
        self.tells = self.processes.rank == last

    def gradients(
        self, batches: Sequence[RoutedBatch], phase: Phase, weight: float, readers: Sequence[int]
    ) -> tuple[Gradients, list[BatchMetrics]]:
        """The gradients of what this process holds, and the figures of every micro-batch: losses of the whole step are
        the first one's. `weight`: of each token that counts (loss scale by tokens of the step); `readers`: ranks that
        have read each row once."""
        groups = self.model.groups
        weight = float(np.float32(weight))  # as the graph has it
        objective, by_expert, shared, squares = self.compute(self._inputs(batches, weight), self._experts(batches[0]))
        parts = []
        for number, batch in enumerate(batches):
            none = np.zeros(len(batch.mask))
            measured = BatchLoss(none, batch.mask.sum(axis=1, dtype=np.float64))
            own = BatchMetrics.from_loss(batch, len(groups.names), measured, (), 0.0)
            if number == 0 and self.tells:
                own = replace(own, loss=objective.asnumpy().astype(np.float64) / weight)
            parts.append(own.sum_ranks(own.gather(self.processes)[list(readers)]))
        found = Gradients()
        if phase.shared:
            found.shared, found.shared_squares = tuple(shared), squares.asnumpy().astype(np.float64)
        owner, at = np.repeat(groups.names, groups.sizes), 0
        layers = {layer_signature.name: layer for layer, layer_signature in enumerate(self.signature.layers)}
        for layer_signature in self.layers:
            plans = [batch.plans[layers[layer_signature.name]] for batch in batches]
            trains = np.isin(owner[plans[0].experts], list(phase.domains)) & (sum(plan.counts for plan in plans) > 0)
            stacked = by_expert[at : at + layer_signature.weights]
            at += layer_signature.weights
            found.experts |= unstack_slot_gradients(self.signature, layer_signature, plans[0].experts, trains, stacked)
        return found, parts

    def compute(
        self, inputs: Sequence[np.ndarray], experts: Sequence[np.ndarray]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Set this stage's `experts` and run: see `PipelinedStep`, of this rank's parts."""
        raise NotImplementedError

    def _inputs(self, batches: Sequence[RoutedBatch], weight: float) -> list[np.ndarray]:
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

    def _experts(self, batch: RoutedBatch) -> list[np.ndarray]:
        """What this rank has of the activated experts of its stage, stacked as the graph takes them; the slots of a
        step are the same in all its micro-batches."""
        store, found = self.model.store, []
        store.start_step()
        for layer_signature, plan in zip(self.signature.layers, batch.plans, strict=True):
            if layer_signature not in self.layers:
                continue
            for slots in layer_signature.capacity_spec.by_chunk(self.signature.expert_part):
                fetched = store.fetch(layer_signature.name, self.signature.stored(plan.experts[slots]))
                tensors = len(layer_signature.network.tensors)
                found += [np.stack([t.asnumpy() for t in fetched[i::tensors]]) for i in range(tensors)]
        return found


class CutStages(StagedStep):
    """On devices: this rank's stage of the graph, which MindSpore cuts when this is made."""

    def __init__(self, model: Model, signature: GraphSignature) -> None:
        super().__init__(model, signature)
        if any(os.environ.get(name) != value for name, value in LOCAL_SLICES.items()):
            raise RuntimeError(f"a process of a pipeline stage needs {LOCAL_SLICES} in its environment")
        context = MeshContext(model, signature)
        with context:
            step = meshed_step(model, signature, self.processes.rank)
            step.compile()
        self.cell = step.cell
        for parameter in self.cell.made_here:
            parameter.init_data()
        self._graph = InContext(step.cell, context)

    def compute(
        self, inputs: Sequence[np.ndarray], experts: Sequence[np.ndarray]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor]:
        """See `StagedStep`."""
        self.set_experts(experts)
        return self._graph.set_train(True)(*(Tensor(array) for array in inputs))

    def set_experts(self, experts: Sequence[np.ndarray]) -> None:
        """Put the parts of a step's experts where the graph has them."""
        for parameter, values in zip(self.cell.experts, experts, strict=True):
            if tuple(parameter.shape) != values.shape:
                raise RuntimeError(f"{parameter.name} was cut to {tuple(parameter.shape)}, not to {values.shape}")
            parameter.set_data(Tensor(values), slice_shape=True)


class RehearsedStages(StagedStep):
    """The same of one process for each device, which computes all stages of what all ranks give."""

    def __init__(self, model: Model, signature: GraphSignature) -> None:
        super().__init__(model, signature)
        config, layers = model.config, model.config.model.layers
        self.micro_batches = config.train.gradient_accumulation_steps
        self.cell = WholeStep(model.net, signature, model.layout, self.micro_batches, len(config.domains))
        self.experts = self.cell.experts
        self.stages = [stage_of(p.name, layers, self.mesh) for p in self.experts]
        self.whole_inputs = step_inputs(signature, self.micro_batches, len(config.domains))

    def compute(
        self, inputs: Sequence[np.ndarray], experts: Sequence[np.ndarray]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor]:
        """See `StagedStep`."""
        shared, stage = self.model.shared, self.mesh.coordinates(self.processes.rank).stage
        shared.fill()
        self._fill_experts(list(experts), stage)
        objective, of_experts, of_shared = self.cell.set_train(True)(*self._whole(inputs))
        if stage < self.mesh.pipeline - 1:
            objective = Tensor(np.zeros(objective.shape, np.float32))
        by_expert = [
            self._part(gradient, self._expert_part(parameter, self.processes.rank))
            for parameter, gradient, of in zip(self.experts, of_experts, self.stages, strict=True) if of == stage
        ]  # fmt: skip
        by_name = dict(zip(shared.trained, of_shared, strict=True))
        mine = [self._part(by_name[p.name], shared.stored_slices(p.name)) for p in shared.trainable]
        squares = np.array([np.square(g.asnumpy(), dtype=np.float64).sum() for g in mine])
        return objective, by_expert, mine, Tensor(squares)

    def _whole(self, inputs: Sequence[np.ndarray]) -> list[Tensor]:
        """The graph's inputs, micro-batch by micro-batch of the parts that all ranks give."""
        found = []
        for mine, (shape, dtype, cut) in zip(inputs, self.whole_inputs, strict=True):
            of_one = (shape[0] // self.micro_batches, *shape[1:])
            lines = self.processes.gather(mine)
            lines = lines.reshape(self.mesh.size, self.micro_batches, -1, *mine.shape[1:])
            whole = np.empty((self.micro_batches, *of_one), mine.dtype)
            for rank, line in enumerate(lines):
                whole[(slice(None), *shard_slices(self.mesh, rank, of_one, cut))] = line
            found.append(Tensor(whole.reshape(shape), dtype))
        return found

    def _fill_experts(self, mine: list[np.ndarray], stage: int) -> None:
        """Give the graph the experts that the ranks of each stage hold."""
        for parameter, of in zip(self.experts, self.stages, strict=True):
            part = self._expert_part(parameter, self.processes.rank)
            # Ranks of other stages have nothing to give.
            sent = mine.pop(0) if of == stage else np.zeros([axis.stop - axis.start for axis in part], np.float32)
            whole = np.empty(parameter.shape, np.float32)
            for rank, line in enumerate(self.processes.gather(sent)):
                if self.mesh.coordinates(rank).stage == of:
                    whole[self._expert_part(parameter, rank)] = line
            parameter.set_data(Tensor(whole))

    def _expert_part(self, parameter: Parameter, rank: int) -> tuple[slice, ...]:
        tensor = parameter.name.split(".experts.")[1].split("/")[0]
        return shard_slices(self.mesh, rank, parameter.shape, PARAMETER_SPECS[tensor])

    @staticmethod
    def _part(gradient: Tensor, part: tuple[slice, ...]) -> Tensor:
        return Tensor(np.ascontiguousarray(gradient.asnumpy()[part]))


def staged_step(model: Model, signature: GraphSignature) -> StagedStep:
    """The step of a model with pipeline stages, cut over devices or rehearsed."""
    return (RehearsedStages if isinstance(model.shared, RehearsedParameters) else CutStages)(model, signature)
