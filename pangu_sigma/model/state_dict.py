"""State dict: a live model's tensors under their checkpoint names, and back into a model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import partial

import numpy as np

from pangu_sigma.checkpoint import LazyTensor, StoredTensors, folder_layout
from pangu_sigma.checkpoint.distributed import ShardedTensor, TensorShard
from pangu_sigma.config.parameter_counts import is_routing, layer_name_and_owner
from pangu_sigma.errors import UserError
from pangu_sigma.model.model import DOMAIN_EMBEDDING, Model
from rre.router_specs import LAYER
from rre.store.expert_store import STATE_TENSORS


def domain_tensors(model: Model, optimizer_state: bool) -> dict[str, np.ndarray]:
    """Every domain's tensors by checkpoint name; the arrays are views of the store's tables, nothing is copied."""
    store, groups = model.store, model.groups
    tensors: dict[str, np.ndarray] = {}
    for kind, layer_name, name, table in store.tables():
        if kind != "weight" and not optimizer_state:
            continue
        for domain_id, domain in enumerate(groups.names):
            checkpoint_name = _expert_tensor(domain, kind, layer_name, name)
            tensors[checkpoint_name] = table[domain_id] if layer_name == DOMAIN_EMBEDDING else table[groups.of(domain)]
    for layer_name, by_domain in model.tables.items():
        for domain, table in by_domain.items():
            tensors[table_name(domain, layer_name)] = table
    if optimizer_state:
        for layer_name, steps in store.steps.items():
            for domain_id, domain in enumerate(groups.names):
                rows = slice(domain_id, domain_id + 1) if layer_name == DOMAIN_EMBEDDING else groups.of(domain)
                tensors[f"domains.{domain}.optimizer.steps.{layer_name}"] = steps[rows]
    return tensors


def table_name(owner: str, layer_name: str) -> str:
    """The checkpoint's name of a routing table of one sparse layer, which belongs to a domain or to the layer."""
    return f"{layer_name}.routing" if owner == LAYER else f"domains.{owner}.{layer_name}.routing"


def _expert_tensor(domain: str, kind: str, layer_name: str, name: str) -> str:
    prefix = f"domains.{domain}." + ("" if kind == "weight" else f"optimizer.{kind}.")
    return f"{prefix}embedding.{name}" if layer_name == DOMAIN_EMBEDDING else f"{prefix}{layer_name}.experts.{name}"


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
    for kind, layer_name, name, table in store.tables():
        if store.in_memory(layer_name) or (kind != "weight" and moments is None):
            continue
        for domain in groups.names:
            rows = groups.of(domain)
            read = partial(store.read, kind, layer_name, name, rows)
            shape = (rows.stop - rows.start, *table.shape[1:])
            tensors[_expert_tensor(domain, kind, layer_name, name)] = LazyTensor(shape, table.dtype, read)
    return tensors


def tensor_parts(model: Model, moments: Mapping[str, np.ndarray] | None) -> dict[str, ShardedTensor]:
    """All tensors of a checkpoint by name, each with the part of it that this process writes; without `moments`
    those of the model alone.

    All processes' parts together are every tensor once: a process writes its own experts, unless it is a replica, its
    own parts of shared parameters, and its turn of what several of them have.
    """
    store, groups, shards = model.store, model.groups, model.expert_shards
    store.flush()
    parts = _shared_parts(model, moments) | _elsewhere(model, moments)
    for kind, layer_name, name, table in store.tables():
        if layer_name == DOMAIN_EMBEDDING or (kind != "weight" and moments is None):
            continue
        shard = shards[name]
        for domain in groups.names:
            pieces = []
            for begin, rows in _runs(model, domain) if shard.is_writer else ():
                read = partial(store.read, kind, layer_name, name, rows)
                values = LazyTensor((rows.stop - rows.start, *table.shape[1:]), table.dtype, read)
                pieces.append(TensorShard((begin, *(axis.start for axis in shard.slices)), values))
            shape = (groups.of(domain).stop - groups.of(domain).start, *shard.shape)
            parts[_expert_tensor(domain, kind, layer_name, name)] = ShardedTensor(shape, table.dtype, tuple(pieces))
    for layer_name, steps in store.steps.items() if moments is not None else ():
        for domain in groups.names if layer_name != DOMAIN_EMBEDDING else ():
            runs = _runs(model, domain) if _counts_for_others(model) else ()
            size = groups.of(domain).stop - groups.of(domain).start
            pieces = tuple(TensorShard((begin,), steps[rows]) for begin, rows in runs)
            parts[f"domains.{domain}.optimizer.steps.{layer_name}"] = ShardedTensor((size,), steps.dtype, pieces)
    return parts


