"""Continual-learning controller: gives a regularised phase its teacher and the step its regulariser.

When a phase with `regularise` begins, the model of that moment is kept with the run as the teacher snapshot, and the
terms that keep the phase near it are made: distillation from its outputs, an L2 or EWC penalty on the weights. A run
that is resumed within the phase opens the kept snapshot. Replay of old text is the sampler's: a phase's domain weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.checkpoint_reader import open_checkpoint
from pangu_sigma.checkpoint.distributed import raise_on_all_ranks
from pangu_sigma.checkpoint.retention import list_checkpoints
from pangu_sigma.config.phase_domains import old_domains
from pangu_sigma.data.corpus import Corpus
from pangu_sigma.errors import CheckpointError, UserError
from pangu_sigma.model.model import Model
from pangu_sigma.training.continual import teacher_snapshot
from pangu_sigma.training.continual.distillation import DistillationObjective
from pangu_sigma.training.continual.teacher import load_teacher
from pangu_sigma.training.continual.teacher_snapshot import TEACHER_KEY, TeacherSnapshot
from pangu_sigma.training.continual.weight_penalty import WeightPenalty
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.run_contents import collect_contents, write_checkpoint
from pangu_sigma.training.schedule import Phase
from pangu_sigma.training.trainer import NO_REGULARISER, Regulariser, micro_batch_rows

if TYPE_CHECKING:
    from pangu_sigma.monitor.progress import Job


# Opens a progress bar for a long job within the run: `TrainingProgress.job`.
JobOpener = Callable[..., AbstractContextManager["Job"]]


class ContinualController:
    """Knows the phase under way, its teacher snapshot (None for a phase without) and its regulariser.

    `objective`: the run's own. `snapshot`: the one that the resumed checkpoint names. All processes of a run call it
    together.
    """

    def __init__(
        self,
        run_dir: Path,
        model: Model,
        objective: TrainingObjective,
        corpus: Corpus,
        snapshot: TeacherSnapshot | None,
    ) -> None:
        self.run_dir = run_dir
        self.model = model
        self.objective = objective
        self.corpus = corpus
        self.snapshot = snapshot
        self.regulariser = NO_REGULARISER
        self.config, self.processes = model.config, model.processes
        self.micro_batch = micro_batch_rows(self.config, objective)
        self._phase_index: int | None = None

    def state(self) -> dict[str, object]:
        """What a checkpoint's state keeps of it."""
        return {} if self.snapshot is None else {TEACHER_KEY: asdict(self.snapshot)}

    def start_phase(self, phase: Phase, step: int, open_job: JobOpener) -> str | None:
        """Prepare for a step of `phase`; does nothing within the phase under way.

        step: optimizer steps done. Returns a message for the user, None for none. Raises UserError where the teacher
        of a resumed phase is missing or another one, or the run's objective cannot be regularised by outputs.
        """
        if phase.index == self._phase_index:
            return None
        self._phase_index = phase.index
        if phase.regularise is None:
            self.snapshot, self.regulariser = None, NO_REGULARISER
            return None
        # 1. The teacher: the kept one of a resumed phase, else the model of this moment.
        damage = ""
        if self.snapshot is not None and self.snapshot.phase == phase.index:
            teacher_model = teacher_snapshot.open_snapshot(self.run_dir, self.snapshot)
        else:
            with open_job("keep the previous model", None):
                damage = self._keep_model(step)
            teacher_model = open_checkpoint(teacher_snapshot.snapshot_path(self.run_dir, step))
            self.snapshot = TeacherSnapshot(phase.index, step, teacher_snapshot.hash_tensors(teacher_model))
        # 2. The terms that the phase asks for.
        terms = phase.regularise
        fisher = self._load_or_estimate_fisher(phase, open_job) if terms.ewc else None
        objective = self._distillation(phase, teacher_model) if terms.output else None
        penalty = None
        if terms.l2 or terms.ewc:
            parameters, names = self.model.net.trainable_params(), teacher_model.names(domains=[], optimizer=False)
            penalty = WeightPenalty(parameters, teacher_model.load(names), fisher, terms, self.model.layout)
        self.regulariser = Regulariser(objective, penalty)
        names = [f"{name} {getattr(terms, name):g}" for name in ("output", "l2", "ewc") if getattr(terms, name)]
        return (
            f"phase {phase.index} stays near the model of step {self.snapshot.step} ({teacher_model.path}): "
            f"{', '.join(names)}{damage}"
        )

    def remove_unneeded_snapshots(self) -> None:
        """Delete snapshots that neither this phase nor a checkpoint of the run names any more."""
        if not self.processes.first or not (self.run_dir / teacher_snapshot.FOLDER).is_dir():
            return
        snapshots = [self.snapshot]
        for _, path in list_checkpoints(self.run_dir)[0]:
            snapshots.append(TeacherSnapshot.from_state(open_checkpoint(path).state))
        needed_steps = {snapshot.step for snapshot in snapshots if snapshot is not None}
        teacher_snapshot.remove_unneeded(self.run_dir, needed_steps)

    def _distillation(self, phase: Phase, teacher_model: Checkpoint) -> DistillationObjective:
        """The objective of a phase that stays near the outputs of `teacher_model`, with the run's auxiliary losses."""
        if type(self.objective) is not TrainingObjective:
            raise UserError("regularise.output holds training on text: leave it out where another loss is trained")
        terms, config = phase.regularise, self.config
        # A gate that grew is asked without its new experts, whose domains it does not tell apart anyway.
        new_domains = set(config.domain_names) - set(teacher_model.domains) if self.model.learned else set()
        stand_in = dict.fromkeys(new_domains, teacher_model.domains[0])
        # Every process has the whole teacher: what it trains may be sharded in another way.
        rows = self.micro_batch // self.processes.mesh.rows
        teacher = load_teacher(teacher_model, config, rows, stand_in)
        names = old_domains(config, phase.index) if terms.through == "old" else ()
        through = [config.domain_names.index(name) for name in names]
        return DistillationObjective(teacher, terms.output, through, config.run.seed, self.objective.auxiliary)

    def _keep_model(self, step: int) -> str:
        """Write the model of this moment as the teacher snapshot; where it was just saved, its files are linked, unless
        they are damaged, which is said."""
        saved, damage = dict(list_checkpoints(self.run_dir)[0]).get(step), ""
        if saved is not None:
            try:
                with raise_on_all_ranks(self.processes):
                    if self.processes.first:
                        teacher_snapshot.link_snapshot(self.run_dir, open_checkpoint(saved))
                return ""
            except CheckpointError as error:
                damage = f"; written from memory, since {error}"
        folder = teacher_snapshot.working_folder(self.run_dir, step)
        state = {"origin": {"job": "previous model"}}
        contents = collect_contents(step, self.config, self.corpus, {}, state)
        written = write_checkpoint(folder, contents, self.model, None, keep=1)
        with raise_on_all_ranks(self.processes):
            if self.processes.first:
                teacher_snapshot.publish_saved(self.run_dir, written.path)
        return damage

    def _load_or_estimate_fisher(self, phase: Phase, open_job: JobOpener) -> dict[str, np.ndarray]:
        """The Fisher information of the shared parameters by name; estimated once a phase and kept with the run."""
        from pangu_sigma.training.continual.fisher import estimate_fisher

        if self.snapshot.fisher is not None:
            return teacher_snapshot.read_fisher(self.run_dir, self.snapshot)
        old = old_domains(self.config, phase.index)
        rows, count = self.micro_batch, phase.regularise.fisher_batches
        streams = {stream.domain: stream for stream in self.corpus.training_streams()}
        with open_job("Fisher information", len(old) * count, unit="batches") as job:

            def batches() -> Iterator[tuple[str, np.ndarray]]:
                for name in old:
                    for index in range(count):
                        first = index * rows
                        yield name, np.stack([streams[name].sequence(first + row) for row in range(rows)])
                        job.advance()

            fisher = estimate_fisher(self.model, batches(), self.config.run.seed, rows)
        digest = ""
        with raise_on_all_ranks(self.processes):
            if self.processes.first:
                digest = teacher_snapshot.write_fisher(self.run_dir, self.snapshot.step, fisher)
        self.snapshot = replace(self.snapshot, fisher=self.processes.texts(digest)[0])
        return fisher
