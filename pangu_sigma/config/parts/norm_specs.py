"""Norms: what is known of each normalisation before a framework is loaded; their cells are `layers.norms`.

Legend: D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pangu_sigma.config.parts.part_spec import PartSpec, by_name
from rre.router_specs import OLMOE_NETWORK, PANGU_NETWORK


@dataclass(frozen=True)
class NormSpec(PartSpec):
    """A normalisation. `tensors`: its parameters [D] and the value that each begins with."""

    tensors: dict[str, float] = field(default_factory=dict)


LAYER_NORM = NormSpec(
    "layernorm", "norms:LayerNormCell", exports=(PANGU_NETWORK,), in_fused_decode=True,
    tensors={"gamma": 1.0, "beta": 0.0},
)  # fmt: skip
RMS_NORM = NormSpec("rmsnorm", "norms:RmsNormCell", exports=(OLMOE_NETWORK,), tensors={"gamma": 1.0})
NORM_SPECS = by_name(LAYER_NORM, RMS_NORM)
