"""What changes over the steps by plan: the learning rate, and the phases of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pangu_sigma.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up to the peak, then cosine or linear decay to `final_factor` of it at `decay_steps`, or constant.
    """
    peak = config.optimizer.learning_rate
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    span = max(1, schedule.decay_steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / span)
    left = (1.0 + math.cos(math.pi * done)) / 2.0 if schedule.kind == "cosine" else 1.0 - done
    return peak * (schedule.final_factor + (1.0 - schedule.final_factor) * left)


@dataclass(frozen=True)
class Phase:
    """What holds at a step: domain weights, whether shared parameters train, and whose experts do."""

    index: int
    weights: dict[str, float]
    shared: bool
    domains: frozenset[str]


def phase_at(config: Config, step: int) -> Phase:
    """The phase of optimizer step `step`, counted from 0; a run without phases trains everything throughout."""
    own = {domain.name: domain.weight for domain in config.domains}
    everyone = frozenset(own)
    start = 0
    for index, phase in enumerate(config.train.phases):
        start += phase.steps
        if step < start or index == len(config.train.phases) - 1:
            weights = own if phase.weights is None else dict(phase.weights)
            trained = everyone if phase.domains is None else frozenset(phase.domains)
            return Phase(index, weights, phase.shared, trained)
    return Phase(0, own, True, everyone)
