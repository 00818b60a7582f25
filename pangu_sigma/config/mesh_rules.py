"""Rules between the `parallel` section and the rest of the configuration: whatever is cut must divide."""

from __future__ import annotations

from pangu_sigma.config.capacity_sizes import activated_slots
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Violations, divides
from pangu_sigma.errors import UserError
from pangu_sigma.wording import bare
from parallel.mesh import Mesh
from rre.router_specs import ROUTER_SPECS, routers_that


def mesh_violations(config: Config) -> Violations:
    """Broken rules of a mesh that does not divide what it cuts, or that its device cannot run."""
    parallel = config.parallel
    own = list(parallel.violations())
    if own:
        yield from own
        return
    yield from _device(config)
    yield from _experts(config, parallel.mesh)
    yield from _widths(config)
    if config.sharded_over_devices:
        yield from _one_graph(config, parallel.mesh)
    yield from _batch(config, parallel.mesh)


def check_one_process(config: Config, instead: str) -> None:
    """Refuse a mesh of several ranks for a job of one process; `instead`: what to do. Raises UserError."""
    mesh = config.parallel.mesh
    if mesh.size > 1:
        raise UserError(
            f"parallel makes a mesh of {mesh.size} ranks ({mesh.axes}), but this job runs in one process: {instead}"
        )


def _device(config: Config) -> Violations:
    parallel, device = config.parallel, config.run.device
    if parallel.emulate_mesh and (device != "CPU" or parallel.mesh.size == 1):
        yield (
            "parallel.emulate_mesh = true emulates a mesh of several devices with CPU processes, but "
            f"parallel makes a mesh of {parallel.mesh.size} on {device}: set parallel.data, expert, tensor or "
            "pipeline, and run.device to CPU, or leave emulate_mesh out"
        )
    if device == "CPU":
        cut = ("tensor", "sequence_parallel", "optimizer_parallel", "pipeline")
        for name in () if parallel.emulate_mesh else cut:
            if getattr(parallel, name) > 1 or getattr(parallel, name) is True:
                yield (
                    f"parallel.{name} = {str(getattr(parallel, name)).lower()} needs run.device = Ascend: processes on "
                    "CPU know the data and expert axes only, unless parallel.emulate_mesh is true"
                )
        if parallel.workers not in (1, parallel.mesh.size):
            yield (
                f"parallel.workers = {parallel.workers} is not the mesh's size {parallel.mesh.size} "
                f"({parallel.mesh.axes}): change one of them, or leave parallel.workers out"
            )
    elif parallel.workers != 1:
        yield (
            f"parallel.workers = {parallel.workers} is for run.device = CPU; on Ascend msrun starts one process a "
            "device: set it to 1"
        )
    sparse = config.model.sparse
    cut = config.sharded_over_devices and config.model.sparse_prefixes
    # A router that has no cut form at all is refused with that reason.
    if cut and config.model.router_spec.has_mesh_form and sparse.dispatch == "dropless":
        yield (
            "model.sparse.dispatch = dropless has rows of changing number, but a graph that is cut over devices needs "
            "fixed shapes: set it to capacity"
        )


def _experts(config: Config, mesh: Mesh) -> Violations:
    if not config.model.sparse_prefixes:
        if mesh.expert > 1:
            yield (
                f"parallel.expert = {mesh.expert}, but the model has no sparse layer: set it to 1 and parallel.data to "
                f"{mesh.data * mesh.expert}"
            )
        return
    if mesh.placement_groups > 1 and not config.model.router_spec.separates_domains:
        yield (
            f"parallel.placement = domain keeps a domain's rows at its own experts, but {config.model.router_setting} "
            "sends them to all: set placement to global, or the router to "
            f"{routers_that(lambda spec: spec.separates_domains)}"
        )
    sizes = [domain.experts for domain in config.domains]
    wrong = list(mesh.expert_problems(sizes, config.domain_names))
    if wrong:
        yield from (f"parallel.{sentence}" for sentence in wrong)
        return
    own = {domain.name: domain.weight for domain in config.domains}
    stretches = [phase.weights or own for phase in config.train.phases] or [own]
    for weights in stretches if mesh.placement_groups > 1 else ():
        for group in mesh.domains_of_groups(sizes):
            names = [config.domain_names[domain] for domain in group]
            if not any(weights.get(name, 0.0) for name in names):
                yield (
                    f"parallel.placement = domain leaves the ranks that read {', '.join(names)} without text, because "
                    "these have no weight in a phase: give one of them some, or set placement to global"
                )
                return
    limit, fewest = config.data.max_domains_per_batch, min(len(group) for group in mesh.domains_of_groups(sizes))
    if mesh.placement_groups > 1 and limit is not None and limit > fewest:
        yield (
            f"data.max_domains_per_batch = {limit} counts per placement group, and one of them has {fewest} domains: "
            f"set it to at most {fewest}, or parallel.placement_groups lower"
        )


