"""Router specs: what must be known of every router before a framework is loaded.

Whoever treats routers differently asks their spec; no other file of the packages compares a router's name. A router is
its spec here and its class in a file of `rre/routers/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Exported networks: those whose parts an export format writes.
PANGU_NETWORK, OLMOE_NETWORK = "PanGu-Σ", "OLMoE"
LAYER = "shared"  # owner of a routing table that belongs to the layer and not to a domain


@dataclass(frozen=True)
class RouterOption:
    """A key `model.sparse.{name}`, which only routers that list it obey.

    `default` says the type too, unless `choices` are the allowed words; numbers are `at_least` so large and `below` so
    large. `{routers}` in the one-line `description` stands for the routers that have the option. `weighs_loss`: it is
    the weight of a term of the auxiliary loss, so that a value has no effect on other routers, but is no mistake there;
    other options are refused with `no_effect`. `defines_network`: whether a trained model is another function with
    another value. `unit_scale`: whether a token's combine weights add up to 1 while it is true. `not_on_mesh`: values
    that have no form in a graph that is cut over devices.
    """

    name: str
    default: bool | float | str
    description: str
    choices: tuple[str, ...] = ()
    at_least: int | None = None
    below: int | None = None
    weighs_loss: bool = False
    no_effect: str = "has no effect on the {router}"
    defines_network: bool = False
    unit_scale: bool = False
    not_on_mesh: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateWeight:
    """A trained tensor `{layer}.router.{name}` of a learned gate.

    `dimensions` are "hidden" and "experts"; the latter, a column for each expert of the layer, is the last. `initial`:
    the constant that it begins as, None for Normal(model.init_std).
    """

    name: str
    dimensions: tuple[str, ...] = ("hidden", "experts")
    initial: float | None = None

    @property
    def by_expert(self) -> bool:
        """Whether it has a column for each expert."""
        return self.dimensions[-1:] == ("experts",)

    def shape(self, hidden: int, experts: int) -> tuple[int, ...]:
        """Its shape in a layer of so many experts."""
        return tuple({"hidden": hidden, "experts": experts}[dimension] for dimension in self.dimensions)


@dataclass(frozen=True)
class RouterSpec:
    """Properties of one kind of router.

    `implementation`: its class, `module:Class`. `tables`: who owns a routing table, the "domain" (over its group), the
    "layer" (over all experts), or nobody, under a learned gate.
    `experts_per_token`: k where the configuration does not say, None for all of the layer; `fixed` if the router's
    definition leaves no choice. `needs_unchosen_expert`: whether k must be less than the experts of a layer.
    `experts_choose`: each expert takes a fixed number of tokens, not each token its experts. `extra_weights`: what a
    learned gate trains beside its `weight`. `keeps_scale`: whether a token's combine weights add up to 1, so that equal
    experts are one network. `has_capacity`: whether an expert can run out of room. `has_mesh_form`: whether it has a
    form in a graph that is cut over devices. `exports`: exported networks that know it. `chooses`, `combine_weights`,
    `auxiliary_loss` and `source` are its row in docs/configuration.md.
    """

    name: str
    implementation: str
    tables: str | None = None
    experts_per_token: int | None = 1
    fixed: bool = False
    needs_unchosen_expert: bool = False
    experts_choose: bool = False
    extra_weights: tuple[GateWeight, ...] = ()
    options: tuple[RouterOption, ...] = ()
    keeps_scale: bool = True
    has_capacity: bool = True
    has_mesh_form: bool = True
    exports: tuple[str, ...] = ()
    chooses: str = ""
    combine_weights: str = "1"
    auxiliary_loss: str = "none"
    source: str = ""

    @property
    def learned(self) -> bool:
        """Whether a gate chooses inside the graph, among all experts of the layer; a table chooses outside."""
        return self.tables is None

    @property
    def separates_domains(self) -> bool:
        """Whether no gate or table couples the domains: each can come, go and be cut out without the others."""
        return self.tables == "domain"

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on no later token."""
        return not self.experts_choose

    @property
    def needs_all_experts(self) -> bool:
        """Whether a step needs every expert at hand, because which ones it activates is decided inside its graph."""
        return self.learned

    @property
    def gate_weights(self) -> tuple[GateWeight, ...]:
        """The trained tensors of a learned gate."""
        return (GateWeight("weight"), *self.extra_weights) if self.learned else ()

    def gate_weight(self, name: str) -> GateWeight:
        """The tensor of that name. Raises StopIteration for another router's."""
        return next(weight for weight in self.gate_weights if weight.name == name)

    def option(self, name: str) -> RouterOption:
        """The option of that name. Raises StopIteration for another router's."""
        return next(option for option in self.options if option.name == name)

    def table_owners(self, domains: Iterable[str]) -> tuple[str, ...]:
        """Owners of a layer's routing tables: the domains, LAYER, or none."""
        return {"domain": tuple(domains), "layer": (LAYER,), None: ()}[self.tables]


def _loss_weight(name: str, default: float, loss: str) -> RouterOption:
    return RouterOption(name, default, f"Weight of the {loss} of {{routers}}.", at_least=0, weighs_loss=True)


_BALANCE_LOSS = _loss_weight("aux_loss_weight", 0.01, "balance loss")

