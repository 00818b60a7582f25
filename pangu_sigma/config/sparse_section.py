"""The `model.sparse` section: which layers are sparse, how a token finds its expert and how rows travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import create_model

from pangu_sigma.config.parts.feed_forward_kinds import FEED_FORWARD_KINDS
from pangu_sigma.config.section import Field, Section, Violations
from pangu_sigma.wording import bare
from rre.router_specs import ROUTER_OPTIONS, ROUTER_SPECS, RouterOption, RouterSpec, routers_with

RouterName = Literal[tuple(ROUTER_SPECS)]
_BY_TABLE = [name for name, spec in ROUTER_SPECS.items() if not spec.learned]
_OF_ANY_K = [name for name, spec in ROUTER_SPECS.items() if not spec.fixed]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


class SparseKeys(Section):
    """Keys of `model.sparse` in their order; those without a value here are options of routers, which
    `rre.router_specs` defines."""

    pattern: Literal["top", "every_other", "every"] = "top"
    """Which layers are sparse: the top ones, every second block (not the first), or all blocks."""
    layers: int = Field(0, ge=0)
    """With pattern top, how many of the top layers are sparse; 0 gives a dense PanGu-α; a preset has its own."""
    include_query_layer: bool = False
    """Whether the query layer is sparse too; it then counts as one of the top layers."""
    router: RouterName = Field(
        next(iter(ROUTER_SPECS)),
        description=f"How tokens and experts meet: {_listed(_BY_TABLE)} by fixed tables, all others by a learned gate.",
    )
    top_k: int | None = Field(
        None, ge=1, description=f"Experts per token of {', '.join(_OF_ANY_K)}; null takes the router's own."
    )
    table: Literal["uniform", "frequency"] = Field("uniform", init_from="free")
    """How a routing table is drawn: equal numbers of vocabulary ids, or balanced by their frequency."""
    resample: bool
    dispatch: Literal["dropless", "capacity"] = Field("dropless", init_from="free")
    """Whether every row reaches its expert, or only as many as an expert may take."""
    capacity_factor: float = Field(1.25, gt=0, init_from="free")
    """Rows an expert may take under capacity dispatch, as a multiple of an even share."""
    capacity_samples: int = Field(1, ge=1, init_from="free")
    """Samples that share an expert's room under a learned gate and capacity dispatch: GShard's group."""
    aux_loss_weight: float
    balance: str
    z_loss_weight: float
    importance_loss_weight: float
    load_loss_weight: float
    renormalise: bool
    feed_forward: Literal[tuple(FEED_FORWARD_KINDS)] | None = None
    """Kind of every expert's network; null takes model.feed_forward, the dense layers'."""
    shared_expert: bool = False
    """Whether sparse layers have one more network, which every token takes beside its experts."""
    jitter: float

    def router_name(self, is_mixture: bool) -> str:
        """The router as sentences call it."""
        return "mixture (model.top_layer)" if is_mixture else f"router {self.router}"

    def has_group_capacity(self, spec: RouterSpec) -> bool:
        """Whether samples may share an expert's capacity: under a learned gate whose experts can run out of room."""
        return spec.learned and spec.has_capacity and self.dispatch == "capacity"

    def violations(self, spec: RouterSpec, is_mixture: bool) -> Violations:
        """Options without effect on the router that `spec` describes, or on the gate of a mixture."""
        router = self.router_name(is_mixture)
        for name, option in ROUTER_OPTIONS.items():
            value = getattr(self, name)
            if option not in spec.options and value != option.default and not option.weighs_loss:
                written = "is true, but" if value is True else f"= {bare(value)}"
                default = bare(option.default).removesuffix(".0")
                yield (
                    f"model.sparse.{name} {written} {option.no_effect.format(router=router)}: set it to {default}, or "
                    f"the router to {' or '.join(routers_with(name))}"
                )
        if spec.fixed and self.top_k not in (None, spec.experts_per_token):
            yield (
                f"model.sparse.top_k = {self.top_k}, but the {router} takes {spec.experts_per_token or 'all experts'} "
                "by definition: leave it out"
            )
        if spec.experts_choose and self.dispatch == "capacity":
            yield (
                f"model.sparse.dispatch = capacity, but with the {router} every expert takes a fixed number of tokens "
                "anyway: set it to dropless"
            )
        if self.capacity_samples > 1 and not self.has_group_capacity(spec):
            yield (
                f"model.sparse.capacity_samples = {self.capacity_samples} acts on the learned gates that have a "
                "capacity: leave it out, or set such a router and model.sparse.dispatch to capacity"
            )


def _field(option: RouterOption) -> tuple[Any, Any]:
    """Type and field of a router's option."""
    description = option.description.format(routers=_listed(routers_with(option.name)))
    kind = Literal[option.choices] if option.choices else type(option.default)
    init_from = "equal" if option.defines_network else "free"
    return kind, Field(
        option.default, ge=option.at_least, lt=option.below, init_from=init_from, description=description
    )


SparseConfig = create_model(
    "SparseConfig",
    __base__=SparseKeys,
    __cls_kwargs__={"resume": "fixed", "init_from": "equal"},
    __module__=__name__,
    __doc__="Which layers are sparse, how a token finds its expert and how rows travel.",
    **{name: _field(option) for name, option in ROUTER_OPTIONS.items()},
)
