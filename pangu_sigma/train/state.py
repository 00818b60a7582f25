"""Between a live model and a checkpoint: which tensor has which name, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor

from pangu_sigma.checkpoint import LazyTensor, StoredTensors, layout
from pangu_sigma.checkpoint.together import TensorPart
from pangu_sigma.config.counts import is_routing, place_and_owner
from pangu_sigma.errors import UserError
from pangu_sigma.model.build import SLOTS, Model
from rre.kinds import LAYER

if TYPE_CHECKING:
    from pangu_sigma.train.optimizer import Optimizer


def domain_tensors(model: Model, optimizer_state: bool) -> dict[str, np.ndarray]:
    """Every domain's tensors by checkpoint name; the arrays are views of the store's tables, nothing is copied."""
    store, groups = model.store, model.groups
    found: dict[str, np.ndarray] = {}
    for kind, place, name, table in store.tables():
        if kind != "weight" and not optimizer_state:
            continue
        for number, domain in enumerate(groups.names):
            checkpoint_name = _expert_tensor(domain, kind, place, name)
            found[checkpoint_name] = table[number] if place == SLOTS else table[groups.of(domain)]
    for place, by_domain in model.tables.items():
        for domain, table in by_domain.items():
            found[table_name(domain, place)] = table
    if optimizer_state:
        for place, steps in store.steps.items():
            for number, domain in enumerate(groups.names):
                mine = steps[number : number + 1] if place == SLOTS else steps[groups.of(domain)]
                found[f"domains.{domain}.optimizer.steps.{place}"] = mine
    return found


def table_name(owner: str, place: str) -> str:
    """The checkpoint's name of a routing table of one sparse layer, which belongs to a domain or to the layer."""
    return f"{place}.routing" if owner == LAYER else f"domains.{owner}.{place}.routing"


def _expert_tensor(domain: str, kind: str, place: str, name: str) -> str:
    prefix = f"domains.{domain}." + ("" if kind == "weight" else f"optimizer.{kind}.")
    return f"{prefix}embedding.{name}" if place == SLOTS else f"{prefix}{place}.experts.{name}"


def model_tensors(model: Model, optimizer: Optimizer | None) -> dict[str, np.ndarray | LazyTensor]:
    """All tensors of a checkpoint by name: shared, every domain's, and the moments if an optimizer is given.

    Experts that lie on disk come as tensors that are read when they are written.
    """
    store, groups = model.store, model.groups
    store.settle()
    tensors: dict[str, np.ndarray | LazyTensor] = {p.name: p.asnumpy() for p in model.net.get_parameters()}
    if optimizer is not None:
        tensors |= optimizer.moments()
    tensors |= domain_tensors(model, optimizer is not None)
    for kind, place, name, table in store.tables():
        if store.in_memory(place) or (kind != "weight" and optimizer is None):
            continue
        for domain in groups.names:
            rows = groups.of(domain)
            read = partial(store.read, kind, place, name, rows)
            shape = (rows.stop - rows.start, *table.shape[1:])
            tensors[_expert_tensor(domain, kind, place, name)] = LazyTensor(shape, table.dtype, read)
    return tensors


def tensor_parts(model: Model, optimizer: Optimizer | None) -> dict[str, TensorPart]:
    """All tensors of a checkpoint by name, each with the part of it that this process writes; without an optimizer
    those of the model alone.

    All processes' parts together are every tensor once: a process writes its own experts, unless it is a replica, and
    its turn of what all of them have.
    """
    store, groups, processes = model.store, model.groups, model.processes
    store.settle()
    parts: dict[str, TensorPart] = {}
    common: dict[str, np.ndarray] = {p.name: p.asnumpy() for p in model.net.get_parameters()}
    if optimizer is not None:
        common |= optimizer.moments()
    for place, by_owner in model.tables.items():
        common |= {table_name(owner, place): table for owner, table in by_owner.items()}
    for kind, place, name, table in store.tables():
        if kind != "weight" and optimizer is None:
            continue
        if place == SLOTS:
            common |= {_expert_tensor(d, kind, place, name): table[n] for n, d in enumerate(groups.names)}
            continue
        for domain in groups.names:
            shape = (groups.of(domain).stop - groups.of(domain).start, *table.shape[1:])
            begin, rows = _held_rows(model, domain)
            data = None
            if rows is not None and _speaks_for_replicas(model):
                mine = (rows.stop - rows.start, *table.shape[1:])
                data = LazyTensor(mine, table.dtype, partial(store.read, kind, place, name, rows))
            parts[_expert_tensor(domain, kind, place, name)] = TensorPart(shape, table.dtype, begin, data)
    for place, steps in store.steps.items() if optimizer is not None else ():
        for number, domain in enumerate(groups.names):
            name = f"domains.{domain}.optimizer.steps.{place}"
            if place == SLOTS:
                common[name] = steps[number : number + 1]
                continue
            begin, rows = _held_rows(model, domain)
            data = steps[rows] if rows is not None and _speaks_for_replicas(model) else None
            size = groups.of(domain).stop - groups.of(domain).start
            parts[name] = TensorPart((size,), steps.dtype, begin, data)
    for turn, (name, array) in enumerate(sorted(common.items())):
        mine = turn % processes.size == processes.rank
        parts[name] = TensorPart(array.shape, array.dtype, 0, array if mine else None)
    return parts


