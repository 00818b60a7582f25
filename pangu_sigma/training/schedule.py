"""Schedules of a run: learning rate and phase of each optimizer step, weights of the domains in each batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pangu_sigma.config import Config
from pangu_sigma.config.phase_domains import drawn_weights
from pangu_sigma.config.training_sections import RegulariseConfig, ScheduleConfig


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up to the peak, then cosine or linear decay to `min_lr_ratio` of it at `decay_steps`, or constant. A
    phase that restarts begins this anew, with its own steps in place of `decay_steps` and a warm-up that takes at most
    `restart_warmup_ratio` of them. Over the last `anneal_steps` of
    the run the rate falls linearly from where it stands, to reach 0 when the run is over (OLMoE's annealing phase,
    arXiv 2409.02060, section 2).
    """
    anneal = config.schedule.anneal_steps
    left = config.train.steps - step
    if anneal and left < anneal:
        return _planned(config, config.train.steps - anneal) * max(0.0, left / anneal)
    return _planned(config, step)


def _planned(config: Config, step: int) -> float:
    """The learning rate without the anneal."""
    peak = config.optimizer.learning_rate
    schedule = config.schedule
    warmup, decay_steps, begin, start = schedule.warmup_steps, schedule.decay_steps, 0, 0
    for phase in config.train.phases:
        if phase.restart and start <= step:
            warmup, decay_steps, begin = _restart_warmup(schedule, phase.steps), phase.steps, start
        start += phase.steps
    step -= begin
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    if decay_steps is None:
        decay_steps = config.train.steps - schedule.anneal_steps
    span = max(1, decay_steps - warmup)
    done = min(1.0, (step - warmup) / span)
    left = (1.0 + math.cos(math.pi * done)) / 2.0 if schedule.kind == "cosine" else 1.0 - done
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * left)


def _restart_warmup(schedule: ScheduleConfig, steps: int) -> int:
    """Steps of warm-up of a phase of `steps` that restarts."""
    return min(schedule.warmup_steps, int(schedule.restart_warmup_ratio * steps))


def same_rates(one: Config, other: Config, steps: int) -> bool:
    """Whether the first `steps` steps have the same learning rates: asked at both ends of every stretch in which each
    configuration has one formula, and beside its begin, since two such curves that meet there are one."""
    begins = _formula_begins(one) | _formula_begins(other)
    asked = {steps - 1, *(begin + offset for begin in begins for offset in (-1, 0, 1))}
    return all(learning_rate(one, step) == learning_rate(other, step) for step in asked if 0 <= step < steps)


def _formula_begins(config: Config) -> set[int]:
    """Steps from which on the learning rate has another formula: warm-up, decay, its end, all anew, the anneal."""
    schedule, begin = config.schedule, 0
    last = config.train.steps - schedule.anneal_steps
    begins = {0, schedule.warmup_steps, last if schedule.decay_steps is None else schedule.decay_steps, last}
    for phase in config.train.phases:
        if phase.restart:
            begins |= {begin, begin + _restart_warmup(schedule, phase.steps), begin + phase.steps}
        begin += phase.steps
    return begins


@dataclass(frozen=True)
class Phase:
    """Training phase: whether shared parameters train, and the domains whose experts do.

    regularise: what keeps it near the model of its first step, None for nothing.
    """

    index: int
    shared: bool
    domains: frozenset[str]
    regularise: RegulariseConfig | None = None


@dataclass(frozen=True)
class ScheduledStep:
    """What is settled of an optimizer step before it is computed; `index` steps have been done."""

    index: int
    phase: Phase
    learning_rate: float


def scheduled_step(config: Config, index: int, batch_step: int | None = None) -> ScheduledStep:
    """Optimizer step `index`, counted from 0, on the batch that was sampled for step `batch_step`, None for the same.

    After skipped steps the sampler is ahead of the optimizer: the batch's own step decides the phase.
    """
    phase = phase_at(config, index if batch_step is None else batch_step)
    return ScheduledStep(index, phase, learning_rate(config, index))


def phase_at(config: Config, step: int) -> Phase:
    """The phase of optimizer step `step`, counted from 0; a run without phases trains everything throughout."""
    everyone = frozenset(config.domain_names)
    if not config.train.phases:
        return Phase(0, True, everyone)
    index = phase_index(config, step)
    phase = config.train.phases[index]
    trained = everyone if phase.domains is None else frozenset(phase.domains)
    return Phase(index, phase.shared != "frozen", trained, phase.regularise)


def domain_weights(config: Config, step: int) -> dict[str, float]:
    """The weights by which the domains of step `step`'s batch are drawn, replay included."""
    if not config.train.phases:
        return {domain.name: domain.weight for domain in config.domains}
    return drawn_weights(config, phase_index(config, step))


def phase_index(config: Config, step: int) -> int:
    """Which of the run's phases, of which there are some, a step is in; the last one takes what is left."""
    end = 0
    for index, phase in enumerate(config.train.phases[:-1]):
        end += phase.steps
        if step < end:
            return index
    return len(config.train.phases) - 1
