"""What a run does about a step whose loss or gradient norm is not finite: raise, skip the batch or roll back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import find_latest
from pangu_sigma.errors import UserError

if TYPE_CHECKING:
    from pangu_sigma.train.checkpointing import RunCheckpointer
    from pangu_sigma.train.trainer import StepResult, Trainer


class TrainingError(UserError):
    """Training cannot go on: a loss or gradient that is not finite, or a used-up budget of skipped steps."""


class NonfiniteHandler:
    """Applies `train.nonfinite` and `train.skip_budget` to steps that updated nothing because of a NaN or infinity."""

    def __init__(self, run_dir: Path, trainer: Trainer, checkpointer: RunCheckpointer) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.checkpointer = checkpointer
        self.settings = trainer.config.train

    def handle(self, result: StepResult) -> str:
        """Count a bad step and skip its batch or roll the run back; returns the sentence for the user.

        Raises TrainingError where the settings do not let the run go on.
        """
        progress = self.checkpointer.progress
        progress.skipped += 1
        skipped = progress.skipped
        message = self._describe(result)
        if self.settings.nonfinite == "rollback":
            message += f"; rolled back to step {self._roll_back(message)}"
        else:
            message += "; batch skipped"
        return f"{message} ({skipped} so far)"

    def _describe(self, result: StepResult) -> str:
        """Which value is not finite in which step. Raises TrainingError where that ends the run."""
        finite_loss = math.isfinite(result.loss)
        name, value = ("gradient norm", result.gradient_norm) if finite_loss else ("loss", result.loss)
        progress, budget = self.checkpointer.progress, self.settings.skip_budget
        message = f"step {progress.step + 1}: the {name} is {value}"
        if self.settings.nonfinite == "raise":
            raise TrainingError(f"{message}; lower optimizer.learning_rate, or set train.nonfinite=skip or rollback")
        if progress.skipped > budget:
            raise TrainingError(
                f"{message}, and train.skip_budget={budget} is used up; lower optimizer.learning_rate or raise "
                "the budget"
            )
        return message

    def _roll_back(self, message: str) -> int:
        """Return to the last checkpoint's parameters and continue with the next batches; the checkpoint's step.

        The sampler is not rolled back: the run goes on past the bad batch (PaLM, arXiv 2204.02311, section 5.1: the
        same state with other data does not fail again). Nor is the count of skipped steps, or the budget would be
        renewed each time.
        """
        progress = self.checkpointer.progress
        skipped = progress.skipped
        checkpoint, _ = find_latest(self.run_dir)
        if checkpoint is None:
            raise TrainingError(
                f"{message} and there is no checkpoint to roll back to; set checkpoint.every lower, or lower "
                "optimizer.learning_rate"
            )
        self.checkpointer.restore(checkpoint)
        progress.skipped = skipped
        self.trainer.metrics.take_record()
        return checkpoint.step
