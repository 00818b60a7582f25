"""Trainer: the compiled graphs, optimizer and loss scale of a run, and the path of one optimizer step.

Everything here runs in the training thread, except `Trainer.plan`, which runs in the thread that reads batches ahead,
and what the expert store (expert weights and their AdamW moments, in device or host memory or on disk) does in its
own thread: fetching and writing experts (`rre.store`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.config import Config
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.errors import UserError
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.train.continual.frozen_gate_columns import FrozenGateColumns
from pangu_sigma.train.continual.weight_penalty import WeightPenalty
from pangu_sigma.train.distributed.gradient_all_reduce import gradient_reducer_of
from pangu_sigma.train.distributed.pipeline_runner import PipelineRunner, pipeline_runner_of
from pangu_sigma.train.distributed.step_cache import step_cache_of
from pangu_sigma.train.flops import flops_per_token
from pangu_sigma.train.gradients import Gradients, select_expert_gradients
from pangu_sigma.train.loss_scale import LossScale
from pangu_sigma.train.objective import TrainingObjective
from pangu_sigma.train.optimizer import Optimizer
from pangu_sigma.train.schedule import Phase, learning_rate, phase_at
from pangu_sigma.train.step_metrics import BatchMetrics, MetricsAccumulator, take_store_metrics
from rre.store.disk_store import StoreFull


@dataclass(frozen=True)
class Regulariser:
    """What a regularised phase adds to a step: an objective in place of the run's own, a penalty on the weights.

    None for either leaves it out.
    """

    objective: TrainingObjective | None = None
    penalty: WeightPenalty | None = None


NO_REGULARISER = Regulariser()


@dataclass(frozen=True)
class StepResult:
    """Outcome of one attempt at a step.

    loss: in nats per token, or per whatever the run's objective counts. finite: False where nothing was updated.
    overflow: float16 overflowed; retry with a smaller loss scale. tokens: label tokens of the whole batch that are not
    masked.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    finite: bool
    overflow: bool
    tokens: int = 0


def micro_batch_rows(config: Config, objective: TrainingObjective) -> int:
    """Sequences that a graph of this run computes at a time."""
    return objective.rows_per_sample * config.train.batch_size // config.train.gradient_accumulation_steps


