"""Router interface: from tokens to an expert assignment, and where it is made (host or graph).

A router has a part on the host, which sees vocabulary ids, domains and the step, and a part inside the compiled graph,
which sees hidden states. Table routers (RRE, hash layers) decide everything on the host; learned gates decide inside.
Both hand on the same small structure, so dispatch and experts do not know which router they serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from mindspore import nn

from parallel.comm.exchange import GatheredExchange
from parallel.operator_layout import Layout


@dataclass(frozen=True)
class Assignment:
    """Expert assignment of T tokens, made on the host.

    `expert_ids` int [T, K], DROPPED for a choice that overflowed. Combine weights are 1 and there is no loss to add:
    a router that needs either decides inside the graph.
    """

    expert_ids: np.ndarray


@dataclass(frozen=True)
class ExpertGroups:
    """Expert groups of a sparse layer, one a domain: names and positions on the layer's expert axis."""

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
        """Slice of one domain's experts on the expert axis."""
        index = self.names.index(name)
        start = int(self.offsets[index])
        return slice(start, start + self.sizes[index])


@dataclass(frozen=True)
class RouterOptions:
    """Options of the router of sparse layer number `layer`; every router takes what its definition names.

    `length` S is the tokens of a sample, which is the dispatch group of a capacity; under a learned gate
    `capacity_samples` of them are one. `capacity_factor` None = dropless.
    `top_k`: experts per token. `pooled`: the balance loss is over all layers together. `tables`: the layer's
    routing tables by owner. The weights are those of the losses. `log_weights`: the combine weights
    of `every_expert` are log p. `exchange`: where other processes hold other experts
    and see other tokens.
    """

    groups: ExpertGroups
    hidden: int
    length: int
    layout: Layout
    layer: int = 0
    seed: int = 0
    top_k: int = 1
    capacity_factor: float | None = None
    capacity_samples: int = 1
    auxiliary_weight: float = 0.01
    z_loss_weight: float = 0.0
    importance_weight: float = 0.0
    load_weight: float = 0.0
    renormalise: bool = False
    pooled: bool = False
    jitter: float = 0.0
    resample: bool = False
    tables: Mapping[str, np.ndarray] | None = None
    init_std: float = 0.02
    log_weights: bool = False
    exchange: GatheredExchange | None = None


class Router:
    """Base of all routers of one sparse layer.

    `learned` says where the assignment is made: False -> `assign` on the host, True -> in the graph. `cell()` gives the
    part inside the graph, called as `cell(x_TD, routing) -> (plan, combine weights [T, K] or None, auxiliary loss, rows
    [B, E + 1] where the gate is learned)`; a plan is what the networks of the layer take (`rre.sparse_layer`), rows are
    what each expert took of each sample and, last, how many of its S tokens' choices found no room, divided by K.
    `expert_choice`: experts choose tokens, and the plan begins with the rows that they took (see `ExpertChoiceRouter`).
    """

    learned = False
    expert_choice = False

    @classmethod
    def build(cls, options: RouterOptions) -> Router:
        """Build the router of one layer."""
        raise NotImplementedError

    def assign(
        self, token_ids: np.ndarray, domain: np.ndarray, step: int, samples: np.ndarray, training: bool
    ) -> Assignment:
        """Assign `token_ids` [B, S] of `domain` [B] at `step`; `samples` [B] are global sample numbers."""
        raise NotImplementedError(f"{type(self).__name__} assigns inside the graph")

    def noise_shape(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of the noise that the gate takes for so many tokens while training; () = none."""
        return ()

    def noise(self, step: int, samples: np.ndarray) -> np.ndarray:
        """Draw the noise float32 of B samples: a function of the seed, the step, each sample and the layer."""
        raise NotImplementedError(f"{type(self).__name__} takes no noise")

    def pool(self) -> nn.Cell | None:
        """Build the cell that turns the sum over layers of their auxiliary values [n] into the loss.

        None where the values are losses already.
        """
        return None

    def cell(self) -> nn.Cell:
        """Build the router's part inside the compiled graph."""
        raise NotImplementedError