def _widths(config: Config) -> Violations:
    model, parallel = config.model, config.parallel
    for name, width in (("heads", model.heads), ("ffn", model.ffn), ("vocab_size", model.vocab_size)):
        if width is not None:
            yield from divides("parallel.tensor", parallel.tensor, f"model.{name} = {width}", width)
    yield from divides("parallel.pipeline", parallel.pipeline, f"model.layers = {model.layers}", model.layers)
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield (
            "parallel.sequence_parallel is true, but parallel.tensor is 1 and there is nothing to cut rows over: set "
            "it to false"
        )
    length = config.data.sequence_length
    if parallel.sequence_parallel:
        what = f"data.sequence_length = {length}, which parallel.sequence_parallel cuts"
        yield from divides("parallel.tensor", parallel.tensor, what, length)


def _one_graph(config: Config, mesh: Mesh) -> Violations:
    """What a graph that is cut over devices cannot hold."""
    model, parallel = config.model, config.parallel
    settings = {
        "model.dropout": (model.dropout, 0),
        "model.attention.dropout": (model.attention.dropout, 0),
        "model.domain_parameters.embedding": (model.domain_parameters.embedding, "shared"),
    }
    for option in model.router_spec.options if model.sparse_prefixes else ():
        if model.router_options[option.name] in option.not_on_mesh:
            settings[f"model.sparse.{option.name}"] = model.router_options[option.name], option.default
    for key, (value, default) in settings.items():
        if value != default:
            yield f"{key} = {bare(value)} has no form that is cut over devices: set it to {bare(default)}"
    if not config.model.sparse_prefixes:
        return
    if not model.router_spec.has_mesh_form:
        others = ", ".join(name for name, spec in ROUTER_SPECS.items() if spec.has_mesh_form)
        advice = "leave it out" if model.is_mixture else f"choose one of {others}"
        yield f"{model.router_setting} has no form that is cut over devices: {advice}"
    for name, parts in (("expert_chunks", parallel.expert_chunks), ("pipeline", parallel.pipeline)):
        if model.router_spec.learned and parts > 1:
            yield (
                f"parallel.{name} = {parts} needs rows planned outside the graph, and a gate ({model.router}) plans "
                f"them inside: set it to 1, or the router to {routers_that(lambda spec: not spec.learned)}"
            )
    for name, width in (("hidden", model.hidden), ("ffn", model.ffn)):
        if width % (mesh.data * mesh.tensor):
            yield (
                f"model.{name} = {width} is not divided by parallel.data x parallel.tensor = "
                f"{mesh.data * mesh.tensor}, over which every expert is cut: change one of them"
            )
    if parallel.expert_chunks > 1 and not model.router_spec.learned:
        local_experts = activated_slots(config) // mesh.exchange_size
        what = f"the {local_experts} experts that a rank computes"
        yield from divides("parallel.expert_chunks", parallel.expert_chunks, what, local_experts)


def _batch(config: Config, mesh: Mesh) -> Violations:
    train = config.train
    micro = train.batch_size // train.gradient_accumulation_steps
    if micro % mesh.rows:
        yield (
            f"train.batch_size = {train.batch_size} in train.gradient_accumulation_steps = "
            f"{train.gradient_accumulation_steps} parts gives {micro} sequences at a time, which the {mesh.rows} ranks "
            "that read (parallel.data x parallel.expert) do not divide: choose a batch that is a multiple of both"
        )
    measures = config.evaluate.every > 0 or config.run.device == "CPU"
    if measures and config.evaluate.batch_size % mesh.rows:
        yield (
            f"evaluate.batch_size = {config.evaluate.batch_size} is not divided by the {mesh.rows} ranks that read "
            "(parallel.data x parallel.expert): choose a multiple of it"
        )
    if mesh.pipeline > 1 and config.evaluate.every > 0:
        yield (
            f"evaluate.every = {config.evaluate.every} measures between steps, for which pipeline stages have no "
            "graph: set it to 0, and measure checkpoints with pangu-sigma evaluate"
        )
    if mesh.pipeline > 1 and train.gradient_accumulation_steps < mesh.pipeline:
        yield (
            f"train.gradient_accumulation_steps = {train.gradient_accumulation_steps} keeps {mesh.pipeline} pipeline "
            f"stages waiting for one another: set it to at least parallel.pipeline = {mesh.pipeline}"
        )
