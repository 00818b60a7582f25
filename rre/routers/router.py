"""Router interface: from tokens to their experts, and where it is made (host or graph).

A router has a part on the host, which sees vocabulary ids, domains and the step, and a part inside the compiled graph,
which sees hidden states. Table routers (RRE, hash layers) decide everything on the host; learned gates decide inside.
Both hand on the same small structure, so dispatch and experts do not know which router they serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from mindspore import nn

from parallel.comm.exchange import GatheredExchange
from parallel.operator_layout import Layout
from rre.router_specs import RouterSpec


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
    """What the router of sparse layer number `layer` is made from.

    `length` S is the tokens of a sample, which is the dispatch group of a capacity; under a learned gate
    `capacity_samples` of them are one. `capacity_factor` None = dropless. `top_k`: experts per token. `settings`:
    values of the options that the spec names. `tables`: the layer's routing tables by owner. `log_weights`: the
    combine weights of a mixture's gate are log p. `exchange`: where other processes hold other experts and see other
    tokens. `padded`: rows of a training step may be filled up with padding, which a learned gate sends to no expert.
    """

    spec: RouterSpec
    groups: ExpertGroups
    hidden: int
    length: int
    layout: Layout
    layer: int = 0
    seed: int = 0
    top_k: int = 1
    capacity_factor: float | None = None
    capacity_samples: int = 1
    settings: Mapping[str, bool | float | str] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] | None = None
    init_std: float = 0.02
    log_weights: bool = False
    exchange: GatheredExchange | None = None
    padded: bool = False

    def setting(self, name: str):
        """Value of an option of the router: as set, or its default."""
        return self.settings.get(name, self.spec.option(name).default)


class Router:
    """Base of all routers of one sparse layer.

    `learned` says where the assignment is made: False -> `assign` on the host, True -> in the graph. `cell()` gives the
    part inside the graph, called as `cell(x_TD, routing) -> (plan, combine weights [T, K] or None, auxiliary loss, rows
    [B, E + 1] where the gate is learned)`; a plan is what the networks of the layer take (`rre.sparse_layer`), rows are
    what each expert took of each sample and, last, how many of its S tokens' choices found no room, divided by K.
    Where experts choose tokens, the plan begins with the rows that they took (see `ExpertChoiceRouter`).
    """

    def __init__(self, options: RouterOptions) -> None:
        self.options = options

    @property
    def learned(self) -> bool:
        """Whether a gate inside the graph makes the assignment."""
        return self.options.spec.learned

    def assign(
        self, token_ids: np.ndarray, domain: np.ndarray, step: int, samples: np.ndarray, training: bool
    ) -> np.ndarray:
        """Assign `token_ids` [B, S] of `domain` [B] at `step`; `samples` [B] are global sample numbers.

        Returns expert ids int [T, K], DROPPED for a choice that overflowed. Combine weights are 1 and there is no loss
        to add: a router that needs either decides inside the graph."""
        raise NotImplementedError(f"{type(self).__name__} assigns inside the graph")

    def noise_shape(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of the noise that the gate takes for so many tokens while training; () = none."""
        return ()

    def text_shape(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of what tells a learned gate text from padding while training; () = nothing does."""
        return (tokens, 1) if self.options.padded and self.learned else ()

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
