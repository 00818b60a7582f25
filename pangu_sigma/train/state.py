"""Between a live model and a checkpoint: which tensor has which name, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor

from pangu_sigma.checkpoint import LazyTensor
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


def restore_model(model: Model, tensors: Mapping[str, np.ndarray], optimizer_state: bool = False) -> None:
    """Fill the network and the store from checkpoint tensors; `optimizer_state`: the experts' moments and counts too.

    Raises UserError naming the first tensor that is missing or has another shape: nothing stays uninitialised.
    """
    # Updates that are still under way would write over what is restored.
    model.store.settle()
    for parameter in model.net.get_parameters():
        parameter.set_data(Tensor(_checked(tensors, parameter.name, parameter.shape)))
    store, groups = model.store, model.groups
    on_disk = set()
    for kind, place, name, table in store.tables():
        if store.in_memory(place) or (kind != "weight" and not optimizer_state):
            continue
        for domain in groups.names:
            rows = groups.of(domain)
            stored = _expert_tensor(domain, kind, place, name)
            store.write(kind, place, name, rows, _checked(tensors, stored, table[rows].shape))
            on_disk.add(stored)
    for name, target in domain_tensors(model, optimizer_state).items():
        if name not in on_disk:
            target[...] = _checked(tensors, name, target.shape)


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
        raise UserError(f"the checkpoint has no tensor {name}: it belongs to another configuration")
    tensor = tensors[name]
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"the checkpoint's tensor {name} is {tuple(tensor.shape)} where this configuration needs {tuple(shape)}"
        )
    return tensor