def _held_rows(model: Model, domain: str) -> tuple[int, slice | None]:
    """Where the part of a domain's group that this process holds begins in the group, and its rows of the store."""
    group, held = model.groups.of(domain), model.held
    low, high = max(group.start, held.start), min(group.stop, held.stop)
    return (low - group.start, slice(low - held.start, high - held.start)) if low < high else (0, None)


def _speaks_for_replicas(model: Model) -> bool:
    processes = model.processes
    return processes.mesh.replica_group(processes.rank)[0] == processes.rank


def restore_model(model: Model, tensors: Mapping[str, np.ndarray], optimizer_state: bool = False) -> None:
    """Fill the network and the store from checkpoint tensors; `optimizer_state`: the experts' moments and counts too.

    A process of several takes its own experts and reads nothing of the others'. Raises UserError naming the first
    tensor that is missing or has another shape: nothing stays uninitialised.
    """
    # Updates that are still under way would write over what is restored.
    model.store.settle()
    for parameter in model.net.get_parameters():
        parameter.set_data(Tensor(_checked(tensors, parameter.name, parameter.shape)))
        model.processes.mark()
    store, groups = model.store, model.groups
    for kind, place, name, table in store.tables():
        if kind != "weight" and not optimizer_state:
            continue
        for number, domain in enumerate(groups.names):
            stored = _expert_tensor(domain, kind, place, name)
            if place == SLOTS:
                table[number][...] = _checked(tensors, stored, table[number].shape)
                continue
            begin, rows = _held_rows(model, domain)
            if rows is not None:
                values = _checked_rows(model, tensors, stored, table.shape[1:], begin, rows)
                store.write(kind, place, name, rows, values)
            model.processes.mark()
    for place, by_owner in model.tables.items():
        for owner, table in by_owner.items():
            table[...] = _checked(tensors, table_name(owner, place), table.shape)
    if optimizer_state:
        for place, steps in store.steps.items():
            for number, domain in enumerate(groups.names):
                stored = f"domains.{domain}.optimizer.steps.{place}"
                if place == SLOTS:
                    steps[number : number + 1] = _checked(tensors, stored, (1,))
                    continue
                begin, rows = _held_rows(model, domain)
                if rows is not None:
                    steps[rows] = _checked_rows(model, tensors, stored, (), begin, rows)


def _checked_rows(
    model: Model, tensors: Mapping[str, np.ndarray], name: str, inner: tuple[int, ...], begin: int, rows: slice
) -> np.ndarray:
    """The rows of a domain's tensor that this process holds, from row `begin` of the group on."""
    group = model.groups.of(layout.domain_of(name))
    shape, end = (group.stop - group.start, *inner), begin + rows.stop - rows.start
    if not isinstance(tensors, StoredTensors) or end - begin == shape[0]:
        return _checked(tensors, name, shape)[begin:end]
    if name not in tensors:
        raise _missing(name)
    _check_shape(name, tensors.shape(name), shape)
    return tensors.rows(name, begin, end)


def stored_tables(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The routing tables of a checkpoint: sparse layer -> owner -> int32 [V]."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors:
        if is_routing(name):
            place, owner = place_and_owner(name)
            tables.setdefault(place, {})[owner] = tensors[name]
    return tables


def _checked(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise _missing(name)
    tensor = tensors[name]
    _check_shape(name, tensor.shape, shape)
    return tensor


def _missing(name: str) -> UserError:
    return UserError(f"the checkpoint has no tensor {name}: use the configuration that it was saved with")


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"the checkpoint's tensor {name} is {tuple(found)} where this configuration needs {tuple(wanted)}: "
            "use the configuration that it was saved with"
        )
