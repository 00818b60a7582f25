"""One optimizer step, and what can go wrong in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.config import Config
from pangu_sigma.data.sampler import Batch
from pangu_sigma.errors import UserError
from pangu_sigma.model.build import SLOTS, Model
from pangu_sigma.model.inputs import PlannedBatch, Planner
from pangu_sigma.train.accounting import Accounting, store_figures
from pangu_sigma.train.distance import Distance
from pangu_sigma.train.flops import flops_per_token
from pangu_sigma.train.gates import FrozenColumns
from pangu_sigma.train.loss_scale import LossScale
from pangu_sigma.train.objective import Measured, Objective
from pangu_sigma.train.optimizer import Gradients, Optimizer
from pangu_sigma.train.schedule import Phase, learning_rate, phase_at
from pangu_sigma.train.step import GradientStep
from rre.store.disk import StoreFull


@dataclass(frozen=True)
class StepResult:
    """What one attempt at a step gave: `finite` False means that nothing was updated.

    `overflow` True: float16 overflowed and a smaller loss scale may mend it. `loss` in nats per token, or in whatever
    the run's objective counts.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    finite: bool
    overflow: bool


def micro_batch_rows(config: Config, objective: Objective) -> int:
    """Rows that a graph of this run computes at a time."""
    return objective.rows_per_sample * config.train.batch_size // config.train.accumulation


