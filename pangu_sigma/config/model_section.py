"""The `model` section: size and parts of the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from pangu_sigma.config.layer_names import LayerNames
from pangu_sigma.config.parts.attention_options import AttentionConfig
from pangu_sigma.config.parts.feed_forward_kinds import (
    ACTIVATION_SPECS,
    BIASES,
    FEED_FORWARD_KINDS,
    SHARED_EXPERT,
    FeedForwardKind,
)
from pangu_sigma.config.parts.head_specs import HEAD_SPECS, HeadSpec
from pangu_sigma.config.parts.norm_specs import NORM_SPECS, NormSpec
from pangu_sigma.config.parts.part_spec import PartSpec, names_with
from pangu_sigma.config.parts.position_specs import POSITION_SPECS, PositionSpec
from pangu_sigma.config.presets import PRESETS
from pangu_sigma.config.section import Field, Section, Violations, at_most, divides
from pangu_sigma.config.sparse_section import SparseConfig
from pangu_sigma.tensor_names import QUERY_LAYER, block_name
from rre.feed_forward_spec import FeedForwardSpec
from rre.router_specs import MIXTURE_GATE, ROUTER_SPECS, RouterSpec


class DomainParametersConfig(Section, resume="fixed", init_from="equal"):
    """Parameters that are shared by all domains, or one set for each, beside the experts."""

    embedding: Literal["shared", "own"] = "shared"
    """One word embedding for all domains, or one of its own for each."""


class ModelConfig(Section, resume="fixed", init_from="equal"):
    """Size and parts of the network; `preset` gives defaults for the sizes, explicit keys override it."""

    preset: Literal["tiny", "350M", "2.6B", "13B", "200B"] | None = Field(None, resume="free", init_from="free")
    """A named size that fills in the sizes that are not written, and how many top layers are sparse."""
    vocab_size: int | None = Field(None, ge=1, init_from="equal if written")
    """Rows of the word embedding; null takes the tokenizer's size."""
    layers: int = Field(ge=1)
    """Number of transformer layers, the query layer included."""
    hidden: int = Field(ge=1)
    """Width of the residual stream."""
    heads: int = Field(ge=1)
    """Number of attention heads; divides hidden."""
    ffn: int = Field(ge=1)
    """Inner width of the feed-forward network and of every expert."""
    positions: int = Field(ge=1)
    """Longest sequence in tokens: the rows of learned position tables."""
    activation: Literal[tuple(ACTIVATION_SPECS)] = next(iter(ACTIVATION_SPECS))
    """Activation inside the feed-forward network; swiglu's is silu, geglu's gelu."""
    norm: Literal[tuple(NORM_SPECS)] = next(iter(NORM_SPECS))
    """Kind of normalisation."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Number added to the variance inside a normalisation."""
    position: Literal[tuple(POSITION_SPECS)] = next(iter(POSITION_SPECS))
    """How positions enter the model: a learned table, or rotations of queries and keys."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the wavelengths of rope."""
    feed_forward: Literal[tuple(FEED_FORWARD_KINDS)] = next(iter(FEED_FORWARD_KINDS))
    """Kind of feed-forward network: two matrices, or gated by a third, with silu or gelu."""
    biases: bool = True
    """Whether the matrices of attention and feed-forward networks have biases."""
    head: Literal[tuple(HEAD_SPECS)] = next(iter(HEAD_SPECS))
    """Output head: tied uses the word embedding, untied has a table of its own."""
    query_layer: Literal["next_position", "none"] = "next_position"
    """PanGu-α's top layer, whose queries are a table of next positions, or none."""
    attention: AttentionConfig = AttentionConfig()
    dropout: float = Field(0.0, ge=0, lt=1, init_from="free")
    """Share of residual values dropped while training."""
    init_std: float = Field(0.02, gt=0, init_from="free")
    """Standard deviation of the normal initialisation."""
    init_cutoff: float | None = Field(None, gt=0, init_from="free")
    """Standard deviations beyond which an initial value is drawn again; null keeps all."""
    init_scale_residual: bool = Field(True, init_from="free")
    """Whether matrices that end in the residual stream begin smaller, by 1 / sqrt(2 layers)."""
    domain_parameters: DomainParametersConfig = DomainParametersConfig()
    top_layer: Literal["mixture"] | None = None
    """Top layer of a kind of its own: mixture mixes what every expert predicts (Jacobs et al. 1991)."""
    mixture_loss: Literal["competitive", "cooperative"] = "competitive"
    """Loss of a mixture: of each expert's own likelihood, mixed, or of the blended output's."""
    sparse: SparseConfig = SparseConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str):
            return values
        # An unknown name passes through: the field's own check names the known ones.
        sizes = dict(PRESETS.get(preset, {}))
        layers, sparse = sizes.pop("sparse_layers", None), values.get("sparse", {})
        # A pattern or a top layer of a kind of its own says itself which layers hold experts.
        counts = isinstance(sparse, dict) and sparse.get("pattern", "top") == "top" and values.get("top_layer") is None
        if counts and layers is not None:
            written = values.get("layers")
            # A model that is written shorter has a dense layer left all the same.
            most = max(0, written - 1) if isinstance(written, int) else layers
            sizes["sparse"] = {"layers": min(layers, most), **sparse}
            values = {name: value for name, value in values.items() if name != "sparse"}
        return {**sizes, **values}

    @property
    def feed_forward_kind(self) -> FeedForwardKind:
        """What a dense layer's network is."""
        return FEED_FORWARD_KINDS[self.feed_forward]

    @property
    def expert_kind(self) -> FeedForwardKind:
        """What the network of an expert is, a shared expert too."""
        return FEED_FORWARD_KINDS[self.sparse.feed_forward or self.feed_forward]

    @property
    def network(self) -> FeedForwardSpec:
        """What a dense layer's feed-forward network is made of."""
        return self.feed_forward_kind.form(self.activation, self.biases)

    @property
    def expert_network(self) -> FeedForwardSpec:
        """What an expert is made of, a shared expert too."""
        return self.expert_kind.form(self.activation, self.biases)

    @property
    def norm_spec(self) -> NormSpec:
        """What `norm` is."""
        return NORM_SPECS[self.norm]

    @property
    def position_spec(self) -> PositionSpec:
        """What `position` is."""
        return POSITION_SPECS[self.position]

    @property
    def head_spec(self) -> HeadSpec:
        """What `head` is."""
        return HEAD_SPECS[self.head]

    @property
    def residual_std(self) -> float:
        """Standard deviation with which matrices that end in the residual stream begin."""
        return self.init_std / (2.0 * self.layers) ** 0.5 if self.init_scale_residual else self.init_std

    @property
    def parts(self) -> dict[str, PartSpec]:
        """What the keys choose that name a part of the backbone; those of sparse layers only where there are any."""
        sparse = {
            "model.sparse.feed_forward": self.expert_kind,
            "model.sparse.shared_expert": SHARED_EXPERT[self.sparse.shared_expert],
        }
        return {
            "model.norm": self.norm_spec,
            "model.position": self.position_spec,
            "model.feed_forward": self.feed_forward_kind,
            "model.activation": ACTIVATION_SPECS[self.activation],
            "model.biases": BIASES[self.biases],
            "model.head": self.head_spec,
            "model.attention.qk_norm": self.attention.qk_norm_spec,
            **(sparse if self.sparse_prefixes else {}),
        }

    def parts_unlike(self, network: str) -> list[str]:
        """The parts that an exported network does not have, as `key is value`."""
        return [f"{key} is {part.name}" for key, part in self.parts.items() if network not in part.exports]

    @property
    def has_query_layer(self) -> bool:
        """Whether the top layer is a query layer."""
        return self.query_layer != "none"

    @property
    def blocks(self) -> int:
        """Number of ordinary transformer blocks under the query layer (all layers if there is no query layer)."""
        return self.layers - int(self.has_query_layer)

    @property
    def layer_names(self) -> LayerNames:
        """Names of all layers from bottom to top: the blocks, and the query layer if there is one."""
        return LayerNames(range(self.blocks), self.has_query_layer)

    @property
    def sparse_prefixes(self) -> LayerNames:
        """Names of the layers that hold experts, from bottom to top: the sparse ones, or the one top layer that is a
        mixture."""
        if self.is_mixture:
            return LayerNames(range(self.layers - 1, self.blocks), self.has_query_layer)
        blocks_sparse = self.sparse.layers - int(self.sparse.include_query_layer)
        chosen = {
            "top": range(self.blocks - blocks_sparse, self.blocks),
            "every_other": range(1, self.blocks, 2),
            "every": range(self.blocks),
        }
        return LayerNames(chosen[self.sparse.pattern], self.sparse.include_query_layer)

    def kinds_of_layers(self, indices: range | None = None) -> Iterator[tuple[str, int]]:
        """(name of one of them, number) of layers that have the same tensors, of those with these `indices` (a range
        of neighbours, the query layer's is the last; None: all): dense blocks, sparse blocks, the query layer."""
        indices = range(self.layers) if indices is None else indices
        blocks = indices[: max(0, self.blocks - indices.start)]
        number = self.sparse_prefixes.blocks_among(blocks)
        sparse = self.sparse_prefixes.blocks
        # Two neighbours tell both kinds apart, whatever the pattern; top layers begin further up.
        if dense := len(blocks) - number:
            yield block_name(next(index for index in blocks if index not in sparse)), dense
        if number:
            yield block_name(next(index for index in (*blocks[:2], sparse.start) if index in sparse)), number
        if len(blocks) < len(indices):
            yield QUERY_LAYER, 1

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
        return self.router_spec.name

    @property
    def router_spec(self) -> RouterSpec:
        """What `router` is."""
        return MIXTURE_GATE if self.is_mixture else ROUTER_SPECS[self.sparse.router]

    @property
    def router_options(self) -> dict[str, bool | float | str]:
        """Values of the options that the router has."""
        return {option.name: getattr(self.sparse, option.name) for option in self.router_spec.options}

    @property
    def separates_domains(self) -> bool:
        """Whether every domain has experts of its own, to which no gate or table sends another domain's tokens."""
        return bool(self.sparse_prefixes) and self.router_spec.separates_domains

    @property
    def router_setting(self) -> str:
        """The key and its value that choose `router`, for sentences."""
        return "model.top_layer = mixture" if self.is_mixture else f"model.sparse.router = {self.sparse.router}"

    def choices_of(self, experts: int) -> int:
        """k, a token's experts of a layer of so many: what `top_k` says, or the router's own, which may be all."""
        return self.sparse.top_k or self.router_spec.experts_per_token or experts

    def violations(self) -> Violations:
        """Broken rules of the section: a model that cannot be built, or an option without effect."""
        for check in (_sizes, _parts, _networks, _top_layer, _sparse):
            yield from check(self)


