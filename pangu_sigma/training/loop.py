"""Training loop: optimizer steps to the end of the run or to a signal, with evaluations and checkpoints between them.

Threads. Everything here runs in the training thread, which is the main thread where the run was started from a command
line. Beside it run: the reading thread of `Prefetcher`, which draws batches and plans them (`Trainer.plan`); the expert
store's thread, which fetches and writes experts (`rre.store`); and with standard input as the source the thread that
keeps it (`StandardInputSpool`). Signal handlers (`StopSignalListener`) only set a flag, at which the loop looks
between two steps. Checkpoints are written in the training thread.

Several processes run the same loop. Whether they stop or save is decided by all of them together, after the same step.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.config.config_paths import stored_path, with_stored_paths
from pangu_sigma.data.prefetcher import Prefetcher
from pangu_sigma.data.stream_sampler import StreamEnded
from pangu_sigma.errors import argument
from pangu_sigma.monitor.progress import TrainingProgress
from pangu_sigma.monitor.text_tables import evaluation_line
from pangu_sigma.runtime import COMPUTING
from pangu_sigma.signals import StopSignalListener, restore_ctrl_c, signal_name
from pangu_sigma.training.nonfinite import handle_nonfinite
from pangu_sigma.training.profiling import profile_steps
from pangu_sigma.training.schedule import scheduled_step

if TYPE_CHECKING:
    from pangu_sigma.config import Config
    from pangu_sigma.data.corpus import Corpus
    from pangu_sigma.data.mixture_sampler import MixtureSampler
    from pangu_sigma.data.packed_sequences import HeldoutSequences
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.model.model import Model
    from pangu_sigma.monitor.metrics_log import MetricsLog, NoMetrics
    from pangu_sigma.training.checkpointing import RunCheckpointer, RunProgress
    from pangu_sigma.training.continual.controller import ContinualController
    from pangu_sigma.training.streaming_input import StreamingInput
    from pangu_sigma.training.trainer import Trainer
    from parallel.comm.processes import Processes

# How soon a signal, an idle stream or an overdue checkpoint is noticed while waiting for documents.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class HeldoutEvaluation:
    """What the loop evaluates: held-out sequences by domain, and the unigram model's losses to set beside the result,
    in nats per token by domain."""

    evaluator: Evaluator
    sequences: Mapping[str, HeldoutSequences]
    unigram: Mapping[str, float]


@dataclass
class TrainingRun:
    """A prepared run over its folder, with all that its steps need.

    controller: gives each step the regulariser of its phase. stream: where text arrives while the run trains, None for
    a prepared corpus; `sampler` is then the stream's. progress: how far the run is. messages, warnings: what the user
    should know before the first step. stop_signal: the signal that came while it trained, None if none did.
    """

    config: Config
    processes: Processes
    corpus: Corpus
    model: Model
    trainer: Trainer
    controller: ContinualController
    checkpointer: RunCheckpointer
    evaluation: HeldoutEvaluation
    sampler: MixtureSampler
    stream: StreamingInput | None
    metrics: MetricsLog | NoMetrics
    progress: RunProgress
    messages: list[str]
    warnings: list[str]
    stop_signal: signal.Signals | None

    def train(self) -> RunProgress:
        """Train to the end, to `train.stop_at` or to a signal, which is then the run's `stop_signal`, and say how far
        the run is; a checkpoint stands there in every case."""
        with (
            self._open_reader() as reader,
            StopSignalListener() as signals,
            TrainingProgress(self.config.train.steps, self.progress.step) as bar,
        ):
            loop = TrainingLoop(**vars(self), reader=reader, signals=signals, bar=bar)
            progress = loop.run()
            self.stop_signal = loop.stop_signal
            return progress

    @contextmanager
    def _open_reader(self) -> Iterator[Prefetcher]:
        """Batches, planned by the trainer, which a thread reads ahead."""
        # A stream is read by a thread in any case, so that a signal ends the wait for it.
        ahead = self.config.data.prefetch if self.stream is None else max(1, self.config.data.prefetch)
        rows = None if self.processes.size == 1 else self.trainer.read_rows
        size = self.config.train.batch_size
        with Prefetcher(self.sampler, size, ahead, rows=rows, transform=self.trainer.plan) as reader:
            try:
                yield reader
            finally:
                if self.stream is not None:
                    self.stream.close()  # or the reader would be waited for


@dataclass
class TrainingLoop(TrainingRun):
    """A run under way: `reader` gives its planned batches."""

    reader: Prefetcher
    signals: StopSignalListener
    bar: TrainingProgress

    def run(self) -> RunProgress:
        """See `TrainingRun.train`."""
        for message in self.messages:
            self._report(message)
        for warning in self.warnings:
            self._report(warning, logging.WARNING)
        if self.progress.step < self.config.train.steps:
            self.bar.say("compiling the training step (seconds for a small model, minutes for a large one)")
        if self.progress.step == 0 and self.config.evaluate.every:
            self._evaluate()
        total = self.config.train.steps
        self._run_steps(min(total, self.config.train.stop_at or total))
        if self.checkpointer.saved_step != self.progress.step:
            self._save()
        self._is_stop_requested()  # one that came after the last step
        self._report_end()
        return self.progress

    def _is_stop_requested(self) -> bool:
        """Whether a signal came to any process; all of them then know the same one."""
        numbers = self.processes.gather(np.array([self.signals.signal_number or 0]))
        if numbers.any():
            self.stop_signal = signal.Signals(int(numbers.max()))
        return self.stop_signal is not None

    def _run_steps(self, end: int) -> None:
        """Train until step `end` is done, a signal comes or a stream gives nothing more."""
        evaluate_every, save_every = self.config.evaluate.every, self.config.checkpoint.every
        profile = self.config.run.profile if self.processes.first else None
        with profile_steps(profile, Path(self.config.run.dir) / "profile", self.progress.step) as on_step_done:
            # A signal may have come to one process alone: all stop after the same step.
            while self.progress.step < end and not self._is_stop_requested():
                restore_ctrl_c()
                if self.stream is not None and not self._wait_for_batch():
                    return
                self._run_step()
                step = self.progress.step
                on_step_done(step)
                if evaluate_every and (step % evaluate_every == 0 or step == self.config.train.steps):
                    self._evaluate()
                is_save_step = save_every and step % save_every == 0 and step != self.checkpointer.saved_step
                if is_save_step or self.processes.any(self.checkpointer.is_overdue(step)):
                    self._save()

    def _wait_for_batch(self) -> bool:
        """Wait for the stream's next batch; False where none will be learned: interrupted, ended or unreadable."""
        while not self.reader.wait(_POLL_SECONDS):
            restore_ctrl_c()
            if self.signals.stop_requested:
                return False
            message = self.stream.take_idle_message()
            if message:
                self._report(message)
            if self.checkpointer.is_overdue(self.progress.step):
                self._save()
        return self.reader.failure is None

    @COMPUTING
    def _run_step(self) -> None:
        """One optimizer step on the next batch, and its record in the metrics; a bad step changes no parameter."""
        planned = next(self.reader)
        step = scheduled_step(self.config, self.progress.step, planned[0].step)
        message = self.controller.start_phase(step.phase, step.index, self.bar.job)
        if message:
            self._report(message)
        result = self.trainer.step(step, planned, self.controller.regulariser)
        if result.overflow:
            # An overflow of float16 is expected: the step is tried on the next batch with a smaller loss scale.
            self.metrics.event(step.index, f"float16 overflow: loss scale {result.loss_scale:g}")
            return
        if not result.finite:
            settings, roll_back = self.config.train, self.checkpointer.restore_latest
            self.progress, message = handle_nonfinite(settings, result, self.progress, roll_back)
            self._report(message, logging.WARNING)
            return
        done = step.index + 1
        self.progress = replace(self.progress, step=done, tokens=self.progress.tokens + result.tokens)
        self.bar.update(done, result.loss, self.trainer.metrics.tokens_per_second)
        if done % self.config.run.log_every == 0 or done == self.config.train.steps:
            self.metrics.train(
                done,
                learning_rate=step.learning_rate,
                gradient_norm=result.gradient_norm,
                loss_scale=result.loss_scale,
                skipped_steps=self.progress.skipped,
                **self.trainer.take_record(),
            )

    @COMPUTING
    def _evaluate(self) -> None:
        evaluator, sequences = self.evaluation.evaluator, self.evaluation.sequences
        unigram, limit = self.evaluation.unigram, self.config.evaluate.batches
        total = sum(evaluator.batches(of_domain, limit) for of_domain in sequences.values())
        with self.bar.job("evaluate", total) as job:
            losses, tokens = evaluator.losses(sequences, limit, job.advance)
        self.metrics.evaluate(
            self.progress.step, losses=losses, unigram=unigram, tokens=tokens, figures=evaluator.figures
        )
        self.bar.say(evaluation_line(self.progress.step, losses, unigram))

    @COMPUTING
    def _save(self) -> None:
        started = time.monotonic()
        if self.stream is not None:
            self.stream.sync()
        with self.bar.job("save", None, unit="B") as job:
            result = self.checkpointer.save(
                self.progress, self.reader.state(), lambda done, total: job.set(done), self._is_over()
            )
        self.metrics.checkpoint(
            self.progress.step,
            path=stored_path(str(result.path), self.config.run.dir),
            bytes_written=result.bytes_written,
            bytes_linked=result.bytes_linked,
            seconds=time.monotonic() - started,
        )
        for message in result.messages:
            self.bar.say(message)
        self.controller.remove_unneeded_snapshots()

    def _is_over(self) -> bool:
        """Whether no step follows that this process knows of."""
        total = self.config.train.steps
        at_end = self.progress.step >= min(total, self.config.train.stop_at or total)
        return at_end or self.signals.stop_requested or self.reader.failure is not None

    def _report(self, message: str, level: int = logging.INFO) -> None:
        self.bar.say(message, level)
        self.metrics.event(self.progress.step, with_stored_paths(message, self.config.run.dir))

    def _report_end(self) -> None:
        """Say why the loop is over, if not because all is done. Raises the error that ended a stream."""
        step, go_on = self.progress.step, f"continue with {argument('resume', True)}"
        failure = self.reader.failure if self.stream is not None else None
        if self.stop_signal is not None and step < self.config.train.steps:
            self.bar.say(f"{signal_name(self.stop_signal)}: saved step {step}; {go_on}")
        elif isinstance(failure, StreamEnded):
            self._report(f"the stream has ended: saved step {step}; {go_on}")
        elif failure is not None:
            self._report(f"the stream cannot be read on: saved step {step}", logging.WARNING)
            raise failure
        elif step < self.config.train.steps:
            self.bar.say(f"stopped at step {step} as train.stop_at says; {go_on}")
