"""Batch planner: from a batch to a graph's inputs: positions, segments and the routing of every sparse layer, all in
NumPy.

This runs ahead of the step in the reading thread; only the tensors and the experts' weights are made by the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.model.graph_inputs import GraphSignature, LayerSignature
from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.position_ids import positions_and_segments
from parallel.operator_layout import Layout
from parallel.partition_spec import PartitionSpec
from rre.counted_random import sample_keys
from rre.dispatch.capacity_dispatch import CapacityPlan, plan_by_capacity
from rre.dispatch.dispatch_plan import DROPPED, DispatchPlan, plan_by_expert, plan_in_blocks, plan_present
from rre.routers import Router
from rre.store import ExpertStore


@dataclass(frozen=True)
class ReservedRowsPlan:
    """Dispatch plan of a layer whose slots have reserved rows (capacity dispatch): `experts` [N] are the slots' owners,
    `counts` [N] the rows that they take."""

    experts: np.ndarray
    counts: np.ndarray
    plan: CapacityPlan


@dataclass(frozen=True)
class RoutedBatch:
    """One micro-batch of B samples and S positions with its routing: everything a graph needs of it.

    `step`: the data's, which a skipped or rolled back optimizer step does not turn back.
    tokens, labels, positions, segments int32 [B, S]; mask float32 [B, S] (0 where a label does not count); domain and
    keys int32 [B]; `plans`: per table-routed sparse layer, of the rows that come to this process and the experts that
    it holds; `noise`: per noisy gate; `load` [layers, E]: rows of these samples at each of a table-routed layer's
    experts; `dropped`: rows per layer and domain; `filled` [B]: positions of each row that hold text, not padding.
    """

    step: int
    tokens: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    domain: np.ndarray
    keys: np.ndarray
    plans: tuple[DispatchPlan | ReservedRowsPlan | None, ...]
    noise: tuple[np.ndarray | None, ...]
    load: np.ndarray
    dropped: np.ndarray
    filled: np.ndarray

    @property
    def fixed(self) -> tuple[Tensor, ...]:
        """tokens, positions, segments, domain, keys as tensors."""
        return tuple(Tensor(a) for a in (self.tokens, self.positions, self.segments, self.domain, self.keys))

    @property
    def sequences(self) -> np.ndarray:
        """The batch's rows with their last labels, as they were given to the planner: int32 [B, S + 1]."""
        return np.concatenate([self.tokens, self.labels[:, -1:]], axis=1)

    def flat(self, signature: GraphSignature, store: ExpertStore) -> list[Tensor]:
        """The variable inputs in the signature's order, with weights fetched from `store`."""
        store.start_step()
        tensors: list[Tensor] = []
        if signature.domain_embedding_shape is not None:
            tensors.append(store.full_table("embedding", "word"))
        for layer_signature, plan, noise in zip(signature.layers, self.plans, self.noise, strict=True):
            if layer_signature.capacity_spec is not None:
                if plan is not None:
                    tensors += [Tensor(part) for part in plan.plan.inputs]
                elif layer_signature.noise:
                    tensors.append(Tensor(noise))
                for slots in layer_signature.capacity_spec.by_chunk(signature.expert_part):
                    experts = signature.stored(slots if plan is None else plan.experts[slots])
                    fetched = store.fetch(layer_signature.name, experts)
                    per_slot = len(fetched) // slots.size
                    tensors += [Tensor(np.stack([t.asnumpy() for t in fetched[i::per_slot]])) for i in range(per_slot)]
            elif plan is None:
                if layer_signature.noise:
                    tensors.append(Tensor(noise))
                tensors += store.fetch(layer_signature.name, range(layer_signature.slots))
            else:
                parts = (plan.order, plan.offsets) if layer_signature.compiled else (*plan.rows, plan.position)
                tensors += [Tensor(part) for part in parts]
                tensors += store.fetch(layer_signature.name, plan.experts)
        return tensors


