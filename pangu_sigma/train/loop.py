"""Training loop: optimizer steps to the end of the run or to a signal, with evaluations and checkpoints between them.

Threads. Everything here runs in the training thread, which is the main thread where the run was started from a command
line. Beside it run: the reading thread of `Prefetcher`, which draws batches and plans them (`Trainer.plan`); the expert
store's thread, which fetches and writes experts (`rre.store`); and with standard input as the source the thread that
keeps it (`StandardInputSpool`). Signal handlers (`StopSignalListener`) only set a flag, at which the loop looks
between two steps. Checkpoints are written in the training thread.

Several processes run the same loop. Whether they stop or save is decided by all of them together, after the same step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pangu_sigma.data.prefetcher import Prefetcher
from pangu_sigma.data.stream_sampler import StreamEnded
from pangu_sigma.monitor.progress import TrainingProgress
from pangu_sigma.monitor.text_tables import evaluation_line
from pangu_sigma.signals import StopSignalListener
from pangu_sigma.train.nonfinite import NonfiniteHandler
from pangu_sigma.train.profiling import profile_steps
from pangu_sigma.train.schedule import phase_at

if TYPE_CHECKING:
    from pangu_sigma.data.mixture_sampler import MixtureSampler
    from pangu_sigma.data.packed_sequences import HeldoutSequences
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.monitor.metrics_log import MetricsLog, NoMetrics
    from pangu_sigma.train.checkpointing import RunCheckpointer
    from pangu_sigma.train.continual.controller import ContinualController
    from pangu_sigma.train.streaming_input import StreamingInput
    from pangu_sigma.train.trainer import Trainer

# How soon a signal, an idle stream or an overdue checkpoint is noticed while waiting for documents.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class HeldoutEvaluation:
    """What the loop evaluates: held-out sequences by domain, and the unigram model's losses to set beside the result,
    in nats per token by domain."""

    evaluator: Evaluator
    sequences: Mapping[str, HeldoutSequences]
    unigram: Mapping[str, float]


class TrainingLoop:
    """The loop of a prepared run; `train` goes through it once.

    `stream`: where text arrives while the run trains, None for a prepared corpus; `sampler` is then the stream's.
    """

    def __init__(
        self,
        trainer: Trainer,
        sampler: MixtureSampler,
        stream: StreamingInput | None,
        controller: ContinualController,
        checkpointer: RunCheckpointer,
        evaluation: HeldoutEvaluation,
        metrics: MetricsLog | NoMetrics,
    ) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self.stream = stream
        self.controller = controller
        self.checkpointer = checkpointer
        self.evaluation = evaluation
        self.metrics = metrics
        self.config = trainer.config
        self.processes = trainer.processes
        self.run_dir = checkpointer.run_dir
        self.progress = checkpointer.progress
        self.nonfinite = NonfiniteHandler(self.run_dir, trainer, checkpointer)

    def train(self, messages: list[str]) -> None:
        """Train to the end, to `train.stop_at` or to a signal; a checkpoint stands at the end in every case.

        `messages`: what the user should know before the first step.
        """
        total = self.config.train.steps
        with (
            self._open_reader() as self.reader,
            StopSignalListener() as self.signals,
            TrainingProgress(total, self.progress.step) as self.bar,
        ):
            for message in messages:
                self._report(message)
            if self.progress.step == 0 and self.config.evaluate.every:
                self._evaluate()
            self._run_steps(min(total, self.config.train.stop_at or total))
            if self.checkpointer.saved_step != self.progress.step:
                self._save()
            self._report_end()

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

    def _run_steps(self, end: int) -> None:
        """Train until step `end` is done, a signal comes or a stream gives nothing more."""
        evaluate_every, save_every = self.config.evaluate.every, self.config.checkpoint.every
        profile = self.config.run.profile if self.processes.first else None
        with profile_steps(profile, self.run_dir / "profile", self.progress.step) as on_step_done:
            # A signal may have come to one process alone: all stop after the same step.
            while self.progress.step < end and not self.processes.any(self.signals.stop_requested):
                self.signals.reinstall()
                if self.stream is not None and not self._wait_for_batch():
                    return
                self._run_step()
                step = self.progress.step
                on_step_done(step)
                if evaluate_every and (step % evaluate_every == 0 or step == self.config.train.steps):
                    self._evaluate()
                is_save_step = save_every and step % save_every == 0 and step != self.checkpointer.saved_step
                if is_save_step or self.processes.any(self.checkpointer.is_overdue):
                    self._save()

    def _wait_for_batch(self) -> bool:
        """Wait for the stream's next batch; False where none will be learned: interrupted, ended or unreadable."""
        while not self.reader.wait(_POLL_SECONDS):
            self.signals.reinstall()
            if self.signals.stop_requested:
                return False
            message = self.stream.take_idle_message()
            if message:
                self._report(message)
            if self.checkpointer.is_overdue:
                self._save()
        return self.reader.failure is None

    def _run_step(self) -> None:
        """One optimizer step on the next batch, and its record in the metrics; a bad step changes no parameter."""
        planned = next(self.reader)
        step = self.progress.step
        # The batch's own step decides the phase: after skipped steps the sampler is ahead of the optimizer.
        message = self.controller.start_phase(phase_at(self.config, planned[0].step), step, self.bar.job)
        if message:
            self._report(message)
        result = self.trainer.step(step, planned, self.controller.regulariser)
        if result.overflow:
            # An overflow of float16 is expected: the step is tried on the next batch with a smaller loss scale.
            self.metrics.event(step, f"float16 overflow: loss scale {self.trainer.loss_scale.value:g}")
            return
        if not result.finite:
            self._report(self.nonfinite.handle(result))
            return
        self.progress.step += 1
        self.progress.tokens += result.tokens
        metrics = self.trainer.metrics
        self.bar.update(self.progress.step, result.loss, metrics.tokens_per_second)
        if self.progress.step % self.config.run.log_every == 0 or self.progress.step == self.config.train.steps:
            self.metrics.train(
                self.progress.step,
                learning_rate=result.learning_rate,
                gradient_norm=result.gradient_norm,
                loss_scale=self.trainer.loss_scale.value if self.trainer.loss_scale.dynamic else None,
                skipped_steps=self.progress.skipped,
                store=self.trainer.take_store_metrics(),
                **metrics.take_record(),
            )

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

    def _save(self) -> None:
        started = time.monotonic()
        if self.stream is not None:
            self.stream.sync()
        with self.bar.job("save", None, unit="B") as job:
            result = self.checkpointer.save(self.reader.state(), lambda done, total: job.set(done))
        self.metrics.checkpoint(
            self.progress.step,
            path=result.path,
            bytes_written=result.bytes_written,
            bytes_linked=result.bytes_linked,
            seconds=time.monotonic() - started,
        )
        for message in result.messages:
            self.bar.say(message)
        self.controller.remove_unneeded_snapshots()

    def _report(self, message: str) -> None:
        self.bar.say(message)
        self.metrics.event(self.progress.step, message)

    def _report_end(self) -> None:
        """Say why the loop is over, if not because all is done. Raises the error that ended a stream."""
        step = self.progress.step
        failure = self.reader.failure if self.stream is not None else None
        if self.processes.any(self.signals.stop_requested):
            self.bar.say(f"{self.signals.signal_name or 'a signal'}: saved step {step}; continue with --resume")
        elif isinstance(failure, StreamEnded):
            self._report(f"the stream has ended: saved step {step}; continue with --resume")
        elif failure is not None:
            self._report(f"the stream cannot be read on: saved step {step}")
            raise failure
        elif step < self.config.train.steps:
            self.bar.say(f"stopped at step {step} as train.stop_at says; continue with --resume")
