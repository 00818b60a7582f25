"""The checkpoints of a run: when one is due, the state that it keeps, and how the run returns to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import Checkpoint, SaveResult, StoredTensors
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES
from pangu_sigma.model.state_dict import restore_model
from pangu_sigma.train.run_contents import collect_contents, write_checkpoint

if TYPE_CHECKING:
    from pangu_sigma.train.continual.controller import ContinualController
    from pangu_sigma.train.task import TrainingTask
    from pangu_sigma.train.trainer import Trainer


@dataclass
class RunProgress:
    """How far a run is: optimizer steps done, steps skipped because something was not finite, tokens learned from.

    Kept in every checkpoint.
    """

    step: int = 0
    skipped: int = 0
    tokens: int = 0


class RunCheckpointer:
    """Saves the run in `run_dir` and restores it; has its progress.

    saved_step: step of the run's last checkpoint, -1 before the first.
    domain_changes: what `pangu-sigma domains` did to the run; every later checkpoint keeps the list.

    The training thread calls `save`, and waits: parameters do not move while they are written.
    """

    def __init__(
        self,
        run_dir: Path,
        trainer: Trainer,
        task: TrainingTask,
        controller: ContinualController,
        domain_changes: list[dict],
    ) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.task = task
        self.controller = controller
        self.domain_changes = domain_changes
        self.config = trainer.config
        self.progress = RunProgress()
        self.saved_step = -1
        self._saved_at = time.monotonic()

    @property
    def is_overdue(self) -> bool:
        """Whether checkpoint.every_seconds have passed since the last checkpoint, and a step has been done since."""
        seconds = self.config.checkpoint.every_seconds
        time_passed = seconds is not None and time.monotonic() - self._saved_at >= seconds
        return time_passed and self.saved_step != self.progress.step

    def save(self, sampler_state: dict, progress: Callable[[int, int], None]) -> SaveResult:
        """Write the checkpoint of this moment; `sampler_state`: after the last batch that was used."""
        settings, trainer = self.config.checkpoint, self.trainer
        probe = self.task.probe(settings.probe_sequences)
        state = self._collect_state(sampler_state)
        contents = collect_contents(self.progress.step, self.config, self.task.corpus, probe, state)
        moments = trainer.optimizer.moments()
        result = write_checkpoint(self.run_dir, contents, trainer.model, moments, settings.keep, progress)
        self.saved_step, self._saved_at = self.progress.step, time.monotonic()
        return result

    def _collect_state(self, sampler_state: dict) -> dict[str, object]:
        changes = {DOMAIN_CHANGES: self.domain_changes} if self.domain_changes else {}
        return {
            "sampler": sampler_state,
            "loss_scale": self.trainer.loss_scale.state(),
            "shared_steps": self.trainer.optimizer.shared_steps,
            "kernels": self.trainer.model.kernels,
            "skipped": self.progress.skipped,
            "tokens": self.progress.tokens,
            **changes,
            **self.controller.state(),
            **self.task.state(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set parameters, moments, loss scale and progress to those of the checkpoint."""
        tensors, state = StoredTensors(checkpoint), checkpoint.state
        restore_model(self.trainer.model, tensors, optimizer_state=True)
        self.trainer.optimizer.restore(tensors, int(state["shared_steps"]))
        self.trainer.loss_scale.restore(state["loss_scale"])
        self.progress.step = self.saved_step = checkpoint.step
        self.progress.skipped, self.progress.tokens = int(state["skipped"]), int(state["tokens"])
