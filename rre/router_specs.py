"""Router specs: what a configuration must know of every router before any framework is loaded, one line per router."""

from __future__ import annotations

from dataclasses import dataclass

LAYER = "shared"  # owner of a routing table that belongs to the layer and not to a domain


@dataclass(frozen=True)
class RouterSpec:
    """Properties of one kind of router.

    `learned`: a gate chooses inside the graph, among all experts of the layer. `tables`: who owns a routing table,
    the "domain" (over its group), the "layer" (over all experts), or nobody. `experts_per_token`: k where the
    configuration does not say, None for all of the layer; `fixed` if the router's definition leaves no choice.
    `options`: keys of the configuration that only routers which name them obey. `causal`: whether a token's experts
    depend on it alone.
    `keeps_scale`: whether a token's combine weights add up to 1, so that equal experts are one network.
    `cut`: whether it has a form in a graph that is cut over devices.
    """

    learned: bool
    tables: str | None = None
    experts_per_token: int | None = 1
    fixed: bool = False
    options: frozenset[str] = frozenset()
    causal: bool = True
    keeps_scale: bool = True
    cut: bool = False


ROUTER_SPECS = {
    "rre": RouterSpec(False, "domain", fixed=True, options=frozenset({"resample"}), cut=True),
    "hash": RouterSpec(False, "layer", fixed=True, cut=True),
    "switch": RouterSpec(True, fixed=True, options=frozenset({"jitter"}), keeps_scale=False, cut=True),
    "gshard": RouterSpec(True, experts_per_token=2, fixed=True, cut=True),
    "glam": RouterSpec(True, experts_per_token=2, fixed=True, cut=True),
    "noisy_top_k": RouterSpec(True, experts_per_token=4, cut=True),
    "olmoe": RouterSpec(
        True, experts_per_token=8, options=frozenset({"renormalise", "balance"}), keeps_scale=False, cut=True
    ),
    "expert_choice": RouterSpec(True, experts_per_token=2, causal=False, keeps_scale=False),
    # Of no sparse layer: the gate of a top layer that is an adaptive mixture.
    "every_expert": RouterSpec(True, experts_per_token=None, fixed=True),
}
