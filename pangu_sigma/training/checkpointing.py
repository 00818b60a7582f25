"""The checkpoints of a run: when one is due, the state that it keeps, and how the run returns to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import Checkpoint, SaveResult, StoredTensors, find_latest
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES
from pangu_sigma.checkpoint.verified_files import VerifiedFiles
from pangu_sigma.training.run_contents import collect_contents, write_checkpoint

if TYPE_CHECKING:
    from pangu_sigma.training.continual.controller import ContinualController
    from pangu_sigma.training.task import TrainingTask
    from pangu_sigma.training.trainer import Trainer


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: optimizer steps done, steps skipped because something was not finite, tokens learned from.

    Kept in every checkpoint.
    """

    step: int = 0
    skipped: int = 0
    tokens: int = 0


class RunCheckpointer:
    """Saves the run in `run_dir` and restores it.

    saved_step: step of the run's last checkpoint, -1 before the first.
    domain_changes: what `pangu-sigma domains` did to the run; every later checkpoint keeps the list.
    verified: what is known of the files that the next save may link.

    The training thread calls `save`, and waits: parameters do not move while they are written.
    """

    def __init__(
        self,
        run_dir: Path,
        trainer: Trainer,
        task: TrainingTask,
        controller: ContinualController,
        domain_changes: list[dict],
        verified: VerifiedFiles,
    ) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.task = task
        self.controller = controller
        self.domain_changes = domain_changes
        self.verified = verified
        self.config = trainer.config
        self.saved_step = -1
        self._saved_at = time.monotonic()

    def is_overdue(self, step: int) -> bool:
        """Whether checkpoint.every_seconds have passed since the last checkpoint, and a step has been done since."""
        seconds = self.config.checkpoint.every_seconds
        time_passed = seconds is not None and time.monotonic() - self._saved_at >= seconds
        return time_passed and self.saved_step != step

    def save(
        self, progress: RunProgress, sampler_state: dict, on_bytes: Callable[[int, int], None], is_last: bool
    ) -> SaveResult:
        """Write the checkpoint of this moment.

        sampler_state: after the last batch that was used. on_bytes: is told the bytes written and all there are.
        is_last: whether the run ends here, so that all that is linked is read.
        """
        settings, trainer = self.config.checkpoint, self.trainer
        probe = self.task.probe(settings.probe_sequences)
        changes = {DOMAIN_CHANGES: self.domain_changes} if self.domain_changes else {}
        state = {
            "sampler": sampler_state,
            **trainer.state(),
            "skipped": progress.skipped,
            "tokens": progress.tokens,
            **changes,
            **self.controller.state(),
            **self.task.state(),
        }
        contents = collect_contents(progress.step, self.config, self.task.corpus, probe, state)
        moments = trainer.optimizer.moments()
        result = write_checkpoint(
            self.run_dir, contents, trainer.model, moments, settings.keep, on_bytes, self.verified, is_last
        )
        self.saved_step, self._saved_at = progress.step, time.monotonic()
        return result

    def restore(self, checkpoint: Checkpoint) -> RunProgress:
        """Set parameters, moments and loss scale to those of the checkpoint; returns how far the run was."""
        state = checkpoint.state
        self.trainer.restore(StoredTensors(checkpoint), state)
        self.saved_step = checkpoint.step
        return RunProgress(checkpoint.step, int(state["skipped"]), int(state["tokens"]))

    def restore_latest(self) -> RunProgress | None:
        """Return to the last checkpoint of the run's folder; None where there is none."""
        checkpoint, _ = find_latest(self.run_dir)
        return None if checkpoint is None else self.restore(checkpoint)
