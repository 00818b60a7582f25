"""Routed batch: a micro-batch's arrays with the routing of every sparse layer, as the batch planner makes it on the
host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rre.dispatch.capacity_dispatch import CapacityPlan
from rre.dispatch.dispatch_plan import DispatchPlan


@dataclass(frozen=True)
class ReservedRowsPlan:
    """Dispatch plan of a layer whose slots have reserved rows (capacity dispatch): `experts` [N] are the slots' owners,
    `counts` [N] the rows that they take."""

    experts: np.ndarray
    counts: np.ndarray
    plan: CapacityPlan


@dataclass(frozen=True)
class RoutedBatch:
    """One micro-batch of B samples and S positions with its routing: everything a graph needs of it.

    `step`: the data's, which a skipped or rolled back optimizer step does not turn back.
    tokens, labels, positions, segments int32 [B, S]; mask float32 [B, S] (0 where a label does not count); domain and
    keys int32 [B]; `plans`: per table-routed sparse layer, of the rows that come to this process and the experts that
    it holds; `noise`: per noisy gate; `load` [layers, E]: rows of these samples at each of a table-routed layer's
    experts; `dropped`: rows per layer and domain; `filled` [B]: positions of each row that hold text, not padding.
    """

    step: int
    tokens: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    domain: np.ndarray
    keys: np.ndarray
    plans: tuple[DispatchPlan | ReservedRowsPlan | None, ...]
    noise: tuple[np.ndarray | None, ...]
    load: np.ndarray
    dropped: np.ndarray
    filled: np.ndarray

    @property
    def text(self) -> np.ndarray:
        """float32 [B, S]: 1 where a position holds text, 0 where padding fills the row up, which is at its end."""
        return (np.arange(self.tokens.shape[1]) < self.filled[:, None]).astype(np.float32)

    @property
    def sequences(self) -> np.ndarray:
        """The batch's rows with their last labels, as they were given to the planner: int32 [B, S + 1]."""
        return np.concatenate([self.tokens, self.labels[:, -1:]], axis=1)
