"""The loop of a run: steps to its end or to a signal, with evaluations and checkpoints between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import find_latest
from pangu_sigma.data.prefetcher import Prefetcher
from pangu_sigma.data.stream_sampler import StreamEnded
from pangu_sigma.monitor.progress import TrainingProgress
from pangu_sigma.monitor.text_tables import evaluation_line
from pangu_sigma.train.interrupt import Interruption
from pangu_sigma.train.nonfinite import no_way_back, tolerated
from pangu_sigma.train.profiling import profiled_steps
from pangu_sigma.train.schedule import phase_at

if TYPE_CHECKING:
    from pangu_sigma.train.job import Run
    from pangu_sigma.train.trainer import StepResult

# How soon a signal, an idle stream or an overdue checkpoint is noticed while waiting for documents.
_POLL_SECONDS = 0.2


class Loop:
    """The loop of a prepared run; `train` goes through it once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config
        self.processes = run.processes
        self.trainer = run.trainer
        self.stream = run.stream
        self.saving = run.saving
        self.progress = run.progress
        self.metrics = run.metrics

    def train(self) -> None:
        """Train to the end, to `train.stop_at` or to a signal; a checkpoint stands at the end in every case."""
        total = self.config.train.steps
        with (
            self._reading() as self.reader,
            Interruption() as interruption,
            TrainingProgress(total, self.progress.step) as self.bar,
        ):
            for message in self.run.messages:
                self._say(message)
            if self.progress.step == 0 and self.config.evaluate.every:
                self._evaluate()
            self._go(min(total, self.config.train.stop_at or total), interruption)
            if self.saving.saved != self.progress.step:
                self._save()
            self._end(interruption)

    @contextmanager
    def _reading(self) -> Iterator[Prefetcher]:
        """Batches, planned by the trainer, which a thread reads ahead."""
        # A stream is read by a thread in any case, so that a signal ends the wait for it.
        ahead = self.config.data.prefetch if self.stream is None else max(1, self.config.data.prefetch)
        rows = None if self.processes.size == 1 else self.trainer.reads
        sampler, size = self.run.sampler, self.config.train.batch_size
        with Prefetcher(sampler, size, ahead, rows=rows, transform=self.trainer.plan) as reader:
            try:
                yield reader
            finally:
                if self.stream is not None:
                    self.stream.close()  # or the reader would be waited for

    def _go(self, end: int, interruption: Interruption) -> None:
        """Train until step `end` is done, a signal comes or a stream gives nothing more."""
        evaluate, save = self.config.evaluate.every, self.config.checkpoint.every
        profile = self.config.run.profile if self.processes.first else None
        with profiled_steps(profile, self.run.dir / "profile", self.progress.step) as stepped:
            # A signal may have come to one process alone: all stop after the same step.
            while self.progress.step < end and not self.processes.any(interruption.asked):
                interruption.renew()
                if self.stream is not None and not self._arrived(interruption):
                    return
                self._step()
                done = self.progress.step
                stepped(done)
                if evaluate and (done % evaluate == 0 or done == self.config.train.steps):
                    self._evaluate()
                wanted = save and done % save == 0 and done != self.saving.saved
                if wanted or self.processes.any(self.saving.overdue):
                    self._save()

    def _end(self, interruption: Interruption) -> None:
        """Say why the loop is over, if not because all is done. Raises the error that ended a stream."""
        step = self.progress.step
        failure = self.reader.failure if self.stream is not None else None
        if self.processes.any(interruption.asked):
            self.bar.say(f"{interruption.name or 'a signal'}: saved step {step}; continue with --resume")
        elif isinstance(failure, StreamEnded):
            self._say(f"the stream has ended: saved step {step}; continue with --resume")
        elif failure is not None:
            self._say(f"the stream cannot be read on: saved step {step}")
            raise failure
        elif step < self.config.train.steps:
            self.bar.say(f"stopped at step {step} as train.stop_at says; continue with --resume")

    def _arrived(self, interruption: Interruption) -> bool:
        """Wait for the stream's next batch; False where none will be learned: interrupted, ended or unreadable."""
        while not self.reader.wait(_POLL_SECONDS):
            interruption.renew()
            if interruption.asked:
                return False
            said = self.stream.idle_message()
            if said:
                self._say(said)
            if self.saving.overdue:
                self._save()
        return self.reader.failure is None

    def _say(self, message: str) -> None:
        self.bar.say(message)
        self.metrics.event(self.progress.step, message)

    def _step(self) -> None:
        planned = next(self.reader)
        step = self.progress.step
        said = self.run.holding.enter(phase_at(self.config, planned[0].step), step, self.bar.job)
        if said:
            self._say(said)
        result = self.trainer.step(step, planned)
        if not result.finite:
            self._nonfinite(result)
            return
        self.progress.step += 1
        self.progress.tokens += result.tokens
        accounting = self.trainer.accounting
        self.bar.update(self.progress.step, result.loss, accounting.tokens_per_second)
        if self.progress.step % self.config.run.log_every == 0 or self.progress.step == self.config.train.steps:
            self.metrics.train(
                self.progress.step,
                learning_rate=result.learning_rate,
                gradient_norm=result.gradient_norm,
                loss_scale=self.trainer.loss_scale.value if self.trainer.loss_scale.dynamic else None,
                skipped_steps=self.progress.skipped,
                store=self.trainer.store_figures(),
                **accounting.take(),
            )

    def _nonfinite(self, result: StepResult) -> None:
        """Act on a loss or gradient that is not finite; nothing has been updated."""
        step = self.progress.step
        if result.overflow:
            # An overflow of float16 is expected: the step is tried on the next batch with a smaller loss scale.
            self.metrics.event(step, f"float16 overflow: loss scale {self.trainer.loss_scale.value:g}")
            return
        self.progress.skipped += 1
        skipped = self.progress.skipped
        said = tolerated(result.loss, result.gradient_norm, step, skipped, self.config.train)
        if self.config.train.nonfinite == "rollback":
            said += f"; rolled back to step {self._roll_back(said)}"
        else:
            said += "; batch skipped"
        self._say(f"{said} ({skipped} so far)")

    def _roll_back(self, said: str) -> int:
        """Return to the last checkpoint's parameters and go on with the next batches, past the bad one (PaLM, arXiv
        2204.02311, section 5.1: the same state with other data does not fail again); the checkpoint's step."""
        skipped = self.progress.skipped
        checkpoint, _ = find_latest(self.run.dir)
        if checkpoint is None:
            raise no_way_back(said)
        self.saving.restore(checkpoint)
        self.progress.skipped = skipped
        self.trainer.accounting.take()
        return checkpoint.step

    def _evaluate(self) -> None:
        evaluator, heldout, limit = self.run.evaluator, self.run.heldout, self.config.evaluate.batches
        total = sum(evaluator.batches(sequences, limit) for sequences in heldout.values())
        with self.bar.job("evaluate", total) as job:
            losses, tokens = evaluator.losses(heldout, limit, job.advance)
        unigram = self.run.unigram
        self.metrics.evaluate(
            self.progress.step, losses=losses, unigram=unigram, tokens=tokens, figures=evaluator.figures
        )
        self.bar.say(evaluation_line(self.progress.step, losses, unigram))

    def _save(self) -> None:
        started = time.monotonic()
        if self.stream is not None:
            self.stream.secure()
        with self.bar.job("save", None, unit="B") as job:
            result = self.saving.save(self.reader.state(), lambda done, total: job.set(done))
        self.metrics.checkpoint(
            self.progress.step,
            path=result.path,
            bytes_written=result.bytes_written,
            bytes_linked=result.bytes_linked,
            seconds=time.monotonic() - started,
        )
        for message in result.messages:
            self.bar.say(message)
        self.run.holding.clean()
