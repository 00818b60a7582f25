"""A run's checkpoints: what one holds of this moment, and how the run returns to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.checkpoint import (
    Checkpoint,
    CheckpointContents,
    Fingerprints,
    SaveResult,
    StoredTensors,
    save_checkpoint,
)
from pangu_sigma.checkpoint.distributed import save_distributed
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES
from pangu_sigma.config import Config
from pangu_sigma.data.corpus import Corpus
from pangu_sigma.data.tokenizers.tokenizer_registry import tokenizer_files
from pangu_sigma.model.model import Model
from pangu_sigma.model.state_dict import model_tensors, restore_model, tensor_parts

if TYPE_CHECKING:
    from pangu_sigma.train.continual.controller import Holding
    from pangu_sigma.train.optimizer import Optimizer
    from pangu_sigma.train.task import Recipe
    from pangu_sigma.train.trainer import Trainer


def run_contents(
    step: int, config: Config, corpus: Corpus, probe: Mapping[str, np.ndarray], state: Mapping[str, object]
) -> CheckpointContents:
    """What a checkpoint of a run holds beside tensors."""
    return CheckpointContents(
        step=step,
        domains=config.domain_names,
        coverage=config.coverage,
        config_text=config.to_yaml(),
        tokenizer_files=tokenizer_files(corpus.tokenizer),
        probe=probe,
        state=state,
        fingerprints=Fingerprints(tokenizer=corpus.tokenizer.fingerprint, corpora=corpus.fingerprints),
    )


def write_checkpoint(
    folder: Path,
    contents: CheckpointContents,
    model: Model,
    optimizer: Optimizer | None,
    keep: int,
    progress: Callable[[int, int], None] | None = None,
) -> SaveResult:
    """Save the model, and the moments if an optimizer is given; its processes do it together. See `save_checkpoint`."""
    if model.processes.size == 1:
        tensors = model_tensors(model, optimizer)
        return save_checkpoint(folder, contents, tensors, keep=keep, progress=progress)
    parts = tensor_parts(model, optimizer)
    return save_distributed(model.processes, folder, contents, parts, keep=keep, progress=progress)


@dataclass
class Progress:
    """Where a run stands; kept in every checkpoint."""

    step: int = 0
    skipped: int = 0
    tokens: int = 0


class Saving:
    """Saves and restores the run in `run_dir`; `saved`: step of its last checkpoint, -1 before the first.

    `domain_changes`: what `pangu-sigma domains` did to the run, which every later checkpoint goes on to tell.
    """

    def __init__(
        self, run_dir: Path, trainer: Trainer, recipe: Recipe, holding: Holding, domain_changes: list[dict]
    ) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.recipe = recipe
        self.holding = holding
        self.domain_changes = domain_changes
        self.config = trainer.config
        self.progress = Progress()
        self.saved = -1
        self._saved_at = time.monotonic()

    @property
    def overdue(self) -> bool:
        """Whether checkpoint.every_seconds have passed since the last checkpoint, and something was learned."""
        seconds = self.config.checkpoint.every_seconds
        late = seconds is not None and time.monotonic() - self._saved_at >= seconds
        return late and self.saved != self.progress.step

    def save(self, sampler_state: dict, progress: Callable[[int, int], None]) -> SaveResult:
        """Write the checkpoint of this moment; `sampler_state`: after the last batch that was used."""
        wanted, trainer = self.config.checkpoint, self.trainer
        probe = self.recipe.probe(wanted.probe_sequences)
        state = self._state(sampler_state)
        contents = run_contents(self.progress.step, self.config, self.recipe.corpus, probe, state)
        result = write_checkpoint(self.run_dir, contents, trainer.model, trainer.optimizer, wanted.keep, progress)
        self.saved, self._saved_at = self.progress.step, time.monotonic()
        return result

    def _state(self, sampler_state: dict) -> dict[str, object]:
        changes = {DOMAIN_CHANGES: self.domain_changes} if self.domain_changes else {}
        return {
            "sampler": sampler_state,
            "loss_scale": self.trainer.loss_scale.state(),
            "shared_steps": self.trainer.optimizer.shared_steps,
            "kernels": self.trainer.model.kernels,
            "skipped": self.progress.skipped,
            "tokens": self.progress.tokens,
            **changes,
            **self.holding.state(),
            **self.recipe.state(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put parameters, moments, loss scale and progress where the checkpoint has them."""
        tensors, state = StoredTensors(checkpoint), checkpoint.state
        restore_model(self.trainer.model, tensors, optimizer_state=True)
        self.trainer.optimizer.restore(tensors, int(state["shared_steps"]))
        self.trainer.loss_scale.restore(state["loss_scale"])
        self.progress.step = self.saved = checkpoint.step
        self.progress.skipped, self.progress.tokens = int(state["skipped"]), int(state["tokens"])
