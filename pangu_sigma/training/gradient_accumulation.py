"""Gradient accumulation: forward and backward of a step, one micro-batch after the other, and the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.training.gradient_reducer import GradientReducer
from pangu_sigma.training.gradients import Gradients, trained_experts
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.schedule import Phase
from pangu_sigma.training.step import GradientStep
from pangu_sigma.training.step_metrics import BatchMetrics

# A compiled `GradientStep`, or what takes and gives the same on a mesh.
Step = Callable[..., tuple]


class ForwardBackward(Protocol):
    """Forward and backward of a whole step.

    `one_graph`: whether all its micro-batches are in one graph, whose slots hold the experts that any of them
    activates.
    """

    one_graph: bool

    def __call__(
        self, batches: Sequence[RoutedBatch], phase: Phase, objective: TrainingObjective, scale: float, total: float
    ) -> tuple[Gradients, list[BatchMetrics]]:
        """Gradients of this process's rows and experts, and the metrics of all processes' rows by micro-batch.

        scale: the loss scale; total: tokens (pairs) of the whole batch, by which the loss is divided.
        """


class GradientAccumulation:
    """`ForwardBackward` micro-batch by micro-batch, with the graph of one of them.

    make_step: makes the graph (with shared gradients or without, objective), which is compiled when it first runs;
    None makes this process's own. An objective's graphs go with it: each phase that is distilled has its own.
    """

    one_graph = False

    def __init__(
        self, model: Model, reducer: GradientReducer, inputs: GraphInputs, planner: BatchPlanner,
        make_step: Callable[[bool, TrainingObjective], Step] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.reducer, self.inputs, self.planner = model, reducer, inputs, planner
        self._make_step = make_step or partial(GradientStep, model.net, inputs, model.layout)
        self._steps: WeakKeyDictionary[TrainingObjective, dict[bool, Step]] = WeakKeyDictionary()

    def compiled_step(self, with_shared: bool, objective: TrainingObjective) -> Step:
        """The graph, made when it is first asked for."""
        steps = self._steps.setdefault(objective, {})
        if with_shared not in steps:
            steps[with_shared] = self._make_step(with_shared, objective)
        return steps[with_shared]

    def __call__(
        self, batches: Sequence[RoutedBatch], phase: Phase, objective: TrainingObjective, scale: float, total: float
    ) -> tuple[Gradients, list[BatchMetrics]]:
        """See `ForwardBackward`; the objective's extra micro-batches come last."""
        sums: Gradients | None = None
        of_each = []
        for batch in (*batches, *objective.extra_batches(batches, self.planner)):
            gradients, metrics = self._of_micro_batch(batch, phase, objective, scale, total, len(batches))
            of_each.append(metrics)
            if sums is None:
                sums = gradients
            else:
                sums.add(gradients)
        return sums, of_each

    def _of_micro_batch(
        self, batch: RoutedBatch, phase: Phase, objective: TrainingObjective, scale: float, total: float, count: int
    ) -> tuple[Gradients, BatchMetrics]:
        """Of one of `count` micro-batches."""
        # 1. Run the graph. The network is shared with evaluation, so its mode is set per use.
        prepared = objective.prepare(batch)
        of_loss = objective.inputs(batch, prepared, scale, total, count)
        step = self.compiled_step(phase.shared, objective).set_train(True)
        by_sample, auxiliary, counts, expert_gradients, shared, squares = step(
            *self.inputs.pack(batch, self.model.store, *of_loss)
        )
        # 2. Metrics. An expert of this process has a gradient if any rank that sends rows here sent it a row.
        loss = objective.measure(batch, prepared, by_sample.asnumpy())
        gate_rows, domains = [c.asnumpy() for c in counts], len(self.model.groups.names)
        own = BatchMetrics.from_loss(batch, domains, loss, gate_rows, float(auxiliary.asnumpy()))
        received, of_all = self.reducer.sum_metrics(own)
        # 3. Gradients of what trains.
        gradients = Gradients()
        if phase.shared:
            gradients.shared, gradients.shared_squares = tuple(shared), squares.asnumpy().astype(np.float64)
        if expert_gradients:
            groups = self.model.groups
            trains = trained_experts(groups, phase.domains) & (received.load > 0)
            owners = np.unique(batch.domain) if self.inputs.word_tables else ()
            own_tables = [domain_id for domain_id in owners if groups.names[domain_id] in phase.domains]
            gradients.experts = self.inputs.expert_gradients(expert_gradients, batch.plans, trains, own_tables)
        return gradients, of_all
