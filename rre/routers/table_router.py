"""Table routers: the expert of a token follows from its vocabulary id and its domain, by a fixed table.

This is Random Routed Experts (PanGu-Sigma, arXiv 2303.10845): domain -> expert group, then a
fixed random table inside the group; combine weight 1, no gate, no auxiliary loss. Hash layers (arXiv 2106.04426) are
the same with one table over all experts of the layer (`hash`).
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from rre.counted_random import key64, uniform
from rre.dispatch.dispatch_plan import drop_overflow
from rre.routers.router import Router, RouterOptions


class TableRouter(Router):
    """Table router (RRE) on the host: `tables` holds one int32 [vocab] per domain, experts numbered inside the group.

    `resample` draws a fresh uniform expert per occurrence while training; evaluation always uses the table. With
    `capacity_factor` (None = dropless) an expert of a group of E_d takes ceil(factor * rows / E_d) rows of a dispatch
    group, which is one sample: the capacity depends on the sample alone, never on stored experts or processes.
    """

    def __init__(self, options: RouterOptions) -> None:
        super().__init__(options)
        self.tables = options.tables

    def assign(
        self, token_ids: np.ndarray, domain: np.ndarray, step: int, samples: np.ndarray, training: bool
    ) -> np.ndarray:
        batch, length = token_ids.shape
        options, groups = self.options, self.options.groups
        resample = training and options.setting("resample")
        ids_BS = np.empty((batch, length), dtype=np.int64)
        offsets = groups.offsets
        for b in range(batch):
            d = int(domain[b])
            if resample:
                key = key64(options.seed, "resampled routing", step, int(samples[b]), options.layer)
                inside_S = (uniform(key, np.arange(length)) * groups.sizes[d]).astype(np.int64)
            else:
                inside_S = self.tables[groups.names[d]][token_ids[b]]
            ids_BS[b] = offsets[d] + inside_S
        ids_TK = ids_BS.reshape(-1, 1)
        if training and options.capacity_factor is not None:
            per_group = [math.ceil(options.capacity_factor * length / size) for size in groups.sizes]
            ids_TK = drop_overflow(ids_TK, length, np.repeat(per_group, groups.sizes))
        return ids_TK

    def cell(self) -> nn.Cell:
        return PrecomputedRouting()


class PrecomputedRouting(nn.Cell):
    """Table router inside the graph: hands on the plan made on the host, which is all of `routing`."""

    def construct(self, x_TD: Tensor, routing: tuple[Tensor, ...]):
        return routing, None, Tensor(0.0, ms.float32), Tensor([0.0], ms.float32)
