"""Rules between sections of the configuration, those of the mesh (`mesh_rules.py`) apart; `load_config` checks all of
them, before any device work."""

from __future__ import annotations

from collections.abc import Iterable
from os.path import expanduser, realpath

from pangu_sigma.config.capacity_sizes import samples_at_a_time
from pangu_sigma.config.mesh_rules import mesh_violations
from pangu_sigma.config.phase_domains import old_domains
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Violations, at_most, divides, positive_sum
from pangu_sigma.config.training_sections import PhaseConfig
from pangu_sigma.errors import argument
from pangu_sigma.wording import listed
from rre.router_specs import routers_that


def violations(config: Config) -> Violations:
    """All broken rules of a configuration whose single fields are right, those inside one section included."""
    yield from config.model.violations()
    checks = (_routing, _domains, _tokenizer, _data, _schedule, _train, _run, _experts)
    for check in (*checks, mesh_violations, _phases, _stream, _adapt):
        yield from check(config)


def warnings(config: Config) -> Violations:
    """What holds but is seldom meant."""
    model = config.model
    if not model.sparse_prefixes and model.domain_parameters.embedding == "shared" and config.adapt is None:
        yield (
            f"no domain ({', '.join(config.domain_names)}) owns anything: the model has no sparse layer, so none can "
            "be cut out or added; set model.sparse.layers to the number of top layers that shall hold experts"
        )


def _routing(config: Config) -> Violations:
    """What a sparse layer's options ask of the batch and of the domains' experts."""
    model, sparse = config.model, config.model.sparse
    if sparse.include_query_layer and not model.has_query_layer:
        return  # which layers are sparse is not known: the model's own rules say why
    # How many samples a rank computes is not known of a mesh that cannot be.
    is_mesh = not any(config.parallel.violations())
    if sparse.capacity_samples > 1 and is_mesh and sparse.has_group_capacity(model.router_spec):
        samples = samples_at_a_time(config)
        what = f"the {samples} sequences that a rank computes at a time (train.batch_size / "
        what += "train.gradient_accumulation_steps, among the ranks that read)"
        yield from divides("model.sparse.capacity_samples", sparse.capacity_samples, what, samples)
    experts = config.experts_in_layer
    most = experts - int(model.router_spec.needs_unchosen_expert)
    if model.sparse_prefixes and model.router_spec.learned and config.experts_per_token > most:
        spare = ", one of which must be left unchosen" if most < experts else ""
        yield (
            f"model.sparse.top_k = {config.experts_per_token} (the {sparse.router_name(model.is_mixture)}'s own where "
            f"nothing is written) is too many for the {experts} experts of a sparse layer{spare}: set it to at most "
            f"{most}"
        )


def _domains(config: Config) -> Violations:
    seen: set[str] = set()
    for index, domain in enumerate(config.domains):
        key = f"domains.{index}"
        if domain.name in seen:
            yield f"{key}.name = {domain.name} is the name of an earlier domain: give every domain its own name"
        seen.add(domain.name)
        yield from domain.violations(key)
    yield from positive_sum("domains have weights that", (domain.weight for domain in config.domains))
    limit, count = config.data.max_domains_per_batch, len(config.domains)
    yield from at_most("data.max_domains_per_batch", limit, f"the {count} domains there are", count)


def _tokenizer(config: Config) -> Violations:
    tokenizer, model = config.data.tokenizer, config.model
    yield from tokenizer.violations()
    known = tokenizer.known_size
    if known is not None and model.vocab_size is not None and model.vocab_size < known:
        yield (
            f"model.vocab_size = {model.vocab_size} is less than the tokenizer's {known} pieces: set it to at least "
            f"{known}, or to null for the tokenizer's size"
        )
    rows = model.vocab_size or known
    owners = model.router_spec.tables if model.sparse_prefixes and rows else None
    experts = config.experts_in_layer
    if owners == "layer" and experts > rows:
        yield (
            f"domains have {experts} experts together, more than the {rows} vocabulary ids that the table of a "
            f"{model.router} layer can spread: make the expert groups smaller"
        )
    what = f"the {rows} vocabulary ids that a routing table can spread"
    for index, domain in enumerate(config.domains if owners == "domain" else ()):
        yield from at_most(f"domains.{index}.experts", domain.experts, what, rows)


