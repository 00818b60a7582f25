"""One optimizer step, and what can go wrong in it."""

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
from pangu_sigma.model.batch_planner import BatchPlanner, RoutedBatch
from pangu_sigma.model.model import DOMAIN_EMBEDDING, Model
from pangu_sigma.train.continual.frozen_gate_columns import FrozenColumns
from pangu_sigma.train.continual.weight_penalty import Distance
from pangu_sigma.train.distributed.gradient_all_reduce import gradient_reducer_of
from pangu_sigma.train.distributed.pipeline_runner import StagedStep, staged_step
from pangu_sigma.train.distributed.step_cache import step_graphs
from pangu_sigma.train.flops import flops_per_token
from pangu_sigma.train.loss_scale import LossScale
from pangu_sigma.train.objective import Objective
from pangu_sigma.train.optimizer import Gradients, Optimizer
from pangu_sigma.train.schedule import Phase, learning_rate, phase_at
from pangu_sigma.train.slot_gradients import slot_gradients
from pangu_sigma.train.step_metrics import Accounting, Figures, store_figures
from rre.store.disk_store import StoreFull


@dataclass(frozen=True)
class StepResult:
    """What one attempt at a step gave: `finite` False means that nothing was updated.

    `overflow` True: float16 overflowed and a smaller loss scale may mend it. `loss` in nats per token, or in whatever
    the run's objective counts; `tokens` of the whole batch that count.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    finite: bool
    overflow: bool
    tokens: int = 0


def micro_batch_rows(config: Config, objective: Objective) -> int:
    """Rows that a graph of this run computes at a time."""
    return objective.rows_per_sample * config.train.batch_size // config.train.gradient_accumulation_steps


class Trainer:
    """Compiled steps, optimizer and loss scale of one run; `step` does one optimizer step.

    Several processes each do their rows of every micro-batch and their experts; what they decide (norm, loss scale,
    whether a step counts) follows from the same numbers everywhere.
    """

    def __init__(self, model: Model, objective: Objective | None = None) -> None:
        self.model = model
        self.processes = model.processes
        self.config = model.config
        self.objective = Objective() if objective is None else objective
        self.micro_batch = micro_batch_rows(self.config, self.objective)
        # The graph that is cut over devices is of all ranks' rows, any other of this process's own.
        rows = 1 if model.layout.spmd_mesh else self.processes.mesh.rows
        self.signature = model.training_signature(self.micro_batch // rows)
        self.planner = BatchPlanner(model, self.signature, training=True)
        if self.config.train.recompute:
            model.net.recompute_blocks()
        # Before the optimizer, whose moments are of the parts that this leaves.
        self.stages: StagedStep | None = None
        if self.config.parallel.pipeline > 1:
            self.stages = staged_step(model, self.signature)
        else:
            self._graphs = step_graphs(model, self.signature, self.objective)
        self.optimizer = Optimizer(model)
        self.reducer = gradient_reducer_of(model)
        self.loss_scale = LossScale.of(self.config)
        self.accounting = Accounting(
            model.groups, self.config.model.sparse_prefixes, flops_per_token(self.config, model.vocab)
        )
        self._plain = self.objective
        self._distance: Distance | None = None
        self._frozen: dict[frozenset[str], FrozenColumns] = {}

    def hold(self, objective: Objective | None, distance: Distance | None) -> None:
        """From now on minimise `objective` (None: the run's own) with the pull of `distance` (None: without one).

        Raises UserError for another objective where the run's own is not the mean loss of all tokens.
        """
        if objective is not None and type(self._plain) is not Objective:
            raise UserError("regularise.output holds training on text: leave it out where another loss is trained")
        wanted = self._plain if objective is None else objective
        wanted.auxiliary = self._plain.auxiliary
        if wanted is not self.objective:
            self._graphs.clear()
        self.objective, self._distance = wanted, distance

    @property
    def reads(self) -> np.ndarray:
        """The rows of a step's batch that this process looks at, micro-batch by micro-batch."""
        rows = self.objective.rows_per_sample * self.config.train.batch_size
        starts = np.arange(0, rows, self.micro_batch)
        return (starts[:, None] + self.planner.reads).reshape(-1)

    def plan(self, batch: Batch) -> list[RoutedBatch]:
        """Cut the rows of a step's batch that `reads` names into planned micro-batches; runs in the reading thread."""
        size = self.planner.reads.size
        runs = [slice(a, a + size) for a in range(0, batch.domain.size, size)]

        def of(run: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
            return batch.tokens[run], batch.domain[run], batch.sample[run], batch.step

        def cut(rows: np.ndarray | None, run: slice) -> np.ndarray | None:
            return None if rows is None else rows[run]

        present = None
        if self.stages is not None:
            # All micro-batches of a step are in one graph, and share its slots.
            found = [self.planner.present(*of(run), cut(batch.padding, run)) for run in runs]
            present = [np.unique(np.concatenate(of_layer)) for of_layer in zip(*found, strict=True)]
        return [self.planner(*of(run), cut(batch.mask, run), cut(batch.padding, run), present) for run in runs]

    def step(self, step: int, batches: Sequence[RoutedBatch]) -> StepResult:
        """Do optimizer step `step` (from 0) on the micro-batches of one batch.

        Raises UserError where a step activates more experts than the store may hold.
        """
        try:
            return self._step(step, batches)
        except StoreFull as error:
            raise UserError(f"step {step + 1}: {error}") from error

    def _step(self, step: int, batches: Sequence[RoutedBatch]) -> StepResult:
        # By the data's step: text that a phase drew trains what that phase trains, also after skipped steps.
        phase = phase_at(self.config, batches[0].step)
        rate = learning_rate(self.config, step)
        scale = self.loss_scale.value
        units = np.array([sum(float(self.objective.units(b).sum()) for b in batches)])
        total = float(self.reducer.total(units)[0])
        if self.stages is not None:
            gradients, parts = self.stages.gradients(batches, phase, scale / total, self.reducer.reader_ranks)
        else:
            gradients, parts = self._summed(batches, phase, scale, total)
        self.reducer.reduce_in_place(gradients, parts, phase)
        loss = sum(float(figures.loss.sum()) for figures in parts) / total
        frozen = self._frozen_columns(phase)
        penalty = self._pull(gradients, scale) if self._distance is not None and phase.shared else None
        if frozen:
            gradients.shared, gradients.shared_squares = frozen.without(gradients.shared), None
        norm = self.reducer.global_norm(gradients) / scale
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:
            return StepResult(loss, norm, rate, False, self.loss_scale.overflow())
        clip = min(1.0, self.config.optimizer.max_grad_norm / max(norm, 1e-38))
        self.optimizer.apply(gradients, rate, clip / scale, frozen)
        self.loss_scale.good()
        for figures in parts[: len(batches)]:
            self.accounting.add_batch(figures)
        for figures in parts[len(batches) :]:
            self.accounting.add_figures(figures)
        if penalty is not None:
            self.accounting.add_figure("distance", penalty, 1.0)
        self.accounting.add_step(self.reducer.num_updated_experts(parts, phase))
        tokens = sum(int(figures.tokens.sum()) for figures in parts[: len(batches)])
        return StepResult(loss, norm, rate, True, False, tokens)

    def store_figures(self) -> dict[str, float]:
        """What the expert stores of all processes did a step since the last record; call it before `take`."""
        figures = store_figures(self.model.store.stats, self.accounting.steps)
        total = self.processes.total(np.array(list(figures.values())))
        found = dict(zip(figures, total.tolist(), strict=True))
        return found | {"prefetch_hit_rate": found["prefetch_hit_rate"] / self.processes.size}

    def _pull(self, gradients: Gradients, scale: float) -> float:
        """Adds the pull towards the previous parameters, once a step; returns the penalty."""
        changed, squares, penalty = self._distance(Tensor(scale, ms.float32), *gradients.shared)
        gradients.shared = tuple(changed)
        gradients.shared_squares = squares.asnumpy().astype(np.float64)
        return float(penalty.asnumpy())

    def _frozen_columns(self, phase: Phase) -> FrozenColumns | None:
        if not phase.shared or not self.model.learned:
            return None
        if phase.domains not in self._frozen:
            names = [p.name for p in self.model.shared.trainable]
            self._frozen[phase.domains] = FrozenColumns(names, self.model.groups, phase.domains)
        return self._frozen[phase.domains]

    def _summed(
        self, batches: Sequence[RoutedBatch], phase: Phase, scale: float, total: float
    ) -> tuple[Gradients, list[Figures]]:
        """The gradients of a step micro-batch by micro-batch, and the figures of each."""
        gradients: Gradients | None = None
        parts = []
        for batch in (*batches, *self.objective.beside(batches, self.planner)):
            part, figures = self._gradients(batch, phase, scale, total, len(batches))
            parts.append(figures)
            if gradients is None:
                gradients = part
            else:
                gradients.add(part)
        return gradients, parts

    def _gradients(
        self, batch: RoutedBatch, phase: Phase, scale: float, total: float, parts: int
    ) -> tuple[Gradients, Figures]:
        """The gradients of this process's rows and experts, and the figures of the whole micro-batch."""
        fixed = batch.fixed
        prepared = self.objective.prepare(batch)
        weights, auxiliary_weight, *extra = self.objective.inputs(batch, prepared, scale, total, parts)
        # The network is shared with evaluation, so its mode is set per use.
        outputs = self._graphs(phase.shared, self.objective).set_train(True)(
            fixed[0],
            Tensor(batch.labels),
            weights,
            auxiliary_weight,
            *fixed[1:],
            *extra,
            *batch.flat(self.signature, self.model.store),
        )
        by_sample, auxiliary, counts, by_expert, shared, squares = outputs
        measured = self.objective.measure(batch, prepared, by_sample.asnumpy())
        rows = [c.asnumpy() for c in counts]
        own = Figures.of(batch, len(self.model.groups.names), measured, rows, float(auxiliary.asnumpy()))
        lines = own.by_rank(self.processes)
        here = own.summed(lines[list(self.reducer.exchange_ranks)])
        gradients = Gradients()
        if phase.shared:
            gradients.shared = tuple(shared)
            gradients.shared_squares = squares.asnumpy().astype(np.float64)
        if by_expert:
            gradients.experts = self._activated(batch, phase, by_expert, here.load)
        return gradients, own.summed(lines[list(self.reducer.reader_ranks)])

    def _activated(
        self, batch: RoutedBatch, phase: Phase, by_expert: Sequence[Tensor], received: np.ndarray
    ) -> dict[tuple[str, int], list[Tensor]]:
        """Gradients of experts held here that received a token and train, by (layer name, expert as the store counts).

        `received` [layers, E]: rows that came here. The gradient of an expert without rows is a product over nothing,
        whose memory MindSpore leaves as it was: it must not be looked at.
        """
        groups = self.model.groups
        found: dict[tuple[str, int], list[Tensor]] = {}
        at = 0
        if self.signature.domain_embedding_shape is not None:
            for number in np.unique(batch.domain):
                if groups.names[number] in phase.domains:
                    found[(DOMAIN_EMBEDDING, int(number))] = [by_expert[0][int(number)]]
            at = 1
        owner, first = np.repeat(groups.names, groups.sizes), self.model.local_experts.start
        for layer, layer_signature in enumerate(self.signature.layers):
            tensors = len(layer_signature.network.tensors)
            plan = batch.plans[layer]
            if layer_signature.capacity_spec is not None:
                experts = np.arange(layer_signature.slots) if plan is None else plan.experts
                rows = received[layer] if plan is None else plan.counts
                trains = np.isin(owner[experts], list(phase.domains)) & (rows > 0)
                stacked = by_expert[at : at + layer_signature.weights]
                at += layer_signature.weights
                found |= slot_gradients(self.signature, layer_signature, experts, trains, stacked)
                continue
            experts = range(layer_signature.slots) if plan is None else plan.experts.tolist()
            filled = [True] * layer_signature.slots if plan is None else plan.counts > 0
            for expert, has_rows in zip(experts, filled, strict=True):
                number = first + expert
                if has_rows and received[layer, number] > 0 and owner[number] in phase.domains:
                    found[(layer_signature.name, expert)] = list(by_expert[at : at + tensors])
                at += tensors
        return found