def _shared_parts(model: Model, moments: Mapping[str, np.ndarray] | None) -> dict[str, ShardedTensor]:
    """What is not the experts': shared parameters and moments, routing tables, embedding slots."""
    store, groups, shared, processes = model.store, model.groups, model.shared, model.processes
    values = shared.values() | (moments or {})
    names = {name: name for name in shared.shapes}
    if moments is not None:
        names |= {f"optimizer.{kind}.{owner}": owner for owner in shared.trained for kind in "mv"}
    parts: dict[str, ShardedTensor] = {}
    for turn, (name, owner) in enumerate(sorted(names.items())):
        holders = shared.storing_ranks(owner) or range(processes.size)
        writes = holders[turn % len(holders)] == processes.rank
        begin = tuple(axis.start for axis in shared.stored_slices(owner))
        pieces = (TensorShard(begin, values[name]),) if writes else ()
        parts[name] = ShardedTensor(shared.shapes[owner], np.dtype(np.float32), pieces)
    common = {
        table_name(o, layer_name): table
        for layer_name, by_owner in model.tables.items()
        for o, table in by_owner.items()
    }
    for kind, layer_name, name, table in store.tables():
        if layer_name == DOMAIN_EMBEDDING and (kind == "weight" or moments is not None):
            common |= {_expert_tensor(d, kind, layer_name, name): table[n] for n, d in enumerate(groups.names)}
    if DOMAIN_EMBEDDING in store.steps and moments is not None:
        steps = store.steps[DOMAIN_EMBEDDING]
        common |= {
            f"domains.{domain}.optimizer.steps.{DOMAIN_EMBEDDING}": steps[domain_id : domain_id + 1]
            for domain_id, domain in enumerate(groups.names)
        }
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
                parts |= {_expert_tensor(domain, kind, layer_name, name): part for kind in kinds}
            if moments is not None:
                name = f"domains.{domain}.optimizer.steps.{layer_name}"
                parts[name] = ShardedTensor((size,), np.dtype(np.int64), ())
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
    store, groups = model.store, model.groups
    for kind, layer_name, name, table in store.tables():
        if kind != "weight" and not optimizer_state:
            continue
        for domain_id, domain in enumerate(groups.names):
            stored = _expert_tensor(domain, kind, layer_name, name)
            if layer_name == DOMAIN_EMBEDDING:
                table[domain_id][...] = _checked(tensors, stored, table[domain_id].shape)
                continue
            shard = model.expert_shards[name]
            inside, rows = _local_experts_of(model, domain)
            if inside:
                values = _checked_rows(model, tensors, stored, shard.shape, inside)
                store.write(kind, layer_name, name, rows, values[(slice(None), *shard.slices)])
            model.processes.mark()
    for layer_name, by_owner in model.tables.items():
        for owner, table in by_owner.items():
            table[...] = _checked(tensors, table_name(owner, layer_name), table.shape)
    if optimizer_state:
        for layer_name, steps in store.steps.items():
            for domain_id, domain in enumerate(groups.names):
                stored = f"domains.{domain}.optimizer.steps.{layer_name}"
                if layer_name == DOMAIN_EMBEDDING:
                    steps[domain_id : domain_id + 1] = _checked(tensors, stored, (1,))
                    continue
                inside, rows = _local_experts_of(model, domain)
                if inside:
                    steps[rows] = _checked_rows(model, tensors, stored, (), inside)


def _checked_rows(
    model: Model, tensors: Mapping[str, np.ndarray], name: str, inner: tuple[int, ...], rows: range
) -> np.ndarray:
    """These rows of a domain's tensor, of whose experts each has the shape `inner`."""
    group = model.groups.of(folder_layout.domain_of(name))
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
        if is_routing(name):
            layer_name, owner = layer_name_and_owner(name)
            tables.setdefault(layer_name, {})[owner] = tensors[name]
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
