"""Position embeddings: what is known of each before a framework is loaded; their cells are `layers.positions`.

Legend: D hidden width, P positions of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.config.parts.part_spec import PartSpec, by_name
from rre.router_specs import OLMOE_NETWORK, PANGU_NETWORK


@dataclass(frozen=True)
class PositionSpec(PartSpec):
    """How positions enter. `has_table`: by rows of a learned table [P, D]; `rotates`: by rotating queries and keys."""

    has_table: bool = False
    rotates: bool = False


LEARNED = PositionSpec(
    "learned", "positions:LearnedPositions", exports=(PANGU_NETWORK,), in_fused_decode=True, has_table=True
)
ROPE = PositionSpec("rope", "positions:RotaryPositions", exports=(OLMOE_NETWORK,), rotates=True)
POSITION_SPECS = by_name(LEARNED, ROPE)