class BatchPlanner:
    """Routes and packs batches for one graph. `exact` cuts rows into fixed blocks (evaluation), else one slot per
    expert.

    Several processes cut a micro-batch into equal runs, one each. `reads`: the rows of it that this process looks at:
    its own, and where a table says outside the graph which expert a token goes to, also those of the processes whose
    rows may come to its experts. `own`: its own among them. `prefetch`: told, layer by layer, the experts that a
    training step will fetch, as this process's store counts them.
    """

    def __init__(
        self,
        model: ModelStructure,
        signature: GraphSignature,
        training: bool,
        prefetch: Callable[[str, Sequence[int]], None] = lambda layer_name, experts: None,
    ) -> None:
        self.model = model
        self.signature = signature
        self.training = training
        self.prefetch = prefetch
        self.seed = model.config.run.seed
        self.reads, self.own = self._rows()

    def _rows(self) -> tuple[np.ndarray, slice]:
        mesh, rank, size = self.model.processes.mesh, self.model.processes.rank, self.signature.batch
        if self.model.processes.size == 1:
            return np.arange(size), slice(None)
        if self.model.layout.spmd_mesh:
            # The signature is of the global batch. Each rank needs the token ids of its placement group, to know which
            # rows its experts will receive.
            size, row = size // mesh.rows, mesh.row_rank(rank)
            seen = range(row, row + 1) if self.model.learned else mesh.placement_rows(rank)
            first = row - seen.start
            return np.arange(seen.start * size, seen.stop * size), slice(first * size, (first + 1) * size)
        ranks = (rank,)
        if any(not layer_signature.learned for layer_signature in self.signature.layers):
            ranks = mesh.exchange_group(rank) if self.training else mesh.expert_group(rank)
        rows = np.concatenate([np.arange(size) + mesh.row_rank(r) * size for r in ranks])
        return rows, slice(ranks.index(rank) * size, (ranks.index(rank) + 1) * size)

    def __call__(
        self,
        tokens: np.ndarray,
        domain: np.ndarray,
        sample: np.ndarray,
        step: int,
        mask: np.ndarray | None = None,
        padding: np.ndarray | None = None,
        present: Sequence[np.ndarray] | None = None,
    ) -> RoutedBatch:
        """tokens int32 [R, S+1], domain int32 [R], global sample numbers int64 [R], optional label mask [R, S] of the
        rows that this process `reads`.

        `padding` bool [R, S]: positions that fill a row up. Table routers send them to no expert, so that none trains
        that met no text; a learned gate sees them as it sees any row. `present`: of each sparse layer the experts that
        share its reserved slots, where these are not of this batch alone.
        """
        seen, owners, samples, filling = np.ascontiguousarray(tokens[:, :-1]), domain, sample, padding
        tokens, domain, sample = tokens[self.own], domain[self.own], sample[self.own]
        mask = None if mask is None else mask[self.own]
        padding = None if padding is None else padding[self.own]
        inputs = seen[self.own]
        local_experts, total = self.model.local_experts, self.model.groups.total
        positions, segments = positions_and_segments(inputs, self.model.eod_id)
        plans: list[DispatchPlan | None] = []
        noise: list[np.ndarray | None] = []
        load = np.zeros((len(self.signature.layers), total), np.int64)
        dropped = np.zeros((len(self.signature.layers), len(self.model.groups.names)), np.int64)
        for layer, (router, layer_signature) in enumerate(zip(self.model.routers, self.signature.layers, strict=True)):
            if layer_signature.learned:
                plans.append(None)
                noise.append(router.noise(step, sample) if layer_signature.noise else None)
                continue
            ids, lost = self._assigned(router, seen, owners, step, samples, filling)
            np.add.at(dropped[layer], domain, lost[self.own].sum(axis=1))
            own_ids = ids.reshape(len(seen), -1)[self.own]
            load[layer] = np.bincount(own_ids[own_ids != DROPPED], minlength=total)
            if layer_signature.capacity_spec is not None:
                plans.append(self._placed(ids, layer_signature, None if present is None else present[layer]))
                noise.append(None)
                continue
            if len(local_experts) < total:
                is_local = (ids >= local_experts.start) & (ids < local_experts.stop)
                ids = np.where(is_local, ids - local_experts.start, DROPPED)
            if self.training and self.model.all_resident:
                plans.append(plan_by_expert(ids, np.arange(layer_signature.slots)))
            elif self.training:
                plans.append(plan_present(ids, layer_signature.slots))
                self.prefetch(layer_signature.name, plans[-1].experts)
            else:
                plans.append(
                    plan_present(ids, layer_signature.slots)
                    if layer_signature.compiled
                    else plan_in_blocks(ids, layer_signature.slots)
                )
            noise.append(None)
        return RoutedBatch(
            step=step,
            tokens=inputs,
            labels=np.ascontiguousarray(tokens[:, 1:]),
            mask=np.ones(inputs.shape, np.float32) if mask is None else mask,
            positions=positions,
            segments=segments,
            domain=domain.astype(np.int32),
            keys=self._keys(step, sample),
            plans=tuple(plans),
            noise=tuple(noise),
            load=load,
            dropped=dropped,
            filled=np.full(len(inputs), inputs.shape[1]) if padding is None else (~padding).sum(axis=1),
        )

    def present(
        self, tokens: np.ndarray, domain: np.ndarray, sample: np.ndarray, step: int, padding: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The experts of each sparse layer to which a table sends these rows, ascending."""
        seen, present = np.ascontiguousarray(tokens[:, :-1]), []
        for router in self.model.routers:
            ids, _ = self._assigned(router, seen, domain, step, sample, padding)
            present.append(np.unique(ids[ids != DROPPED]))
        return present

    def _assigned(
        self, router: Router, seen: np.ndarray, owners: np.ndarray, step: int, samples: np.ndarray,
        filling: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """A table router's experts of all rows that are `seen`, [T, k], and where text was dropped, bool [R, S]."""
        ids = router.assign(seen, owners, step, samples, self.training).expert_ids
        lost = (ids == DROPPED).any(axis=1).reshape(seen.shape)
        if filling is None:
            return ids, lost
        return np.where(filling.reshape(-1, 1), DROPPED, ids), lost & ~filling

    def _placed(self, ids: np.ndarray, layer_signature: LayerSignature, present: np.ndarray | None) -> ReservedRowsPlan:
        """The reserved rows of expert `ids` [T, k]; a slot that nobody needs stands for some expert, without rows."""
        capacity_spec, total = layer_signature.capacity_spec, self.model.groups.total
        if layer_signature.slots == total:
            present = np.arange(total)
        elif present is None:
            present = np.unique(ids[ids >= 0])
        slots = capacity_spec.slots_of(present, total)
        of_expert = np.full(total + 1, DROPPED)
        of_expert[present] = slots
        experts = capacity_spec.idle_experts(total)
        experts[slots] = present
        slot_ids = of_expert[ids]
        counts = np.bincount(slot_ids[slot_ids >= 0], minlength=layer_signature.slots)
        own, shards, processes = slot_ids, None, self.model.processes
        if processes.size > 1:
            row = processes.mesh.row_rank(processes.rank)
            own, shards = slot_ids.reshape(self.reads.size, -1)[self.own].reshape(-1, ids.shape[1]), range(row, row + 1)
        if self.training and layer_signature.name in self.model.layer_names:
            local_slots = capacity_spec.by_chunk(self.signature.expert_part).reshape(-1)
            self.prefetch(layer_signature.name, self.signature.stored(experts[local_slots]))
        return ReservedRowsPlan(experts, counts, plan_by_capacity(own, capacity_spec, shards))

    def _keys(self, step: int, sample: np.ndarray) -> np.ndarray:
        model = self.model.config.model
        if not self.training or (model.dropout == 0.0 and model.attention.dropout == 0.0):
            return np.zeros(sample.size, np.int32)
        return sample_keys(self.seed, "dropout", step, sample)


def fixed_inputs(batch: int, length: int) -> dict[str, tuple[tuple[int, ...], ms.dtype, PartitionSpec]]:
    """Full shape, type and partition spec of the fixed inputs by name."""
    int32, float32 = ms.int32, ms.float32
    of_token, of_sample = ((batch, length), ("rows", 1)), ((batch,), ("rows",))
    return {
        "tokens": (of_token[0], int32, of_token[1]),
        "labels": (of_token[0], int32, of_token[1]),
        "weights": (of_token[0], float32, of_token[1]),
        "auxiliary_weight": ((), float32, ()),
        "positions": (of_token[0], int32, of_token[1]),
        "segments": (of_token[0], int32, of_token[1]),
        "domain": (of_sample[0], int32, of_sample[1]),
        "keys": (of_sample[0], int32, of_sample[1]),
    }


def graph_placeholders(batch: int, length: int, layout: Layout | None = None) -> dict[str, Tensor]:
    """Shapes of the fixed inputs by name, for compiling; under a mesh's `layout` what one rank gives."""
    local_shape = (layout or Layout()).local_shape
    inputs = fixed_inputs(batch, length)
    return {name: Tensor(shape=local_shape(shape, spec), dtype=dtype) for name, (shape, dtype, spec) in inputs.items()}
