"""Rules between fields. Each yields (key, sentence) for what is wrong; all are checked before any device work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from os.path import abspath, expanduser
from typing import TYPE_CHECKING

from pangu_sigma.config.adaptation_rules import broken_adaptation_rules
from pangu_sigma.config.mesh_rules import broken_mesh_rules
from pangu_sigma.config.model import GATE_ACTIVATIONS
from pangu_sigma.config.phase_rules import broken_phase_rules, broken_stream_rules
from rre.kinds import KINDS

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
    checks = (_model, _parts, _networks, _sparse, _domains, _tokenizer, _data, _schedule, _train, _around, _experts)
    checks += (broken_mesh_rules, broken_phase_rules, broken_stream_rules, broken_adaptation_rules)
    return [problem for check in checks for problem in check(config)]


def _model(config: Config) -> Broken:
    model = config.model
    if model.hidden % model.heads:
        yield (
            "model.heads",
            f"model.heads = {model.heads} does not divide model.hidden = {model.hidden}: "
            "choose a hidden size that is a multiple of the number of heads",
        )
    if model.blocks < 1:
        yield (
            "model.layers",
            f"model.layers = {model.layers} leaves no block under the query layer: set it to at least 2, "
            "or model.query_layer to none",
        )


def _parts(config: Config) -> Broken:
    """Backbone parts that cannot be combined, and options of parts that are not there."""
    model = config.model
    if model.position == "rope" and model.query_layer != "none":
        yield (
            "model.query_layer",
            "model.query_layer = next_position asks by learned positions, which model.position = rope does not have: "
            "set model.query_layer to none, or model.position to learned",
        )
    if model.position == "rope" and model.hidden % model.heads == 0 and model.hidden // model.heads % 2:
        yield (
            "model.heads",
            f"model.position = rope turns pairs of values, and a head has {model.hidden // model.heads} "
            "(model.hidden / model.heads): choose sizes that make it even",
        )
    if model.position != "rope" and model.rope_theta != 10000.0:
        yield (
            "model.rope_theta",
            f"model.rope_theta = {model.rope_theta:g} has no effect with model.position = {model.position}: leave it "
            "out, or set model.position to rope",
        )
    if model.head == "untied" and model.embedding_slots == "per_domain":
        yield (
            "model.head",
            "model.head = untied is one table for all domains, but model.embedding_slots = per_domain gives each its "
            "own words: set model.head to tied, or model.embedding_slots to shared",
        )


def _networks(config: Config) -> Broken:
    """Feed-forward networks of dense layers and of experts, which share activation and biases."""
    model = config.model
    written = {"model.feed_forward": model.feed_forward, "model.sparse.feed_forward": model.sparse.feed_forward}
    gated = {key: kind for key, kind in written.items() if kind in GATE_ACTIVATIONS}
    if len(set(gated.values())) > 1:
        yield (
            "model.sparse.feed_forward",
            f"model.feed_forward = {model.feed_forward} and model.sparse.feed_forward = {model.sparse.feed_forward} "
            "are gated by different activations, and a model has one: set them alike, or one of them to mlp",
        )
        return
    for key, kind in gated.items():
        wanted = GATE_ACTIVATIONS[kind]
        if model.activation != wanted:
            yield (
                "model.activation",
                f"model.activation = {model.activation}, but {key} = {kind} is gated by {wanted} by definition: "
                f"set model.activation to {wanted}",
            )
        if model.biases:
            yield (
                "model.biases",
                f"model.biases is true, but {key} = {kind} has none: set model.biases to false",
            )


def _sparse(config: Config) -> Broken:
    model, sparse = config.model, config.model.sparse
    if sparse.include_query_layer and model.query_layer == "none":
        yield (
            "model.sparse.include_query_layer",
            "model.sparse.include_query_layer is true, but model.query_layer is none: set it to false",
        )
        return
    if sparse.pattern != "top" and sparse.layers:
        yield (
            "model.sparse.layers",
            f"model.sparse.layers = {sparse.layers} counts top layers, but model.sparse.pattern = {sparse.pattern} "
            "says itself which layers are sparse: set model.sparse.layers to 0, or the pattern to top",
        )
    if sparse.pattern == "every_other" and model.blocks < 2:
        yield (
            "model.sparse.pattern",
            f"model.sparse.pattern = every_other begins with the second block, but there are {model.blocks}: "
            "set it to top or every, or raise model.layers",
        )
    if sparse.pattern == "top" and sparse.include_query_layer and sparse.layers == 0:
        yield (
            "model.sparse.include_query_layer",
            "model.sparse.include_query_layer is true, but model.sparse.layers is 0: "
            "the query layer counts as one of the sparse layers, so set model.sparse.layers to at least 1",
        )
    most = model.blocks + int(sparse.include_query_layer)
    if sparse.layers > most:
        counted = "the query layer included" if sparse.include_query_layer else "the query layer is dense"
        if model.query_layer == "none":
            counted = "there is no query layer"
        yield (
            "model.sparse.layers",
            f"model.sparse.layers = {sparse.layers} is more than the {most} layers that can be sparse "
            f"(model.layers = {model.layers}, {counted}): set it to at most {most}",
        )
    yield from _router(config)


def _router(config: Config) -> Broken:
    sparse = config.model.sparse
    kind = KINDS[sparse.router]
    if sparse.resample and "resample" not in kind.options:
        yield (
            "model.sparse.resample",
            f"model.sparse.resample is true, but the router {sparse.router} has no table of a domain to draw from: "
            "set it to false or the router to rre",
        )
    if sparse.jitter > 0 and "jitter" not in kind.options:
        yield (
            "model.sparse.jitter",
            f"model.sparse.jitter = {sparse.jitter} has no effect on the router {sparse.router}: set it to 0, or the "
            "router to switch",
        )
    if sparse.renormalise and "renormalise" not in kind.options:
        yield (
            "model.sparse.renormalise",
            f"model.sparse.renormalise is true, but has no effect on the router {sparse.router}: set it to false, or "
            "the router to olmoe",
        )
    if sparse.balance != "per_layer" and "balance" not in kind.options:
        yield (
            "model.sparse.balance",
            f"model.sparse.balance = {sparse.balance} has no effect on the router {sparse.router}: set it to "
            "per_layer, or the router to olmoe",
        )
    if sparse.mixture_loss != "competitive" and "mixture_loss" not in kind.options:
        yield (
            "model.sparse.mixture_loss",
            f"model.sparse.mixture_loss = {sparse.mixture_loss} has no effect on the router {sparse.router}: leave it "
            "out, or set the router to adaptive_mixture",
        )
    if kind.fixed and sparse.top_k not in (None, kind.experts_per_token):
        yield (
            "model.sparse.top_k",
            f"model.sparse.top_k = {sparse.top_k}, but the router {sparse.router} takes "
            f"{kind.experts_per_token or 'all experts'} by definition: leave it out",
        )
    if kind.top_layer and config.model.sparse_prefixes not in ((), (config.model.top_layer,)):
        query = "true" if config.model.query_layer != "none" else "false"
        yield (
            "model.sparse.router",
            f"model.sparse.router = {sparse.router} mixes what whole models would give, so the layer under the head "
            f"({config.model.top_layer}) must be the only sparse one: set model.sparse.pattern to top, layers to 1 and "
            f"include_query_layer to {query}",
        )
    if kind.top_layer and sparse.dispatch == "capacity":
        yield (
            "model.sparse.dispatch",
            f"model.sparse.dispatch = capacity, but with the router {sparse.router} every expert takes every row: set "
            "it to dropless",
        )
    if not kind.causal and sparse.dispatch == "capacity":
        yield (
            "model.sparse.dispatch",
            f"model.sparse.dispatch = capacity, but with the router {sparse.router} every expert takes a fixed number "
            "of tokens anyway: set it to dropless",
        )
    experts = config.experts_in_layer
    most = experts - 1 if sparse.router == "noisy_top_k" else experts
    if config.model.sparse_prefixes and kind.learned and config.experts_per_token > most:
        spare = ", one of which must be left unchosen" if most < experts else ""
        yield (
            "model.sparse.top_k",
            f"model.sparse.top_k = {config.experts_per_token} (the router {sparse.router}'s own where nothing is "
            f"written) is too many for the {experts} experts of a sparse layer{spare}: set it to at most {most}",
        )


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
    wanted = config.data.domains_per_step
    if wanted is not None and wanted > len(config.domains):
        yield (
            "data.domains_per_step",
            f"data.domains_per_step = {wanted} is more than the {len(config.domains)} domains there are: "
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
    owners = KINDS[model.sparse.router].tables if model.sparse_prefixes else None
    experts = sum(domain.experts for domain in config.domains)
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
    if train.batch_size % train.accumulation:
        yield (
            "train.accumulation",
            f"train.accumulation = {train.accumulation} does not divide train.batch_size = {train.batch_size}: "
            "choose a batch that is a multiple of it",
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
    if store != "device" and KINDS[config.model.sparse.router].learned:
        yield (
            "experts.store",
            f"experts.store = {store}, but a learned gate (model.sparse.router = {config.model.sparse.router}) chooses "
            "among all experts inside the step: set experts.store to device",
        )