RRE = RouterSpec(
    "rre", "rre.routers.table_router:TableRouter", tables="domain", fixed=True, exports=(PANGU_NETWORK,),
    options=(
        RouterOption(
            "resample", False, "Whether training draws a fresh expert for every occurrence instead of using the table.",
            no_effect="the {router} has no table of a domain to draw from",
        ),
    ),
    chooses="domain → group, then a fixed random table: vocabulary id → expert",
    source="PanGu-Σ, 2303.10845",
)  # fmt: skip
HASH = RouterSpec(
    "hash", "rre.routers.hash:HashRouter", tables="layer", fixed=True,
    chooses="one fixed table over all experts", source="2106.04426",
)  # fmt: skip
SWITCH = RouterSpec(
    "switch", "rre.routers.switch:SwitchRouter", fixed=True, keeps_scale=False, exports=(PANGU_NETWORK,),
    options=(
        _BALANCE_LOSS,
        RouterOption(
            "jitter", 0.0, "Half-width of the noise multiplied onto the gate's input of {routers} in training.",
            at_least=0, below=1,
        ),
    ),
    chooses="the largest p (`jitter` on its input)", combine_weights="p",
    auxiliary_loss="`aux_loss_weight` · E Σ f_e P_e", source="2101.03961",
)  # fmt: skip
GSHARD = RouterSpec(
    "gshard", "rre.routers.gshard:GShardRouter", experts_per_token=2, fixed=True, options=(_BALANCE_LOSS,),
    chooses="the two largest p, the second with probability min(1, 2 g₂)",
    combine_weights="g: both p, divided by their sum",
    auxiliary_loss="as above, f of first choices", source="2006.16668",
)  # fmt: skip
GLAM = RouterSpec(
    "glam", "rre.routers.glam:GlamRouter", experts_per_token=2, fixed=True, options=(_BALANCE_LOSS,),
    chooses="as `gshard`", combine_weights="as `gshard`", auxiliary_loss="as `gshard`", source="2112.06905",
)  # fmt: skip
NOISY_TOP_K = RouterSpec(
    "noisy_top_k", "rre.routers.noisy_top_k:NoisyTopKRouter", experts_per_token=4, needs_unchosen_expert=True,
    # It begins with the same noise for every expert (Shazeer et al. 2017, appendix A).
    extra_weights=(GateWeight("noise_weight", initial=0.0),),
    options=(
        _loss_weight("importance_loss_weight", 0.1, "importance loss"),
        _loss_weight("load_loss_weight", 0.1, "load loss"),
    ),
    chooses="the k largest h = x W_g + N(0, 1) softplus(x W_noise)", combine_weights="softmax over the k",
    auxiliary_loss="`importance_loss_weight` · CV(Σ gates)² + `load_loss_weight` · CV(load)²", source="1701.06538",
)  # fmt: skip
OLMOE = RouterSpec(
    "olmoe", "rre.routers.olmoe:OlmoeRouter", experts_per_token=8, keeps_scale=False, exports=(OLMOE_NETWORK,),
    options=(
        _BALANCE_LOSS,
        RouterOption(
            "balance", "per_layer",
            "Form of olmoe's balance loss: each layer's own, added up, or Hugging Face's, pooled over layers.",
            choices=("per_layer", "pooled"), not_on_mesh=("pooled",),
        ),
        _loss_weight("z_loss_weight", 0.001, "z-loss"),
        RouterOption(
            "renormalise", False,
            "Whether olmoe divides a token's combine weights by their sum; OLMoE itself does not.",
            defines_network=True, unit_scale=True,
        ),
    ),
    chooses="the k largest p", combine_weights="p (`renormalise`: divided by their sum)",
    auxiliary_loss="`aux_loss_weight` · E Σ f_e P_e, f divided by k, + `z_loss_weight` · mean (logsumexp)²; `balance: "
    "pooled` is Hugging Face's",
    source="2409.02060",
)  # fmt: skip
EXPERT_CHOICE = RouterSpec(
    "expert_choice", "rre.routers.expert_choice:ExpertChoiceRouter", experts_per_token=2, experts_choose=True,
    keeps_scale=False, has_capacity=False, has_mesh_form=False,
    chooses="every expert its best S k / E tokens of a sample", combine_weights="p", source="2202.09368",
)  # fmt: skip
# The gate of a top layer that is an adaptive mixture; of no sparse layer.
MIXTURE_GATE = RouterSpec(
    "every_expert", "rre.routers.every_expert:EveryExpertRouter", experts_per_token=None, fixed=True,
    has_capacity=False, has_mesh_form=False,
)  # fmt: skip

# Routers of sparse layers by name; the first is the default.
ROUTER_SPECS = {
    spec.name: spec for spec in (RRE, HASH, SWITCH, GSHARD, GLAM, NOISY_TOP_K, OLMOE, EXPERT_CHOICE)
}  # fmt: skip
ROUTER_OPTIONS = {option.name: option for spec in ROUTER_SPECS.values() for option in spec.options}


def routers_that(condition: Callable[[RouterSpec], bool]) -> str:
    """Names of the routers with a property, as a sentence lists them: `rre or hash`."""
    return " or ".join(name for name, spec in ROUTER_SPECS.items() if condition(spec))


def routers_with(option: str) -> list[str]:
    """Names of the routers that obey an option."""
    return [name for name, spec in ROUTER_SPECS.items() if any(option == own.name for own in spec.options)]
