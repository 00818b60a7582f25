"""Batch planner: from a batch to a routed batch: positions, segments and the routing of every sparse layer, all in
NumPy.

This runs ahead of the step in the reading thread; only the tensors and the experts' weights are made by the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pangu_sigma.model.graph_inputs import GraphInputs, LayerInputs
from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.position_ids import positions_and_segments
from pangu_sigma.model.routed_batch import ReservedRowsPlan, RoutedBatch
from rre.counted_random import sample_keys
from rre.dispatch.capacity_dispatch import plan_by_capacity
from rre.dispatch.dispatch_plan import DROPPED, DispatchPlan, plan_by_expert, plan_in_blocks, plan_present
from rre.routers import Router


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
        inputs: GraphInputs,
        training: bool,
        prefetch: Callable[[str, Sequence[int]], None] = lambda layer_name, experts: None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.training = training
        self.prefetch = prefetch
        self.seed = model.config.run.seed
        self.reads, self.own = self._rows()

    def _rows(self) -> tuple[np.ndarray, slice]:
        mesh, rank, size = self.model.processes.mesh, self.model.processes.rank, self.inputs.batch
        if self.model.processes.size == 1:
            return np.arange(size), slice(None)
        if self.model.layout.spmd_mesh:
            # The inputs are of the global batch. Each rank needs the token ids of its placement group, to know which
            # rows its experts will receive.
            size, row = size // mesh.rows, mesh.row_rank(rank)
            seen = range(row, row + 1) if self.model.learned else mesh.placement_rows(rank)
            first = row - seen.start
            return np.arange(seen.start * size, seen.stop * size), slice(first * size, (first + 1) * size)
        ranks = (rank,)
        if any(layer.planned for layer in self.inputs.layers):
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
        that met no text; a learned gate is told them by an input (`LayerInputs.text`). `present`: of each sparse layer
        the experts that share its reserved slots, where these are not of this batch alone.
        """
        seen, owners, samples, filling = np.ascontiguousarray(tokens[:, :-1]), domain, sample, padding
        tokens, domain, sample = tokens[self.own], domain[self.own], sample[self.own]
        mask = None if mask is None else mask[self.own]
        padding = None if padding is None else padding[self.own]
        own_tokens = seen[self.own]
        local_experts, total = self.model.local_experts, self.model.groups.total
        positions, segments = positions_and_segments(own_tokens, self.model.eod_id)
        plans: list[DispatchPlan | None] = []
        noise: list[np.ndarray | None] = []
        load = np.zeros((len(self.inputs.layers), total), np.int64)
        dropped = np.zeros((len(self.inputs.layers), len(self.model.groups.names)), np.int64)
        for layer, (router, layer_inputs) in enumerate(zip(self.model.routers, self.inputs.layers, strict=True)):
            if not layer_inputs.planned:
                plans.append(None)
                noise.append(router.noise(step, sample) if layer_inputs.noise else None)
                continue
            ids, lost = self._assigned(router, seen, owners, step, samples, filling)
            np.add.at(dropped[layer], domain, lost[self.own].sum(axis=1))
            own_ids = ids.reshape(len(seen), -1)[self.own]
            load[layer] = np.bincount(own_ids[own_ids != DROPPED], minlength=total)
            if layer_inputs.capacity_spec is not None:
                plans.append(self._placed(ids, layer_inputs, None if present is None else present[layer]))
                noise.append(None)
                continue
            if len(local_experts) < total:
                is_local = (ids >= local_experts.start) & (ids < local_experts.stop)
                ids = np.where(is_local, ids - local_experts.start, DROPPED)
            if self.training and self.model.all_resident:
                plans.append(plan_by_expert(ids, np.arange(layer_inputs.slots)))
            elif self.training:
                plans.append(plan_present(ids, layer_inputs.slots))
                self.prefetch(layer_inputs.name, plans[-1].experts)
            else:
                plans.append(
                    plan_present(ids, layer_inputs.slots)
                    if layer_inputs.compiled
                    else plan_in_blocks(ids, layer_inputs.slots)
                )
            noise.append(None)
        return RoutedBatch(
            step=step,
            tokens=own_tokens,
            labels=np.ascontiguousarray(tokens[:, 1:]),
            mask=np.ones(own_tokens.shape, np.float32) if mask is None else mask,
            positions=positions,
            segments=segments,
            domain=domain.astype(np.int32),
            keys=self._keys(step, sample),
            plans=tuple(plans),
            noise=tuple(noise),
            load=load,
            dropped=dropped,
            filled=np.full(len(own_tokens), own_tokens.shape[1]) if padding is None else (~padding).sum(axis=1),
        )

    def gather(self, own_rows: np.ndarray) -> np.ndarray:
        """The rows [B, …] of a micro-batch from each process's own; all processes call it together."""
        return self.model.processes.gather(own_rows).reshape(-1, *own_rows.shape[1:])

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
        ids = router.assign(seen, owners, step, samples, self.training)
        lost = (ids == DROPPED).any(axis=1).reshape(seen.shape)
        if filling is None:
            return ids, lost
        return np.where(filling.reshape(-1, 1), DROPPED, ids), lost & ~filling

    def _placed(self, ids: np.ndarray, layer_inputs: LayerInputs, present: np.ndarray | None) -> ReservedRowsPlan:
        """The reserved rows of expert `ids` [T, k]; a slot that nobody needs stands for some expert, without rows."""
        capacity_spec, total = layer_inputs.capacity_spec, self.model.groups.total
        if layer_inputs.slots == total:
            present = np.arange(total)
        elif present is None:
            present = np.unique(ids[ids >= 0])
        slots = capacity_spec.slots_of(present, total)
        of_expert = np.full(total + 1, DROPPED)
        of_expert[present] = slots
        experts = capacity_spec.idle_experts(total)
        experts[slots] = present
        slot_ids = of_expert[ids]
        counts = np.bincount(slot_ids[slot_ids >= 0], minlength=layer_inputs.slots)
        own, shards, processes = slot_ids, None, self.model.processes
        if processes.size > 1:
            row = processes.mesh.row_rank(processes.rank)
            own, shards = slot_ids.reshape(self.reads.size, -1)[self.own].reshape(-1, ids.shape[1]), range(row, row + 1)
        if self.training and layer_inputs.name in self.model.layer_names:
            local_slots = capacity_spec.by_chunk(self.inputs.expert_part).reshape(-1)
            self.prefetch(layer_inputs.name, self.inputs.stored(experts[local_slots]))
        return ReservedRowsPlan(experts, counts, plan_by_capacity(own, capacity_spec, shards))

    def _keys(self, step: int, sample: np.ndarray) -> np.ndarray:
        model = self.model.config.model
        if not self.training or (model.dropout == 0.0 and model.attention.dropout == 0.0):
            return np.zeros(sample.size, np.int32)
        return sample_keys(self.seed, "dropout", step, sample)
