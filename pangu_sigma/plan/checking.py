"""Whether a compiled graph is what the plan says: cuts of parameters and experts, exchanges of every sparse layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pangu_sigma.config import Config, manifest, vocabulary_size
from pangu_sigma.config.counts import is_expert, is_routing
from pangu_sigma.config.dispatch import activated_slots
from pangu_sigma.plan.cuts import cut_of
from parallel.dry.graph import Collective, Operator, ancestors, collectives, given, held, operators
from parallel.mesh import Mesh

Shape = tuple[int, ...]

# Of the four tensors of an expert, which mesh axes cut which of its axes where they enter the graph.
_ENTRY = {
    "up.weight": (("expert",), ("data",), ("tensor",)),
    "up.bias": (("expert",), ("tensor", "data")),
    "down.weight": (("expert",), ("tensor",), ("data",)),
    "down.bias": (("expert",), ("data", "tensor")),
}
_PLACE = re.compile(r"blocks-CellList/(\d+)-TransformerLayer|(query_layer)-TransformerLayer")
_PRODUCTS = "networks-SlotNetworks/"


@dataclass(frozen=True)
class Compiled:
    """The last graph of one rank, with what its process told: uncut shapes of parameters and of expert inputs (with
    their numbers among the graph's inputs), seconds in the compiler and in all, peak memory of the process;
    `update`: the graph that updates the shared parameters."""

    rank: int
    graph: str
    parameters: dict[str, Shape]
    expert_inputs: dict[str, tuple[int, Shape]]
    seconds: float
    total_seconds: float
    peak_bytes: int
    update: str = ""

    @cached_property
    def inputs(self) -> list[tuple[str, Shape]]:
        """Name in the graph and shape of the rank's part of every input."""
        return given(self.graph)

    def input_shape(self, number: int) -> Shape:
        """Shape of the rank's part of one input; () where the graph dropped it."""
        return self.inputs[number][1] if number < len(self.inputs) else ()

    @cached_property
    def operators(self) -> list[Operator]:
        """Every operator."""
        return list(operators(self.graph))

    @cached_property
    def collectives(self) -> list[Collective]:
        """Every collective."""
        return collectives(self.graph)


def place_of(scope: str) -> str | None:
    """The layer (`blocks.3`, `query_layer`) in whose cells an operator stands."""
    found = _PLACE.search(scope)
    if found is None:
        return None
    return found[2] or f"blocks.{found[1]}"


def problems(config: Config, compiled: Compiled) -> Iterator[str]:
    """A sentence for everything in the graph that is not the plan's; the layers are named."""
    yield from _names(config, compiled)
    yield from _shards(config, compiled)
    yield from _expert_cuts(config, compiled)
    yield from _exchanges(config, compiled)
    yield from _groups(config, compiled)
    yield from _update(compiled)
    yield from _chunks(config, compiled)


def _names(config: Config, compiled: Compiled) -> Iterator[str]:
    """Names and uncut shapes against the configuration's manifest."""
    wanted = manifest(config, vocabulary_size(config))
    shared = {n: s for n, s in wanted.items() if not n.startswith("domains.") and not is_routing(n)}
    for name in sorted(shared.keys() | compiled.parameters.keys()):
        ours, theirs = shared.get(name), compiled.parameters.get(name)
        if ours != theirs:
            yield f"parameter {name} is {_said(theirs)} in the graph and {_said(ours)} in the configuration's manifest"
    chunks = config.parallel.expert_chunks
    for place in config.model.sparse_prefixes:
        for tensor in _ENTRY:
            end = f".{place}.experts.{tensor}"
            one = next(shape[1:] for name, shape in wanted.items() if is_expert(name) and name.endswith(end))
            slots = activated_slots(config) * config.parallel.mesh.placement_groups
            for chunk in range(chunks):
                name = f"{place}.experts.{tensor}/{chunk}"
                _, shape = compiled.expert_inputs.get(name, (0, None))
                if shape != (slots // chunks, *one):
                    yield (
                        f"{place}: experts' {tensor} is {_said(shape)} in the graph and {slots // chunks} experts of "
                        f"{one} in the plan"
                    )


def _said(shape: Shape | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _shards(config: Config, compiled: Compiled) -> Iterator[str]:
    """Every shared parameter's part."""
    mesh, parts = config.parallel.mesh, held(compiled.graph)
    for name, shape in compiled.parameters.items():
        wanted = [
            size // (1 if axis is None else getattr(mesh, axis))
            for size, axis in zip(shape, cut_of(name, shape), strict=True)
        ]
        allowed = [tuple(wanted)]
        if config.parallel.optimizer_parallel:
            ranks = mesh.rows if "tensor" in cut_of(name, shape) else mesh.rows * mesh.tensor
            allowed += [
                (wanted[0] // ways, *wanted[1:]) for ways in range(2, ranks + 1)
                if ranks % ways == 0 and wanted[0] % ways == 0
            ]  # fmt: skip
        part = parts.get(name)
        if part not in allowed:
            yield f"parameter {name} is cut to {_said(part)}, not to {allowed[0]}"


def _expert_cuts(config: Config, compiled: Compiled) -> Iterator[str]:
    """Every expert weight where it enters the graph and where it enters its product."""
    mesh = config.parallel.mesh
    for name, (number, shape) in compiled.expert_inputs.items():
        place, _, tensor = name.partition(".experts.")
        axes = _ENTRY[tensor.split("/")[0]]
        wanted = tuple(size // _ways(mesh, names) for size, names in zip(shape, axes, strict=True))
        part = compiled.input_shape(number)
        if part != wanted:
            yield f"{place}: experts' {tensor} comes in cut to {_said(part)}, not to {wanted}"
    hidden, inner = config.model.hidden, config.model.ffn // mesh.tensor
    for place in config.model.sparse_prefixes:
        of_rank = activated_slots(config) // mesh.exchange_size // config.parallel.expert_chunks
        found = {
            operator.takes[1][1]
            for operator in compiled.operators
            if operator.kind == "BatchMatMul" and not operator.backward and _PRODUCTS in operator.scope
            and place_of(operator.scope) == place
        }  # fmt: skip
        wanted = {(of_rank, hidden, inner), (of_rank, inner, hidden)}
        if found != wanted:
            yield f"{place}: an expert's products take weights of {sorted(found)}, not of {sorted(wanted)}"


def _ways(mesh: Mesh, names: tuple[str, ...]) -> int:
    ways = 1
    for name in names:
        ways *= getattr(mesh, name)
    return ways


def _exchanges(config: Config, compiled: Compiled) -> Iterator[str]:
    """Two all-to-alls forward and two backward of every sparse layer (of every chunk), inside the placement's group."""
    mesh, chunks = config.parallel.mesh, config.parallel.expert_chunks
    group = mesh.exchange_group(compiled.rank)
    expected = 2 * chunks if mesh.exchange_size > 1 else 0
    by_place: dict[str | None, list[Collective]] = {}
    for c in compiled.collectives:
        if c.kind == "AlltoAll":
            by_place.setdefault(place_of(c.scope), []).append(c)
    for place in config.model.sparse_prefixes:
        mine = by_place.pop(place, [])
        for way, backward in (("forward", False), ("backward", True)):
            count = sum(c.backward == backward and not c.recomputed for c in mine)
            if count != expected:
                yield f"{place} has {count} AllToAll {way} instead of {expected}"
        for c in mine:
            if len(c.ranks) > len(group):
                yield (
                    f"{place} exchanges rows between {len(c.ranks)} ranks, more than the {len(group)} of its placement "
                    "group"
                )
            elif c.ranks != group:
                yield f"{place} exchanges rows between ranks {c.ranks}, not between {group}"
    for place, others in by_place.items():
        yield f"{place or 'the graph'} has {len(others)} AllToAll that no sparse layer asks for"


def _groups(config: Config, compiled: Compiled) -> Iterator[str]:
    """Every other collective is between ranks that share a tensor, a sample or a parameter."""
    mesh, rank = config.parallel.mesh, compiled.rank
    place = mesh.coordinates(rank)
    stage = tuple(r for r in range(mesh.size) if mesh.coordinates(r).stage == place.stage)
    known = {
        mesh.tensor_group(rank),
        mesh.exchange_group(rank),
        mesh.replica_group(rank),
        mesh.shared_group(rank),
        stage,
        # The replicas of an expert's cut with the other cuts of its bias.
        tuple(r for r in stage if mesh.coordinates(r).expert == place.expert),
    }
    for c in compiled.collectives:
        if c.kind not in ("Send", "Receive", "AlltoAll") and c.ranks not in known:
            where = place_of(c.scope) or c.scope.rsplit("/", 2)[0]
            yield f"{where}: {c.kind} between ranks {c.ranks}, which share no part of a tensor in the plan"


def _update(compiled: Compiled) -> Iterator[str]:
    """Each rank updates its own parts, once each, and speaks with nobody."""
    parts = held(compiled.graph)
    mine = {name: shape for name, shape in held(compiled.update).items() if not name.startswith("optimizer.")}
    for name in sorted(parts.keys() | mine.keys()):
        if mine.get(name) != parts.get(name):
            yield f"the update of {name} works on {_said(mine.get(name))}, not on the rank's {_said(parts.get(name))}"
    updates = sum(o.kind == "AdamWeightDecay" for o in operators(compiled.update))
    if updates != len(parts):
        yield f"{updates} of {len(parts)} shared parameters are updated"
    for c in collectives(compiled.update):
        yield f"the update of the shared parameters has a {c.kind} between ranks {c.ranks}"


def _chunks(config: Config, compiled: Compiled) -> Iterator[str]:
    """No chunk's rows wait for another chunk's experts."""
    chunks = config.parallel.expert_chunks
    if chunks == 1:
        return
    by_name = {operator.name: operator for operator in compiled.operators}
    for place in config.model.sparse_prefixes:
        products = {
            o.name
            for o in compiled.operators
            if o.kind == "BatchMatMul" and not o.backward and _PRODUCTS in o.scope and place_of(o.scope) == place
        }
        sent, returned = 0, []
        for c in compiled.collectives:
            if c.kind == "AlltoAll" and not c.backward and not c.recomputed and place_of(c.scope) == place:
                waits = frozenset(ancestors(by_name, c.name) & products)
                sent += not waits
                returned += [waits] if waits else []
        if sent != chunks:
            yield f"{place}: {chunks - sent} of {chunks} chunks of experts wait for another before their rows travel"
        if len(set(returned)) != chunks or any(len(waits) != 2 for waits in returned):
            yield f"{place}: rows come back from more experts than their own chunk's"
