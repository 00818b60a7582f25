"""Rules of `train.phases` and `data.stream`: what a phase draws, trains and stays near, and what a stream rules out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pangu_sigma.config.phase_domains import old_domains

if TYPE_CHECKING:
    from pangu_sigma.config.schema import Config
    from pangu_sigma.config.training_sections import PhaseConfig

Broken = Iterator[tuple[str, str]]


def broken_phase_rules(config: Config) -> Broken:
    """What is wrong with the phases of a run."""
    phases, steps, model = config.train.phases, config.train.steps, config.model
    names = set(config.domain_names)
    for index, phase in enumerate(phases):
        key = f"train.phases.{index}"
        if phase.steps is None and index < len(phases) - 1:
            yield f"{key}.steps", f"{key}.steps is missing: only the last phase may leave it out"
        for name in phase.weights or {}:
            if name not in names:
                yield f"{key}.weights.{name}", f"{key}.weights names the domain {name}, {_known(names)}"
        if phase.weights is not None:
            yield from _phase_weights(f"{key}.weights", phase.weights)
        for name in phase.domains or ():
            if name not in names:
                yield f"{key}.domains", f"{key}.domains names the domain {name}, {_known(names)}"
        frozen = phase.shared == "frozen"
        if frozen and phase.domains == ():
            yield key, f"{key} trains nothing: set shared to train or name domains whose experts train"
        elif frozen and not model.sparse_prefixes and model.domain_parameters.embedding == "shared":
            yield (
                f"{key}.shared",
                f"{key} trains nothing: a dense model has shared parameters only; set shared to train",
            )
        yield from _regularise(key, phase, config)
        if phase.shared == "regularised" and config.cut_over_devices:
            yield (
                f"{key}.shared",
                f"{key}.shared = regularised has no form that is cut over devices, and parallel describes "
                f"{config.parallel.devices} of them: set its keys to 1, or {key}.shared to train",
            )
        if not set(phase.weights or ()) - names:
            yield from _old_domains(key, config, index)
    given = sum(phase.steps or 0 for phase in phases)
    open_end = bool(phases) and phases[-1].steps is None
    if phases and (given >= steps if open_end else given != steps):
        last = "the phases before the last take" if open_end else "the phases add up to"
        more = "leave at least one step for the last phase" if open_end else "they must be equal, or leave out the last"
        yield "train.phases", f"{last} {given} steps and train.steps is {steps}: {more}"


def _regularise(key: str, phase: PhaseConfig, config: Config) -> Broken:
    wanted = phase.regularise
    if wanted is not None and phase.shared != "regularised":
        yield (
            f"{key}.regularise",
            f"{key}.regularise has no effect, since {key}.shared = {phase.shared}: set shared to regularised, or leave "
            "regularise out",
        )
    elif phase.shared == "regularised" and not (wanted and (wanted.output or wanted.l2 or wanted.ewc)):
        yield (
            f"{key}.regularise",
            f"{key}.shared = regularised, but {key}.regularise says by what: give output, l2 or ewc a weight above 0",
        )
    if wanted is not None and wanted.through == "old":
        has_own_experts = config.model.sparse_prefixes and config.model.router_spec.tables == "domain"
        if not wanted.output:
            yield (
                f"{key}.regularise.through",
                f"{key}.regularise.through = old says whose outputs are compared, and output is 0: give output a "
                "weight above 0, or leave through out",
            )
        elif config.parallel.placement_groups > 1:
            yield (
                f"{key}.regularise.through",
                f"{key}.regularise.through = old has the new text read by other domains' experts, whose rows do not "
                "leave their placement group: set it to own, or parallel.placement to global",
            )
        elif not has_own_experts and config.model.domain_parameters.embedding == "shared":
            yield (
                f"{key}.regularise.through",
                f"{key}.regularise.through = old has no effect on this model, in which no domain has experts of its "
                "own (a dense one, or model.sparse.router other than rre): leave it out",
            )


def _old_domains(key: str, config: Config, index: int) -> Broken:
    phase, names = config.train.phases[index], set(config.domain_names)
    for name in phase.old or ():
        if name not in names:
            yield f"{key}.old", f"{key}.old names the domain {name}, {_known(names)}"
            return
    held = phase.regularise
    through = held is not None and held.output > 0 and held.through == "old"
    ewc = held is not None and held.ewc > 0
    if not phase.replay and not ewc and not through:
        if phase.old is not None:
            yield (
                f"{key}.old",
                f"{key}.old has no effect without {key}.replay, {key}.regularise.ewc or through = old: leave it out",
            )
        return
    why = f"{key}.regularise.ewc" if ewc else f"{key}.regularise.through = old"
    why = f"{key}.replay = {phase.replay:g}" if phase.replay else why
    if phase.replay and phase.weights is None:
        yield (
            f"{key}.weights",
            f"{why} is a share beside what {key}.weights draws, which is null: name the new domains there",
        )
    elif not old_domains(config, index):
        yield (
            f"{key}.old",
            f"{why} needs old domains, but no earlier phase draws another domain than {key} itself: name them in "
            f"{key}.old",
        )
    elif phase.replay and phase.shared == "frozen" and not set(old_domains(config, index)) & set(
        names if phase.domains is None else phase.domains
    ):
        yield (
            f"{key}.replay",
            f"{why} has no use where nothing of the old domains trains: set it to 0, or {key}.shared to train or "
            "regularised",
        )


def _phase_weights(key: str, weights: dict[str, float]) -> Broken:
    negative = [name for name, weight in weights.items() if weight < 0]
    if negative:
        yield f"{key}.{negative[0]}", f"{key}.{negative[0]} = {weights[negative[0]]} is negative: set it to 0 or more"
    elif not 0 < sum(weights.values()) < math.inf:
        yield (
            key,
            f"{key} do not add up to a positive number: give at least one domain a positive weight, or write null",
        )


def _known(names: set[str]) -> str:
    return f"which domains does not list: the known ones are {', '.join(sorted(names))}"


def broken_stream_rules(config: Config) -> Broken:
    """What is wrong with a stream."""
    if config.data.stream is None:
        return
    stream, names = config.data.stream, set(config.domain_names)
    if stream.domain is not None and stream.domain not in names:
        yield "data.stream.domain", f"data.stream.domain names the domain {stream.domain}, {_known(names)}"
    if config.data.max_domains_per_batch is not None:
        yield (
            "data.max_domains_per_batch",
            f"data.max_domains_per_batch = {config.data.max_domains_per_batch}, but the documents of data.stream "
            "come in their own order: set it to null",
        )
    for index, phase in enumerate(config.train.phases):
        if phase.replay:
            yield (
                f"train.phases.{index}.replay",
                f"train.phases.{index}.replay = {phase.replay:g}, but a run with data.stream draws nothing from the "
                "domains' files: set it to 0",
            )
    if config.parallel.devices > 1:
        yield (
            "data.stream",
            f"data.stream is read by one process, and parallel describes {config.parallel.devices} devices: leave "
            "--workers out and set its keys to 1",
        )
