"""Model builder: from a configuration to routing tables, routers, expert store and network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.config import Config
from pangu_sigma.errors import UserError
from pangu_sigma.model.initialization import initial_value
from pangu_sigma.model.model import Model
from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.model.sharded_parameters import DeviceParameterStorage, ShardedParameters, SharedParameters
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from parallel.comm.exchange import GatheredExchange
from parallel.comm.processes import Processes
from parallel.emulation.emulated_mesh import EmulatedLayout, EmulatedMesh
from parallel.emulation.emulated_parameters import EmulatedParameterStorage
from parallel.operator_layout import Layout, MeshLayout
from parallel.ops.compiled_kernels import HostKernels, library
from parallel.ops.grouped_matmul import uses_grouped_product
from parallel.partition_spec import slices_shape
from rre.routers import ExpertGroups, RouterOptions, build_router
from rre.routing_tables import draw_owned_table
from rre.store import DeviceStore, DiskStore, ExpertStore, HostStore
from rre.store.disk_store import remove_tables
from rre.store.expert_store import Shapes

STORES = {"device": DeviceStore, "host": HostStore, "disk": DiskStore}
COMPUTE_TYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def chosen_kernels(config: Config) -> str | None:
    """The path of the compiled CPU kernels if this run uses them: they compute in float32. Raises UserError."""
    if config.run.kernels == "composed" or config.run.device != "CPU":
        return None
    path = library()
    if config.run.kernels == "compiled" and (path is None or config.train.precision != "float32"):
        raise UserError(
            "run.kernels is compiled, which needs train.precision=float32 and an installation that built them with gcc;"
            " set run.kernels=auto"
        )
    return path if config.train.precision == "float32" else None


def chosen_layout(config: Config) -> Layout:
    """The layout of this configuration's graphs: cut over the mesh on Ascend, one process's own else."""
    parallel = config.parallel
    if parallel.emulate_mesh:
        return EmulatedLayout(parallel.mesh)
    if config.sharded_over_devices:
        return MeshLayout(parallel.mesh, config.run.device, parallel.sequence_parallel)
    # The experts of a layer are one grouped product where rows are planned by a table, before the graph runs.
    grouped = config.experts.grouped_matmul and not config.model.router_spec.learned
    grouped = grouped and uses_grouped_product(config.run.device, COMPUTE_TYPES[config.train.precision])
    return Layout(config.run.device, chosen_kernels(config), grouped)


def build_model(
    config: Config,
    vocab: int,
    eod_id: int,
    tables: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    token_counts: Mapping[str, np.ndarray] | None = None,
    initialise: bool = True,
    inference: bool = False,
    layout: Layout | None = None,
    processes: Processes | None = None,
) -> Model:
    """Build the model of `config` for `vocab` ids; see `build_structure` for `tables`, `token_counts` and `layout`.

    With `initialise` False all weights are zero: something else will fill them. Those of a graph that is cut over
    devices come to be when it is compiled; call `initialise_shared` then. A model for `inference` keeps its experts in
    host memory, wherever training has them. `processes` that share it cut its experts.
    """
    store_kind = "host" if inference else config.experts.store
    all_resident = STORES[store_kind].all_resident
    structure = build_structure(config, vocab, eod_id, tables, token_counts, layout, processes, all_resident)
    store = _make_store(structure, store_kind, clear_folder=not inference)
    on_devices = structure.layout.spmd_mesh is not None and structure.layout.native and structure.processes.size > 1
    # Full values would be in the way of the shards that MindSpore makes, and may not fit a device.
    with no_init_parameters() if on_devices else nullcontext():
        net = build_network(structure)
    if config.train.recompute and not inference:
        net.recompute_blocks()
    built = Model(**vars(structure), store=store, net=net, shared=_shared_parameters(structure, net))
    if initialise:
        _initialise_experts(built)
        if not built.shared.deferred_init:
            initialise_shared(built)
    return built


def build_structure(
    config: Config,
    vocab: int,
    eod_id: int,
    tables: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    token_counts: Mapping[str, np.ndarray] | None = None,
    layout: Layout | None = None,
    processes: Processes | None = None,
    all_resident: bool = True,
) -> ModelStructure:
    """The model's groups, tables and routers, which plan batches.

    Routing tables are drawn here for a new model (`token_counts` [V] per domain serve the `frequency` rule) and given
    for one from a checkpoint. `layout`: another than the configuration's own. `all_resident`: as of `ModelStructure`.
    """
    layout = layout or chosen_layout(config)
    groups = ExpertGroups(config.domain_names, tuple(d.experts for d in config.domains))
    layer_names = config.model.sparse_prefixes
    processes = processes or Processes()
    model, sparse, exchange = config.model, config.model.sparse, None
    if tables is None:
        tables = {
            layer_name: {
                owner: draw_owned_table(
                    sparse.table, config.run.seed, layer_name, owner, vocab, config.expert_groups, token_counts or {}
                )
                for owner in model.router_spec.table_owners(config.expert_groups)
            }
            for layer_name in layer_names
        }
    if processes.size > 1 and layer_names and not config.sharded_over_devices:
        exchange = GatheredExchange(processes.mesh, processes.rank, groups.total)
    options = RouterOptions(
        spec=model.router_spec,
        groups=groups,
        hidden=model.hidden,
        length=config.data.sequence_length,
        layout=layout,
        seed=config.run.seed,
        top_k=config.experts_per_token,
        capacity_factor=sparse.capacity_factor if sparse.dispatch == "capacity" else None,
        capacity_samples=sparse.capacity_samples,
        settings=model.router_options,
        init_std=model.init_std,
        log_weights=model.is_competitive_mixture,
        exchange=exchange,
        padded=config.adapt is not None,  # examples fill their rows up, the text of a training is packed
    )
    routers = tuple(
        build_router(replace(options, layer=layer, tables=tables[layer_name] if model.router_spec.tables else None))
        for layer, layer_name in enumerate(layer_names)
    )
    drawn = {layer_name: dict(by_owner) for layer_name, by_owner in tables.items() if by_owner}
    return ModelStructure(config, vocab, eod_id, groups, routers, drawn, layout, processes, all_resident)


def build_network(structure: ModelStructure) -> PanGuSigma:
    """The network of a structure, its shared parameters not initialised."""
    config = structure.config
    return PanGuSigma(
        config.model,
        structure.vocab,
        structure.routers,
        structure.layout,
        COMPUTE_TYPES[config.train.precision],
        config.parallel.expert_chunks if structure.layout.spmd_mesh else 1,
    )


def _shared_parameters(structure: ModelStructure, net: PanGuSigma) -> SharedParameters:
    processes, mesh = structure.processes, structure.processes.mesh
    if structure.layout.spmd_mesh is None or processes.size == 1:
        return SharedParameters(net)
    if isinstance(structure.layout, EmulatedLayout):
        storage = EmulatedParameterStorage(EmulatedMesh(processes))
    else:
        storage = DeviceParameterStorage(mesh.coordinates(processes.rank).stage)
    return ShardedParameters(net, mesh, processes.rank, structure.config.parallel.optimizer_parallel, storage)


def _make_store(structure: ModelStructure, kind: str, clear_folder: bool) -> ExpertStore:
    """The store of this process's experts and of the domains' own embeddings, all zero.

    `clear_folder`: remove what an earlier start of the run left in its folder.
    """
    config, layer_names, processes = structure.config, structure.layer_names, structure.processes
    stored = {name: slices_shape(shard.slices) for name, shard in structure.expert_shards.items()}
    shapes: dict[str, Shapes] = dict.fromkeys(layer_names, stored)
    experts = dict.fromkeys(layer_names, len(structure.local_experts))
    if config.model.domain_parameters.embedding == "own":
        shapes[DOMAIN_EMBEDDING] = {"word": (structure.vocab, config.model.hidden)}
        experts[DOMAIN_EMBEDDING] = len(structure.groups.names)
    kernels = HostKernels(structure.layout.kernels) if structure.layout.kernels else None
    folder = Path(config.run.dir) / "experts"
    if clear_folder and processes.first:
        # That start had perhaps another store or mesh, and was killed.
        for left in (*folder.glob("rank-*"), folder):
            remove_tables(left)
    if kind != "disk":
        return STORES[kind](shapes, experts, kernels)
    bound = int(config.experts.resident_gib * 2**30) // processes.size
    if processes.size > 1:
        processes.barrier()  # what is removed is gone
        folder /= f"rank-{processes.rank}"
    try:
        return DiskStore(shapes, experts, folder, bound, kernels, in_memory=(DOMAIN_EMBEDDING,))
    except OSError as error:
        raise UserError(
            f"the expert tables do not fit under {folder} ({error.strerror}): free space there or set another run.dir"
        ) from error


def initialise_shared(built: Model) -> None:
    """Draw the shared parameters as `model.initialization` says: one seed gives one model on every machine."""
    for name in built.shared.local_names:
        shape = built.shared.shapes[name]
        built.shared.write(name, initial_value(name, shape, built.config.run.seed, built.config.model))
        built.processes.mark()


def _initialise_experts(built: Model) -> None:
    """Normal(init_std), matrices that end in the residual stream scaled by 1 / sqrt(2 L) (PanGu-alpha's own code)."""
    model, seed = built.config.model, built.config.run.seed
    std = {name: model.init_std for name, shape in model.expert_network.shapes(1, 1).items() if len(shape) == 2}
    local_experts = dict.fromkeys(model.sparse_prefixes, built.local_experts)
    std |= {"down.weight": model.residual_std, "word": model.init_std}
    built.store.initialise(seed, std, local_experts, model.init_cutoff, built.expert_shards)
