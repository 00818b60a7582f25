"""Trainer: the compiled graphs, optimizer and loss scale of a run, and the path of one optimizer step.

Everything here runs in the training thread, except `Trainer.plan`, which runs in the thread that reads batches ahead,
and what the expert store (expert weights and their AdamW moments, in device or host memory or on disk) does in its
own thread: fetching and writing experts (`rre.store`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.config import Config
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.errors import UserError
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.model.state_dict import restore_model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from pangu_sigma.training.flops import flops_per_token
from pangu_sigma.training.frozen_gate_columns import FrozenGateColumns
from pangu_sigma.training.gradient_accumulation import ForwardBackward, GradientAccumulation
from pangu_sigma.training.gradient_reducer import GradientReducer
from pangu_sigma.training.loss_scale import LossScale
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.optimizer import Optimizer
from pangu_sigma.training.schedule import Phase, ScheduledStep
from pangu_sigma.training.step_metrics import MetricsAccumulator, take_store_metrics, updated_domains, updated_experts
from rre.store.disk_store import StoreFull

# A term of the loss that depends on the weights alone: (scale, the shared gradients …) -> (the gradients with `scale`
# times the penalty's added, their square sums [n], the penalty).
Penalty = Callable[..., tuple[Sequence[Tensor], Tensor, Tensor]]


@dataclass(frozen=True)
class Regulariser:
    """What a regularised phase adds to a step: an objective in place of the run's own, a penalty on the weights.

    None for either leaves it out.
    """

    objective: TrainingObjective | None = None
    penalty: Penalty | None = None


NO_REGULARISER = Regulariser()


@dataclass(frozen=True)
class StepResult:
    """Outcome of one attempt at a step.

    loss: in nats per token, or per whatever the run's objective counts. finite: False where nothing was updated.
    overflow: float16 overflowed; retry with a smaller loss scale. loss_scale: the next step's, None where it is fixed.
    tokens: label tokens of the whole batch that are not masked.
    """

    loss: float
    gradient_norm: float
    finite: bool
    overflow: bool
    loss_scale: float | None
    tokens: int = 0


def micro_batch_rows(config: Config, objective: TrainingObjective) -> int:
    """Sequences that a graph of this run computes at a time."""
    return objective.rows_per_sample * config.train.batch_size // config.train.gradient_accumulation_steps


class Trainer:
    """Trains `model` by an objective (None: the mean loss per token); `step` does one optimizer step.

    micro_batch: sequences of a micro-batch over all processes. inputs: of this process's graph, whose sequences are its
    own share unless MindSpore shards the graph.

    Several processes each compute their rows of every micro-batch and their experts; what controls the step (loss,
    norm, overflow) is summed outside the graph, so that all decide alike. What they need beside this,
    `distributed.distributed_trainer` hands in: the `reducer`, and what makes the graphs (`make_forward_backward`).
    """

    def __init__(
        self,
        model: Model,
        objective: TrainingObjective | None = None,
        reducer: GradientReducer | None = None,
        make_forward_backward: Callable[[GraphInputs, BatchPlanner], ForwardBackward] | None = None,
    ) -> None:
        if reducer is None and model.processes.size > 1:
            raise ValueError("several processes share the model: make the trainer with distributed_trainer")
        self.model = model
        self.processes = model.processes
        self.config = model.config
        self.objective = TrainingObjective() if objective is None else objective
        self.micro_batch = micro_batch_rows(self.config, self.objective)
        # The graph that is sharded over devices is of all ranks' sequences, any other of this process's own.
        num_data_ranks = 1 if model.layout.spmd_mesh else self.processes.mesh.rows
        self.inputs = model.training_inputs(self.micro_batch // num_data_ranks)
        self.planner = BatchPlanner(model, self.inputs, training=True, prefetch=model.store.prefetch)
        self.reducer = reducer or GradientReducer(model)
        # Before the optimizer, whose moments have the shapes of the parameters: compiling a sharded step replaces those
        # by this rank's shards.
        make = make_forward_backward or partial(GradientAccumulation, model, self.reducer)
        self.forward_backward = make(self.inputs, self.planner)
        self.optimizer = Optimizer(model)
        self._frozen: tuple[Phase | None, FrozenGateColumns | None] = (None, None)  # of the phase under way
        self.loss_scale = LossScale.from_config(self.config)
        self.metrics = MetricsAccumulator(
            model.groups, self.config.model.sparse_prefixes, flops_per_token(self.config, model.vocab)
        )

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
        size, planner = self.planner.reads.size, self.planner
        parts = [batch.rows(slice(start, start + size)) for start in range(0, batch.domain.size, size)]
        present = None
        if self.forward_backward.one_graph:
            by_part = [planner.present(b.tokens, b.domain, b.sample, b.step, b.padding) for b in parts]
            present = [np.unique(np.concatenate(of_layer)) for of_layer in zip(*by_part, strict=True)]
        return [planner(b.tokens, b.domain, b.sample, b.step, b.mask, b.padding, present) for b in parts]

    def step(
        self, scheduled: ScheduledStep, batches: Sequence[RoutedBatch], regulariser: Regulariser = NO_REGULARISER
    ) -> StepResult:
        """Do an optimizer step on the micro-batches of one batch; all processes call it together.

        A loss or gradient that is not finite updates nothing, and the result says so. Raises UserError where a step
        activates more experts than the store may hold.
        """
        try:
            return self._step(scheduled, batches, regulariser)
        except StoreFull as error:
            raise UserError(f"step {scheduled.index + 1}: {error}") from error

    def _step(self, scheduled: ScheduledStep, batches: Sequence[RoutedBatch], regulariser: Regulariser) -> StepResult:
        phase, scale = scheduled.phase, self.loss_scale.value
        objective = self.objective if regulariser.objective is None else regulariser.objective

        # 1. The loss's denominator: the tokens (pairs) of the whole batch. Known before the graphs run, so that
        #    micro-batches and processes only have to be summed.
        total_units = self.reducer.total(sum(float(objective.units(batch).sum()) for batch in batches))

        # 2. Forward and backward, summed over micro-batches.
        gradients, micro_batches = self.forward_backward(batches, phase, objective, scale, total_units)

        # 3. Sum over processes: shared (not expert) parameters over all, experts over their replicas.
        self.reducer.reduce_in_place(gradients, micro_batches, phase)
        loss = sum(float(metrics.loss.sum()) for metrics in micro_batches) / total_units

        # 4. What depends on the weights alone, before the norm: it includes the penalty's gradient and excludes those
        #    of frozen experts' gate columns.
        penalty = None
        if regulariser.penalty is not None and phase.shared:
            shared, squares, value = regulariser.penalty(Tensor(scale, ms.float32), *gradients.shared)
            gradients.shared, gradients.shared_squares = tuple(shared), squares.asnumpy().astype(np.float64)
            penalty = float(value.asnumpy())
        if self._frozen[0] != phase:
            self._frozen = phase, FrozenGateColumns.of_phase(self.model, phase)
        frozen = self._frozen[1]
        if frozen is not None:
            gradients.shared, gradients.shared_squares = frozen.mask_gradients(gradients.shared), None

        # 5. Finite check and loss scale: every process has the same loss and norm, and so decides alike.
        norm = self.reducer.global_norm(gradients) / scale
        if not (math.isfinite(loss) and math.isfinite(norm)):
            overflow = self.loss_scale.record_overflow()
            return StepResult(loss, norm, False, overflow, self.loss_scale.dynamic_value)

        # 6. Clip to the global norm and update: shared parameters in the graph, activated experts in their store.
        clip = min(1.0, self.config.optimizer.max_grad_norm / max(norm, 1e-38))
        self.optimizer.apply(gradients, scheduled.learning_rate, clip / scale, frozen)
        self.loss_scale.record_success()

        # 7. Metrics. Tokens of the objective's extra micro-batches are not training tokens; only its own figures count.
        text, extra = micro_batches[: len(batches)], micro_batches[len(batches) :]
        for metrics in text:
            self.metrics.add_batch(metrics)
        for metrics in extra:
            self.metrics.add_extra_metrics(metrics.extra_metrics)
        if penalty is not None:
            self.metrics.add_extra_metrics({"distance": np.array([penalty, 1.0])})
        groups, embeddings = self.model.groups, 0
        if DOMAIN_EMBEDDING in self.model.store.experts:
            embeddings = len(updated_domains(micro_batches, groups, phase.domains))
        self.metrics.add_step(embeddings + int(updated_experts(micro_batches, groups, phase.domains).sum()))
        tokens = sum(int(metrics.tokens.sum()) for metrics in text)
        return StepResult(loss, norm, True, False, self.loss_scale.dynamic_value, tokens)

    def take_record(self) -> dict[str, object]:
        """Metrics since the last record, what the expert stores of all processes did per step among them (`store`).

        All processes call it together.
        """
        own = take_store_metrics(self.model.store.stats, self.metrics.steps)
        totals = self.processes.total(np.array(list(own.values())))
        store = dict(zip(own, totals.tolist(), strict=True))
        store["prefetch_hit_rate"] /= self.processes.size
        return {"store": store, **self.metrics.take_record()}

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps of it beside tensors."""
        return {
            "loss_scale": self.loss_scale.state(),
            "shared_steps": self.optimizer.shared_steps,
            "kernels": self.model.kernels,
        }

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, object]) -> None:
        """Set parameters, moments and loss scale to a checkpoint's; the metrics begin anew."""
        restore_model(self.model, tensors, optimizer_state=True)
        self.optimizer.restore(tensors, int(state["shared_steps"]))
        self.loss_scale.restore(state["loss_scale"])
        self.metrics.clear()
