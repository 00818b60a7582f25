"""Whether a compiled graph is what the plan says: cuts of parameters and experts, exchanges of every sparse layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pangu_sigma.config import Config, tensor_shapes
from pangu_sigma.config.capacity_sizes import activated_slots, samples_at_a_time
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.model.tensor_parallel_layout import computed_slices_of, spec_of, stored_slices_of
from pangu_sigma.tensor_names import WORDS, block_name, chunk_name, expert_name, is_routing, parse_name
from pangu_sigma.wording import natural_order
from parallel.dry.compiled_graph import (
    BYTES,
    POINT_TO_POINT,
    Collective,
    Operator,
    ancestors,
    collectives,
    graph_inputs,
    operators,
    parameter_shards,
)
from parallel.dry.parameter_placement import Placed
from parallel.mesh import Mesh
from parallel.optimizer_sharding import optimizer_num_shards, replica_ranks
from parallel.partition_spec import Slices, slices_shape

Shape = tuple[int, ...]

# Of the tensors of an expert, which mesh axes cut which of its axes where they enter the graph.
_ENTRY = {
    "gate.weight": (("expert",), ("data",), ("tensor",)),
    "up.weight": (("expert",), ("data",), ("tensor",)),
    "up.bias": (("expert",), ("tensor", "data")),
    "down.weight": (("expert",), ("tensor",), ("data",)),
    "down.bias": (("expert",), ("data", "tensor")),
}
_LAYER_NAME = re.compile(r"blocks-CellList/(\d+)-TransformerLayer|(query_layer)-TransformerLayer")
_PRODUCTS = "experts-BatchedExperts/"
# What the pipeline's pass adds micro-batches' gradients to (see `parallel.micro_batches`).
SUMS = "accu_grads."


@dataclass(frozen=True)
class CompiledGraph:
    """The last graph of one rank, with what its process told: uncut shapes of the model's parameters and of its expert
    tensors (with their numbers among the graph's inputs; None where they are parameters of a graph of pipeline
    stages), where MindSpore says that the parts of each parameter are, seconds in the compiler and in all, peak memory
    of the process; `update`: the graph that updates the shared parameters."""

    rank: int
    graph: str
    parameters: dict[str, Shape]
    expert_inputs: dict[str, tuple[int | None, Shape]]
    placed: dict[str, Placed]
    seconds: float
    total_seconds: float
    peak_bytes: int
    update: str = ""

    @cached_property
    def inputs(self) -> list[tuple[str, Shape]]:
        """Name in the graph and shape of the rank's part of every input."""
        return graph_inputs(self.graph)

    @cached_property
    def parameter_shards(self) -> dict[str, Shape]:
        """Shape of the rank's part of every parameter."""
        return parameter_shards(self.graph)

    def expert_part(self, name: str) -> Shape:
        """Shape of the rank's part of an expert tensor; () where the graph dropped it."""
        input_index, _ = self.expert_inputs[name]
        if input_index is None:
            return self.parameter_shards.get(name, ())
        return self.inputs[input_index][1] if input_index < len(self.inputs) else ()

    @cached_property
    def operators(self) -> list[Operator]:
        """Every operator."""
        return list(operators(self.graph))

    @cached_property
    def collectives(self) -> list[Collective]:
        """Every collective."""
        return collectives(self.graph)


def layer_name_of(scope: str) -> str | None:
    """The layer (`blocks.3`, `query_layer`) in whose cells an operator stands."""
    match = _LAYER_NAME.search(scope)
    if match is None:
        return None
    return match[2] or block_name(int(match[1]))


