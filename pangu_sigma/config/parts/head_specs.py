"""Output heads: what is known of each before a framework is loaded; their cells are `layers.heads`."""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.config.parts.part_spec import PartSpec, by_name
from rre.router_specs import OLMOE_NETWORK, PANGU_NETWORK


@dataclass(frozen=True)
class HeadSpec(PartSpec):
    """An output head. `is_tied`: its matrix is the word embedding."""

    is_tied: bool = False


TIED = HeadSpec("tied", "heads:TiedHead", exports=(PANGU_NETWORK, OLMOE_NETWORK), in_fused_decode=True, is_tied=True)
UNTIED = HeadSpec("untied", "heads:UntiedHead", exports=(OLMOE_NETWORK,))
HEAD_SPECS = by_name(TIED, UNTIED)
