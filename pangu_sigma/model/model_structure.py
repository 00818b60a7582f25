"""Structure of a model in one process: routers and routing tables, its share of the experts, its graphs' inputs.

What planning a batch needs; the weights are `Model`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pangu_sigma.config import Config
from pangu_sigma.config.capacity_sizes import dispatch_buffer
from pangu_sigma.model.graph_inputs import GraphInputs, LayerInputs
from pangu_sigma.model.pipeline_stages import stage_of
from parallel.comm.processes import Processes
from parallel.operator_layout import Layout
from parallel.partition_spec import Shard, full_slices, replicated_shard, shard_slices
from rre.dispatch.capacity_dispatch import PARAMETER_SPECS, WEIGHT_SPECS, CapacitySpec
from rre.dispatch.dispatch_plan import EXACT_ROWS
from rre.routers import ExpertGroups, Router


@dataclass(frozen=True)
class ModelStructure:
    """A model without weights: expert groups, routers and tables of its domains.

    `tables`: sparse layer -> owner of the table (a domain, or the layer for all) -> int32 [V], empty for learned gates.
    `processes`: who shares the work; each holds some of every sparse layer's experts, which its store counts from 0.
    `all_resident`: whether a training step's graph takes every expert, or only those that its batch activates.
    """

    config: Config
    vocab: int
    eod_id: int
    groups: ExpertGroups
    routers: tuple[Router, ...]
    tables: dict[str, dict[str, np.ndarray]]
    layout: Layout
    processes: Processes
    all_resident: bool

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The sparse layers whose experts this process holds: those of its pipeline stage."""
        mesh, model = self.processes.mesh, self.config.model
        stage = mesh.coordinates(self.processes.rank).stage
        return tuple(p for p in model.sparse_prefixes if stage_of(p, model.layers, mesh) == stage)

    @property
    def local_experts(self) -> range:
        """The experts of a sparse layer that this process holds, by their positions on the layer's expert axis."""
        mesh, rank = self.processes.mesh, self.processes.rank
        # In a graph that is cut over devices a gate's experts stand in their order, a table's as
        # `rre.dispatch.capacity_dispatch` says.
        interleaved = self.layout.spmd_mesh is not None and not self.learned
        return (mesh.interleaved_experts_of if interleaved else mesh.experts_of)(rank, self.groups.total)

    @property
    def expert_shards(self) -> dict[str, Shard]:
        """The shard of every tensor of such an expert that this process holds."""
        model = self.config.model
        shapes = model.expert_network.shapes(model.hidden, model.ffn)
        if self.layout.spmd_mesh is None:
            return {name: Shard(shape, full_slices(shape), self._first_replica) for name, shape in shapes.items()}
        mesh, rank = self.processes.mesh, self.processes.rank
        if mesh.pipeline > 1:
            specs = {name: PARAMETER_SPECS[name][1:] for name in shapes}
            return {name: replicated_shard(mesh, rank, shape, specs[name]) for name, shape in shapes.items()}
        specs = {name: WEIGHT_SPECS[name][1:] for name in shapes}
        return {name: Shard(shape, shard_slices(mesh, rank, shape, specs[name])) for name, shape in shapes.items()}

    @property
    def _first_replica(self) -> bool:
        return self.processes.mesh.replica_group(self.processes.rank)[0] == self.processes.rank

    def num_exchange_ranks(self, training: bool) -> int:
        """Processes whose rows meet at this one's experts."""
        mesh = self.processes.mesh
        return mesh.exchange_size if training else mesh.expert

    @property
    def kernels(self) -> str:
        """Which kernels compute: "compiled" or "composed" (of MindSpore's operators)."""
        return "compiled" if self.layout.kernels else "composed"

    @property
    def learned(self) -> bool:
        """Whether the routers are learned gates."""
        return any(router.learned for router in self.routers)

    def training_inputs(self, batch: int) -> GraphInputs:
        """Inputs of a training graph: a slot for each expert, or for as many as a micro-batch can activate."""
        if self.layout.spmd_mesh:
            return self._spmd_inputs(batch)
        slots = len(self.local_experts)
        if not self.all_resident:
            come = batch * self.num_exchange_ranks(training=True)
            limit = self.config.data.max_domains_per_batch or len(self.groups.names)
            slots = min(slots, self._activated_at_most(come, min(limit, come)))
        return self._inputs(batch, slots, training=True)

    def mesh_evaluation_inputs(self, batch: int, rows: int) -> GraphInputs:
        """Inputs of an evaluation graph that is cut over a mesh, of whose slots each takes so many `rows` of a
        shard."""
        return self._spmd_inputs(batch, rows)

    def _spmd_inputs(self, batch: int, rows: int | None = None) -> GraphInputs:
        """Inputs of a graph that is cut over a mesh: static shapes, stacked weights; without `rows` those of a
        training step."""
        config, mesh = self.config, self.layout.spmd_mesh
        sent, layers = dispatch_buffer(config), ()
        if sent is not None:
            slots = sent.slots * mesh.placement_groups
            length, chunks = config.data.sequence_length, config.parallel.expert_chunks
            choices = config.experts_per_token
            capacity_spec = CapacitySpec(mesh, slots, rows or sent.rows_per_slot, batch * length, choices, chunks)
            prefixes = config.model.sparse_prefixes
            form = config.model.expert_network
            noise = () if rows else self.routers[0].noise_shape(batch * length)
            text = () if rows else self.routers[0].text_shape(batch * length)
            layers = tuple(
                LayerInputs(p, slots, form, not self.learned, noise, capacity_spec=capacity_spec, text=text)
                for p in prefixes
            )
        part = None if self.processes.size == 1 else self.processes.mesh.coordinates(self.processes.rank).expert
        return GraphInputs(
            layers, (), batch, config.data.sequence_length, config.model.hidden, config.model.ffn,
            expert_part=part, local_experts=self.local_experts,
        )  # fmt: skip

    def reachable_experts(self, domains: int) -> int:
        """Experts of a sparse layer that texts of at most so many domains can come to."""
        if self.config.model.router_spec.separates_domains:
            return sum(sorted(self.groups.sizes, reverse=True)[:domains])
        return self.groups.total

    def _activated_at_most(self, batch: int, domains: int) -> int:
        """Experts of a sparse layer that `batch` samples of at most so many domains can activate."""
        return min(self.reachable_experts(domains), batch * self.config.data.sequence_length)

    def evaluation_inputs(self, batch: int, domains: int) -> GraphInputs:
        """Inputs of an evaluation graph whose batches mix at most `domains` domains: slots of fixed blocks."""
        if self.learned:
            return self._inputs(batch, len(self.local_experts))
        come = batch * self.num_exchange_ranks(training=False)
        activated = min(len(self.local_experts), self._activated_at_most(come, domains))
        if self.layout.rows_by_slot:
            return self._inputs(batch, activated)
        # Every expert may end in one block that is not full.
        full = come * self.config.data.sequence_length // EXACT_ROWS
        return self._inputs(batch, full + activated)

    def _inputs(self, batch: int, slots: int, training: bool = False) -> GraphInputs:
        model = self.config.model
        tokens = batch * self.config.data.sequence_length
        layers = tuple(
            LayerInputs(
                layer_name,
                slots,
                model.expert_network,
                not router.learned,
                router.noise_shape(tokens) if training else (),
                self.layout.rows_by_slot,
                text=router.text_shape(tokens) if training else (),
            )  # fmt: skip
            for layer_name, router in zip(model.sparse_prefixes, self.routers, strict=True)
        )
        own_tables = model.domain_parameters.embedding == "own"
        word_tables = ((len(self.groups.names), self.vocab, model.hidden),) if own_tables else ()
        return GraphInputs(
            layers, word_tables, batch, self.config.data.sequence_length, model.hidden, model.ffn,
            self.num_exchange_ranks(training), local_experts=self.local_experts,
        )  # fmt: skip