def problems(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """A sentence for everything in the graph that is not the plan's; the layers are named."""
    for check in (_names, _shards, _placed, _expert_cuts, _exchanges, _groups, _update, _chunks, _neighbours):
        yield from check(config, compiled)


def shared_of_stage(config: Config, compiled: CompiledGraph) -> dict[str, Shape]:
    """Name and uncut shape of the shared parameters that the rank's pipeline stage trains."""
    mesh = config.parallel.mesh
    stage = mesh.coordinates(compiled.rank).stage
    return {n: s for n, s in compiled.parameters.items() if stage_of(n, config.model.layers, mesh) == stage}


def _layer_names(config: Config, compiled: CompiledGraph) -> list[str]:
    """The sparse layers of the rank's pipeline stage."""
    mesh, layers = config.parallel.mesh, config.model.layers
    stage = mesh.coordinates(compiled.rank).stage
    return [layer_name for layer_name in config.model.sparse_prefixes if stage_of(layer_name, layers, mesh) == stage]


def _micro_batches(config: Config) -> int:
    """Micro-batches in one graph."""
    return config.train.gradient_accumulation_steps if config.parallel.pipeline > 1 else 1


def _names(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Names and uncut shapes against the configuration's manifest."""
    planned = tensor_shapes(config, vocabulary_size(config))
    shared = {n: s for n, s in planned.items() if parse_name(n).domain is None and not is_routing(n)}
    for name, ours, theirs in _unequal(shared, compiled.parameters):
        yield f"parameter {name} is {theirs} in the graph and {ours} in the configuration's manifest"
    chunks = config.parallel.expert_chunks
    for layer_name in config.model.sparse_prefixes:
        for tensor in config.model.expert_network.tensors:
            one = planned[expert_name(layer_name, tensor, config.domain_names[0])][1:]
            slots = activated_slots(config) * config.parallel.mesh.placement_groups
            for chunk in range(chunks):
                _, shape = compiled.expert_inputs.get(chunk_name(layer_name, tensor, chunk), (0, None))
                if shape != (slots // chunks, *one):
                    yield (
                        f"{layer_name}: experts' {tensor} is {_shape_text(shape)} in the graph and "
                        f"{slots // chunks} experts of {one} in the plan"
                    )


def _unequal(planned: dict[str, Shape], actual: dict[str, Shape]) -> Iterator[tuple[str, str, str]]:
    """(name, planned, actual) as texts, where a tensor does not have the shape that it should have."""
    for name in sorted(planned.keys() | actual.keys(), key=natural_order):
        if planned.get(name) != actual.get(name):
            yield name, _shape_text(planned.get(name)), _shape_text(actual.get(name))


def _shape_text(shape: Shape | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _shards(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Every shared parameter's part, and in a pipeline that there are no others than the stage's."""
    mesh, parts = config.parallel.mesh, compiled.parameter_shards
    own = shared_of_stage(config, compiled)
    planned = {name: _stored_shape(config, name, shape, compiled.rank) for name, shape in own.items()}
    for name, ours, theirs in _unequal(planned, {name: parts[name] for name in own if name in parts}):
        yield f"parameter {name} is cut to {theirs}, not to {ours}"
    if mesh.pipeline == 1:
        return
    stage = mesh.coordinates(compiled.rank).stage
    experts = {name for name in compiled.expert_inputs if stage_of(name, config.model.layers, mesh) == stage}
    expected = {*own, *experts}
    expected |= {f"{SUMS}{name}" for name in expected}
    if sends_words(config) and not config.parallel.optimizer_parallel and stage == mesh.pipeline - 1:
        expected.add(WORDS)
    for name in sorted(parts.keys() - expected, key=natural_order):
        yield f"stage {stage} holds {name}, which is another stage's"
    for name in sorted(expected - parts.keys(), key=natural_order):
        yield f"stage {stage} lacks {name}"


def sends_words(config: Config) -> bool:
    """Whether the first stage's word table is the last one's output matrix."""
    return config.parallel.pipeline > 1 and config.model.head_spec.is_tied


def _stored_shape(config: Config, name: str, shape: Shape, rank: int) -> Shape:
    """Shape of what a rank holds of a shared parameter."""
    return slices_shape(stored_slices_of(name, shape, config.parallel.mesh, rank, config.parallel.optimizer_parallel))


def _placed(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Which rank of the stage has which part of every shared parameter, by MindSpore's own statement."""
    mesh, seen = config.parallel.mesh, set()
    first = mesh.coordinates(compiled.rank).stage * mesh.stage_size
    for name, shape in shared_of_stage(config, compiled).items():
        placed, cut = compiled.placed.get(name), spec_of(name, shape)
        if placed is None:
            yield f"parameter {name} has no place in the compiled graph"
            continue
        if (placed, cut, shape) in seen:
            continue
        seen.add((placed, cut, shape))
        for rank in range(first, first + mesh.stage_size):
            theirs, ours = placed.part(shape, rank - first), computed_slices_of(name, shape, mesh, rank)
            if theirs != ours:
                yield f"of parameter {name} rank {rank} has the part {_ranges(theirs)}, not {_ranges(ours)}"
                break
        divided = config.parallel.optimizer_parallel and optimizer_num_shards(shape, cut, mesh) > 1
        planned = replica_ranks(cut, mesh, compiled.rank) if divided else ()
        if placed.dividing != planned:
            yield f"the part of parameter {name} is divided among the ranks {placed.dividing}, not {planned}"


def _ranges(part: Slices) -> str:
    return f"[{', '.join(f'{axis.start}:{axis.stop}' for axis in part)}]"


def _expert_cuts(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Every expert weight where it enters the graph and where it enters its product."""
    mesh = config.parallel.mesh
    own = _layer_names(config, compiled)
    for name, (_, shape) in compiled.expert_inputs.items():
        layer_name = parse_name(name).layer
        if layer_name not in own:
            continue
        planned = tuple(
            size // _num_shards(mesh, names) for size, names in zip(shape, _axes(config, name), strict=True)
        )
        part = compiled.expert_part(name)
        if part != planned:
            yield f"{name} comes in cut to {_shape_text(part)}, not to {planned}"
    hidden, inner = config.model.hidden, config.model.ffn // mesh.tensor
    for layer_name in own:
        of_rank = activated_slots(config) // mesh.exchange_size // config.parallel.expert_chunks
        actual = {operator.takes[1][1] for operator in _expert_products(compiled, layer_name)}
        planned = {(of_rank, hidden, inner), (of_rank, inner, hidden)}
        if actual != planned:
            yield f"{layer_name}: an expert's products take weights of {sorted(actual)}, not of {sorted(planned)}"


def _expert_products(compiled: CompiledGraph, layer_name: str) -> Iterator[Operator]:
    """The matrix products of a layer's experts in the forward pass."""
    for o in compiled.operators:
        if o.kind == "BatchMatMul" and not o.backward and _PRODUCTS in o.scope and layer_name_of(o.scope) == layer_name:
            yield o


def _axes(config: Config, name: str) -> tuple[tuple[str, ...], ...]:
    """Which mesh axes cut which axis of an expert tensor where it enters the graph: as an input finer than its product
    wants it, as a parameter (in pipeline stages, where MindSpore looks at the product alone) just so."""
    if config.parallel.pipeline == 1:
        return _ENTRY[parse_name(name).tensor]
    return tuple(() if axis is None else (axis,) for axis in spec_of(name, ()))


def _num_shards(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(getattr(mesh, name) for name in names)


def _exchanges(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Two all-to-alls forward and two backward of every sparse layer (of every chunk), inside the placement's group."""
    mesh, chunks = config.parallel.mesh, config.parallel.expert_chunks
    group = mesh.exchange_group(compiled.rank)
    expected = 2 * chunks * _micro_batches(config) if mesh.exchange_size > 1 else 0
    by_layer: dict[str | None, list[Collective]] = {}
    for c in compiled.collectives:
        if c.kind == "AlltoAll":
            by_layer.setdefault(layer_name_of(c.scope), []).append(c)
    for layer_name in _layer_names(config, compiled):
        own = by_layer.pop(layer_name, [])
        for way, backward in (("forward", False), ("backward", True)):
            count = sum(c.backward == backward and not c.recomputed for c in own)
            if count != expected:
                yield f"{layer_name} has {count} AllToAll {way} instead of {expected}"
        for c in own:
            if len(c.ranks) > len(group):
                yield (
                    f"{layer_name} exchanges rows between {len(c.ranks)} ranks, more than the {len(group)} of its "
                    "placement group"
                )
            elif c.ranks != group:
                yield f"{layer_name} exchanges rows between ranks {c.ranks}, not between {group}"
    for layer_name, others in by_layer.items():
        yield f"{layer_name or 'the graph'} has {len(others)} AllToAll that no sparse layer asks for"


def _groups(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Every other collective is between ranks that share a tensor, a sample or a parameter."""
    mesh, rank = config.parallel.mesh, compiled.rank
    own = mesh.coordinates(rank)
    stage = tuple(r for r in range(mesh.size) if mesh.coordinates(r).stage == own.stage)
    known = {
        mesh.tensor_group(rank),
        mesh.exchange_group(rank),
        mesh.replica_group(rank),
        mesh.shared_group(rank),
        stage,
        # The replicas of an expert's cut with the other cuts of its bias.
        tuple(r for r in stage if mesh.coordinates(r).expert == own.expert),
    }
    for c in compiled.collectives:
        if c.kind not in (*POINT_TO_POINT, "AlltoAll") and c.ranks not in known:
            where = layer_name_of(c.scope) or c.scope.rsplit("/", 2)[0]
            yield f"{where}: {c.kind} between ranks {c.ranks}, which share no part of a tensor in the plan"


def _update(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """Each rank updates its own parts, once each, and speaks with nobody."""
    parts = {name: compiled.parameter_shards.get(name) for name in shared_of_stage(config, compiled)}
    own = {n: shape for n, shape in parameter_shards(compiled.update).items() if not parse_name(n).is_optimizer}
    for name, ours, theirs in _unequal(parts, own):
        yield f"the update of {name} works on {theirs}, not on the rank's {ours}"
    updates = sum(o.kind == "AdamWeightDecay" for o in operators(compiled.update))
    if updates != len(parts):
        yield f"{updates} of {len(parts)} shared parameters are updated"
    for c in collectives(compiled.update):
        yield f"the update of the shared parameters has a {c.kind} between ranks {c.ranks}"


def _chunks(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """No chunk's rows wait for another chunk's experts."""
    chunks = config.parallel.expert_chunks
    if chunks == 1:
        return
    by_name = {operator.name: operator for operator in compiled.operators}
    products_of_expert = 3 if config.model.expert_network.gated else 2
    for layer_name in _layer_names(config, compiled):
        # Of one micro-batch: a later one may wait for an earlier one.
        products: dict[str | None, set[str]] = {}
        for o in _expert_products(compiled, layer_name):
            products.setdefault(o.micro, set()).add(o.name)
        sent, returned = 0, []
        for c in compiled.collectives:
            if c.kind == "AlltoAll" and not c.backward and not c.recomputed and layer_name_of(c.scope) == layer_name:
                own = products.get(by_name[c.name].micro, set())
                waits = frozenset(ancestors(by_name, c.name) & own)
                sent += not waits
                returned += [waits] if waits else []
        chunks = config.parallel.expert_chunks * _micro_batches(config)
        if sent != chunks:
            waiting = chunks - sent
            yield f"{layer_name}: {waiting} of {chunks} chunks of experts wait for another before their rows travel"
        if len(set(returned)) != chunks or any(len(waits) != products_of_expert for waits in returned):
            yield f"{layer_name}: rows come back from more experts than their own chunk's"


def _neighbours(config: Config, compiled: CompiledGraph) -> Iterator[str]:
    """A stage hands rows to the next one and gradients to the one before, micro-batch by micro-batch; a tied word table
    goes from the first stage to the last, and its gradient back, once a step, or under optimizer parallelism with
    every micro-batch."""
    mesh, rank = config.parallel.mesh, compiled.rank
    stage, last = mesh.coordinates(rank).stage, mesh.pipeline - 1
    if last == 0:
        return
    cut = mesh.tensor if config.parallel.sequence_parallel else 1
    tokens = samples_at_a_time(config) * config.data.sequence_length
    rows = tokens // cut * config.model.hidden * BYTES["Float32"]
    times, planned = config.train.gradient_accumulation_steps, Counter()
    for neighbour in (rank + mesh.stage_size, rank - mesh.stage_size):
        if 0 <= neighbour < mesh.size:
            planned["Send", neighbour, rows] += times
            planned["Receive", neighbour, rows] += times
    if sends_words(config) and stage in (0, last):
        part = computed_slices_of(WORDS, compiled.parameters[WORDS], mesh, rank)
        words = math.prod(slices_shape(part)) * BYTES["Float32"]
        other = rank + (last if stage == 0 else -last) * mesh.stage_size
        again = times if config.parallel.optimizer_parallel else 1
        planned["Send", other, words] += again
        planned["Receive", other, words] += again
    actual = Counter((c.kind, c.ranks[0], c.bytes) for c in compiled.collectives if c.kind in POINT_TO_POINT)
    for key in sorted(planned.keys() | actual.keys()):
        if planned[key] != actual[key]:
            kind, other, size = key
            yield f"stage {stage} has {actual[key]} {kind} of {size} bytes with rank {other} instead of {planned[key]}"
