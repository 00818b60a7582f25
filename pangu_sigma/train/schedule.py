"""Schedules of a run: the learning rate of each optimizer step, and the phase that it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pangu_sigma.config import Config
from pangu_sigma.config.phase_domains import drawn_weights
from pangu_sigma.config.training_sections import RegulariseConfig


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up to the peak, then cosine or linear decay to `min_lr_ratio` of it at `decay_steps`, or constant. A
    phase that restarts begins this anew, with its own steps in place of `decay_steps`. Over the last `anneal_steps` of
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
            warmup, decay_steps, begin = min(schedule.warmup_steps, phase.steps), phase.steps, start
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


@dataclass(frozen=True)
class Phase:
    """Training phase: domain weights, whether shared parameters train, and the domains whose experts do.

    start: the phase's first step. regularise: what keeps it near the model of that step, None for nothing.
    """

    index: int
    weights: dict[str, float]
    shared: bool
    domains: frozenset[str]
    start: int = 0
    regularise: RegulariseConfig | None = None


def phase_at(config: Config, step: int) -> Phase:
    """The phase of optimizer step `step`, counted from 0; a run without phases trains everything throughout."""
    everyone = frozenset(config.domain_names)
    start = 0
    for index, phase in enumerate(config.train.phases):
        if step < start + phase.steps or index == len(config.train.phases) - 1:
            trained = everyone if phase.domains is None else frozenset(phase.domains)
            weights = drawn_weights(config, index)
            return Phase(index, weights, phase.shared != "frozen", trained, start, phase.regularise)
        start += phase.steps
    return Phase(0, {domain.name: domain.weight for domain in config.domains}, True, everyone)