class Trainer:
    """Compiled steps, optimizer and loss scale of one run; `step` does one optimizer step."""

    def __init__(self, model: Model, objective: Objective | None = None) -> None:
        self.model = model
        self.config = model.config
        self.objective = Objective() if objective is None else objective
        self.micro_batch = micro_batch_rows(self.config, self.objective)
        self.signature = model.training_signature(self.micro_batch)
        self.planner = Planner(model, self.signature, training=True)
        self.optimizer = Optimizer(model)
        self.loss_scale = LossScale.of(self.config)
        self.accounting = Accounting(
            model.groups, self.config.model.sparse_prefixes, flops_per_token(self.config, model.vocab)
        )
        if self.config.train.recompute:
            model.net.recompute_blocks()
        self._plain = self.objective
        self._distance: Distance | None = None
        self._graphs: dict[bool, GradientStep] = {}
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

    def plan(self, batch: Batch) -> list[PlannedBatch]:
        """Cut a step's batch into planned micro-batches; runs in the reading thread."""
        size = self.micro_batch
        return [
            self.planner(
                batch.tokens[a : a + size],
                batch.domain[a : a + size],
                batch.sample[a : a + size],
                batch.step,
                None if batch.mask is None else batch.mask[a : a + size],
                None if batch.padding is None else batch.padding[a : a + size],
            )
            for a in range(0, batch.domain.size, size)
        ]

    def step(self, step: int, batches: Sequence[PlannedBatch]) -> StepResult:
        """Do optimizer step `step` (from 0) on the micro-batches of one batch.

        Raises UserError where a step activates more experts than the store may hold.
        """
        try:
            return self._step(step, batches)
        except StoreFull as error:
            raise UserError(f"step {step + 1}: {error}") from error

    def _step(self, step: int, batches: Sequence[PlannedBatch]) -> StepResult:
        # By the data's step: text that a phase drew trains what that phase trains, also after skipped steps.
        phase = phase_at(self.config, batches[0].step)
        rate = learning_rate(self.config, step)
        scale = self.loss_scale.value
        total = sum(float(self.objective.units(b).sum()) for b in batches)
        gradients: Gradients | None = None
        loss_sum = 0.0
        parts = []
        for batch in (*batches, *self.objective.beside(batches, self.planner)):
            part, measured, counts, auxiliary = self._gradients(batch, phase, scale, total, len(batches))
            parts.append((batch, measured, counts, auxiliary))
            loss_sum += float(measured.losses.astype(np.float64).sum())
            if gradients is None:
                gradients = part
            else:
                gradients.add(part)
        loss = loss_sum / total
        frozen = self._frozen_columns(phase)
        penalty = self._pull(gradients, scale) if self._distance is not None and phase.shared else None
        if frozen:
            gradients.shared, gradients.shared_squares = frozen.without(gradients.shared), None
        norm = gradients.norm(self.model.store) / scale
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:
            return StepResult(loss, norm, rate, False, self.loss_scale.overflow())
        clip = min(1.0, self.config.optimizer.clip_norm / max(norm, 1e-38))
        self.optimizer.apply(gradients, rate, clip / scale, frozen)
        self.loss_scale.good()
        for batch, measured, counts, auxiliary in parts[: len(batches)]:
            self.accounting.add_batch(batch, measured, counts, auxiliary)
        for _, measured, _, _ in parts[len(batches) :]:
            self.accounting.add_figures(measured)
        if penalty is not None:
            self.accounting.add_figure("distance", penalty, 1.0)
        self.accounting.add_step(len(gradients.experts))
        return StepResult(loss, norm, rate, True, False)

    def store_figures(self) -> dict[str, float]:
        """What the expert store did a step since the last record; call it before the accounting's `take`."""
        return store_figures(self.model.store.traffic, self.accounting.steps)

    def _pull(self, gradients: Gradients, scale: float) -> float:
        """Adds the pull towards the previous parameters, once a step; returns the penalty."""
        changed, squares, penalty = self._distance(Tensor(scale, ms.float32), *gradients.shared)
        gradients.shared = tuple(changed)
        gradients.shared_squares = float(squares.asnumpy().astype(np.float64).sum())
        return float(penalty.asnumpy())

    def _frozen_columns(self, phase: Phase) -> FrozenColumns | None:
        if not phase.shared or not self.model.learned:
            return None
        if phase.domains not in self._frozen:
            names = [p.name for p in self.model.net.trainable_params()]
            self._frozen[phase.domains] = FrozenColumns(names, self.model.groups, phase.domains)
        return self._frozen[phase.domains]

    def _graph(self, with_shared: bool) -> GradientStep:
        if with_shared not in self._graphs:
            self._graphs[with_shared] = GradientStep(
                self.model.net, self.signature, self.model.layout, with_shared, self.objective
            )
        # The network is shared with evaluation, so its mode is set per use.
        return self._graphs[with_shared].set_train(True)

    def _gradients(
        self, batch: PlannedBatch, phase: Phase, scale: float, total: float, parts: int
    ) -> tuple[Gradients, Measured, list[np.ndarray], float]:
        fixed = batch.fixed
        prepared = self.objective.prepare(batch)
        weights, auxiliary_weight, *extra = self.objective.inputs(batch, prepared, scale, total, parts)
        outputs = self._graph(phase.shared)(
            fixed[0],
            Tensor(batch.labels),
            weights,
            auxiliary_weight,
            *fixed[1:],
            *extra,
            *batch.flat(self.signature, self.model.store),
        )
        by_sample, auxiliary, counts, by_expert, shared, squares = outputs
        rows = [c.asnumpy() for c in counts]
        gradients = Gradients()
        if phase.shared:
            gradients.shared = tuple(shared)
            gradients.shared_squares = float(squares.asnumpy().astype(np.float64).sum())
        if by_expert:
            gradients.experts = self._activated(batch, phase, by_expert, rows)
        measured = self.objective.measure(batch, prepared, by_sample.asnumpy())
        return gradients, measured, rows, float(auxiliary.asnumpy())

    def _activated(
        self, batch: PlannedBatch, phase: Phase, by_expert: Sequence[Tensor], rows: Sequence[np.ndarray]
    ) -> dict[tuple[str, int], list[Tensor]]:
        """The gradients of experts that received a token and train, by (place, expert).

        The gradient of an expert without rows is a product over nothing, whose memory MindSpore leaves as it was: it
        must not be looked at.
        """
        groups = self.model.groups
        found: dict[tuple[str, int], list[Tensor]] = {}
        at = 0
        if self.signature.slot_table is not None:
            for number in np.unique(batch.domain):
                if groups.names[number] in phase.domains:
                    found[(SLOTS, int(number))] = [by_expert[0][int(number)]]
            at = 1
        owner = np.repeat(groups.names, groups.sizes)
        for layer, place in enumerate(self.signature.places):
            tensors = len(place.network.tensors)
            plan = batch.plans[layer]
            if place.reserved is not None:
                for slots in place.reserved.by_chunk(place.slots):
                    stacked = by_expert[at : at + len(place.network.tensors)]
                    at += len(stacked)
                    for i, slot in enumerate(slots.tolist()):
                        expert = int(plan.experts[slot])
                        if plan.counts[slot] > 0 and owner[expert] in phase.domains:
                            found[(place.name, expert)] = [gradient[i] for gradient in stacked]
                continue
            received = rows[layer].sum(axis=0) if plan is None else plan.counts
            experts = range(place.slots) if plan is None else plan.experts.tolist()
            for slot, expert in enumerate(experts):
                if received[slot] > 0 and owner[expert] in phase.domains:
                    found[(place.name, expert)] = list(by_expert[at : at + tensors])
                at += tensors
        return found
