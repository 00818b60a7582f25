"""Gradient reducer: what a step sums over the processes that share it, and the global norm of the sums.

Here of one process, which has all there is. `distributed.gradient_all_reduce` has those of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from pangu_sigma.training.gradients import Gradients
from pangu_sigma.training.schedule import Phase
from pangu_sigma.training.step_metrics import BatchMetrics


class GradientReducer:
    """The sums of one process alone: what it has. Where there are several, all call these methods together."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def total(self, value: float) -> float:
        """The sum, over all rows of the batch, of what each process counted of its own."""
        return value

    def sum_metrics(self, own: BatchMetrics) -> tuple[BatchMetrics, BatchMetrics]:
        """A micro-batch's metrics of the rows that came to this process's experts, and of all rows."""
        return own, own

    def reduce_in_place(self, gradients: Gradients, metrics: Sequence[BatchMetrics], phase: Phase) -> None:
        """Make `gradients` those of the whole batch; `metrics`: of all rows of its micro-batches."""

    def global_norm(self, gradients: Gradients) -> float:
        """The norm of all gradients together; NaN where a sum of squares is negative or NaN."""
        shared, by_layer = gradients.square_sums(self.model.store)
        return root(float(shared.sum()) + by_layer.pop(DOMAIN_EMBEDDING, 0.0) + sum(by_layer.values(), 0.0))


def root(squares: float) -> float:
    """The square root, NaN of what is not a sum of squares."""
    return math.sqrt(squares) if squares >= 0 else math.nan
