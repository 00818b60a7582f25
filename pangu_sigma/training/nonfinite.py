"""What a run does about a step whose loss or gradient norm is not finite: raise, skip the batch or roll back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pangu_sigma.config.training_sections import TrainConfig
from pangu_sigma.errors import UserError

if TYPE_CHECKING:
    from pangu_sigma.training.checkpointing import RunProgress
    from pangu_sigma.training.trainer import StepResult


class TrainingError(UserError):
    """Training cannot go on: a loss or gradient that is not finite, or a used-up budget of skipped steps."""


def handle_nonfinite(
    settings: TrainConfig, result: StepResult, progress: RunProgress, roll_back: Callable[[], RunProgress | None]
) -> tuple[RunProgress, str]:
    """Where the run goes on from after a step that updated nothing because of a NaN or infinity, and the sentence for
    the user; `train.nonfinite` and `train.skip_budget` decide.

    roll_back: returns to the last checkpoint, None without one. The sampler is not rolled back: the run goes on past
    the bad batch (PaLM, arXiv 2204.02311, section 5.1: the same state with other data does not fail again). Nor is the
    count of skipped steps, or the budget would be renewed each time. Raises TrainingError where the settings do not let
    the run go on.
    """
    name, value = ("gradient norm", result.gradient_norm) if math.isfinite(result.loss) else ("loss", result.loss)
    message = f"step {progress.step + 1}: the {name} is {value}"
    skipped, budget = progress.skipped + 1, settings.skip_budget
    if settings.nonfinite == "raise":
        raise TrainingError(f"{message}; lower optimizer.learning_rate, or set train.nonfinite=skip or rollback")
    if skipped > budget:
        raise TrainingError(
            f"{message}, and train.skip_budget={budget} is used up; lower optimizer.learning_rate or raise the budget"
        )
    action = "batch skipped"
    if settings.nonfinite == "rollback":
        restored = roll_back()
        if restored is None:
            raise TrainingError(
                f"{message} and there is no checkpoint to roll back to; set checkpoint.every lower, or lower "
                "optimizer.learning_rate"
            )
        progress, action = restored, f"rolled back to step {restored.step}"
    return replace(progress, skipped=skipped), f"{message}; {action} ({skipped} so far)"
