"""Training job: from a configuration to a finished run folder.

`TrainingRun` makes the parts of a run in the order in which they can fail cheaply: the user's files and configuration
first, then the framework and the other processes, then the model and what computes. `TrainingLoop` does the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.checkpoint import Checkpoint, StoredTensors, find_latest, remove_stale
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES
from pangu_sigma.config import Config, parameter_counts, with_vocabulary
from pangu_sigma.config.data_section import STANDARD_INPUT
from pangu_sigma.data.growing_file import check_source
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import MetricsLog, NoMetrics
from pangu_sigma.monitor.result_files import write_json, write_text
from pangu_sigma.signals import sigterm_as_ctrl_c
from pangu_sigma.train.loop import HeldoutEvaluation, TrainingLoop
from pangu_sigma.train.startup.starting_point import StartingPoint, find_run_checkpoint, resume_from, start_fresh
from pangu_sigma.train.startup.warnings import describe_differences, describe_placement
from pangu_sigma.train.streaming_input import StreamingInput
from pangu_sigma.train.task import TextTask, TrainingTask
from pangu_sigma.trained_model import stored_weights, weights_as_needed
from pangu_sigma.workers import processes_of
from parallel.comm.processes import Processes


def train(config: Config, resume: bool = False) -> Path:
    """Train as `config` says and return the run's folder; see `TrainingRun` for the parts.

    Raises UserError for the user's mistakes and for training that cannot go on.
    """
    if config.adapt is not None:
        raise UserError(
            f"adapt fine-tunes a trained model: run it with pangu-sigma {config.adapt.objective} MODEL FILE.yaml"
        )
    if config.data.stream is not None and find_latest(config.run.dir)[0] is None:
        # Before anything is made on disk.
        with sigterm_as_ctrl_c():
            check_source(config.data.stream.path, STANDARD_INPUT, lambda message: print(message, file=sys.stderr))
    with sigterm_as_ctrl_c(), TrainingRun(config, resume, processes_of(config, Path(config.run.dir))) as run:
        run.train()
        run.processes.leave()
    return Path(config.run.dir)


class TrainingRun:
    """A run over its folder: a context that makes its parts and holds the folder's lock and metrics; `train` trains.

    make_task: makes the kind of training (text, SFT, DPO) of where the run starts from.

    Several `processes` do it together, each in a `TrainingRun` of its own: rank 0 has the lock and the metrics.
    """

    def __init__(
        self,
        config: Config,
        resume: bool,
        processes: Processes | None = None,
        make_task: Callable[[StartingPoint], TrainingTask] = TextTask,
    ) -> None:
        self.processes = processes or Processes()
        self.dir = Path(config.run.dir)
        self.resume = resume
        self.config = config
        self._make_task = make_task
        self._open = ExitStack()

    def __enter__(self) -> TrainingRun:
        try:
            self._prepare()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def train(self) -> None:
        """Train to the end, to `train.stop_at` or to a signal; a checkpoint stands at the end in every case."""
        TrainingLoop(
            self.trainer,
            self.sampler,
            self.stream,
            self.controller,
            self.checkpointer,
            HeldoutEvaluation(self.evaluator, self.heldout, self.unigram),
            self.metrics,
        ).train(self.messages)

    def _prepare(self) -> None:
        is_first = self.processes.first
        # 1. The folder, under its lock, and its last checkpoint.
        if not is_first:
            # Rank 0 comes to the meeting when the text is tokenised: it is there, and so is the last checkpoint.
            self._connect()
        else:
            self._open.enter_context(lock_run_folder(self.dir))
        self.messages = remove_stale(self.dir) if is_first else []
        checkpoint, messages = find_run_checkpoint(self.dir, self.resume)
        self.messages += messages
        # 2. The configuration, settled with that of a checkpoint, and the text. Nothing of the framework is loaded yet.
        if checkpoint is None:
            starting_point = start_fresh(self.config)
        else:
            starting_point = resume_from(self.dir, self.config, checkpoint)
        self.task = self._make_task(starting_point)
        self.corpus, self.heldout = self.task.corpus, self.task.heldout
        self.messages += starting_point.messages + self.corpus.messages()
        tokenizer = self.corpus.tokenizer
        if checkpoint is not None:
            checkpoint.check_fingerprints(tokenizer=tokenizer.fingerprint, corpora=self.corpus.fingerprints)
        self.config = with_vocabulary(starting_point.config, tokenizer.vocab_size)
        # 3. The framework and the other processes.
        if is_first:
            # Only now: whatever is wrong with the user's files shows before the framework is loaded.
            self._connect()
        # 4. The model, what computes with it, and what there is to say before the first step.
        self._build(checkpoint, starting_point.initial_model)
        self.messages += describe_differences(self.model, checkpoint)
        self.messages += describe_placement(self.config, self.model.groups.sizes, self.progress.step)
        self.metrics = self._open_metrics(checkpoint) if is_first else NoMetrics()
        if self.resume:
            self.messages.append(
                f"resumed from {checkpoint.path.name} (step {checkpoint.step})"
                if checkpoint
                else "no complete checkpoint to resume from: beginning at step 0"
            )
        if self.config.parallel.emulate_mesh:
            self.messages.append(
                f"emulates {self.processes.size} devices: each of as many processes computes the whole graph, and its "
                "speed says nothing about theirs"
            )
        if self.stream is not None:
            self.messages += self.stream.messages
        if is_first:
            self._write_description()

    def _connect(self) -> None:
        """Load the framework and meet the other processes."""
        runtime.prepare(self.config.run.device, self.dir / "mindspore")
        self.processes.connect()

    def _build(self, checkpoint: Checkpoint | None, initial_model: Checkpoint | None) -> None:
        """Make everything that computes: as it was in `checkpoint`, or with the weights of `initial_model`, or new."""
        from pangu_sigma.model.build_model import build_model, initialise_shared
        from pangu_sigma.model.state_dict import restore_model, stored_tables
        from pangu_sigma.train.checkpointing import RunCheckpointer
        from pangu_sigma.train.continual.controller import ContinualController
        from pangu_sigma.train.continual.teacher_snapshot import TeacherSnapshot
        from pangu_sigma.train.trainer import Trainer

        tokenizer, vocab = self.corpus.tokenizer, self.config.model.vocab_size
        tensors: Mapping[str, np.ndarray] = {}
        if checkpoint:
            tensors = StoredTensors(checkpoint)
        elif initial_model:
            alone = self.processes.size == 1
            tensors = stored_weights(initial_model) if alone else weights_as_needed(initial_model)
        self.model = build_model(
            self.config,
            vocab,
            tokenizer.eod_id,
            tables=stored_tables(tensors) or None,
            token_counts=self.corpus.token_counts(vocab),
            initialise=not tensors,
            processes=self.processes,
        )
        self._open.callback(self.model.store.close)
        objective = self.task.objective()
        # The trainer before the weights: it may shard the shared parameters, which then take this rank's shards.
        self.trainer = Trainer(self.model, objective)
        if initial_model:
            restore_model(self.model, tensors)
        elif not tensors and self.model.shared.deferred_init:
            initialise_shared(self.model)
        self.unigram = self.corpus.unigram_losses()
        self.evaluator = self.task.evaluator(self.model, objective)
        self.stream = self._open_stream(checkpoint)
        self.sampler = self.stream.sampler if self.stream else self.task.sampler(self.model.groups.sizes)
        state = checkpoint.state if checkpoint else {}
        snapshot = TeacherSnapshot.from_state(state)
        self.controller = ContinualController(self.dir, self.trainer, self.corpus, snapshot)
        domain_changes = state.get(DOMAIN_CHANGES, [])
        self.checkpointer = RunCheckpointer(self.dir, self.trainer, self.task, self.controller, domain_changes)
        self.progress = self.checkpointer.progress
        if checkpoint:
            self.checkpointer.restore(checkpoint)
            self.sampler.restore(state["sampler"], allow_new_domains=bool(domain_changes))

    def _open_stream(self, checkpoint: Checkpoint | None) -> StreamingInput | None:
        if self.config.data.stream is None:
            return None
        stream = StreamingInput(self.config, self.corpus.tokenizer, resumed=checkpoint is not None or self.resume)
        self._open.callback(stream.sampler.close)
        return stream

    def _open_metrics(self, checkpoint: Checkpoint | None) -> MetricsLog:
        step = None if not self.resume else (checkpoint.step if checkpoint else -1)
        return self._open.enter_context(MetricsLog(self.dir, self.config.run.tensorboard, step))

    def _write_description(self) -> None:
        """Write the configuration and the parameter counts into the run's folder."""
        write_text(self.dir / "config.yaml", self.config.to_yaml())
        counts = parameter_counts(self.config, self.model.vocab)
        write_json(self.dir / "summary.json", {"parameters": counts.to_dict(), "vocabulary": self.model.vocab})
