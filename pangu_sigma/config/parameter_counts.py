"""Tensors and parameter counts of a model by arithmetic alone: no framework is imported, nothing is built.

Source of the shapes: PanGu-α (arXiv 2104.12369) with biases everywhere, a tied head and no final normalisation
after the query layer; sparse layers hold one such feed-forward network per expert. Other parts by name: OLMoE's
(arXiv 2409.02060), whose norms have gains alone and whose matrices have no biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pangu_sigma.config.schema import Config
from rre.feed_forward_spec import FeedForwardSpec
from rre.router_specs import LAYER

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained values (floats). Routing tables are integers that never train, so they are no parameters."""

    total: int
    shared: int
    per_domain: dict[str, int]
    activated_per_token: dict[str, int]
    """Active parameters per token of the domain: shared ones, the domain's own word embedding, k experts per sparse
    layer (k on average where experts choose)."""
    routing_entries: int
    """Entries of all routing tables together (int32), beside the parameters."""

    def to_dict(self) -> dict[str, object]:
        """The counts as plain values for JSON."""
        return {
            "total": self.total,
            "shared": self.shared,
            "per_domain": dict(self.per_domain),
            "activated_per_token": dict(self.activated_per_token),
            "routing_entries": self.routing_entries,
        }


def tensor_shapes(config: Config, vocab_size: int) -> dict[str, Shape]:
    """Every tensor of the model by its name in model and checkpoint, with its shape; shared tensors first.

    `domains.{d}.{layer}.routing` (`{layer}.routing` of a hash layer) are int32 tables; all others are trained floats.
    Weights are [in, out].
    """
    shapes = dict(_shared(config, vocab_size))
    for domain in config.domains:
        shapes.update(_domain(config, vocab_size, domain.name, domain.experts))
    return shapes


def parameter_counts(config: Config, vocab_size: int) -> ParameterCounts:
    """Counts that follow from `tensor_shapes`: total, shared, per domain, and activated per token of each domain."""
    shared = sum(math.prod(shape) for _, shape in _shared(config, vocab_size))
    per_domain: dict[str, int] = {}
    activated: dict[str, int] = {}
    routing = sum(math.prod(shape) for name, shape in _shared(config, vocab_size) if is_routing(name))
    shared -= routing
    chosen = config.experts_per_token
    for domain in config.domains:
        tensors = dict(_domain(config, vocab_size, domain.name, domain.experts))
        tables = sum(math.prod(shape) for name, shape in tensors.items() if is_routing(name))
        per_domain[domain.name] = sum(math.prod(shape) for shape in tensors.values()) - tables
        # k experts: expert tensors carry the group on their first axis, its word embedding does not.
        activated[domain.name] = shared + sum(
            chosen * math.prod(shape[1:]) if is_expert(name) else math.prod(shape)
            for name, shape in tensors.items()
            if not is_routing(name)
        )
        routing += tables
    return ParameterCounts(shared + sum(per_domain.values()), shared, per_domain, activated, routing)


def is_routing(name: str) -> bool:
    """Whether a tensor's name is that of a routing table (int32, no parameter)."""
    return name.endswith(".routing")


def layer_name_and_owner(name: str) -> tuple[str, str]:
    """Sparse layer and owner of a routing table: a domain, or LAYER where all domains share the table."""
    table = name.removesuffix(".routing")
    if not table.startswith("domains."):
        return table, LAYER
    _, domain, layer_name = table.split(".", 2)
    return layer_name, domain


def is_expert(name: str) -> bool:
    """Whether a tensor's name is that of an expert group's weights, with the experts on the first axis."""
    return ".experts." in name


def _shared(config: Config, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    model = config.model
    hidden = model.hidden
    if model.domain_parameters.embedding == "shared":
        yield "embedding.word", (vocab_size, hidden)
    if model.position == "learned":
        yield "embedding.position", (model.positions, hidden)
    has_query_layer = model.query_layer == "next_position"
    if has_query_layer:
        yield "embedding.query", (model.positions, hidden)
    for index in range(model.blocks):
        yield from _layer(config, f"blocks.{index}", vocab_size)
    yield from _norm(config, "norm")
    if has_query_layer:
        yield from _layer(config, "query_layer", vocab_size)
    if model.head == "untied":
        yield "head.word", (vocab_size, hidden)


def _norm(config: Config, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gamma", (config.model.hidden,)
    if config.model.norm == "layernorm":
        yield f"{name}.beta", (config.model.hidden,)


def _network(config: Config, prefix: str, form: FeedForwardSpec) -> Iterator[tuple[str, Shape]]:
    for name, shape in form.shapes(config.model.hidden, config.model.ffn).items():
        yield f"{prefix}.{name}", shape


def _layer(config: Config, prefix: str, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    """Shared tensors of one layer: its norms and attention, and the dense network, or gate, shared expert and table."""
    model, hidden = config.model, config.model.hidden
    for norm in ("norm1", "norm2"):
        yield from _norm(config, f"{prefix}.{norm}")
    for part in ("query", "key", "value", "projection"):
        yield f"{prefix}.attention.{part}.weight", (hidden, hidden)
        if model.biases:
            yield f"{prefix}.attention.{part}.bias", (hidden,)
    if model.attention.qk_norm:
        yield from _norm(config, f"{prefix}.attention.query_norm")
        yield from _norm(config, f"{prefix}.attention.key_norm")
    if prefix not in model.sparse_prefixes:
        yield from _network(config, f"{prefix}.feed_forward", model.network)
        return
    sparse = model.sparse
    gate = (hidden, config.experts_in_layer)
    if model.router_spec.learned:
        yield f"{prefix}.router.weight", gate
    if model.router == "noisy_top_k":
        yield f"{prefix}.router.noise_weight", gate
    if sparse.shared_expert:
        yield from _network(config, f"{prefix}.shared_expert", model.expert_network)
    if model.router_spec.tables == "layer":
        yield f"{prefix}.routing", (vocab_size,)


def _domain(config: Config, vocab_size: int, name: str, experts: int) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = config.model.hidden, config.model.ffn
    if config.model.domain_parameters.embedding == "own":
        yield f"domains.{name}.embedding.word", (vocab_size, hidden)
    for prefix in config.model.sparse_prefixes:
        for tensor, shape in config.model.expert_network.shapes(hidden, ffn).items():
            yield f"domains.{name}.{prefix}.experts.{tensor}", (experts, *shape)
        if config.model.router_spec.tables == "domain":
            yield f"domains.{name}.{prefix}.routing", (vocab_size,)
