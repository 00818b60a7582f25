"""Rules between sections of the configuration; `load_config` checks them all, before any device work."""

from __future__ import annotations

import math
from os.path import abspath, expanduser

from pangu_sigma.config.mesh_rules import broken_mesh_rules
from pangu_sigma.config.model_rules import broken_model_rules
from pangu_sigma.config.phase_rules import broken_phase_rules, broken_stream_rules
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Violations


def violations(config: Config) -> Violations:
    """All broken rules of a configuration whose single fields are right, those inside one section included."""
    checks = (broken_model_rules, _domains, _tokenizer, _data, _schedule, _train, _run, _experts)
    checks += (broken_mesh_rules, broken_phase_rules, broken_stream_rules, _adapt)
    for check in checks:
        yield from check(config)


def _domains(config: Config) -> Violations:
    seen: set[str] = set()
    for index, domain in enumerate(config.domains):
        key = f"domains.{index}"
        if domain.name in seen:
            yield (
                f"{key}.name",
                f"{key}.name = {domain.name} is the name of an earlier domain: give every domain its own name",
            )
        seen.add(domain.name)
        yield from domain.violations(key)
    if not 0 < sum(domain.weight for domain in config.domains) < math.inf:
        yield (
            "domains",
            "the weights of the domains do not add up to a positive number: give at least one a positive weight",
        )
    limit = config.data.max_domains_per_batch
    if limit is not None and limit > len(config.domains):
        yield (
            "data.max_domains_per_batch",
            f"data.max_domains_per_batch = {limit} is more than the {len(config.domains)} domains there are: "
            f"set it to at most {len(config.domains)}",
        )


def _tokenizer(config: Config) -> Violations:
    tokenizer, model = config.data.tokenizer, config.model
    yield from tokenizer.violations()
    known = tokenizer.known_size
    if known is not None and model.vocab_size is not None and model.vocab_size < known:
        yield (
            "model.vocab_size",
            f"model.vocab_size = {model.vocab_size} is less than the tokenizer's {known} pieces: "
            f"set it to at least {known}, or to null for the tokenizer's size",
        )
    rows = model.vocab_size or known
    owners = model.router_spec.tables if model.sparse_prefixes else None
    experts = config.experts_in_layer
    if rows is not None and owners == "layer" and experts > rows:
        yield (
            "domains",
            f"the domains have {experts} experts together, more than the {rows} vocabulary ids that the table of a "
            "hash layer can spread: make the expert groups smaller",
        )
    if rows is not None and owners == "domain":
        for index, domain in enumerate(config.domains):
            if domain.experts > rows:
                yield (
                    f"domains.{index}.experts",
                    f"domains.{index}.experts = {domain.experts} is more than the {rows} vocabulary ids that a routing "
                    "table can spread: make the expert group smaller",
                )


def _data(config: Config) -> Violations:
    data = config.data
    if data.sequence_length > config.model.positions:
        yield (
            "data.sequence_length",
            f"data.sequence_length = {data.sequence_length} is more than model.positions = {config.model.positions}: "
            "shorten the sequences or give the model more positions",
        )
    if data.heldout_fraction == 0 and config.evaluate.every and config.adapt is None:
        yield (
            "evaluate.every",
            f"evaluate.every = {config.evaluate.every} needs held-out text, but data.heldout_fraction is 0: "
            "set evaluate.every to 0 or hold some text out",
        )
    if data.heldout_fraction == 0 and config.checkpoint.probe_sequences and config.adapt is None:
        yield (
            "checkpoint.probe_sequences",
            f"checkpoint.probe_sequences = {config.checkpoint.probe_sequences} needs held-out text, but "
            "data.heldout_fraction is 0: set checkpoint.probe_sequences to 0 or hold some text out",
        )


