"""Names of tensors: the one place that puts them together and takes them apart.

    embedding.word, embedding.position, embedding.query, norm.gamma, head.word
    {layer}.norm1.gamma, {layer}.attention.query.weight, {layer}.norm2.gamma, {layer}.feed_forward.up.weight
    {layer}.router.weight, {layer}.shared_expert.up.weight, {layer}.routing    what all domains have of a sparse layer
    domains.{domain}.{layer}.experts.up.weight, domains.{domain}.{layer}.routing, domains.{domain}.embedding.word
    optimizer.{m|v}.{name}, domains.{domain}.optimizer.{m|v}.{name}            moments
    domains.{domain}.optimizer.steps.{layer}                                   updates of each expert
    probe.{domain}                                                             held-out sequences

A layer is `blocks.{i}` or `query_layer`. An expert tensor has its group's experts on the first axis.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rre.router_specs import LAYER, GateWeight, RouterSpec

WORDS = "embedding.word"
POSITIONS = "embedding.position"
QUERIES = "embedding.query"
OUTPUT_WORDS = "head.word"
GATE = "router.weight"  # [D, E], of a learned gate in a sparse layer
QUERY_LAYER = "query_layer"
PROBE = "probe"
# Stores keep the domains' own word tables beside the experts' tensors, under this name instead of a layer's.
DOMAIN_EMBEDDING = "embedding"
# The state of a tensor that is no optimizer state. All states: `rre.store.expert_store.STATE_TENSORS`, and `steps`.
WEIGHT = "weight"

_NAME = re.compile(
    r"(?:domains\.([^.]+)\.)?(?:optimizer\.([^.]+)\.)?(?:(blocks\.\d+|query_layer)(?:\.|$))?([^.]*)\.?(.*?)(?:/\d+)?",
    re.DOTALL,
)
# A tensor's name does not tell which part's cell holds it, so a part can be exchanged under a checkpoint.
_WITHOUT_CELLS = {
    "feed_forward.router.": "router.",
    "feed_forward.shared_expert.": "shared_expert.",
    "head.expert_head.": "head.",
    "norm.row_norm.": "norm.",
    "embedding.words.": "embedding.",
    "embedding.positions.": "embedding.",
    "embedding.queries.": "embedding.",
}


class TensorName(NamedTuple):
    """A tensor's name taken apart; `str` puts it together again, also after `_replace`.

    domain: None for what all domains share. state: WEIGHT, or of the optimizer. layer: None outside of
    layers. module: `attention`, `experts`, `routing`, `embedding`, …; tensor: which of the module's, `query.weight`.
    """

    domain: str | None
    state: str
    layer: str | None
    module: str
    tensor: str

    def __str__(self) -> str:
        path = (part for part in (self.layer, self.module, self.tensor) if part)
        return tensor_name(*path, domain=self.domain, state=self.state)

    @property
    def part(self) -> str:
        """The name inside the layer or, outside of layers, the model: `attention.query.weight`."""
        return f"{self.module}.{self.tensor}" if self.tensor else self.module

    @property
    def owner(self) -> str:
        """The domain that it belongs to, or LAYER."""
        return self.domain or LAYER

    @property
    def is_optimizer(self) -> bool:
        """Whether it is optimizer state."""
        return self.state != WEIGHT


def parse_name(name: str) -> TensorName:
    """Take a tensor's name apart; the number of a chunk (`chunk_name`) is left out."""
    domain, state, layer, module, tensor = _NAME.fullmatch(name).groups()
    return TensorName(domain, state or WEIGHT, layer, module, tensor)


def tensor_name(*path: str, domain: str | None = None, state: str = WEIGHT) -> str:
    """The tensor at `path`, such as (block_name(3), "attention", "query.weight")."""
    if state != WEIGHT:
        path = ("optimizer", state, *path)
    if domain is not None:
        path = ("domains", domain, *path)
    return ".".join(path)


def block_name(index: int) -> str:
    """The layer of this number, counted from the bottom; the query layer has no number."""
    return f"blocks.{index}"


def block_index(layer_name: str | None) -> int | None:
    """The number of a block; None for the query layer, and whatever else is no block's name."""
    prefix, _, index = (layer_name or "").partition(".")
    return int(index) if prefix == "blocks" and index.isdecimal() else None


def expert_name(layer_name: str, tensor: str, domain: str | None = None, state: str = WEIGHT) -> str:
    """A domain's tensor of a store: of its experts in a layer (`up.weight`), or its word table (DOMAIN_EMBEDDING)."""
    module = () if layer_name == DOMAIN_EMBEDDING else ("experts",)
    return tensor_name(layer_name, *module, tensor, domain=domain, state=state)


def chunk_name(layer_name: str, tensor: str, chunk: int) -> str:
    """The activated experts of one chunk of a layer, as parameters of a pipeline stage's graph; in no file."""
    return f"{expert_name(layer_name, tensor)}/{chunk}"


def steps_name(layer_name: str, domain: str) -> str:
    """Update counts of a domain's experts in a layer, or of its word table (DOMAIN_EMBEDDING)."""
    return tensor_name(layer_name, domain=domain, state="steps")


def table_name(layer_name: str, owner: str) -> str:
    """A sparse layer's routing table, of a domain or of LAYER."""
    return tensor_name(layer_name, "routing", domain=None if owner == LAYER else owner)


def probe_name(domain: str) -> str:
    """The held-out sequences of a domain."""
    return tensor_name(PROBE, domain)


def of_domain(name: str, domain: str | None) -> str:
    """The same tensor of another domain; None leaves the owner out, which names no tensor but one of any domain."""
    return str(parse_name(name)._replace(domain=domain))


def dense_name(name: str) -> str:
    """The tensor of a dense model that stands where this one does: an expert's is that of the layer's network."""
    parsed = parse_name(name)
    module = "feed_forward" if parsed.module == "experts" else parsed.module
    return str(parsed._replace(domain=None, module=module))


def is_routing(name: str) -> bool:
    """Whether it is a routing table (int32, no parameter)."""
    return name.endswith(".routing")


def is_expert(name: str) -> bool:
    """Whether it is an expert group's weight or moment, with the experts on the first axis."""
    return parse_name(name).module == "experts"


def is_gate(name: str) -> bool:
    """Whether it is a weight or moment of a learned gate."""
    return parse_name(name).module == "router"


def gate_weight(name: str, spec: RouterSpec) -> GateWeight | None:
    """What it is of the weights of a learned gate; None where it is of no gate."""
    return spec.gate_weight(parse_name(name).tensor) if is_gate(name) else None


def name_without_cells(name: str) -> str:
    """The name of a network's parameter, which MindSpore called after all cells that it is in."""
    for cells, plain in _WITHOUT_CELLS.items():
        name = name.replace(cells, plain)
    return name
