"""Options of attention: the keys `model.attention` and what is known of them before a framework is loaded; they act in
`layers.attention`."""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.config.parts.part_spec import PartSpec
from pangu_sigma.config.section import Field, Section
from rre.router_specs import OLMOE_NETWORK, PANGU_NETWORK


@dataclass(frozen=True)
class QkNormSpec(PartSpec):
    """Normalisation of projected queries and keys. `norms`: names of a layer's norms, each of the model's kind."""

    norms: tuple[str, ...] = ()


QK_NORM = {
    True: QkNormSpec("true", exports=(OLMOE_NETWORK,), norms=("query_norm", "key_norm")),
    False: QkNormSpec("false", exports=(PANGU_NETWORK,), in_fused_decode=True),
}


class AttentionConfig(Section, resume="fixed", init_from="equal"):
    """Options of the attention part."""

    qk_norm: bool = False
    """Whether the projected queries and keys are normalised, each over its whole width."""
    dropout: float = Field(0.0, ge=0, lt=1, init_from="free")
    """Share of attention weights dropped while training."""

    @property
    def qk_norm_spec(self) -> QkNormSpec:
        """What `qk_norm` is."""
        return QK_NORM[self.qk_norm]

    @property
    def composed_only(self) -> bool:
        """Whether attention is composed of MindSpore's operators, in float32, on every device: no compiled kernel and
        no device's own operator drops attention weights."""
        return self.dropout > 0
