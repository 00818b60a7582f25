"""Tensors and parameter counts of a model by arithmetic alone: no framework is imported, nothing is built.

Source of the shapes: PanGu-α (arXiv 2104.12369) with biases everywhere, a tied head and no final normalisation
after the query layer; sparse layers hold one such feed-forward network per expert. Other parts by name: OLMoE's
(arXiv 2409.02060), whose norms have gains alone and whose matrices have no biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pangu_sigma import tensor_names
from pangu_sigma.config.schema import Config
from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import (
    QUERY_LAYER,
    expert_name,
    is_expert,
    is_routing,
    parse_name,
    table_name,
    tensor_name,
)
from rre.feed_forward_spec import FeedForwardSpec
from rre.router_specs import LAYER

Shape = tuple[int, ...]
# Names and shapes of so many take half a gigabyte and seconds.
MOST_TENSORS = 1_000_000


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


class CountedTensor(NamedTuple):
    """A tensor by its name and shape, and how `many` layers have one of its shape: of all but `name`'s there is no
    other statement."""

    name: str
    shape: Shape
    many: int

    @property
    def size(self) -> int:
        """Values of all of them together."""
        return self.many * math.prod(self.shape)


def tensor_shapes(config: Config, vocab_size: int) -> dict[str, Shape]:
    """Every tensor of the model by its name in model and checkpoint, with its shape; shared tensors first.

    `domains.{d}.{layer}.routing` (`{layer}.routing` of a hash layer) are int32 tables; all others are trained floats.
    Weights are [in, out]. Raises UserError for more tensors than a machine could list (MOST_TENSORS).
    """
    check_number_of_tensors(config)
    layers = [(name, 1) for name in config.model.layer_names]
    return {tensor.name: tensor.shape for tensor in _tensors(config, vocab_size, layers)}


def check_number_of_tensors(config: Config) -> None:
    """Raises UserError for a model of more tensors than are listed, MOST_TENSORS."""
    number = sum(tensor.many for tensor in counted_tensors(config, 1))
    if number > MOST_TENSORS:
        raise UserError(
            f"model.layers = {config.model.layers} with {len(config.domains)} domains makes {number:,} tensors, and "
            f"{MOST_TENSORS:,} are the most of a model here: lower model.layers"
        )


def counted_tensors(config: Config, vocab_size: int, indices: range | None = None) -> Iterator[CountedTensor]:
    """`tensor_shapes` at once for any number of layers: one of those that are alike stands for all of them.

    indices: of the layers to count, a range of neighbours (None: all); tensors outside of layers always come.
    """
    return _tensors(config, vocab_size, list(config.model.kinds_of_layers(indices)))


def parameter_counts(config: Config, vocab_size: int | None = None) -> ParameterCounts:
    """Counts that follow from `tensor_shapes`: total, shared, per domain, and activated per token of each domain.

    vocab_size: that of the configuration if left out, as every trained model's has it.
    """
    vocab_size = vocab_size or config.model.vocab_size
    assert vocab_size is not None
    owned: dict[str | None, int] = dict.fromkeys((None, *config.domain_names), 0)
    activated, routing, chosen = dict(owned), 0, config.experts_per_token
    for tensor in counted_tensors(config, vocab_size):
        name, size = tensor.name, tensor.size
        domain = parse_name(name).domain
        if is_routing(name):
            routing += size
            continue
        owned[domain] += size
        # k experts: expert tensors carry the group on their first axis, its word embedding does not.
        activated[domain] += chosen * size // tensor.shape[0] if is_expert(name) else size
    total, shared = sum(owned.values()), owned.pop(None)
    activated = {domain: shared + activated[domain] for domain in owned}
    return ParameterCounts(total, shared, owned, activated, routing)


def _tensors(config: Config, vocab_size: int, layers: Sequence[tuple[str, int]]) -> Iterator[CountedTensor]:
    """The tensors of `layers`, each with the number of layers that it stands for, and of all that is in no layer."""
    model = config.model
    hidden = model.hidden

    def once(tensors: Iterable[tuple[str, Shape]], many: int = 1) -> Iterator[CountedTensor]:
        return (CountedTensor(name, shape, many) for name, shape in tensors)

    def of_layers(is_query: bool) -> Iterator[CountedTensor]:
        for layer_name, many in layers:
            if (layer_name == QUERY_LAYER) == is_query:
                yield from once(_layer(config, layer_name, vocab_size), many)

    tables = {
        tensor_names.WORDS: vocab_size if model.domain_parameters.embedding == "shared" else 0,
        tensor_names.POSITIONS: model.positions if model.position_spec.has_table else 0,
        tensor_names.QUERIES: model.positions if model.has_query_layer else 0,
    }
    yield from once((name, (rows, hidden)) for name, rows in tables.items() if rows)
    yield from of_layers(is_query=False)
    yield from once(_norm(config, "norm"))
    yield from of_layers(is_query=True)
    if not model.head_spec.is_tied:
        yield from once([(tensor_names.OUTPUT_WORDS, (vocab_size, hidden))])
    for domain in config.domains:
        if model.domain_parameters.embedding == "own":
            yield from once([(tensor_name(tensor_names.WORDS, domain=domain.name), (vocab_size, hidden))])
        for layer_name, many in layers:
            if layer_name in model.sparse_prefixes:
                yield from once(_group(config, vocab_size, layer_name, domain.name, domain.experts), many)


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


def _group(
    config: Config, vocab_size: int, layer_name: str, domain: str, experts: int
) -> Iterator[tuple[str, Shape]]:
    """A domain's tensors of one sparse layer: its expert group and its routing table."""
    for tensor, shape in config.model.expert_network.shapes(config.model.hidden, config.model.ffn).items():
        yield expert_name(layer_name, tensor, domain), (experts, *shape)
    if config.model.router_spec.separates_domains:
        yield table_name(layer_name, domain), (vocab_size,)
