"""What a run does about a loss or a gradient norm that is not finite."""

from __future__ import annotations

import math

from pangu_sigma.config.training_sections import TrainConfig
from pangu_sigma.errors import UserError


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss, or a used-up budget."""


def tolerated(loss: float, gradient_norm: float, step: int, skipped: int, train: TrainConfig) -> str:
    """Says what is not finite in `step` (from 0), the `skipped`-th time in this run.

    Raises TrainingError where `train.nonfinite` and `train.skip_budget` do not let the run go on.
    """
    name, value = ("gradient norm", gradient_norm) if math.isfinite(loss) else ("loss", loss)
    said = f"step {step + 1}: the {name} is {value}"
    if train.nonfinite == "raise":
        raise TrainingError(f"{said}; lower optimizer.learning_rate, or set train.nonfinite=skip or rollback")
    if skipped > train.skip_budget:
        raise TrainingError(
            f"{said}, and train.skip_budget={train.skip_budget} is used up; lower optimizer.learning_rate or raise "
            "the budget"
        )
    return said


def no_way_back(said: str) -> TrainingError:
    """The error of a run that should roll back and has no checkpoint; `said` is what `tolerated` says."""
    return TrainingError(
        f"{said} and there is no checkpoint to roll back to; set checkpoint.every lower, or lower "
        "optimizer.learning_rate"
    )
