"""Tensors and parameter counts of a model by arithmetic alone: no framework is imported, nothing is built.

Source of the shapes: PanGu-α (arXiv 2104.12369) with biases everywhere, a tied head and no final normalisation
after the query layer; sparse layers hold one such feed-forward network per expert. Other parts by name: OLMoE's
(arXiv 2409.02060), whose norms have gains alone and whose matrices have no biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

from pangu_sigma import tensor_names
from pangu_sigma.config.schema import Config
from pangu_sigma.tensor_names import expert_name, is_expert, is_routing, parse_name, table_name, tensor_name
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
        return asdict(self)


def tensor_shapes(config: Config, vocab_size: int) -> dict[str, Shape]:
    """Every tensor of the model by its name in model and checkpoint, with its shape; shared tensors first.

    `domains.{d}.{layer}.routing` (`{layer}.routing` of a hash layer) are int32 tables; all others are trained floats.
    Weights are [in, out].
    """
    of_domains = (_domain(config, vocab_size, domain.name, domain.experts) for domain in config.domains)
    return dict(chain(_shared(config, vocab_size), *of_domains))


def parameter_counts(config: Config, vocab_size: int | None = None) -> ParameterCounts:
    """Counts that follow from `tensor_shapes`: total, shared, per domain, and activated per token of each domain.

    vocab_size: that of the configuration if left out, as every trained model's has it.
    """
    vocab_size = vocab_size or config.model.vocab_size
    assert vocab_size is not None
    owned: dict[str | None, int] = dict.fromkeys((None, *config.domain_names), 0)
    activated, routing, chosen = dict(owned), 0, config.experts_per_token
    for name, shape in tensor_shapes(config, vocab_size).items():
        domain, size = parse_name(name).domain, math.prod(shape)
        if is_routing(name):
            routing += size
            continue
        owned[domain] += size
        # k experts: expert tensors carry the group on their first axis, its word embedding does not.
        activated[domain] += chosen * math.prod(shape[1:]) if is_expert(name) else size
    total, shared = sum(owned.values()), owned.pop(None)
    activated = {domain: shared + activated[domain] for domain in owned}
    return ParameterCounts(total, shared, owned, activated, routing)


def _shared(config: Config, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    model = config.model
    hidden = model.hidden
    if model.domain_parameters.embedding == "shared":
        yield tensor_names.WORDS, (vocab_size, hidden)
    if model.position_spec.has_table:
        yield tensor_names.POSITIONS, (model.positions, hidden)
    if model.has_query_layer:
        yield tensor_names.QUERIES, (model.positions, hidden)
    for layer_name in model.layer_names[: model.blocks]:
        yield from _layer(config, layer_name, vocab_size)
    yield from _norm(config, "norm")
    for layer_name in model.layer_names[model.blocks :]:
        yield from _layer(config, layer_name, vocab_size)
    if not model.head_spec.is_tied:
        yield tensor_names.OUTPUT_WORDS, (vocab_size, hidden)


def _norm(config: Config, *path: str) -> Iterator[tuple[str, Shape]]:
    for tensor in config.model.norm_spec.tensors:
        yield tensor_name(*path, tensor), (config.model.hidden,)


def _network(config: Config, layer_name: str, module: str, form: FeedForwardSpec) -> Iterator[tuple[str, Shape]]:
    for name, shape in form.shapes(config.model.hidden, config.model.ffn).items():
        yield tensor_name(layer_name, module, name), shape


def _layer(config: Config, layer_name: str, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    """Shared tensors of one layer: its norms and attention, and the dense network, or gate, shared expert and table."""
    model, hidden = config.model, config.model.hidden
    for norm in ("norm1", "norm2"):
        yield from _norm(config, layer_name, norm)
    for part in ("query", "key", "value", "projection"):
        yield tensor_name(layer_name, "attention", part, "weight"), (hidden, hidden)
        if model.biases:
            yield tensor_name(layer_name, "attention", part, "bias"), (hidden,)
    for norm in model.attention.qk_norm_spec.norms:
        yield from _norm(config, layer_name, "attention", norm)
    if layer_name not in model.sparse_prefixes:
        yield from _network(config, layer_name, "feed_forward", model.network)
        return
    sparse = model.sparse
    for weight in model.router_spec.gate_weights:
        yield tensor_name(layer_name, "router", weight.name), weight.shape(hidden, config.experts_in_layer)
    if sparse.shared_expert:
        yield from _network(config, layer_name, "shared_expert", model.expert_network)
    if model.router_spec.tables == "layer":
        yield table_name(layer_name, LAYER), (vocab_size,)


def _domain(config: Config, vocab_size: int, name: str, experts: int) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = config.model.hidden, config.model.ffn
    if config.model.domain_parameters.embedding == "own":
        yield tensor_name(tensor_names.WORDS, domain=name), (vocab_size, hidden)
    for layer_name in config.model.sparse_prefixes:
        for tensor, shape in config.model.expert_network.shapes(hidden, ffn).items():
            yield expert_name(layer_name, tensor, name), (experts, *shape)
        if config.model.router_spec.separates_domains:
            yield table_name(layer_name, name), (vocab_size,)