def _data(config: Config) -> Violations:
    data = config.data
    positions = config.model.positions
    yield from at_most("data.sequence_length", data.sequence_length, f"model.positions = {positions}", positions)
    uses = {"evaluate.every": config.evaluate.every, "checkpoint.probe_sequences": config.checkpoint.probe_sequences}
    for key, number in uses.items():
        if number and data.heldout_fraction == 0 and config.adapt is None:
            yield (
                f"{key} = {number} needs held-out text, but data.heldout_fraction is 0: set {key} to 0 or hold some "
                "text out"
            )


def _schedule(config: Config) -> Violations:
    schedule, steps = config.schedule, config.train.steps
    yield from at_most("schedule.warmup_steps", schedule.warmup_steps, f"train.steps = {steps}", steps)
    if schedule.warmup_steps > steps:
        return
    if schedule.decay_steps is not None and schedule.warmup_steps > schedule.decay_steps:
        yield (
            f"schedule.decay_steps = {schedule.decay_steps} is less than schedule.warmup_steps = "
            f"{schedule.warmup_steps}: it counts the warm-up too, so set it to at least {schedule.warmup_steps}"
        )
    elif schedule.warmup_steps + schedule.anneal_steps > steps:
        yield (
            f"schedule.anneal_steps = {schedule.anneal_steps} and schedule.warmup_steps = {schedule.warmup_steps} are "
            f"more than train.steps = {steps}: shorten them or train longer"
        )
    if schedule.anneal_steps and any(phase.restart for phase in config.train.phases):
        yield (
            "schedule.anneal_steps ends one schedule over the whole run, but a phase restarts it "
            "(train.phases.*.restart): set schedule.anneal_steps to 0, or no phase to restart"
        )


def _train(config: Config) -> Violations:
    train = config.train
    yield from train.violations()
    if train.precision == "bfloat16" and config.run.device == "CPU":
        yield (
            "train.precision = bfloat16 does not run on run.device = CPU, which has no bfloat16 matrix product: use "
            "float32 or float16, or run on Ascend"
        )
    if train.nonfinite == "rollback" and config.checkpoint.every == 0:
        yield (
            "train.nonfinite = rollback needs checkpoints to return to, but checkpoint.every is 0: set "
            "checkpoint.every to a number of steps"
        )


def _run(config: Config) -> Violations:
    if config.paths_from == "file":
        yield "paths_from = file says where the paths of a file start: write it in that YAML file"
    init_from = config.run.init_from
    if init_from is not None and realpath(expanduser(init_from)) == realpath(expanduser(config.run.dir)):
        yield (
            f"run.init_from = {init_from} is run.dir itself: set run.dir to a new folder, or continue a run with "
            f"{argument('resume', True)} and without run.init_from"
        )
    profile, steps = config.run.profile, config.train.steps
    if profile is not None and profile.start + profile.steps - 1 > steps:
        yield (
            f"run.profile ends at step {profile.start + profile.steps - 1}, after train.steps = {steps}: profile "
            "earlier or fewer steps"
        )


def _experts(config: Config) -> Violations:
    store = config.experts.store
    if store != "device" and config.model.router_spec.needs_all_experts:
        yield (
            f"experts.store = {store}, but a learned gate ({config.model.router_setting}) chooses among all experts "
            "inside the step: set experts.store to device"
        )


def _phases(config: Config) -> Violations:
    phases, model = config.train.phases, config.model
    names = set(config.domain_names)
    for index, phase in enumerate(phases):
        key = f"train.phases.{index}"
        if phase.steps is None and index < len(phases) - 1:
            yield f"{key}.steps is missing: only the last phase may leave it out"
        for name in phase.weights or {}:
            yield from _unknown(f"{key}.weights.{name}", [name], names)
        yield from phase.weight_violations(key)
        yield from _unknown(f"{key}.domains", phase.domains, names)
        frozen = phase.shared == "frozen"
        if frozen and phase.domains == ():
            yield f"{key} trains nothing: set shared to train or name domains whose experts train"
        elif frozen and not model.sparse_prefixes and model.domain_parameters.embedding == "shared":
            yield f"{key}.shared = frozen trains nothing: a dense model has shared parameters only; set shared to train"
        yield from _regularise(key, phase, config)
        if phase.shared == "regularised" and config.sharded_over_devices:
            yield (
                f"{key}.shared = regularised has no form that is cut over devices, and parallel describes "
                f"{config.parallel.devices} of them: set its keys to 1, or {key}.shared to train"
            )
        if not set(phase.weights or ()) - names:
            yield from _old_domains(key, config, index)
    yield from config.train.phase_length_violations()


