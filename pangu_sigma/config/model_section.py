"""The `model` section: size and parts of the network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pangu_sigma.config.presets import PRESETS
from pangu_sigma.config.section import Section
from rre.feed_forward_spec import FeedForwardSpec
from rre.router_specs import ROUTER_SPECS, RouterSpec

FeedForwardKind = Literal["mlp", "swiglu", "geglu"]
# Gated kinds of a feed-forward network and the activation of their gate (Shazeer 2020, arXiv 2002.05202).
GATE_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


class SparseConfig(Section):
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
        description="How a routing table is drawn: equal numbers of vocabulary ids, or balanced by their frequency.",
    )
    resample: bool = Field(
        False, description="Whether training draws a fresh expert for every occurrence instead of using the table."
    )
    dispatch: Literal["dropless", "capacity"] = Field(
        "dropless", description="Whether every row reaches its expert, or only as many as an expert may take."
    )
    capacity_factor: float = Field(
        1.25, gt=0, description="Rows an expert may take under capacity dispatch, as a multiple of an even share."
    )
    capacity_samples: int = Field(
        1,
        ge=1,
        description="Samples that share an expert's room under a learned gate and capacity dispatch: GShard's group.",
    )
    aux_loss_weight: float = Field(
        0.01, ge=0, description="Weight of the balance loss of switch, gshard, glam and olmoe."
    )
    balance: Literal["per_layer", "pooled"] = Field(
        "per_layer",
        description="Form of olmoe's balance loss: each layer's own, added up, or Hugging Face's, pooled over layers.",
    )
    z_loss_weight: float = Field(0.001, ge=0, description="Weight of the z-loss of olmoe.")
    importance_loss_weight: float = Field(0.1, ge=0, description="Weight of the importance loss of noisy_top_k.")
    load_loss_weight: float = Field(0.1, ge=0, description="Weight of the load loss of noisy_top_k.")
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
        0.0, ge=0, lt=1, description="Half-width of the noise multiplied onto the gate's input of switch in training."
    )


class AttentionConfig(Section):
    """Options of the attention part."""

    qk_norm: bool = Field(
        False, description="Whether the projected queries and keys are normalised, each over its whole width."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of attention weights dropped while training.")


class DomainParametersConfig(Section):
    """Parameters that are shared by all domains, or one set for each, beside the experts."""

    embedding: Literal["shared", "own"] = Field(
        "shared", description="One word embedding for all domains, or one of its own for each."
    )


class ModelConfig(Section):
    """Size and parts of the network; `preset` gives defaults for the sizes, explicit keys override it."""

    preset: Literal["tiny", "350M", "2.6B", "13B", "200B"] | None = Field(
        None, description="A named size that fills in the sizes that are not written."
    )
    vocab_size: int | None = Field(
        None, ge=1, description="Rows of the word embedding; null takes the tokenizer's size."
    )
    layers: int = Field(ge=1, description="Number of transformer layers, the query layer included.")
    hidden: int = Field(ge=1, description="Width of the residual stream.")
    heads: int = Field(ge=1, description="Number of attention heads; divides hidden.")
    ffn: int = Field(ge=1, description="Inner width of the feed-forward network and of every expert.")
    positions: int = Field(ge=1, description="Longest sequence in tokens: the rows of learned position tables.")
    activation: Literal["fast_gelu", "gelu", "silu"] = Field(
        "fast_gelu", description="Activation inside the feed-forward network; swiglu's is silu, geglu's gelu."
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Kind of normalisation.")
    norm_epsilon: float = Field(1e-5, gt=0, description="Number added to the variance inside a normalisation.")
    position: Literal["learned", "rope"] = Field(
        "learned", description="How positions enter the model: a learned table, or rotations of queries and keys."
    )
    rope_theta: float = Field(10000.0, gt=1, description="Base of the wavelengths of rope.")
    feed_forward: FeedForwardKind = Field(
        "mlp", description="Kind of feed-forward network: two matrices, or gated by a third, with silu or gelu."
    )
    biases: bool = Field(True, description="Whether the matrices of attention and feed-forward networks have biases.")
    head: Literal["tied", "untied"] = Field(
        "tied", description="Output head: tied uses the word embedding, untied has a table of its own."
    )
    query_layer: Literal["next_position", "none"] = Field(
        "next_position", description="PanGu-α's top layer, whose queries are a table of next positions, or none."
    )
    attention: AttentionConfig = Field(default_factory=AttentionConfig, description="Options of the attention part.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of residual values dropped while training.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the normal initialisation.")
    init_cutoff: float | None = Field(
        None, gt=0, description="Standard deviations beyond which an initial value is drawn again; null keeps all."
    )
    init_scale_residual: bool = Field(
        True, description="Whether matrices that end in the residual stream begin smaller, by 1 / sqrt(2 layers)."
    )
    domain_parameters: DomainParametersConfig = Field(
        default_factory=DomainParametersConfig,
        description="What each domain has of its own beside its experts.",
    )
    top_layer: Literal["mixture"] | None = Field(
        None,
        description="Top layer of a kind of its own: mixture mixes what every expert predicts (Jacobs et al. 1991).",
    )
    mixture_loss: Literal["competitive", "cooperative"] = Field(
        "competitive",
        description="Loss of a mixture: of each expert's own likelihood, mixed, or of the blended output's.",
    )
    sparse: SparseConfig = Field(default_factory=SparseConfig, description="The sparse layers.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str):
            return values
        # An unknown name passes through: the field's own check names the known ones.
        return {**PRESETS.get(preset, {}), **values}

    @property
    def network(self) -> FeedForwardSpec:
        """What a dense layer's feed-forward network is made of."""
        return self._form(self.feed_forward)

    @property
    def expert_feed_forward(self) -> FeedForwardKind:
        """Kind of network of experts and shared experts."""
        return self.sparse.feed_forward or self.feed_forward

    @property
    def expert_network(self) -> FeedForwardSpec:
        """What an expert is made of, a shared expert too."""
        return self._form(self.expert_feed_forward)

    def _form(self, kind: FeedForwardKind) -> FeedForwardSpec:
        return FeedForwardSpec(self.activation, gated=kind in GATE_ACTIVATIONS, biases=self.biases)

    @property
    def residual_std(self) -> float:
        """Standard deviation with which matrices that end in the residual stream begin."""
        return self.init_std / (2.0 * self.layers) ** 0.5 if self.init_scale_residual else self.init_std

    @property
    def has_pangu_parts(self) -> bool:
        """Whether every part is one that PanGu-α has, with or without its query layer."""
        return (
            (self.norm, self.position, self.feed_forward, self.head) == ("layernorm", "learned", "mlp", "tied")
            and self.expert_feed_forward == "mlp"
            and self.biases
            and not self.attention.qk_norm
            and self.activation != "silu"
        )

    @property
    def blocks(self) -> int:
        """Number of ordinary transformer blocks under the query layer (all layers if there is no query layer)."""
        return self.layers - 1 if self.query_layer == "next_position" else self.layers

    @property
    def last_layer(self) -> str:
        """Name prefix of the layer under the head."""
        return "query_layer" if self.query_layer == "next_position" else f"blocks.{self.blocks - 1}"

    @property
    def sparse_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the layers that hold experts, from bottom to top: the sparse ones, `blocks.{i}` and
        `query_layer` if it is sparse, or the one top layer that is a mixture."""
        if self.is_mixture:
            return (self.last_layer,)
        blocks_sparse = self.sparse.layers - int(self.sparse.include_query_layer)
        chosen = {
            "top": range(self.blocks - blocks_sparse, self.blocks),
            "every_other": range(1, self.blocks, 2),
            "every": range(self.blocks),
        }
        prefixes = tuple(f"blocks.{i}" for i in chosen[self.sparse.pattern])
        return (*prefixes, "query_layer") if self.sparse.include_query_layer else prefixes

    @property
    def is_mixture(self) -> bool:
        """Whether the top layer is an adaptive mixture of experts."""
        return self.top_layer == "mixture"

    @property
    def is_competitive_mixture(self) -> bool:
        """Whether the top layer's experts are mixed by their likelihoods and not by their outputs."""
        return self.is_mixture and self.mixture_loss == "competitive"

    @property
    def router(self) -> str:
        """Name of the router of the layers that hold experts: the sparse layers' or that of a mixture's gate."""
        return "every_expert" if self.is_mixture else self.sparse.router

    @property
    def router_spec(self) -> RouterSpec:
        """What `router` is."""
        return ROUTER_SPECS[self.router]

    @property
    def router_setting(self) -> str:
        """The key and its value that choose `router`, for sentences."""
        return "model.top_layer = mixture" if self.is_mixture else f"model.sparse.router = {self.sparse.router}"

    def choices_of(self, experts: int) -> int:
        """k, a token's experts of a layer of so many: what `top_k` says, or the router's own, which may be all."""
        return self.sparse.top_k or self.router_spec.experts_per_token or experts
