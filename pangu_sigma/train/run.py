"""The training job from configuration to finished run folder: data, model, loop, checkpoints, metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.checkpoint import (
    Checkpoint,
    Contents,
    Fingerprints,
    StoredTensors,
    find_latest,
    remove_stale,
    save_checkpoint,
)
from pangu_sigma.checkpoint.together import save_together
from pangu_sigma.config import (
    Config,
    parameter_counts,
    with_vocabulary,
)
from pangu_sigma.config.data import STANDARD_INPUT
from pangu_sigma.config.mesh_rules import check_one_process
from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.data.growing import check_source
from pangu_sigma.data.packing import first_sequences
from pangu_sigma.data.prefetch import Prefetcher
from pangu_sigma.data.sampler import MixtureSampler
from pangu_sigma.data.stream import StreamEnded, StreamSampler
from pangu_sigma.data.tokenizer import tokenizer_files
from pangu_sigma.domains.plan import DOMAIN_CHANGES
from pangu_sigma.errors import UserError
from pangu_sigma.load import stored_tokenizer, stored_weights, weights_as_needed
from pangu_sigma.monitor.files import write_json, write_text
from pangu_sigma.monitor.metrics import MetricsLog, NoMetrics
from pangu_sigma.monitor.tables import evaluation_line
from pangu_sigma.monitor.terminal import TrainingProgress, progress
from pangu_sigma.signals import sigterm_as_ctrl_c
from pangu_sigma.train.beginning import begun, resumed
from pangu_sigma.train.differences import differences, placement
from pangu_sigma.train.interrupt import Interruption
from pangu_sigma.train.lock import locked_folder
from pangu_sigma.train.nonfinite import no_way_back, tolerated
from pangu_sigma.train.schedule import phase_at
from pangu_sigma.train.streaming import Stream
from pangu_sigma.workers import processes_of
from parallel.processes import Processes

if TYPE_CHECKING:
    from pangu_sigma.train.objective import Objective

# How soon a signal, an idle stream or an overdue checkpoint is noticed while waiting for documents.
_POLL_SECONDS = 0.2


@dataclass
class Progress:
    """Where a run stands; kept in every checkpoint."""

    step: int = 0
    skipped: int = 0
    tokens: int = 0


def train(config: Config, resume: bool = False) -> Path:
    """Train as `config` says and return the run's folder; see `Run` for the parts.

    Raises UserError for the user's mistakes and for training that cannot go on.
    """
    if config.run.device != "CPU":
        check_one_process(
            config,
            "Ascend meshes do not start yet: check its graph with `pangu-sigma plan --compile`, train on "
            "CPU with --workers, or set parallel={}",
        )
    if config.adapt is not None:
        raise UserError(
            f"adapt fine-tunes a trained model: run it with pangu-sigma {config.adapt.objective} MODEL FILE.yaml"
        )
    if config.data.stream is not None and find_latest(config.run.dir)[0] is None:
        # Before anything is made on disk.
        with sigterm_as_ctrl_c():
            check_source(config.data.stream.path, STANDARD_INPUT, lambda said: print(said, file=sys.stderr))
    with sigterm_as_ctrl_c(), Run(config, resume, processes_of(config, Path(config.run.dir))) as run:
        run.loop()
        run.processes.leave()
    return Path(config.run.dir)


class Run:
    """One training run over its folder; a context that holds the folder's lock, the reader and the metrics.

    Several `processes` do it together, each in a `Run` of its own: rank 0 has the lock and the metrics.
    """

    def __init__(self, config: Config, resume: bool, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.dir = Path(config.run.dir)
        self.resume = resume
        self.config = config
        self.progress = Progress()
        self.start: Checkpoint | None = None
        self.domain_changes: list[dict] = []
        self.stream: Stream | None = None
        self._open = ExitStack()

    def __enter__(self) -> Run:
        try:
            self._prepare()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    # --- preparation

    def _prepare(self) -> None:
        first = self.processes.first
        if not first:
            # Rank 0 comes to the meeting when the text is tokenised: it is there, and so is the last checkpoint.
            self._meet()
        else:
            self._open.enter_context(locked_folder(self.dir))
        messages = remove_stale(self.dir) if first else []
        checkpoint, found = find_latest(self.dir)
        messages += found
        if checkpoint is not None and not self.resume:
            raise UserError(f"{self.dir} already holds a run at step {checkpoint.step}: add --resume or set run.dir")
        beginning = begun(self.config) if checkpoint is None else resumed(self.dir, self.config, checkpoint)
        self.config, self.start = beginning.config, beginning.start
        messages += beginning.messages
        self.corpus = self._corpus(beginning.tokenizer_of)
        messages += self.corpus.messages()
        if checkpoint is not None:
            checkpoint.check_fingerprints(
                tokenizer=self.corpus.tokenizer.fingerprint, corpora=self.corpus.fingerprints
            )
        self.config = with_vocabulary(self.config, self.corpus.tokenizer.vocab_size)
        if first:
            # Only now: whatever is wrong with the user's files shows before the framework is loaded.
            self._meet()
        self._build(checkpoint)
        messages += differences(self.model, checkpoint)
        messages += placement(self.config, self.model.groups.sizes, self.progress.step)
        self.saved = checkpoint.step if checkpoint else -1
        resume_step = None if not self.resume else (checkpoint.step if checkpoint else -1)
        self.metrics = NoMetrics()
        if first:
            self.metrics = self._open.enter_context(MetricsLog(self.dir, self.config.run.tensorboard, resume_step))
        if self.resume:
            messages.append(
                f"resumed from {checkpoint.path.name} (step {checkpoint.step})"
                if checkpoint
                else "no complete checkpoint to resume from: beginning at step 0"
            )
        self.messages = messages + (self.stream.messages if self.stream else [])
        if not first:
            return
        write_text(self.dir / "config.yaml", self.config.to_yaml())
        counts = parameter_counts(self.config, self.model.vocab)
        write_json(self.dir / "summary.json", {"parameters": counts.to_dict(), "vocabulary": self.model.vocab})

    def _meet(self) -> None:
        """Load the framework and meet the other processes."""
        runtime.prepare(self.config.run.device, self.dir / "mindspore")
        self.processes.connect()

    def _corpus(self, tokenizer_of: Checkpoint | None) -> Corpus:
        """The domains' text; with the tokenizer that a checkpoint holds, or else the configured one."""
        tokenizer = stored_tokenizer(tokenizer_of) if tokenizer_of is not None else None
        with ExitStack() as jobs:
            running: dict[tuple[str, str], object] = {}

            def advance(domain: str, stage: str, done: int, total: int) -> None:
                key = (domain, stage)
                if key not in running:
                    jobs.close()
                    running.clear()
                    running[key] = jobs.enter_context(progress(f"{stage} {domain}", total or None, unit="documents"))
                running[key].set(done)

            return prepare_corpus(self.config, tokenizer, progress=advance)

    def _build(self, checkpoint: Checkpoint | None) -> None:
        from pangu_sigma.model.build import build_model
        from pangu_sigma.train.holding import Holding
        from pangu_sigma.train.previous import Record
        from pangu_sigma.train.state import restore_model, stored_tables
        from pangu_sigma.train.trainer import Trainer

        tokenizer = self.corpus.tokenizer
        tensors: Mapping[str, np.ndarray] = {}
        if checkpoint:
            tensors = StoredTensors(checkpoint)
        elif self.start:
            tensors = stored_weights(self.start) if self.processes.size == 1 else weights_as_needed(self.start)
        self.model = build_model(
            self.config,
            self.config.model.vocab_size,
            tokenizer.eod_id,
            tables=stored_tables(tensors) or None,
            token_counts=self._token_counts(),
            initialise=not tensors,
            processes=self.processes,
        )
        if self.start:
            restore_model(self.model, tensors)
        self._open.callback(self.model.store.close)
        self.trainer = Trainer(self.model, self._objective())
        self.heldout = self.corpus.heldout()
        self.unigram = self.corpus.unigram_losses()
        self.evaluator = self._evaluator()
        self.sampler = self._sampler(resumed=checkpoint is not None or self.resume)
        if checkpoint:
            self._restore(checkpoint, tensors)
            self.domain_changes = checkpoint.state.get(DOMAIN_CHANGES, [])
            self.sampler.restore(checkpoint.state["sampler"], allow_new_domains=bool(self.domain_changes))
        record = Record.of(checkpoint.state) if checkpoint else None
        files = partial(tokenizer_files, tokenizer)
        self.holding = Holding(self.dir, self.trainer, self.corpus, files, record)

    # --- what another kind of run does in its own way

    def _token_counts(self) -> dict[str, np.ndarray]:
        """How often every vocabulary id occurs, by domain: routing tables of a new model may be drawn by it."""
        return self.corpus.token_counts(self.config.model.vocab_size)

    def _objective(self) -> Objective:
        """What the steps minimise."""
        from pangu_sigma.train.objective import Objective

        return Objective()

    def _evaluator(self):
        """What measures held-out text while training."""
        from pangu_sigma.evaluate import Evaluator

        return Evaluator(self.model, self.config.evaluate.batch_size)

    def _sampler(self, resumed: bool) -> MixtureSampler | StreamSampler:
        """What the steps' batches are drawn from; `resumed`: whether the run may have begun before."""
        if self.config.data.stream is not None:
            self.stream = Stream(self.config, self.corpus.tokenizer, resumed)
            self._open.callback(self.stream.sampler.close)
            return self.stream.sampler
        return MixtureSampler(
            self.corpus.training_streams(),
            lambda step: phase_at(self.config, step).weights,
            self.config.run.seed,
            self.config.data.domains_per_step,
            self.config.parallel.mesh.domains_of_groups(self.model.groups.sizes) if self._placed else (),
            self.config.train.accumulation,
        )

    def _own_state(self) -> dict[str, object]:
        """What a checkpoint's state keeps beside what every run has."""
        changes = {DOMAIN_CHANGES: self.domain_changes} if self.domain_changes else {}
        return {**changes, **self.holding.state()}

    # --- restoring

    def _restore(self, checkpoint: Checkpoint, tensors: Mapping[str, np.ndarray]) -> None:
        from pangu_sigma.train.state import restore_model

        state = checkpoint.state
        restore_model(self.model, tensors, optimizer_state=True)
        self.trainer.optimizer.restore(tensors, int(state["shared_steps"]))
        self.trainer.loss_scale.restore(state["loss_scale"])
        self.progress = Progress(checkpoint.step, int(state["skipped"]), int(state["tokens"]))

    @property
    def _placed(self) -> bool:
        """Whether placement groups read their own domains' text."""
        return self.config.parallel.placement_groups > 1

    # --- the loop

    @property
    def rows(self) -> np.ndarray | None:
        """The rows of a step's batch that this process reads; None for all."""
        return None if self.processes.size == 1 else self.trainer.reads

    def loop(self) -> None:
        """Train to the end, to `train.stop_at` or to a signal; a checkpoint stands at the end in every case."""
        train = self.config.train
        end = min(train.steps, train.stop_at or train.steps)
        # A stream is read by a thread, so that a signal ends the wait for it.
        ahead = self.config.data.prefetch if self.stream is None else max(1, self.config.data.prefetch)
        reader = Prefetcher(self.sampler, train.batch_size, ahead, rows=self.rows, transform=self.trainer.plan)
        self.reader = self._open.enter_context(reader)
        if self.stream is not None:
            self._open.callback(self.stream.close)  # before the reader is waited for
        self._saved_at = time.monotonic()
        with Interruption() as interruption, TrainingProgress(train.steps, self.progress.step) as bar:
            self.bar = bar
            for message in self.messages:
                self._say(message)
            if self.progress.step == 0 and self.config.evaluate.every:
                self._evaluate()
            with self._profiler() as profile:
                # A signal may have come to one process alone: all stop after the same step.
                while self.progress.step < end and not self.processes.any(interruption.asked):
                    interruption.renew()
                    if self.stream is not None and not self._arrived(interruption):
                        break
                    self._step()
                    profile(self.progress.step)
                    done = self.progress.step
                    if self.config.evaluate.every and (done % self.config.evaluate.every == 0 or done == train.steps):
                        self._evaluate()
                    every = self.config.checkpoint.every
                    if (every and done % every == 0 and done != self.saved) or self.processes.any(self._overdue()):
                        self._save()
            if self.saved != self.progress.step:
                self._save()
            failure = self.reader.failure if self.stream is not None else None
            asked = self.processes.any(interruption.asked)
            if asked:
                bar.say(f"{interruption.name or 'a signal'}: saved step {self.progress.step}; continue with --resume")
            elif isinstance(failure, StreamEnded):
                self._say(f"the stream has ended: saved step {self.progress.step}; continue with --resume")
            elif failure is not None:
                self._say(f"the stream cannot be read on: saved step {self.progress.step}")
            elif self.progress.step < train.steps:
                bar.say(f"stopped at step {self.progress.step} as train.stop_at says; continue with --resume")
        if failure is not None and not asked and not isinstance(failure, StreamEnded):
            raise failure

    def _arrived(self, interruption: Interruption) -> bool:
        """Wait for the stream's next batch; False where none will be learned: interrupted, ended or unreadable."""
        while not self.reader.wait(_POLL_SECONDS):
            interruption.renew()
            if interruption.asked:
                return False
            said = self.stream.idle_message()
            if said:
                self._say(said)
            if self._overdue():
                self._save()
        return self.reader.failure is None

    def _overdue(self) -> bool:
        """Whether checkpoint.every_seconds have passed since the last checkpoint, and something was learned."""
        seconds = self.config.checkpoint.every_seconds
        late = seconds is not None and time.monotonic() - self._saved_at >= seconds
        return late and self.saved != self.progress.step

    def _say(self, message: str) -> None:
        self.bar.say(message)
        self.metrics.event(self.progress.step, message)

    def _step(self) -> None:
        planned = next(self.reader)
        step = self.progress.step
        said = self.holding.enter(phase_at(self.config, planned[0].step), step, self.bar.job)
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

    def _nonfinite(self, result) -> None:
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
        checkpoint, _ = find_latest(self.dir)
        if checkpoint is None:
            raise no_way_back(said)
        self._restore(checkpoint, StoredTensors(checkpoint))
        self.progress.skipped = skipped
        self.trainer.accounting.take()
        return checkpoint.step

    def _evaluate(self) -> None:
        limit = self.config.evaluate.batches
        total = sum(self.evaluator.batches(h, limit) for h in self.heldout.values())
        with self.bar.job("evaluate", total) as job:
            losses, tokens = self.evaluator.losses(self.heldout, limit, job.advance)
        self.metrics.evaluate(
            self.progress.step,
            losses=losses,
            unigram=self.unigram,
            tokens=tokens,
            figures=self.evaluator.figures,
        )
        self.bar.say(evaluation_line(self.progress.step, losses, self.unigram))

    def _save(self) -> None:
        from pangu_sigma.train.state import model_tensors, tensor_parts

        started = time.monotonic()
        wanted = self.config.checkpoint
        if self.stream is not None:
            self.stream.secure()
        with self.bar.job("save", None, unit="B") as job:
            common = {"keep": wanted.keep, "progress": lambda done, total: job.set(done)}
            if self.processes.size == 1:
                tensors = model_tensors(self.model, self.trainer.optimizer)
                result = save_checkpoint(self.dir, self._contents(), tensors, **common)
            else:
                parts = tensor_parts(self.model, self.trainer.optimizer)
                result = save_together(self.processes, self.dir, self._contents(), parts, **common)
        self.metrics.checkpoint(
            self.progress.step,
            path=result.path,
            bytes_written=result.bytes_written,
            bytes_linked=result.bytes_linked,
            seconds=time.monotonic() - started,
        )
        for message in result.messages:
            self.bar.say(message)
        self.holding.clean()
        self.saved, self._saved_at = self.progress.step, time.monotonic()

    def _contents(self) -> Contents:
        """What a checkpoint holds of this moment beside tensors."""
        tokenizer = self.corpus.tokenizer
        return Contents(
            step=self.progress.step,
            domains=self.config.domain_names,
            coverage=self.config.coverage,
            config_text=self.config.to_yaml(),
            tokenizer_files=tokenizer_files(tokenizer),
            probe=self._probe(self.config.checkpoint.probe_sequences),
            state={
                "sampler": self.reader.state(),
                "loss_scale": self.trainer.loss_scale.state(),
                "shared_steps": self.trainer.optimizer.shared_steps,
                "kernels": self.model.kernels,
                "skipped": self.progress.skipped,
                "tokens": self.progress.tokens,
                **self._own_state(),
            },
            fingerprints=Fingerprints(tokenizer=tokenizer.fingerprint, corpora=self.corpus.fingerprints),
        )

    def _probe(self, count: int) -> dict[str, np.ndarray]:
        """Held-out sequences of every domain, int32 [n, S + 1]: with them a model can be verified alone."""
        return first_sequences(self.heldout, count)

    def _profiler(self):
        from pangu_sigma.train.profiling import profiled_steps

        wanted = self.config.run.profile if self.processes.first else None
        return profiled_steps(wanted, self.dir / "profile", self.progress.step)
