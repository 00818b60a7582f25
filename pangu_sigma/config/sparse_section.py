"""The `model.sparse` section: which layers are sparse, how a token finds its expert and how rows travel."""

from __future__ import annotations

from typing import Literal

from pangu_sigma.config.section import Field, Section, Violations
from rre.router_specs import RouterSpec

FeedForwardKind = Literal["mlp", "swiglu", "geglu"]


class SparseConfig(Section, resume="fixed", init_from="equal"):
    """Which layers are sparse, how a token finds its expert and how rows travel."""

    pattern: Literal["top", "every_other", "every"] = Field(
        "top", description="Which layers are sparse: the top ones, every second block (not the first), or all blocks."
    )
    layers: int = Field(
        0, ge=0, description="With pattern top, how many of the top layers are sparse; 0 gives a dense PanGu-α."
    )
    include_query_layer: bool = Field(
        False, description="Whether the query layer is sparse too; it then counts as one of the top layers."
    )
    router: Literal["rre", "hash", "switch", "gshard", "glam", "noisy_top_k", "olmoe", "expert_choice"] = Field(
        "rre", description="How tokens and experts meet: rre and hash by fixed tables, all others by a learned gate."
    )
    top_k: int | None = Field(
        None, ge=1, description="Experts per token of noisy_top_k, olmoe, expert_choice; null takes the router's own."
    )
    table: Literal["uniform", "frequency"] = Field(
        "uniform",
        init_from="free",
        description="How a routing table is drawn: equal numbers of vocabulary ids, or balanced by their frequency.",
    )
    resample: bool = Field(
        False,
        init_from="free",
        description="Whether training draws a fresh expert for every occurrence instead of using the table.",
    )
    dispatch: Literal["dropless", "capacity"] = Field(
        "dropless",
        init_from="free",
        description="Whether every row reaches its expert, or only as many as an expert may take.",
    )
    capacity_factor: float = Field(
        1.25,
        gt=0,
        init_from="free",
        description="Rows an expert may take under capacity dispatch, as a multiple of an even share.",
    )
    capacity_samples: int = Field(
        1,
        ge=1,
        init_from="free",
        description="Samples that share an expert's room under a learned gate and capacity dispatch: GShard's group.",
    )
    aux_loss_weight: float = Field(
        0.01, ge=0, init_from="free", description="Weight of the balance loss of switch, gshard, glam and olmoe."
    )
    balance: Literal["per_layer", "pooled"] = Field(
        "per_layer",
        init_from="free",
        description="Form of olmoe's balance loss: each layer's own, added up, or Hugging Face's, pooled over layers.",
    )
    z_loss_weight: float = Field(0.001, ge=0, init_from="free", description="Weight of the z-loss of olmoe.")
    importance_loss_weight: float = Field(
        0.1, ge=0, init_from="free", description="Weight of the importance loss of noisy_top_k."
    )
    load_loss_weight: float = Field(0.1, ge=0, init_from="free", description="Weight of the load loss of noisy_top_k.")
    renormalise: bool = Field(
        False, description="Whether olmoe divides a token's combine weights by their sum; OLMoE itself does not."
    )
    feed_forward: FeedForwardKind | None = Field(
        None, description="Kind of every expert's network; null takes model.feed_forward, the dense layers'."
    )
    shared_expert: bool = Field(
        False, description="Whether sparse layers have one more network, which every token takes beside its experts."
    )
    jitter: float = Field(
        0.0,
        ge=0,
        lt=1,
        init_from="free",
        description="Half-width of the noise multiplied onto the gate's input of switch in training.",
    )

    def router_name(self, is_mixture: bool) -> str:
        """The router as sentences call it."""
        return "mixture (model.top_layer)" if is_mixture else f"router {self.router}"

    def has_group_capacity(self, spec: RouterSpec, is_mixture: bool) -> bool:
        """Whether samples may share an expert's capacity: under a learned gate that chooses for each token."""
        return spec.learned and spec.causal and not is_mixture and self.dispatch == "capacity"

    def violations(self, spec: RouterSpec, is_mixture: bool) -> Violations:
        """Options without effect on the router that `spec` describes, or on the gate of a mixture."""
        router = self.router_name(is_mixture)
        if self.resample and "resample" not in spec.options:
            yield (
                "model.sparse.resample",
                f"model.sparse.resample is true, but the {router} has no table of a domain to draw from: "
                "set it to false or the router to rre",
            )
        if self.jitter > 0 and "jitter" not in spec.options:
            yield (
                "model.sparse.jitter",
                f"model.sparse.jitter = {self.jitter} has no effect on the {router}: set it to 0, or the "
                "router to switch",
            )
        if self.renormalise and "renormalise" not in spec.options:
            yield (
                "model.sparse.renormalise",
                f"model.sparse.renormalise is true, but has no effect on the {router}: set it to false, or "
                "the router to olmoe",
            )
        if self.balance != "per_layer" and "balance" not in spec.options:
            yield (
                "model.sparse.balance",
                f"model.sparse.balance = {self.balance} has no effect on the {router}: set it to "
                "per_layer, or the router to olmoe",
            )
        if spec.fixed and self.top_k not in (None, spec.experts_per_token):
            yield (
                "model.sparse.top_k",
                f"model.sparse.top_k = {self.top_k}, but the {router} takes "
                f"{spec.experts_per_token or 'all experts'} by definition: leave it out",
            )
        if not spec.causal and self.dispatch == "capacity":
            yield (
                "model.sparse.dispatch",
                f"model.sparse.dispatch = capacity, but with the {router} every expert takes a fixed number "
                "of tokens anyway: set it to dropless",
            )
        if self.capacity_samples > 1 and not self.has_group_capacity(spec, is_mixture):
            yield (
                "model.sparse.capacity_samples",
                f"model.sparse.capacity_samples = {self.capacity_samples} acts on the learned gates that have a "
                "capacity: leave it out, or set such a router and model.sparse.dispatch to capacity",
            )
