"""What a phase brings beside the batch: when a regularised one begins, the previous model is kept with the run and put
beside the trainer; when it is resumed, the kept one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pangu_sigma.checkpoint.checkpoint_reader import open_checkpoint
from pangu_sigma.checkpoint.distributed import raise_on_all_ranks
from pangu_sigma.checkpoint.retention import list_checkpoints
from pangu_sigma.config.phase_domains import old_domains
from pangu_sigma.data.corpus import Corpus
from pangu_sigma.train.checkpointing import run_contents, write_checkpoint
from pangu_sigma.train.continual import teacher_snapshot
from pangu_sigma.train.continual.distillation import RegularisedObjective
from pangu_sigma.train.continual.teacher import load_reference
from pangu_sigma.train.continual.teacher_snapshot import PREVIOUS, Record
from pangu_sigma.train.continual.weight_penalty import Distance
from pangu_sigma.train.schedule import Phase

if TYPE_CHECKING:
    from pangu_sigma.monitor.progress import Job
    from pangu_sigma.train.trainer import Trainer


class Work(Protocol):
    """Opens a progress bar for work under way: `bar.job` of the run's progress."""

    def __call__(self, description: str, total: float | None, unit: str = ...) -> AbstractContextManager[Job]: ...


class Holding:
    """The previous model of the phase under way; `record` says which, None where the phase has none."""

    def __init__(self, run_dir: Path, trainer: Trainer, corpus: Corpus, record: Record | None) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.corpus = corpus
        self.record = record
        self.processes = trainer.processes
        self._entered: int | None = None

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps of it."""
        return {} if self.record is None else {PREVIOUS: self.record.state()}

    def enter(self, phase: Phase, step: int, work: Work) -> str | None:
        """The next step, after `step` done ones, belongs to `phase`; returns what there is to say, None for nothing.

        Raises UserError where the previous model of a resumed phase is missing or another one.
        """
        if phase.index == self._entered:
            return None
        self._entered = phase.index
        wanted = phase.regularise
        if wanted is None:
            self.record = None
            self.trainer.hold(None, None)
            return None
        if self.record is not None and self.record.phase == phase.index:
            kept = teacher_snapshot.open_previous(self.run_dir, self.record)
        else:
            with work("keep the previous model", None):
                self._keep(step)
            kept = open_checkpoint(teacher_snapshot.model_path(self.run_dir, step))
            self.record = Record(phase.index, step, teacher_snapshot.identity(kept))
        fisher = self._fisher(phase, work) if wanted.ewc else None
        config, model = self.trainer.config, self.trainer.model
        objective = distance = None
        if wanted.output:
            # A gate that grew is asked without its new experts, whose domains it does not tell apart anyway.
            grown = set(config.domain_names) - set(kept.domains) if model.learned else set()
            stand_in = dict.fromkeys(grown, kept.domains[0])
            # Every process has the whole frozen model: what it trains may be cut in another way.
            rows = self.trainer.micro_batch // self.processes.mesh.rows
            reference = load_reference(kept, config, rows, stand_in)
            old = old_domains(config, phase.index) if wanted.through == "old" else ()
            through = [config.domain_names.index(name) for name in old]
            objective = RegularisedObjective(reference, wanted.output, through, config.run.seed)
        if wanted.l2 or wanted.ewc:
            names = kept.names(domains=[], optimizer=False)
            distance = Distance(model.net.trainable_params(), kept.load(names), fisher, wanted, model.layout)
        self.trainer.hold(objective, distance)
        terms = [f"{name} {getattr(wanted, name):g}" for name in ("output", "l2", "ewc") if getattr(wanted, name)]
        return f"phase {phase.index} stays near the model of step {self.record.step} ({kept.path}): {', '.join(terms)}"

    def clean(self) -> None:
        """Delete previous models that neither this phase nor a checkpoint of the run names any more."""
        if not self.processes.first or not (self.run_dir / teacher_snapshot.FOLDER).is_dir():
            return
        named = [self.record]
        for _, path in list_checkpoints(self.run_dir)[0]:
            named.append(Record.of(open_checkpoint(path).state))
        teacher_snapshot.remove_unneeded(self.run_dir, {record.step for record in named if record is not None})

    def _keep(self, step: int) -> None:
        """Write the model of this moment beside the run; where it was just saved, its files serve."""
        saved = dict(list_checkpoints(self.run_dir)[0]).get(step)
        if saved is not None:
            with raise_on_all_ranks(self.processes):
                if self.processes.first:
                    teacher_snapshot.link_previous(self.run_dir, open_checkpoint(saved))
            return
        folder = teacher_snapshot.working_folder(self.run_dir, step)
        state = {"origin": {"job": "previous model"}}
        contents = run_contents(step, self.trainer.config, self.corpus, {}, state)
        written = write_checkpoint(folder, contents, self.trainer.model, None, keep=1)
        with raise_on_all_ranks(self.processes):
            if self.processes.first:
                teacher_snapshot.take_saved(self.run_dir, written.path)

    def _fisher(self, phase: Phase, work: Work) -> dict[str, np.ndarray]:
        from pangu_sigma.train.continual.fisher import estimate_fisher

        if self.record.fisher is not None:
            return teacher_snapshot.read_fisher(self.run_dir, self.record)
        config = self.trainer.config
        old = old_domains(config, phase.index)
        rows, count = self.trainer.micro_batch, phase.regularise.fisher_batches
        streams = {stream.domain: stream for stream in self.corpus.training_streams()}
        with work("Fisher information", len(old) * count, unit="batches") as job:

            def batches() -> Iterator[tuple[str, np.ndarray]]:
                for name in old:
                    for number in range(count):
                        first = number * rows
                        yield name, np.stack([streams[name].sequence(first + row) for row in range(rows)])
                        job.advance()

            fisher = estimate_fisher(self.trainer.model, batches(), config.run.seed, rows)
        written = ""
        with raise_on_all_ranks(self.processes):
            if self.processes.first:
                written = teacher_snapshot.write_fisher(self.run_dir, self.record.step, fisher)
        self.record = replace(self.record, fisher=self.processes.texts(written)[0])
        return fisher