def _sizes(model: ModelConfig) -> Violations:
    yield from divides("model.heads", model.heads, f"model.hidden = {model.hidden}", model.hidden)
    if model.blocks < 1:
        yield (
            f"model.layers = {model.layers} leaves no block under the query layer: set it to at least 2, or "
            "model.query_layer to none"
        )


def _parts(model: ModelConfig) -> Violations:
    """Backbone parts that cannot be combined, and options of parts that are not there."""
    position = model.position_spec
    if model.has_query_layer and not position.has_table:
        yield (
            f"model.query_layer = {model.query_layer} asks by learned positions, which model.position = "
            f"{model.position} does not have: set model.query_layer to none, or model.position to "
            f"{names_with(POSITION_SPECS, 'has_table')}"
        )
    if position.rotates and model.hidden % model.heads == 0 and model.hidden // model.heads % 2:
        yield (
            f"model.heads = {model.heads} gives a head {model.hidden // model.heads} values (of model.hidden), and "
            f"model.position = {model.position} turns pairs of them: choose sizes that make it even"
        )
    if not position.rotates and model.rope_theta != 10000.0:
        yield (
            f"model.rope_theta = {model.rope_theta:g} has no effect with model.position = {model.position}: leave it "
            f"out, or set model.position to {names_with(POSITION_SPECS, 'rotates')}"
        )
    if not model.head_spec.is_tied and model.domain_parameters.embedding == "own":
        yield (
            f"model.head = {model.head} is one table for all domains, but model.domain_parameters.embedding = own "
            f"gives each its own words: set model.head to {names_with(HEAD_SPECS, 'is_tied')}, or "
            "model.domain_parameters.embedding to shared"
        )


