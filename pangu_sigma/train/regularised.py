"""The objective of a phase that stays near the previous model by its outputs: the loss plus a divergence.

objective = mean over tokens of -log p(label) + output * mean over tokens of KL(q || p), q the previous model's
next-token distribution at the same place of the same text under the same domain, both in nats (Li and Hoiem 2016, arXiv
1606.09282; as output regularisation in Chen et al. 2023, arXiv 2305.12281). The routers' losses come beside it as ever.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_sigma.model.inputs import PlannedBatch
from pangu_sigma.model.pangu import PanGuSigma, TrainingLoss
from pangu_sigma.model.signature import FlatSignature
from pangu_sigma.train.objective import Measured, Objective
from pangu_sigma.train.reference import Reference
from parallel.layout import Layout


class LossAgainst(TrainingLoss):
    """`TrainingLoss` with two more inputs: the previous model's logits [B, S, V] and the weight of the divergence.

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
        output_weight: Tensor,
        *flat: Tensor,
    ):
        h, auxiliary, counts = self.net(tokens, positions, segments, domain, keys, self.bounds, *flat)
        losses, apart = self.net.head.against(h, labels, domain, self.net.word_table(flat), previous)
        objective = self.sum(self.mul(losses, weights)) + self.sum(self.mul(apart, weights)) * output_weight
        objective = objective + auxiliary * auxiliary_weight
        mask = ops.cast(ops.greater(weights, 0.0), ms.float32)
        both = (self.sum(self.mul(losses, mask), 1), self.sum(self.mul(apart, mask), 1))
        return objective, ops.stop_gradient(ops.stack(both)), ops.stop_gradient(auxiliary), counts


class RegularisedObjective(Objective):
    """Mean loss per token plus `output` times the mean divergence from the frozen `reference`."""

    def __init__(self, reference: Reference, output: float) -> None:
        super().__init__()
        self.reference = reference
        self.output = output

    def cell(self, net: PanGuSigma, layout: Layout, signature: FlatSignature) -> nn.Cell:
        return LossAgainst(net, layout, signature)

    def extra_placeholders(self, signature: FlatSignature) -> tuple[Tensor, ...]:
        shape = [signature.batch, signature.length, self.reference.model.vocab]
        return Tensor(shape=shape, dtype=ms.float32), Tensor(shape=[], dtype=ms.float32)

    def prepare(self, batch: PlannedBatch) -> Tensor:
        return self.reference.logits(batch)

    def inputs(
        self, batch: PlannedBatch, prepared: Tensor, scale: float, total: float, parts: int
    ) -> tuple[Tensor, ...]:
        plain = super().inputs(batch, prepared, scale, total, parts)
        return *plain, prepared, Tensor(self.output, ms.float32)

    def measure(self, batch: PlannedBatch, prepared: Tensor, by_sample: np.ndarray) -> Measured:
        units = self.units(batch)
        apart = float(by_sample[1].astype(np.float64).sum())
        return Measured(by_sample[0], units, {"divergence": (apart, float(units.sum()))})
