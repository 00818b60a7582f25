"""Training objective: the loss that a step minimises, its inputs and what it reports.

The trainer knows batches, gradients and updates; an objective knows what the loss is. One whose loss needs more than
the batch (a teacher's outputs, say) hands it to its cell as extra inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn

from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.forward_pass import HeadOutput, WeightedLoss
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.routed_batch import RoutedBatch
from parallel.operator_layout import Layout


@dataclass(frozen=True)
class BatchLoss:
    """Losses of a micro-batch of B rows, for metrics.

    losses: sums [B]. units: tokens (or pairs) that each sums over, [B]. extra_metrics: name -> (sum, count) of whatever
    else the objective reports.
    """

    losses: np.ndarray
    units: np.ndarray
    extra_metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class TrainingObjective:
    """Mean loss per token whose label counts, plus the routers' auxiliary losses unless they are switched off.

    Subclasses change the loss: `loss` computes it, `prepare` makes what it needs beside the batch, once for each
    micro-batch, and `inputs` hands that over. `auxiliary`: whether the routers' losses count.
    """

    rows_per_sample = 1

    def __init__(self, auxiliary: bool = True) -> None:
        self.auxiliary = auxiliary

    def loss(self, head: nn.Cell, layout: Layout) -> HeadOutput:
        """What computes the loss of a micro-batch from the network's hidden rows and the extra inputs."""
        return WeightedLoss(head, layout)

    def extra_placeholders(self, inputs: GraphInputs) -> tuple[Tensor, ...]:
        """Shapes of the extra inputs."""
        return ()

    def units(self, batch: RoutedBatch) -> np.ndarray:
        """What the mean runs over, counted per row: float64 [B]; its sum over the step divides the loss."""
        return batch.mask.sum(axis=1, dtype=np.float64)

    def extra_batches(self, batches: Sequence[RoutedBatch], planner: BatchPlanner) -> list[RoutedBatch]:
        """Further micro-batches of the step, whose labels do not count: what else the objective asks of the model."""
        return []

    def prepare(self, batch: RoutedBatch) -> np.ndarray | None:
        """What the loss needs beside the batch; computed before the step's graph runs."""
        return None

    def inputs(
        self, batch: RoutedBatch, prepared: np.ndarray | None, scale: float, total: float, micro_batches: int
    ) -> tuple[np.ndarray, float, *tuple[Tensor, ...]]:
        """(weights [B, S], weight of the auxiliary losses, extra inputs …) of one of `micro_batches` micro-batches.

        scale: the loss scale; total: the units of the whole step.
        """
        return batch.mask * np.float32(scale / total), self.auxiliary_weight(scale, micro_batches)

    def auxiliary_weight(self, scale: float, micro_batches: int) -> float:
        """Weight of the auxiliary losses in one of `micro_batches`: their mean counts once."""
        return scale / micro_batches if self.auxiliary else 0.0

    def measure(self, batch: RoutedBatch, prepared: np.ndarray | None, by_sample: np.ndarray) -> BatchLoss:
        """The losses of a micro-batch from its rows' sums [B], which its cell gave."""
        return BatchLoss(by_sample, self.units(batch))