def _networks(model: ModelConfig) -> Violations:
    """Feed-forward networks of dense layers and of experts, which share activation and biases."""
    written = {"model.feed_forward": model.feed_forward_kind}
    if model.sparse.feed_forward:
        written["model.sparse.feed_forward"] = model.expert_kind
    gated = {key: kind for key, kind in written.items() if kind.gate}
    if len({kind.gate for kind in gated.values()}) > 1:
        yield (
            f"model.sparse.feed_forward = {model.sparse.feed_forward} and model.feed_forward = {model.feed_forward} "
            "are gated by different activations, and a model has one: set them alike, or one of them to "
            f"{names_with(FEED_FORWARD_KINDS, 'gateless')}"
        )
        return
    for key, kind in gated.items():
        if model.activation != kind.gate:
            yield (
                f"model.activation = {model.activation}, but {key} = {kind.name} is gated by {kind.gate} by "
                f"definition: set model.activation to {kind.gate}"
            )
        if model.biases:
            yield f"model.biases is true, but {key} = {kind.name} has none: set model.biases to false"


def _top_layer(model: ModelConfig) -> Violations:
    sparse = model.sparse
    if not model.is_mixture:
        if model.mixture_loss != "competitive":
            yield (
                f"model.mixture_loss = {model.mixture_loss} has no effect without a mixture: leave it out, or set "
                "model.top_layer to mixture"
            )
        return
    if sparse.layers or sparse.include_query_layer or sparse.pattern != "top":
        yield (
            "model.top_layer = mixture mixes what whole models would give, so the layer under the head "
            f"({model.layer_names[-1]}) must be the only one with experts: leave model.sparse.layers, pattern and "
            "include_query_layer out"
        )
    if sparse.router != SparseConfig().router:
        yield (
            f"model.sparse.router = {sparse.router} has no effect on model.top_layer = mixture, whose gate is its own: "
            "leave it out"
        )
    if sparse.dispatch == "capacity":
        yield (
            "model.sparse.dispatch = capacity, but under model.top_layer = mixture every expert takes every row: set "
            "it to dropless"
        )


