"""Tensor-parallel layout: the partition spec of every tensor of the model, by its name.

The same statement serves the cluster plan, checkpoints and the compiled graph.
"""

from __future__ import annotations

import math

from pangu_sigma.config.parameter_counts import Shape
from pangu_sigma.tensor_names import is_expert, is_routing, parse_name, tensor_name
from parallel.mesh import Mesh
from parallel.optimizer_sharding import optimizer_num_shards, optimizer_shard_of, replica_ranks
from parallel.partition_spec import Slices, shard_slices

# The mesh axis that shards each axis of a tensor, by its module and its name in there; all others are replicated.
_NETWORK = {
    "gate.weight": (None, "tensor"),
    "up.weight": (None, "tensor"),
    "up.bias": ("tensor",),
    "down.weight": ("tensor", None),
    "down.bias": (None,),
}
_SPECS = {
    "embedding": {"word": ("tensor", None)},
    "head": {"word": ("tensor", None)},
    "attention": {
        **{tensor_name(part, "weight"): (None, "tensor") for part in ("query", "key", "value")},
        **{tensor_name(part, "bias"): ("tensor",) for part in ("query", "key", "value")},
        "projection.weight": ("tensor", None),
    },
    "feed_forward": _NETWORK,
    "shared_expert": _NETWORK,
    "experts": {name: ("expert", *spec) for name, spec in _NETWORK.items()},
}


def spec_of(name: str, shape: Shape) -> tuple[str | None, ...]:
    """The mesh axis that shards each axis of the tensor of this name, None where none does."""
    parsed = parse_name(name)
    return _SPECS.get(parsed.module, {}).get(parsed.tensor, (None,) * len(shape))


def num_shards_of(name: str, shape: Shape, mesh: Mesh) -> int:
    """The number of different shards of the tensor (experts: of one layer's full expert axis)."""
    return math.prod(getattr(mesh, axis) for axis in spec_of(name, shape) if axis is not None)


def computed_slices_of(name: str, shape: Shape, mesh: Mesh, rank: int) -> Slices:
    """The slices that a rank computes with of the tensor of this name and full `shape`."""
    spec = tuple(1 if axis is None else axis for axis in spec_of(name, shape))
    return shard_slices(mesh, rank, shape, spec)


def stored_slices_of(name: str, shape: Shape, mesh: Mesh, rank: int, optimizer_parallel: bool) -> Slices:
    """The slices that a rank stores and updates of the shared parameter of this name and full `shape`;
    `optimizer_parallel`: the configuration's key of that name."""
    slices = computed_slices_of(name, shape, mesh, rank)
    if not optimizer_parallel:
        return slices
    index, shards = optimizer_shard_of(shape, spec_of(name, shape), mesh, rank)
    length = (slices[0].stop - slices[0].start) // shards
    start = slices[0].start + index * length
    return (slice(start, start + length), *slices[1:])


def storing_ranks_of(name: str, shape: Shape, mesh: Mesh, rank: int, optimizer_parallel: bool) -> tuple[int, ...]:
    """The ranks of a pipeline stage that store the same slices as `rank`, itself among them, in ascending order."""
    spec = spec_of(name, shape)
    if optimizer_parallel and optimizer_num_shards(shape, spec, mesh) > 1:
        return (rank,)
    return replica_ranks(spec, mesh, rank)


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether the tensor enters a matrix product: it then has a copy in the compute type too."""
    return len(shape) == (3 if is_expert(name) else 2) and not is_routing(name)
