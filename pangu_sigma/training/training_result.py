"""Result of a training run, read from its folder."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu_sigma.checkpoint import resolve
from pangu_sigma.config import ParameterCounts, parameter_counts
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.trained_model import stored_config


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """What a training run came to; stands for its folder wherever a path is asked for.

    run_dir: its folder. checkpoint: folder of its last checkpoint.
    step, steps: optimizer steps done and planned. tokens: that it learned from. losses, unigram: the last held-out
    losses by domain and a unigram model's beside them, in nats per token; empty where nothing was evaluated.
    stop_signal: the signal that came while it trained, at which it saved and stopped; None if none came.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    steps: int
    tokens: int
    losses: dict[str, float]
    unigram: dict[str, float]
    stop_signal: signal.Signals | None = None

    @classmethod
    def of(cls, run_dir: str | Path, stop_signal: signal.Signals | None = None) -> TrainingResult:
        """The result that stands in a run's folder. Raises UserError where there is no run."""
        checkpoint = resolve(run_dir)
        evaluations = [record for record in read_metrics(run_dir) if record["kind"] == "evaluate"]
        last = evaluations[-1] if evaluations else {"losses": {}, "unigram": {}}
        return cls(
            run_dir=Path(run_dir),
            checkpoint=checkpoint.path,
            step=checkpoint.step,
            steps=stored_config(checkpoint).train.steps,
            tokens=int(checkpoint.state["tokens"]),
            losses=dict(last["losses"]),
            unigram=dict(last["unigram"]),
            stop_signal=stop_signal,
        )

    def __repr__(self) -> str:
        losses = {name: round(loss, 3) for name, loss in self.losses.items()}
        return f"TrainingResult({str(self.run_dir)!r}, step={self.step} of {self.steps}, losses={losses})"

    def __fspath__(self) -> str:
        return str(self.run_dir)

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done; else `train(…, resume=True)` continues."""
        return self.step >= self.steps

    @property
    def parameter_counts(self) -> ParameterCounts:
        """Trained values of the model: in all, shared, of each domain, and active for a token of each domain."""
        return parameter_counts(stored_config(resolve(self.checkpoint)))

    def metrics(self, kind: str = "train") -> list[dict[str, Any]]:
        """The run's records of one kind in the order of their steps: "train" (loss and speed every `run.log_every`
        steps), "evaluate" (held-out losses), "checkpoint" or "event" (messages)."""
        return [record for record in read_metrics(self.run_dir) if record["kind"] == kind]
