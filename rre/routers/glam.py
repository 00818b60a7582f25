"""GLaM: GShard's top-2 gate in every other layer of a decoder (Du et al. 2021, arXiv 2112.06905, section 4)."""

from __future__ import annotations

from rre.routers.gshard import GShardRouter


class GlamRouter(GShardRouter):
    """Gate, second expert, room and loss are GShard's; the paper's weight of the loss is 0.01.

    What GLaM changes lies in the layers around it: experts in every other one (`model.sparse.pattern`), and gated by
    gelu in those between, while experts have two matrices (`model.feed_forward`, `model.sparse.feed_forward`).
    """
