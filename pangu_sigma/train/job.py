"""The training job from configuration to finished run folder; here is what a run is made of before its first step."""

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
from pangu_sigma.train.startup.starting_point import Beginning, begun, last_checkpoint, resumed
from pangu_sigma.train.startup.warnings import differences, placement
from pangu_sigma.train.streaming_input import Stream
from pangu_sigma.train.task import Recipe, TextRecipe
from pangu_sigma.trained_model import stored_weights, weights_as_needed
from pangu_sigma.workers import processes_of
from parallel.comm.processes import Processes


def train(config: Config, resume: bool = False) -> Path:
    """Train as `config` says and return the run's folder; see `Run` for the parts.

    Raises UserError for the user's mistakes and for training that cannot go on.
    """
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
    """One run over its folder, by a recipe; a context that prepares it and holds the folder's lock and the metrics.

    Several `processes` do it together, each in a `Run` of its own: rank 0 has the lock and the metrics.
    """

    def __init__(
        self,
        config: Config,
        resume: bool,
        processes: Processes | None = None,
        recipe: Callable[[Beginning], Recipe] = TextRecipe,
    ) -> None:
        self.processes = processes or Processes()
        self.dir = Path(config.run.dir)
        self.resume = resume
        self.config = config
        self._recipe = recipe
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

    def loop(self) -> None:
        """Train to the end, to `train.stop_at` or to a signal; a checkpoint stands at the end in every case."""
        from pangu_sigma.train.loop import Loop

        Loop(self).train()

    def _prepare(self) -> None:
        first = self.processes.first
        if not first:
            # Rank 0 comes to the meeting when the text is tokenised: it is there, and so is the last checkpoint.
            self._meet()
        else:
            self._open.enter_context(lock_run_folder(self.dir))
        self.messages = remove_stale(self.dir) if first else []
        checkpoint, said = last_checkpoint(self.dir, self.resume)
        self.messages += said
        beginning = begun(self.config) if checkpoint is None else resumed(self.dir, self.config, checkpoint)
        self.recipe = self._recipe(beginning)
        self.corpus, self.heldout = self.recipe.corpus, self.recipe.heldout
        self.messages += beginning.messages + self.corpus.messages()
        tokenizer = self.corpus.tokenizer
        if checkpoint is not None:
            checkpoint.check_fingerprints(tokenizer=tokenizer.fingerprint, corpora=self.corpus.fingerprints)
        self.config = with_vocabulary(beginning.config, tokenizer.vocab_size)
        if first:
            # Only now: whatever is wrong with the user's files shows before the framework is loaded.
            self._meet()
        self._build(checkpoint, beginning.start)
        self.messages += differences(self.model, checkpoint)
        self.messages += placement(self.config, self.model.groups.sizes, self.progress.step)
        self.metrics = self._metrics(checkpoint) if first else NoMetrics()
        if self.resume:
            self.messages.append(
                f"resumed from {checkpoint.path.name} (step {checkpoint.step})"
                if checkpoint
                else "no complete checkpoint to resume from: beginning at step 0"
            )
        if self.config.parallel.emulate_mesh:
            self.messages.append(
                f"rehearses {self.processes.size} devices: each of as many processes computes the whole graph, and its "
                "speed says nothing about theirs"
            )
        if self.stream is not None:
            self.messages += self.stream.messages
        if first:
            self._describe()

    def _meet(self) -> None:
        """Load the framework and meet the other processes."""
        runtime.prepare(self.config.run.device, self.dir / "mindspore")
        self.processes.connect()

    def _build(self, checkpoint: Checkpoint | None, start: Checkpoint | None) -> None:
        """Everything that computes, as it was in `checkpoint`, or with the weights of `start`, or new."""
        from pangu_sigma.model.build_model import build_model, initialise_shared
        from pangu_sigma.model.state_dict import restore_model, stored_tables
        from pangu_sigma.train.checkpointing import Saving
        from pangu_sigma.train.continual.controller import Holding
        from pangu_sigma.train.continual.teacher_snapshot import Record
        from pangu_sigma.train.trainer import Trainer

        tokenizer, vocab = self.corpus.tokenizer, self.config.model.vocab_size
        tensors: Mapping[str, np.ndarray] = {}
        if checkpoint:
            tensors = StoredTensors(checkpoint)
        elif start:
            tensors = stored_weights(start) if self.processes.size == 1 else weights_as_needed(start)
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
        objective = self.recipe.objective()
        self.trainer = Trainer(self.model, objective)
        if start:
            restore_model(self.model, tensors)
        elif not tensors and self.model.shared.deferred_init:
            initialise_shared(self.model)
        self.unigram = self.corpus.unigram_losses()
        self.evaluator = self.recipe.evaluator(self.model, objective)
        self.stream = self._stream(checkpoint)
        self.sampler = self.stream.sampler if self.stream else self.recipe.sampler(self.model.groups.sizes)
        state = checkpoint.state if checkpoint else {}
        self.holding = Holding(self.dir, self.trainer, self.corpus, Record.of(state))
        changes = state.get(DOMAIN_CHANGES, [])
        self.saving = Saving(self.dir, self.trainer, self.recipe, self.holding, changes)
        self.progress = self.saving.progress
        if checkpoint:
            self.saving.restore(checkpoint)
            self.sampler.restore(state["sampler"], allow_new_domains=bool(changes))

    def _stream(self, checkpoint: Checkpoint | None) -> Stream | None:
        if self.config.data.stream is None:
            return None
        stream = Stream(self.config, self.corpus.tokenizer, resumed=checkpoint is not None or self.resume)
        self._open.callback(stream.sampler.close)
        return stream

    def _metrics(self, checkpoint: Checkpoint | None) -> MetricsLog:
        step = None if not self.resume else (checkpoint.step if checkpoint else -1)
        return self._open.enter_context(MetricsLog(self.dir, self.config.run.tensorboard, step))

    def _describe(self) -> None:
        """Write the configuration and the parameter counts into the run's folder."""
        write_text(self.dir / "config.yaml", self.config.to_yaml())
        counts = parameter_counts(self.config, self.model.vocab)
        write_json(self.dir / "summary.json", {"parameters": counts.to_dict(), "vocabulary": self.model.vocab})
