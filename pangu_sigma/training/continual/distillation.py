"""Distillation: the training objective of a phase that stays near its teacher by outputs, the loss plus a divergence.

objective = mean over tokens of -log p(label) + output * mean over tokens of KL(q || p), q the teacher's next-token
distribution at the same position of the same text, both in nats (Li and Hoiem 2016, arXiv 1606.09282; as output
regularisation in Chen et al. 2023, arXiv 2305.12281). The routers' auxiliary losses are added as ever.

Where every domain has experts of its own, the new text can also be read through an *old* domain's experts by both
models, as learning without forgetting compares the old tasks' outputs on the new task's data. That costs a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.forward_pass import HeadOutput, WeightedLoss
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.training.continual.teacher import Teacher
from pangu_sigma.training.objective import BatchLoss, TrainingObjective
from parallel.operator_layout import Layout
from rre.counted_random import key64, uniform


class DistillationLoss(WeightedLoss):
    """Token losses by their weights plus divergences by theirs; the sums [2, B] are of both.

    Extra inputs: the teacher's logits [B, S, V] and weights [B, S] of the divergence.
    """

    def construct(self, h, labels: Tensor, domain: Tensor, table: Tensor, weights: Tensor, extra: tuple):
        teacher_logits, divergence_weights = extra
        losses, divergences = self.head.against(h, labels, domain, table, teacher_logits)
        objective = self.sum(self.mul(losses, weights)) + self.sum(self.mul(divergences, divergence_weights))
        sums = self.sum_counted(losses, weights), self.sum_counted(divergences, divergence_weights)
        return objective, ops.stack(sums)


@dataclass(frozen=True)
class OldDomainBatch(RoutedBatch):
    """A micro-batch's text once more, planned as if of an old domain: no label counts.

    compared: [B, S], 1 where the divergence counts.
    """

    compared: np.ndarray


class DistillationObjective(TrainingObjective):
    """Mean loss per token plus `output` times the mean divergence from the `teacher`.

    through: ids of old domains; every micro-batch is compared under the experts of one of them, drawn for it by (seed,
    step, micro-batch). Without any, samples are compared under their own.
    """

    def __init__(
        self, teacher: Teacher, output: float, through: Sequence[int] = (), seed: int = 0, auxiliary: bool = True
    ) -> None:
        super().__init__(auxiliary)
        self.teacher = teacher
        self.output = output
        self.through = tuple(through)
        self.seed = seed
        self._zero_logits: Tensor | None = None

    def loss(self, head: nn.Cell, layout: Layout) -> HeadOutput:
        return DistillationLoss(head, layout)

    def extra_placeholders(self, inputs: GraphInputs) -> tuple[Tensor, ...]:
        shape = [inputs.batch, inputs.length]
        logits = [*shape, self.teacher.model.vocab]
        return Tensor(shape=logits, dtype=ms.float32), Tensor(shape=shape, dtype=ms.float32)

    def extra_batches(self, batches: Sequence[RoutedBatch], planner: BatchPlanner) -> list[RoutedBatch]:
        if not self.through:
            return []
        return [self._plan_under_old_domain(index, batch, planner) for index, batch in enumerate(batches)]

    def _plan_under_old_domain(self, index: int, batch: RoutedBatch, planner: BatchPlanner) -> OldDomainBatch:
        point = uniform(key64(self.seed, "old domain", batch.step), np.array([index]))[0]
        # Under the old domain's experts rows of other processes come here than under their own.
        sequences, reads = planner.gather(batch.sequences), planner.reads
        domain = np.full(reads.size, self.through[int(point * len(self.through))], np.int32)
        # The rows' numbers, which routers that resample draw by, are counted from the step's first.
        samples = (batch.step * 1_000_003 + index) * len(sequences) + reads
        no_labels = np.zeros((reads.size, batch.mask.shape[1]), np.float32)
        planned = planner(sequences[reads], domain, samples, batch.step, no_labels)
        return OldDomainBatch(**{**vars(planned), "keys": batch.keys}, compared=batch.mask)

    def prepare(self, batch: RoutedBatch) -> Tensor:
        if self.through and not isinstance(batch, OldDomainBatch):
            # Nothing is compared in this pass, so the teacher does not compute; the graph takes logits all the same.
            if self._zero_logits is None:
                shape = (*batch.tokens.shape, self.teacher.model.vocab)
                self._zero_logits = Tensor(np.zeros(shape, np.float32))
            return self._zero_logits
        return self.teacher.logits(batch)

    def inputs(
        self, batch: RoutedBatch, prepared: Tensor, scale: float, total: float, micro_batches: int
    ) -> tuple[np.ndarray, float, *tuple[Tensor, ...]]:
        weights, auxiliary = super().inputs(batch, prepared, scale, total, micro_batches)
        if isinstance(batch, OldDomainBatch):
            auxiliary = 0.0
        return weights, auxiliary, prepared, Tensor(self._compared(batch) * np.float32(self.output * scale / total))

    def _compared(self, batch: RoutedBatch) -> np.ndarray:
        """[B, S], 1 where the divergence counts."""
        if isinstance(batch, OldDomainBatch):
            return batch.compared
        return np.zeros_like(batch.mask) if self.through else batch.mask

    def measure(self, batch: RoutedBatch, prepared: Tensor, by_sample: np.ndarray) -> BatchLoss:
        count = float(self._compared(batch).sum(dtype=np.float64))
        divergence = float(by_sample[1].astype(np.float64).sum())
        return BatchLoss(by_sample[0], self.units(batch), {"divergence": (divergence, count)} if count else {})
