"""What MindSpore's own pass makes of a configuration: its training graph, compiled for N devices without one.

The graph is compiled in a process of its own for each pipeline stage and read back here. Nothing is computed; that no
NPU has run it is said wherever the result is shown.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pangu_sigma.config import Config
from pangu_sigma.config.capacity_sizes import activated_slots
from pangu_sigma.errors import UserError, argument
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.plan.graph_check import CompiledGraph, problems, shared_of_stage
from pangu_sigma.plan.requirements import check_network
from parallel.dry.compiled_graph import collectives, last_graph
from parallel.dry.dry_process import run_dry
from parallel.dry.parameter_placement import Placed
from parallel.dry.stand_in_libraries import DryCompileError
from parallel.operator_layout import LOCAL_SLICES

MODULE = "pangu_sigma.plan.dry_training_graph"


class PlanMismatch(UserError):
    """The compiled graph is not what the plan says."""


def refuse_what_no_mesh_compiles(config: Config) -> None:
    """Raises UserError for a configuration whose graph this check cannot compile, with the reason."""
    if config.run.device != "Ascend":
        raise UserError(f"{argument('compile', True)} compiles what devices run: set run.device=Ascend")
    if config.parallel.mesh.size == 1:
        raise UserError(
            f"{argument('compile', True)} needs more than one device: set parallel.data, parallel.expert or "
            "parallel.tensor"
        )


def compile_plan(config: Config, folder: Path | None = None, timeout: float = 3600.0) -> dict[str, Any]:
    """Compile the training step of `config` for its mesh, one rank of every pipeline stage; what the graphs say, as
    plain values for JSON.

    Graphs stay in `folder` if one is given. Raises PlanMismatch where a graph is not what the plan says, naming the
    layer, and UserError where MindSpore refuses it.
    """
    refuse_what_no_mesh_compiles(config)
    check_network(config)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="pangu-sigma-plan-") as made:
            return compile_plan(config, Path(made), timeout)
    reports = []
    for stage in range(config.parallel.pipeline):
        compiled = compile_graph(config, folder, timeout, stage * config.parallel.mesh.stage_size)
        wrong = list(problems(config, compiled))
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise PlanMismatch(f"the compiled graph is not the plan: {wrong[0]}{more}")
        reports.append(report(config, compiled))
    first_stage = reports[0]
    if len(reports) > 1:
        first_stage = {
            **first_stage,
            "seconds": sum(r["seconds"] for r in reports),
            "total_seconds": sum(r["total_seconds"] for r in reports),
            "peak_bytes": max(r["peak_bytes"] for r in reports),
            "stages": reports,
        }
    return first_stage


def compile_graph(config: Config, folder: Path, timeout: float = 3600.0, rank: int = 0) -> CompiledGraph:
    """The graph of a rank, unchecked; everything about it stays under `folder`/rank_N."""
    mesh = config.parallel.mesh
    folder = folder / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config.to_yaml())
    started = time.perf_counter()
    try:
        command = ["-m", MODULE, "config.yaml", "result.json"]
        run_dry(command, folder, mesh.size, rank, timeout, LOCAL_SLICES if mesh.pipeline > 1 else None)
        # Outside a parallel context every rank calls itself the first.
        text, update = last_graph(folder / "graphs" / f"rank_{rank}"), last_graph(folder / "update" / "rank_0")
    except DryCompileError as error:
        raise UserError(f"the graph was not compiled: {error}") from error
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    parameters = {name: tuple(shape) for name, shape in result["parameters"].items()}
    inputs = {name: (position, tuple(shape)) for name, (position, shape) in result["expert_inputs"].items()}
    placed = {name: Placed.of(values) for name, values in result["placed"].items()}
    seconds = time.perf_counter() - started
    return CompiledGraph(
        rank, text, parameters, inputs, placed, result["seconds"], seconds, result["peak_bytes"], update
    )


def report(config: Config, compiled: CompiledGraph) -> dict[str, Any]:
    """What the compiled graph says, for people and scripts."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for c in collectives(compiled.graph):
        counts[(c.kind, c.backward, c.ranks, c.bytes)] += 1
    rows = [
        {"kind": kind, "backward": backward, "ranks": list(ranks), "bytes": size, "count": count}
        for (kind, backward, ranks, size), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1:]))
    ]
    mesh, layers = config.parallel.mesh, config.model.layers
    stage = mesh.coordinates(compiled.rank).stage
    return {
        "rank": compiled.rank,
        "stage": stage,
        "devices": config.parallel.mesh.size,
        "seconds": compiled.seconds,
        "total_seconds": compiled.total_seconds,
        "peak_bytes": compiled.peak_bytes,
        "collectives": rows,
        "bytes": {
            kind: sum(row["bytes"] * row["count"] for row in rows if row["kind"] == kind)
            for kind in sorted({row["kind"] for row in rows})
        },
        "parameters": {
            name: {"shape": list(shape), "shard": list(compiled.parameter_shards.get(name, ()))}
            for name, shape in shared_of_stage(config, compiled).items()
        },
        "experts": {
            name: {"shape": list(shape), "shard": list(compiled.expert_part(name))}
            for name, (_, shape) in compiled.expert_inputs.items()
            if stage_of(name, layers, mesh) == stage
        },
        "slots_of_a_group": activated_slots(config) if config.model.sparse_prefixes else 0,
    }
