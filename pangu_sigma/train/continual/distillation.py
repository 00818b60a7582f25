"""The objective of a phase that stays near the previous model by its outputs: the loss plus a divergence.

objective = mean over tokens of -log p(label) + output * mean over tokens of KL(q || p), q the previous model's
next-token distribution at the same place of the same text, both in nats (Li and Hoiem 2016, arXiv 1606.09282; as output
regularisation in Chen et al. 2023, arXiv 2305.12281). The routers' losses come beside it as ever.

Where every domain has experts of its own, the new text can also be read through an *old* domain's experts by both
models, as learning without forgetting compares the old tasks' outputs on the new task's data. That costs a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_sigma.model.batch_planner import BatchPlanner, RoutedBatch
from pangu_sigma.model.graph_inputs import GraphSignature
from pangu_sigma.model.pangu import PanGuSigma, TrainingLoss
from pangu_sigma.train.continual.teacher import Reference
from pangu_sigma.train.objective import Measured, Objective
from parallel.operator_layout import Layout
from rre.counted_random import key64, uniform


class LossAgainst(TrainingLoss):
    """`TrainingLoss` with two more inputs: the previous model's logits [B, S, V] and weights [B, S] of the divergence.

    The sums [2, B] in its outputs are of the losses and of the divergences.
    """

    def construct(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor,
        auxiliary_weight: Tensor,
        positions: Tensor,
        segments: Tensor,
        domain: Tensor,
        keys: Tensor,
        previous: Tensor,
        held: Tensor,
        *flat: Tensor,
    ):
        h, auxiliary, counts = self.net(tokens, positions, segments, domain, keys, self.bounds, *flat)
        losses, apart = self.net.head.against(h, labels, domain, self.net.word_table(flat), previous)
        objective = self.sum(self.mul(losses, weights)) + self.sum(self.mul(apart, held))
        objective = objective + auxiliary * auxiliary_weight
        both = (
            self.sum(self.mul(losses, ops.cast(ops.greater(weights, 0.0), ms.float32)), 1),
            self.sum(self.mul(apart, ops.cast(ops.greater(held, 0.0), ms.float32)), 1),
        )
        return objective, ops.stop_gradient(ops.stack(both)), ops.stop_gradient(auxiliary), counts


@dataclass(frozen=True)
class Beside(RoutedBatch):
    """The text of a micro-batch once more, as if of an old domain: no label counts, and `held` [B, S] is compared."""

    held: np.ndarray


class RegularisedObjective(Objective):
    """Mean loss per token plus `output` times the mean divergence from the frozen `reference`.

    through: numbers of old domains; every micro-batch is compared under the experts of one of them, drawn for it by
    (seed, step, micro-batch). Without any, samples are compared under their own.
    """

    def __init__(self, reference: Reference, output: float, through: Sequence[int] = (), seed: int = 0) -> None:
        super().__init__()
        self.reference = reference
        self.output = output
        self.through = tuple(through)
        self.seed = seed
        self._nothing: Tensor | None = None

    def cell(self, net: PanGuSigma, layout: Layout, signature: GraphSignature) -> nn.Cell:
        return LossAgainst(net, layout, signature)

    def extra_placeholders(self, signature: GraphSignature) -> tuple[Tensor, ...]:
        shape = [signature.batch, signature.length]
        logits = [*shape, self.reference.model.vocab]
        return Tensor(shape=logits, dtype=ms.float32), Tensor(shape=shape, dtype=ms.float32)

    def beside(self, batches: Sequence[RoutedBatch], planner: BatchPlanner) -> list[RoutedBatch]:
        return [self._beside(part, batch, planner) for part, batch in enumerate(batches)] if self.through else []

    def _beside(self, part: int, batch: RoutedBatch, planner: BatchPlanner) -> Beside:
        point = uniform(key64(self.seed, "old domain", batch.step), np.array([part]))[0]
        # Under the old domain's experts rows of other processes come here than under their own.
        by_rank, reads = planner.model.processes.gather(batch.sequences), planner.reads
        every = by_rank.reshape(-1, by_rank.shape[-1])
        domain = np.full(reads.size, self.through[int(point * len(self.through))], np.int32)
        # The rows' numbers, which routers that resample draw by, are counted from the step's first.
        samples = (batch.step * 1_000_003 + part) * len(every) + reads
        nothing = np.zeros((reads.size, batch.mask.shape[1]), np.float32)
        planned = planner(every[reads], domain, samples, batch.step, nothing)
        return Beside(**{**vars(planned), "keys": batch.keys}, held=batch.mask)

    def prepare(self, batch: RoutedBatch) -> Tensor:
        if self.through and not isinstance(batch, Beside):
            if self._nothing is None:
                shape = (*batch.tokens.shape, self.reference.model.vocab)
                self._nothing = Tensor(np.zeros(shape, np.float32))
            return self._nothing
        return self.reference.logits(batch)

    def inputs(
        self, batch: RoutedBatch, prepared: Tensor, scale: float, total: float, parts: int
    ) -> tuple[Tensor, ...]:
        weights, auxiliary = super().inputs(batch, prepared, scale, total, parts)
        if isinstance(batch, Beside):
            auxiliary = Tensor(0.0, ms.float32)
        return weights, auxiliary, prepared, Tensor(self._held(batch) * np.float32(self.output * scale / total))

    def _held(self, batch: RoutedBatch) -> np.ndarray:
        if isinstance(batch, Beside):
            return batch.held
        return np.zeros_like(batch.mask) if self.through else batch.mask

    def measure(self, batch: RoutedBatch, prepared: Tensor, by_sample: np.ndarray) -> Measured:
        count = float(self._held(batch).sum(dtype=np.float64))
        apart = float(by_sample[1].astype(np.float64).sum())
        return Measured(by_sample[0], self.units(batch), {"divergence": (apart, count)} if count else {})