class Trainer:
    """Trains `model` by an objective (None: the mean loss per token); `step` does one optimizer step.

    micro_batch: sequences of a micro-batch over all processes. inputs: of this process's graph, whose sequences are its
    own share unless MindSpore shards the graph. pipeline: the runner of pipeline stages, None without.

    Several processes each compute their rows of every micro-batch and their experts; what controls the step (loss,
    norm, overflow) is gathered outside the graph, so that all decide alike.
    """

    def __init__(self, model: Model, objective: TrainingObjective | None = None) -> None:
        self.model = model
        self.processes = model.processes
        self.config = model.config
        self.objective = TrainingObjective() if objective is None else objective
        self.micro_batch = micro_batch_rows(self.config, self.objective)
        # The graph that is sharded over devices is of all ranks' sequences, any other of this process's own.
        num_data_ranks = 1 if model.layout.spmd_mesh else self.processes.mesh.rows
        self.inputs = model.training_inputs(self.micro_batch // num_data_ranks)
        self.planner = BatchPlanner(model, self.inputs, training=True, prefetch=model.store.prefetch)
        if self.config.train.recompute:
            model.net.recompute_blocks()
        # Before the optimizer, whose moments have the shapes of the parameters: compiling a sharded step replaces those
        # by this rank's shards.
        self.pipeline: PipelineRunner | None = None
        if self.config.parallel.pipeline > 1:
            self.pipeline = pipeline_runner_of(model, self.inputs)
        else:
            self._compiled_steps = step_cache_of(model, self.inputs, self.objective)
        self.optimizer = Optimizer(model)
        self.reducer = gradient_reducer_of(model)
        self.loss_scale = LossScale.from_config(self.config)
        self.metrics = MetricsAccumulator(
            model.groups, self.config.model.sparse_prefixes, flops_per_token(self.config, model.vocab)
        )
        self._own_objective = self.objective
        self._frozen: dict[frozenset[str], FrozenGateColumns] = {}

    def check_objective(self, objective: TrainingObjective | None) -> None:
        """Raises UserError where `objective` would replace a loss other than the mean token loss, as SFT's or DPO's."""
        if objective is not None and type(self._own_objective) is not TrainingObjective:
            raise UserError("regularise.output holds training on text: leave it out where another loss is trained")

    def _set_objective(self, objective: TrainingObjective | None) -> None:
        """Minimise `objective` from this step on, the run's own for None; another one needs other graphs."""
        if objective is None:
            objective = self._own_objective
        if objective is not self.objective:
            objective.auxiliary = self._own_objective.auxiliary
            self._compiled_steps.clear()
            self.objective = objective

    @property
    def read_rows(self) -> np.ndarray:
        """Indices of the sequences of a step's batch that this process reads, micro-batch by micro-batch.

        Its own, and those whose token ids it needs to know what its experts will receive (see `BatchPlanner.reads`).
        """
        rows = self.objective.rows_per_sample * self.config.train.batch_size
        starts = np.arange(0, rows, self.micro_batch)
        return (starts[:, None] + self.planner.reads).reshape(-1)

    def plan(self, batch: Batch) -> list[RoutedBatch]:
        """Split the rows that `read_rows` names into planned micro-batches; runs in the reading thread."""
        size = self.planner.reads.size
        micro_batches = [slice(start, start + size) for start in range(0, batch.domain.size, size)]

        def required(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
            return batch.tokens[rows], batch.domain[rows], batch.sample[rows], batch.step

        def optional(array: np.ndarray | None, rows: slice) -> np.ndarray | None:
            return None if array is None else array[rows]

        present = None
        if self.pipeline is not None:
            # All micro-batches of a step are in one graph, whose slots hold the experts that any of them activates.
            by_batch = [self.planner.present(*required(rows), optional(batch.padding, rows)) for rows in micro_batches]
            present = [np.unique(np.concatenate(of_layer)) for of_layer in zip(*by_batch, strict=True)]
        return [
            self.planner(*required(rows), optional(batch.mask, rows), optional(batch.padding, rows), present)
            for rows in micro_batches
        ]

    def step(self, step: int, batches: Sequence[RoutedBatch], regulariser: Regulariser | None = None) -> StepResult:
        """Do optimizer step `step` (from 0) on the micro-batches of one batch; all processes call it together.

        A loss or gradient that is not finite updates nothing, and the result says so. Raises UserError where a step
        activates more experts than the store may hold.
        """
        try:
            return self._step(step, batches, regulariser or NO_REGULARISER)
        except StoreFull as error:
            raise UserError(f"step {step + 1}: {error}") from error

    def _step(self, step: int, batches: Sequence[RoutedBatch], regulariser: Regulariser) -> StepResult:
        # 1. What the step trains and how: the phase of the step that sampled this batch, which after skipped steps is
        #    not the optimizer's.
        phase = phase_at(self.config, batches[0].step)
        rate = learning_rate(self.config, step)
        scale = self.loss_scale.value
        self._set_objective(regulariser.objective)

        # 2. The loss's denominator: the tokens (pairs) of the whole batch. Known before the graphs run, so that
        #    micro-batches and processes only have to be summed.
        local_units = np.array([sum(float(self.objective.units(b).sum()) for b in batches)])
        total_units = float(self.reducer.total(local_units)[0])

        # 3. Forward and backward: micro-batch by micro-batch, or all in one graph where it is a pipeline.
        if self.pipeline is not None:
            gradients, micro_batches = self.pipeline.gradients(
                batches, phase, scale / total_units, self.reducer.reader_ranks
            )
        else:
            gradients, micro_batches = self._accumulate(batches, phase, scale, total_units)

        # 4. Sum over processes: shared (not expert) parameters over all, experts over their replicas.
        self.reducer.reduce_in_place(gradients, micro_batches, phase)
        loss = sum(float(metrics.loss.sum()) for metrics in micro_batches) / total_units

        # 5. What depends on the weights alone, before the norm: it includes the penalty's gradient and excludes those
        #    of frozen experts' gate columns.
        frozen = self._frozen_gate_columns(phase)
        penalty = None
        if regulariser.penalty is not None and phase.shared:
            penalty = self._add_penalty(regulariser.penalty, gradients, scale)
        if frozen:
            gradients.shared, gradients.shared_squares = frozen.mask_gradients(gradients.shared), None

        # 6. Finite check and loss scale: every process has the same loss and norm, and so decides alike.
        norm = self.reducer.global_norm(gradients) / scale
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return StepResult(loss, norm, rate, False, self.loss_scale.record_overflow())

        # 7. Clip to the global norm and update: shared parameters in the graph, activated experts in their store.
        clip = min(1.0, self.config.optimizer.max_grad_norm / max(norm, 1e-38))
        self.optimizer.apply(gradients, rate, clip / scale, frozen)
        self.loss_scale.record_success()

        # 8. Metrics. Tokens of the objective's extra micro-batches are not training tokens; only its own figures count.
        text, extra = micro_batches[: len(batches)], micro_batches[len(batches) :]
        for metrics in text:
            self.metrics.add_batch(metrics)
        for metrics in extra:
            self.metrics.add_extra_metrics(metrics)
        if penalty is not None:
            self.metrics.add_extra_metric("distance", penalty, 1.0)
        self.metrics.add_step(self.reducer.num_updated_experts(micro_batches, phase))
        return StepResult(loss, norm, rate, True, False, sum(int(metrics.tokens.sum()) for metrics in text))

    def take_store_metrics(self) -> dict[str, float]:
        """What the expert stores of all processes did per step since the last record.

        Call it before `metrics.take_record`, which sets the count of steps to 0.
        """
        own = take_store_metrics(self.model.store.stats, self.metrics.steps)
        totals = self.processes.total(np.array(list(own.values())))
        metrics = dict(zip(own, totals.tolist(), strict=True))
        return metrics | {"prefetch_hit_rate": metrics["prefetch_hit_rate"] / self.processes.size}

    @staticmethod
    def _add_penalty(weight_penalty: WeightPenalty, gradients: Gradients, scale: float) -> float:
        """Add the penalty's gradient to those of the shared parameters, once a step; returns the penalty."""
        shared, squares, penalty = weight_penalty(Tensor(scale, ms.float32), *gradients.shared)
        gradients.shared = tuple(shared)
        gradients.shared_squares = squares.asnumpy().astype(np.float64)
        return float(penalty.asnumpy())

    def _frozen_gate_columns(self, phase: Phase) -> FrozenGateColumns | None:
        if not phase.shared or not self.model.learned:
            return None
        if phase.domains not in self._frozen:
            names = [p.name for p in self.model.shared.trainable]
            self._frozen[phase.domains] = FrozenGateColumns(names, self.model.groups, phase.domains)
        return self._frozen[phase.domains]

    def _accumulate(
        self, batches: Sequence[RoutedBatch], phase: Phase, scale: float, total_units: float
    ) -> tuple[Gradients, list[BatchMetrics]]:
        """Gradients summed over the micro-batches of a step, and the metrics of each."""
        gradients: Gradients | None = None
        micro_batches = []
        for batch in (*batches, *self.objective.extra_batches(batches, self.planner)):
            of_batch, metrics = self._compute_gradients(batch, phase, scale, total_units, len(batches))
            micro_batches.append(metrics)
            if gradients is None:
                gradients = of_batch
            else:
                gradients.add(of_batch)
        return gradients, micro_batches

    def _compute_gradients(
        self, batch: RoutedBatch, phase: Phase, scale: float, total_units: float, micro_batches: int
    ) -> tuple[Gradients, BatchMetrics]:
        """Forward and backward: gradients of this process's rows and experts, metrics of the whole micro-batch."""
        prepared = self.objective.prepare(batch)
        of_loss = self.objective.inputs(batch, prepared, scale, total_units, micro_batches)
        # The network is shared with evaluation, so its mode is set per use.
        outputs = self._compiled_steps(phase.shared, self.objective).set_train(True)(
            *self.inputs.pack(batch, self.model.store, *of_loss)
        )
        by_sample, auxiliary, counts, expert_gradients, shared, squares = outputs
        loss = self.objective.measure(batch, prepared, by_sample.asnumpy())
        gate_rows = [c.asnumpy() for c in counts]
        own = BatchMetrics.from_loss(batch, len(self.model.groups.names), loss, gate_rows, float(auxiliary.asnumpy()))
        by_rank = own.gather(self.processes)
        # An expert of this process has a gradient if any rank that sends rows here sent it a row.
        received = own.sum_ranks(by_rank[list(self.reducer.exchange_ranks)])
        gradients = Gradients()
        if phase.shared:
            gradients.shared = tuple(shared)
            gradients.shared_squares = squares.asnumpy().astype(np.float64)
        if expert_gradients:
            gradients.experts = select_expert_gradients(
                self.model.groups, self.inputs, batch, phase.domains, expert_gradients, received.load
            )
        return gradients, own.sum_ranks(by_rank[list(self.reducer.reader_ranks)])
