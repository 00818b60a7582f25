"""Hash layers: vocabulary id -> expert by one fixed table of the layer (Roller et al. 2021, arXiv 2106.04426)."""

from __future__ import annotations

import math

import numpy as np

from rre.dispatch.dispatch_plan import drop_overflow
from rre.router_specs import LAYER
from rre.routers.table_router import TableRouter


class HashRouter(TableRouter):
    """The table int32 [vocab] of the layer, which all domains share, names one of all its experts; combine weight 1, no
    auxiliary loss. It is drawn at random or balanced by frequency (section 3 of the paper), see `rre.routing_tables`.

    With `capacity_factor` an expert takes ceil(factor * S / E) rows of a sample while training.
    """

    def assign(
        self, token_ids: np.ndarray, domain: np.ndarray, step: int, samples: np.ndarray, training: bool
    ) -> np.ndarray:
        ids_TK = self.tables[LAYER][token_ids].astype(np.int64).reshape(-1, 1)
        factor = self.options.capacity_factor
        if training and factor is not None:
            length, experts = token_ids.shape[1], self.options.groups.total
            ids_TK = drop_overflow(ids_TK, length, np.full(experts, math.ceil(factor * length / experts)))
        return ids_TK
