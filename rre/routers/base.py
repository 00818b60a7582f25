"""What every router has in common: from tokens to an assignment, and where it is made.

A router has a part on the host, which sees vocabulary ids, domains and the step, and a part inside the compiled graph,
which sees hidden states. Table routers (RRE, hash layers) decide everything on the host; learned gates decide inside.
Both hand on the same small structure, so dispatch and experts do not know which router they serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import nn


@dataclass(frozen=True)
class Assignment:
    """What a router decided for T tokens.

    `expert_ids` int [T, k], DROPPED for a choice that overflowed. Combine weights are 1 and there is no loss to add:
    a router that needs either decides inside the graph.
    """

    expert_ids: np.ndarray


@dataclass(frozen=True)
class Groups:
    """The expert groups of a sparse layer: domain names and their experts' places on the layer's expert axis."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def offsets(self) -> np.ndarray:
        """First expert of each group, int64 [domains]."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @property
    def total(self) -> int:
        """Number of experts in the layer."""
        return int(sum(self.sizes))

    def of(self, name: str) -> slice:
        """Place of one domain's experts on the expert axis."""
        index = self.names.index(name)
        start = int(self.offsets[index])
        return slice(start, start + self.sizes[index])


class Router:
    """Base of all routers of one sparse layer.

    `learned` says where the assignment is made: False -> `assign` on the host, True -> in the graph. `cell()` gives the
    part inside the graph, called as `cell(x_TD, routing) -> (plan, combine weights or None, auxiliary loss, kept rows
    [B, E] where the gate is learned)`; a plan is what the networks of the layer take (see `rre.layer`).
    """

    learned = False

    def assign(
        self, token_ids: np.ndarray, domain: np.ndarray, step: int, samples: np.ndarray, training: bool
    ) -> Assignment:
        """Assign `token_ids` [B, S] of `domain` [B] at `step`; `samples` [B] are global sample numbers."""
        raise NotImplementedError(f"{type(self).__name__} assigns inside the graph")

    def cell(self) -> nn.Cell:
        """The router's part inside the compiled graph."""
        raise NotImplementedError
