"""Rules between fields. Each yields (key, sentence) for what is wrong; all are checked before any device work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from os.path import abspath, expanduser
from typing import TYPE_CHECKING

from pangu_sigma.config.finetuning_rules import broken_adaptation_rules
from pangu_sigma.config.mesh_rules import broken_mesh_rules
from pangu_sigma.config.model_rules import broken_model_rules
from pangu_sigma.config.phase_rules import broken_phase_rules, broken_stream_rules

if TYPE_CHECKING:
    from pangu_sigma.config.schema import Config

Broken = Iterator[tuple[str, str]]

# A checkpoint stores a domain in a file of its name, beside files and folders that have these names.
RESERVED_NAMES = frozenset(
    {"shared", "manifest", "config", "tokenizer", "probe", "optimizer", "state", "trainer", "domains", "all", "none"}
)

# The command line takes it in a domain's place: the domain is to be inferred from the text.
INFERRED_DOMAIN = "auto"

# Large files of a checkpoint are numbered so.
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")

PANGU_ALPHA_VOCABULARY = 40000


class RulesBroken(ValueError):
    """Carries all broken rules as (key, sentence) pairs through pydantic's own error."""

    def __init__(self, broken: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(sentence for _, sentence in broken))
        self.broken = broken


def broken_rules(config: Config) -> list[tuple[str, str]]:
    """All broken rules of a configuration whose single fields are right, as (key, sentence) pairs."""
    checks = (broken_model_rules, _domains, _tokenizer, _data, _schedule, _train, _around, _experts)
    checks += (broken_mesh_rules, broken_phase_rules, broken_stream_rules, broken_adaptation_rules)
    return [problem for check in checks for problem in check(config)]


def _domains(config: Config) -> Broken:
    seen: set[str] = set()
    for index, domain in enumerate(config.domains):
        key = f"domains.{index}.name"
        if domain.name in seen:
            yield key, f"{key} = {domain.name} is the name of an earlier domain: give every domain its own name"
        seen.add(domain.name)
        if domain.name in RESERVED_NAMES:
            yield key, f"{key} = {domain.name} is reserved for a file of the checkpoint: choose another name"
        if domain.name == INFERRED_DOMAIN:
            yield (
                key,
                f"{key} = {domain.name} is reserved: --domain {domain.name} has a text's domain inferred; choose "
                "another name",
            )
        if domain.stars_field is not None and domain.filters != "code":
            yield (
                f"domains.{index}.stars_field",
                f"domains.{index}.stars_field is set, but only code is judged by its stars: set it to null, or "
                f"domains.{index}.filters to code",
            )
        if _SHARD_NUMBER.search(domain.name):
            yield key, f"{key} = {domain.name} ends like a numbered file of the checkpoint: choose another name"
    if not 0 < sum(domain.weight for domain in config.domains) < math.inf:
        yield (
            "domains",
            "the weights of the domains do not add up to a positive number: give at least one a positive weight",
        )
    wanted = config.data.max_domains_per_batch
    if wanted is not None and wanted > len(config.domains):
        yield (
            "data.max_domains_per_batch",
            f"data.max_domains_per_batch = {wanted} is more than the {len(config.domains)} domains there are: "
            f"set it to at most {len(config.domains)}",
        )


def _tokenizer(config: Config) -> Broken:
    tokenizer, model = config.data.tokenizer, config.model
    if tokenizer.kind == "train" and tokenizer.path is not None:
        yield (
            "data.tokenizer.path",
            "data.tokenizer.path is set, but data.tokenizer.kind is train: set the path to null, "
            "or the kind to sentencepiece, pangu_alpha or huggingface",
        )
    if tokenizer.kind != "train" and tokenizer.path is None:
        yield (
            "data.tokenizer.path",
            f"data.tokenizer.path is missing: data.tokenizer.kind = {tokenizer.kind} needs the tokenizer's model file",
        )
    known = {"train": tokenizer.vocab_size, "pangu_alpha": PANGU_ALPHA_VOCABULARY}.get(tokenizer.kind)
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


def _data(config: Config) -> Broken:
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


def _schedule(config: Config) -> Broken:
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


def _train(config: Config) -> Broken:
    train = config.train
    if train.batch_size % train.gradient_accumulation_steps:
        yield (
            "train.gradient_accumulation_steps",
            f"train.gradient_accumulation_steps = {train.gradient_accumulation_steps} does not divide "
            f"train.batch_size = {train.batch_size}: choose a batch that is a multiple of it",
        )
    if train.stop_at is not None and train.stop_at > train.steps:
        yield (
            "train.stop_at",
            f"train.stop_at = {train.stop_at} is more than train.steps = {train.steps}: set it lower or to null",
        )
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


def _around(config: Config) -> Broken:
    begin = config.run.init_from
    if begin is not None and abspath(expanduser(begin)) == abspath(expanduser(config.run.dir)):
        yield (
            "run.init_from",
            f"run.init_from = {begin} is the run's own folder: continue it with --resume, or choose "
            "another run.dir",
        )
    profile, steps = config.run.profile, config.train.steps
    if profile is not None and profile.start + profile.steps - 1 > steps:
        yield (
            "run.profile",
            f"run.profile ends at step {profile.start + profile.steps - 1}, after train.steps = {steps}: "
            "profile earlier or fewer steps",
        )


def _experts(config: Config) -> Broken:
    store = config.experts.store
    if store != "device" and config.model.router_spec.learned:
        yield (
            "experts.store",
            f"experts.store = {store}, but a learned gate ({config.model.router_setting}) chooses "
            "among all experts inside the step: set experts.store to device",
        )