def _schedule(config: Config) -> Violations:
    schedule, steps = config.schedule, config.train.steps
    if schedule.warmup_steps > steps:
        yield (
            "schedule.warmup_steps",
            f"schedule.warmup_steps = {schedule.warmup_steps} is more than train.steps = {steps}: "
            "shorten the warm-up or train longer",
        )
    elif schedule.decay_steps is not None and schedule.warmup_steps > schedule.decay_steps:
        yield (
            "schedule.decay_steps",
            f"schedule.decay_steps = {schedule.decay_steps} is less than schedule.warmup_steps = "
            f"{schedule.warmup_steps}: it counts the warm-up too, so set it to at least {schedule.warmup_steps}",
        )
    elif schedule.warmup_steps + schedule.anneal_steps > steps:
        yield (
            "schedule.anneal_steps",
            f"schedule.anneal_steps = {schedule.anneal_steps} and schedule.warmup_steps = {schedule.warmup_steps} are "
            f"more than train.steps = {steps}: shorten them or train longer",
        )
    if schedule.anneal_steps and any(phase.restart for phase in config.train.phases):
        yield (
            "schedule.anneal_steps",
            "schedule.anneal_steps ends one schedule over the whole run, but a phase restarts it "
            "(train.phases.*.restart): set schedule.anneal_steps to 0, or no phase to restart",
        )


def _train(config: Config) -> Violations:
    train = config.train
    yield from train.violations()
    if train.precision == "bfloat16" and config.run.device == "CPU":
        yield (
            "train.precision",
            "train.precision = bfloat16 does not run on run.device = CPU, which has no bfloat16 matrix product: "
            "use float32 or float16, or run on Ascend",
        )
    if train.nonfinite == "rollback" and config.checkpoint.every == 0:
        yield (
            "train.nonfinite",
            "train.nonfinite = rollback needs checkpoints to return to, but checkpoint.every is 0: "
            "set checkpoint.every to a number of steps",
        )


def _run(config: Config) -> Violations:
    init_from = config.run.init_from
    if init_from is not None and abspath(expanduser(init_from)) == abspath(expanduser(config.run.dir)):
        yield (
            "run.init_from",
            f"run.init_from = {init_from} is the run's own folder: continue it with --resume, or choose "
            "another run.dir",
        )
    profile, steps = config.run.profile, config.train.steps
    if profile is not None and profile.start + profile.steps - 1 > steps:
        yield (
            "run.profile",
            f"run.profile ends at step {profile.start + profile.steps - 1}, after train.steps = {steps}: "
            "profile earlier or fewer steps",
        )


def _experts(config: Config) -> Violations:
    store = config.experts.store
    if store != "device" and config.model.router_spec.learned:
        yield (
            "experts.store",
            f"experts.store = {store}, but a learned gate ({config.model.router_setting}) chooses "
            "among all experts inside the step: set experts.store to device",
        )


def _adapt(config: Config) -> Violations:
    if config.adapt is None:
        return
    yield from config.adapt.violations(config.domain_names)
    if config.run.init_from is None:
        yield (
            "run.init_from",
            "run.init_from is null, but adapt changes a trained model: run it with pangu-sigma "
            f"{config.adapt.objective} MODEL FILE.yaml",
        )
    if config.adapt.heldout_fraction == 0 and config.evaluate.every:
        yield (
            "evaluate.every",
            f"evaluate.every = {config.evaluate.every} needs held-out examples, but adapt.heldout_fraction is 0: "
            "set evaluate.every to 0 or hold some examples out",
        )
    if config.data.stream is not None:
        yield "data.stream", "data.stream has no use where adapt names the examples: set it to null"
    drawn = {examples.name for examples in config.adapt.examples if examples.weight}
    for index, phase in enumerate(config.train.phases):
        key = f"train.phases.{index}"
        for name, weight in (phase.weights or {}).items():
            if weight and name not in drawn:
                yield f"{key}.weights.{name}", f"{key}.weights draws {name}, which adapt.examples has no examples of"
        if phase.shared == "regularised" or phase.replay:
            yield (
                key,
                f"{key} is held near the previous model or replays text, which adapt does not do: leave shared "
                "regularised and replay out",
            )