def _regularise(key: str, phase: PhaseConfig, config: Config) -> Violations:
    yield from phase.regularise_violations(key)
    regularise = phase.regularise
    if regularise is not None and regularise.through == "old":
        if not regularise.output:
            yield (
                f"{key}.regularise.through = old says whose outputs are compared, and output is 0: give output a "
                "weight above 0, or leave through out"
            )
        elif config.parallel.placement_groups > 1:
            yield (
                f"{key}.regularise.through = old has the new text read by other domains' experts, whose rows do not "
                "leave their placement group: set it to own, or parallel.placement to global"
            )
        elif not config.model.separates_domains and config.model.domain_parameters.embedding == "shared":
            yield (
                f"{key}.regularise.through = old has no effect on this model, in which no domain has experts of its "
                "own (a dense one, or model.sparse.router other than "
                f"{routers_that(lambda spec: spec.separates_domains)}): leave it out"
            )


def _old_domains(key: str, config: Config, index: int) -> Violations:
    phase, names = config.train.phases[index], set(config.domain_names)
    unknown = [*_unknown(f"{key}.old", phase.old, names)]
    if unknown:
        yield unknown[0]
        return
    regularise = phase.regularise
    through = regularise is not None and regularise.output > 0 and regularise.through == "old"
    ewc = regularise is not None and regularise.ewc > 0
    if not phase.replay and not ewc and not through:
        if phase.old is not None:
            yield f"{key}.old has no effect without {key}.replay, {key}.regularise.ewc or through = old: leave it out"
        return
    why = f"{key}.regularise.ewc" if ewc else f"{key}.regularise.through = old"
    why = f"{key}.replay = {phase.replay:g}" if phase.replay else why
    if phase.replay and phase.weights is None:
        yield f"{key}.weights is null, and {why} is a share beside what it draws: name the new domains there"
    elif not old_domains(config, index):
        yield (
            f"{key}.old names none: {why} needs old domains, but no earlier phase draws another domain than {key} "
            "itself: name them there"
        )
    elif (
        phase.replay
        and phase.shared == "frozen"
        and not set(old_domains(config, index)) & set(names if phase.domains is None else phase.domains)
    ):
        yield (
            f"{key}.replay = {phase.replay:g} has no use where nothing of the old domains trains: set it to 0, or "
            f"{key}.shared to train or regularised"
        )


def _unknown(key: str, named: Iterable[str] | None, names: set[str]) -> Violations:
    """A sentence for each domain that is `named` at `key` and not one of the configuration's `names`."""
    for name in named or ():
        if name not in names:
            yield f"{key} names the domain {name}, which domains does not list: the known ones are {listed(names)}"


def _stream(config: Config) -> Violations:
    if config.data.stream is None:
        return
    domain = config.data.stream.domain
    yield from _unknown("data.stream.domain", domain and [domain], set(config.domain_names))
    if config.data.max_domains_per_batch is not None:
        yield (
            f"data.max_domains_per_batch = {config.data.max_domains_per_batch}, but the documents of data.stream come "
            "in their own order: set it to null"
        )
    for index, phase in enumerate(config.train.phases):
        if phase.replay:
            yield (
                f"train.phases.{index}.replay = {phase.replay:g}, but a run with data.stream draws nothing from the "
                "domains' files: set it to 0"
            )
    if config.parallel.devices > 1:
        yield (
            f"data.stream is read by one process, and parallel describes {config.parallel.devices} devices: leave "
            f"{argument('workers')} out and set its keys to 1"
        )


def _adapt(config: Config) -> Violations:
    if config.adapt is None:
        return
    yield from config.adapt.violations(config.domain_names)
    if config.run.init_from is None:
        yield (
            "run.init_from is null, but adapt changes a trained model: run it with pangu-sigma "
            f"{config.adapt.objective} MODEL FILE.yaml"
        )
    if config.adapt.heldout_fraction == 0 and config.evaluate.every:
        yield (
            f"evaluate.every = {config.evaluate.every} needs held-out examples, but adapt.heldout_fraction is 0: set "
            "evaluate.every to 0 or hold some examples out"
        )
    if config.data.stream is not None:
        yield "data.stream has no use where adapt names the examples: set it to null"
    drawn = {examples.name for examples in config.adapt.examples if examples.weight}
    for index, phase in enumerate(config.train.phases):
        key = f"train.phases.{index}"
        for name, weight in (phase.weights or {}).items():
            if weight and name not in drawn:
                yield f"{key}.weights.{name} draws {name}, which adapt.examples has no examples of"
        if phase.shared == "regularised" or phase.replay:
            yield (
                f"{key} is held near the previous model or replays text, which adapt does not do: leave shared "
                "regularised and replay out"
            )
