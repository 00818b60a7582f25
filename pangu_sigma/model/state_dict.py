"""State dict: a live model's tensors under their checkpoint names, and back into a model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from pangu_sigma.checkpoint import LazyTensor, StoredTensors
from pangu_sigma.checkpoint.distributed import ShardedTensor, TensorShard
from pangu_sigma.errors import UserError
from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING, expert_name, parse_name, steps_name, table_name, tensor_name
from parallel.partition_spec import Shard
from rre.store.expert_store import STATE_TENSORS


def domain_tensors(model: Model, optimizer_state: bool) -> dict[str, np.ndarray]:
    """Every domain's tensors by checkpoint name; the arrays are views of the store's tables, nothing is copied."""
    tensors = _common_tensors(model, optimizer_state)
    for _, name_of, table, _ in _expert_tables(model, optimizer_state):
        tensors |= {name_of(domain): table[model.groups.of(domain)] for domain in model.groups.names}
    return tensors


def _expert_tables(
    model: Model, optimizer_state: bool, embedding: bool = False
) -> Iterator[tuple[tuple[str, str, str] | None, Callable[[str], str], np.ndarray, Shard | None]]:
    """(what the store calls it, domain -> checkpoint name, table, shard of an expert's tensor) of every tensor of the
    experts, or of the domains' word embeddings, which have no shard; the store has no name for update counts."""
    shards = model.expert_shards
    for kind, layer_name, tensor, table in model.store.tables():
        if (layer_name == DOMAIN_EMBEDDING) == embedding and (kind == "weight" or optimizer_state):
            name_of = partial(expert_name, layer_name, tensor, state=kind)
            yield (kind, layer_name, tensor), name_of, table, shards.get(tensor)
    for layer_name, steps in model.store.steps.items() if optimizer_state else ():
        if (layer_name == DOMAIN_EMBEDDING) == embedding:
            yield None, partial(steps_name, layer_name), steps, Shard((), (), _counts_for_others(model))


def _common_tensors(model: Model, optimizer_state: bool) -> dict[str, np.ndarray]:
    """Views of what every process has whole: routing tables, the domains' word embeddings."""
    tensors = {
        table_name(layer_name, owner): table
        for layer_name, by_owner in model.tables.items()
        for owner, table in by_owner.items()
    }
    for stored, name_of, table, _ in _expert_tables(model, optimizer_state, embedding=True):
        # An embedding has no axis of experts, its update count has one of length 1.
        rows = [table[i] if stored else table[i : i + 1] for i in range(len(table))]
        tensors |= dict(zip(map(name_of, model.groups.names), rows, strict=True))
    return tensors


def model_tensors(model: Model, moments: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray | LazyTensor]:
    """All tensors of a checkpoint by name: shared, every domain's, and the optimizer's `moments` of shared parameters.

    `moments` None leaves all optimizer state out.

    Experts that lie on disk come as tensors that are read when they are written.
    """
    store, groups = model.store, model.groups
    store.flush()
    tensors: dict[str, np.ndarray | LazyTensor] = {**model.shared.values()}
    if moments is not None:
        tensors |= moments
    tensors |= domain_tensors(model, moments is not None)
    for stored, name_of, table, _ in _expert_tables(model, moments is not None):
        for domain in groups.names if stored and not store.in_memory(stored[1]) else ():
            rows = groups.of(domain)
            shape = (rows.stop - rows.start, *table.shape[1:])
            tensors[name_of(domain)] = LazyTensor(shape, table.dtype, partial(store.read, *stored, rows))
    return tensors


def tensor_parts(model: Model, moments: Mapping[str, np.ndarray] | None) -> dict[str, ShardedTensor]:
    """All tensors of a checkpoint by name, each with the part of it that this process writes; without `moments`
    those of the model alone.

    All processes' parts together are every tensor once: a process writes its own experts, unless it is a replica, its
    own parts of shared parameters, and its turn of what several of them have.
    """
    store, groups = model.store, model.groups
    store.flush()
    parts = _shared_parts(model, moments) | _elsewhere(model, moments)
    for stored, name_of, table, shard in _expert_tables(model, moments is not None):
        for domain, size in zip(groups.names, groups.sizes, strict=True):
            pieces = []
            for begin, rows in _runs(model, domain) if shard.is_writer else ():
                values = table[rows]
                if stored:
                    values = LazyTensor(values.shape, table.dtype, partial(store.read, *stored, rows))
                pieces.append(TensorShard((begin, *(axis.start for axis in shard.slices)), values))
            parts[name_of(domain)] = ShardedTensor((size, *shard.shape), table.dtype, tuple(pieces))
    return parts


def _shared_parts(model: Model, moments: Mapping[str, np.ndarray] | None) -> dict[str, ShardedTensor]:
    """What is not the experts': shared parameters and moments, routing tables, embedding slots."""
    shared, processes = model.shared, model.processes
    values = shared.values() | (moments or {})
    names = {name: name for name in shared.shapes}
    if moments is not None:
        names |= {tensor_name(owner, state=moment): owner for owner in shared.trained for moment in "mv"}
    parts: dict[str, ShardedTensor] = {}
    for turn, (name, owner) in enumerate(sorted(names.items())):
        holders = shared.storing_ranks(owner) or range(processes.size)
        writes = holders[turn % len(holders)] == processes.rank
        begin = tuple(axis.start for axis in shared.stored_slices(owner))
        pieces = (TensorShard(begin, values[name]),) if writes else ()
        parts[name] = ShardedTensor(shared.shapes[owner], np.dtype(np.float32), pieces)
    common = _common_tensors(model, moments is not None)
    for turn, (name, array) in enumerate(sorted(common.items())):
        parts[name] = ShardedTensor.unsharded(array, turn % processes.size == processes.rank)
    return parts


def _elsewhere(model: Model, moments: Mapping[str, np.ndarray] | None) -> dict[str, ShardedTensor]:
    """The experts of other pipeline stages, of which this process writes nothing."""
    parts: dict[str, ShardedTensor] = {}
    kinds = STATE_TENSORS if moments is not None else STATE_TENSORS[:1]
    for layer_name in model.config.model.sparse_prefixes:
        if layer_name in model.layer_names:
            continue
        for domain, size in zip(model.groups.names, model.groups.sizes, strict=True):
            for name, shard in model.expert_shards.items():
                part = ShardedTensor((size, *shard.shape), np.dtype(np.float32), ())
                parts |= {expert_name(layer_name, name, domain, kind): part for kind in kinds}
            if moments is not None:
                parts[steps_name(layer_name, domain)] = ShardedTensor((size,), np.dtype(np.int64), ())
    return parts


def _local_experts_of(model: Model, domain: str) -> tuple[range, slice]:
    """A domain's experts that this process holds: positions in the domain's group, and rows of the store."""
    group, local_experts = model.groups.of(domain), model.local_experts
    low, high = (bisect_left(local_experts, bound) for bound in (group.start, group.stop))
    own = local_experts[low:high]
    return range(own.start - group.start, own.stop - group.start, own.step), slice(low, high)


def _runs(model: Model, domain: str) -> list[tuple[int, slice]]:
    """The same as runs of neighbours: where each begins in the group, and its rows of the store."""
    inside, rows = _local_experts_of(model, domain)
    if inside.step == 1:
        return [(inside.start, rows)] if inside else []
    return [(slot, slice(row, row + 1)) for slot, row in zip(inside, range(rows.start, rows.stop), strict=True)]


def _counts_for_others(model: Model) -> bool:
    """Whether this process writes down what is counted of its experts as wholes, for all that hold a part of them."""
    mesh, rank = model.processes.mesh, model.processes.rank
    coordinates = mesh.coordinates(rank)
    return coordinates.data == 0 and coordinates.tensor == 0


def restore_model(model: Model, tensors: Mapping[str, np.ndarray], optimizer_state: bool = False) -> None:
    """Fill the network and the store from checkpoint tensors; `optimizer_state`: the experts' moments and counts too.

    A process of several takes its own experts and reads nothing of the others'. Raises UserError naming the first
    tensor that is missing or has another shape: nothing stays uninitialised.
    """
    # Updates that are still under way would write over what is restored.
    model.store.flush()
    for name in model.shared.local_names:
        model.shared.write(name, _checked(tensors, name, model.shared.shapes[name]))
        model.processes.mark()
    for name, array in _common_tensors(model, optimizer_state).items():
        array[...] = _checked(tensors, name, array.shape)
        model.processes.mark()
    for stored, name_of, table, shard in _expert_tables(model, optimizer_state):
        for domain in model.groups.names:
            inside, rows = _local_experts_of(model, domain)
            if inside:
                values = _checked_rows(model, tensors, name_of(domain), shard.shape, inside)
                if stored:
                    model.store.write(*stored, rows, values[(slice(None), *shard.slices)])
                else:
                    table[rows] = values
            model.processes.mark()


def _checked_rows(
    model: Model, tensors: Mapping[str, np.ndarray], name: str, inner: tuple[int, ...], rows: range
) -> np.ndarray:
    """These rows of a domain's tensor, of whose experts each has the shape `inner`."""
    group = model.groups.of(parse_name(name).domain)
    shape = (group.stop - group.start, *inner)
    if not isinstance(tensors, StoredTensors) or len(rows) == shape[0]:
        return _checked(tensors, name, shape)[rows.start : rows.stop : rows.step]
    if name not in tensors:
        raise _missing(name)
    _check_shape(name, tensors.shape(name), shape)
    return tensors.rows(name, rows)


def stored_tables(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The routing tables of a checkpoint: sparse layer -> owner -> int32 [V]."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors:
        if (parsed := parse_name(name)).module == "routing":
            tables.setdefault(parsed.layer, {})[parsed.owner] = tensors[name]
    return tables


def _checked(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise _missing(name)
    tensor = tensors[name]
    _check_shape(name, tensor.shape, shape)
    return tensor


def _missing(name: str) -> UserError:
    return UserError(f"the checkpoint has no tensor {name}: use the configuration that it was saved with")


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise UserError(
            f"the checkpoint's tensor {name} is {tuple(shape)} where this configuration needs {tuple(expected)}: "
            "use the configuration that it was saved with"
        )