def _sparse(model: ModelConfig) -> Violations:
    sparse = model.sparse
    if sparse.include_query_layer and not model.has_query_layer:
        yield "model.sparse.include_query_layer is true, but model.query_layer is none: set it to false"
        return
    if sparse.pattern != "top" and sparse.layers:
        yield (
            f"model.sparse.layers = {sparse.layers} counts top layers, but model.sparse.pattern = {sparse.pattern} "
            "says itself which layers are sparse: set model.sparse.layers to 0, or the pattern to top"
        )
    if sparse.pattern == "every_other" and model.blocks < 2:
        yield (
            f"model.sparse.pattern = every_other begins with the second block, but there are {model.blocks}: set it to "
            "top or every, or raise model.layers"
        )
    if sparse.pattern == "top" and sparse.include_query_layer and sparse.layers == 0:
        yield (
            "model.sparse.include_query_layer is true, but model.sparse.layers is 0: the query layer counts as one of "
            "the sparse layers, so set model.sparse.layers to at least 1"
        )
    most = model.blocks + int(sparse.include_query_layer)
    counted = "the query layer included" if sparse.include_query_layer else "the query layer is dense"
    counted = f"model.layers = {model.layers}, {counted if model.has_query_layer else 'there is no query layer'}"
    yield from at_most("model.sparse.layers", sparse.layers, f"the {most} layers that can be sparse ({counted})", most)
    yield from sparse.violations(model.router_spec, model.is_mixture)
