"""Feed-forward networks of dense layers, experts and shared experts: what is known of their kinds, activations and
biases before a framework is loaded. Cells: `layers.feed_forward`, and `rre`'s for experts."""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.config.parts.part_spec import PartSpec, by_name
from rre.feed_forward_spec import FeedForwardSpec
from rre.router_specs import OLMOE_NETWORK, PANGU_NETWORK


@dataclass(frozen=True)
class FeedForwardKind(PartSpec):
    """A feed-forward network. `gate`: activation of its gate, by definition; None without a gate (Shazeer 2020, arXiv
    2002.05202)."""

    gate: str | None = None

    @property
    def gateless(self) -> bool:
        """Whether its activation and biases are free."""
        return self.gate is None

    def form(self, activation: str, biases: bool) -> FeedForwardSpec:
        """What a network of the kind is made of."""
        return FeedForwardSpec(activation, not self.gateless, biases)


FAST_GELU = PartSpec("fast_gelu", exports=(PANGU_NETWORK,), in_fused_decode=True)
GELU = PartSpec("gelu", exports=(PANGU_NETWORK,), in_fused_decode=True)
SILU = PartSpec("silu", exports=(OLMOE_NETWORK,))
ACTIVATION_SPECS = by_name(FAST_GELU, GELU, SILU)

MLP = FeedForwardKind("mlp", "feed_forward:DenseFeedForward", exports=(PANGU_NETWORK,), in_fused_decode=True)
SWIGLU = FeedForwardKind("swiglu", "feed_forward:DenseFeedForward", exports=(OLMOE_NETWORK,), gate=SILU.name)
GEGLU = FeedForwardKind("geglu", "feed_forward:DenseFeedForward", gate=GELU.name)
FEED_FORWARD_KINDS = by_name(MLP, SWIGLU, GEGLU)

# Of the keys that say yes or no.
BIASES = {
    True: PartSpec("true", exports=(PANGU_NETWORK,), in_fused_decode=True),
    False: PartSpec("false", exports=(OLMOE_NETWORK,)),
}
SHARED_EXPERT = {
    True: PartSpec("true"),
    False: PartSpec("false", exports=(PANGU_NETWORK, OLMOE_NETWORK), in_fused_decode=True),
}
