"""What every change of a model's domains has in common: the model that is changed, and where the result goes.

A run is changed in place: its last checkpoint is replaced by one of the same step that has the change, in one rename,
and `config.yaml` in the run's folder follows. With an output the run stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, Fingerprints, TensorSpec, folder_layout, remove_stale, resolve
from pangu_sigma.checkpoint.edited_checkpoint import (
    EditedCheckpoint,
    kept_files,
    replace_checkpoint,
    write_edited_folder,
    write_edited_run,
)
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.checkpoint.model_folder import TensorBytes, check_output
from pangu_sigma.checkpoint.run_config_file import CONFIG_BEFORE, DOMAIN_CHANGES, config_digest, mend_config
from pangu_sigma.config import Config
from pangu_sigma.config.domain_edits import checked
from pangu_sigma.config.load_config import with_run_folder
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.signals import sigterm_as_ctrl_c
from pangu_sigma.train.continual.teacher_snapshot import TEACHER_KEY
from pangu_sigma.trained_model import run_of, stored_config


@dataclass(frozen=True)
class EditResult:
    """A change that stands: the checkpoint, its configuration, and whether it lies in a run that can go on.

    lost_mesh: whether the model's mesh does not hold the changed domains, so that its configuration names none.
    """

    checkpoint: Checkpoint
    config: Config
    run_dir: Path | None
    lost_mesh: bool = False


@dataclass
class EditedTensors:
    """Tensors that a change makes: name -> (spec, how to get it)."""

    sources: dict[str, tuple[TensorSpec, Callable[[], TensorBytes]]] = field(default_factory=dict)

    def add(self, name: str, dtype: str, shape: Sequence[int], read: Callable[[], TensorBytes]) -> None:
        """One more tensor; `read` is called once, when it is written."""
        self.sources[name] = (TensorSpec(name, dtype, tuple(shape)), read)

    @property
    def specs(self) -> list[TensorSpec]:
        """How the tensors are stored, in the order in which they were added."""
        return [spec for spec, _ in self.sources.values()]

    def read(self, spec: TensorSpec) -> TensorBytes:
        """Make one of the tensors."""
        return self.sources[spec.name][1]()


class CheckpointEditor:
    """The model whose domains change: a run (its last checkpoint), or with `out` any checkpoint or model folder.

    A context that holds the run's lock where the run itself is changed. Raises UserError for a model that is not whole,
    and for one whose router couples the domains unless `any_router`.
    """

    def __init__(self, path: Path, out: Path | None, *, any_router: bool = False) -> None:
        self.path = path
        self.out = out
        self.any_router = any_router
        self._open = ExitStack()

    def __enter__(self) -> CheckpointEditor:
        self._open.enter_context(sigterm_as_ctrl_c())
        try:
            self._prepare()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _prepare(self) -> None:
        checkpoint = resolve(self.path)
        if self.out is None:
            run_dir = run_of(checkpoint)
            if run_dir is None:
                raise UserError(f"{self.path} is no run, whose checkpoint could be replaced: name a folder with --out")
            if not (run_dir / folder_layout.CONFIG).is_file() or Path(self.path).resolve() != run_dir.resolve():
                raise UserError(f"{self.path} is one checkpoint: name its run {run_dir}, or a new folder with --out")
            self._open.enter_context(lock_run_folder(run_dir))
            remove_stale(run_dir)  # what a killed process was replacing comes back under its name
            checkpoint = resolve(self.path)  # nobody trains here any more, so this stays the last one
            mend_config(run_dir, checkpoint)
        else:
            check_output(self.out)
        self.checkpoint = checkpoint
        self.config = stored_config(checkpoint)
        if not self.any_router:
            check_router(checkpoint, self.config)

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run that the checkpoint belongs to, if it does."""
        return run_of(self.checkpoint)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The configuration as a mapping that may be changed, with the folder in which the result will lie."""
        # The text that was tokenised for the old run serves the new one.
        values = with_run_folder(self.config, self.run_dir or self.out)
        if self.out is not None:
            values["run"]["dir"] = str(self.out.resolve())
        return values

    @property
    def has_moments(self) -> bool:
        """Whether the model carries its optimizer's state."""
        return any(folder_layout.is_optimizer(name) for name in self.checkpoint.manifest.tensors)

    def groups(self, domains: Sequence[str], shared: bool = True) -> list[str]:
        """The file groups of the shared parameters and of `domains`, optimizer state included."""
        own = [*(["shared"] if shared else []), *(f"domains/{name}" for name in domains)]
        return own + [f"optimizer/{group}" for group in own]

    def write(
        self,
        what: str,
        *,
        domains: Sequence[str],
        keep: Sequence[str],
        new: EditedTensors,
        coverage: Mapping[str, Mapping[str, int]],
        corpora: Mapping[str, str],
        probe: Mapping[str, np.ndarray],
        state: Mapping[str, Any] | None = None,
        extra_state: Mapping[str, Any] | None = None,
        keep_shared: bool = True,
    ) -> EditResult:
        """Write the changed model: files of the domains `keep` stay, `new` ones are added; `what` tells the change.

        `keep_shared` False: the shared tensors are among the new ones too.
        """
        checkpoint = self.checkpoint
        config = checked(self.values, f"the configuration of {checkpoint.path} after the change")
        lost_mesh = config.parallel.mesh.size < self.config.parallel.mesh.size
        before = dict(checkpoint.state if state is None else state)
        # A phase under way that stays near a previous model takes the model of this moment for it.
        before.pop(TEACHER_KEY, None)
        before |= extra_state or {}
        if self.out is None:
            before[CONFIG_BEFORE] = config_digest(self.run_dir)
        record = {"step": checkpoint.step, "change": what}
        content = EditedCheckpoint(
            kept=kept_files(checkpoint, self.groups(keep, keep_shared)),
            tensors=new.specs,
            read=new.read,
            domains=domains,
            coverage=coverage,
            config_text=config.to_yaml(),
            state={**before, DOMAIN_CHANGES: [*before.get(DOMAIN_CHANGES, []), record]},
            tokenizer_files=checkpoint.tokenizer_files(),
            fingerprints=Fingerprints(tokenizer=checkpoint.fingerprints.tokenizer, corpora=dict(corpora)),
            step=checkpoint.step,
            probe=probe,
        )
        total = sum(file.size for file in (*content.kept, *content.new_files()))
        with progress(what, total, unit="B") as job:

            def advance(done: int, _: int) -> None:
                job.set(done)

            if self.out is None:
                written = replace_checkpoint(self.run_dir, content, advance)
                write_text(self.run_dir / folder_layout.CONFIG, config.to_yaml())
                return EditResult(written, config, self.run_dir, lost_mesh)
            if self.run_dir is not None:
                written = write_edited_run(self.out, content, advance)
                return EditResult(written, config, run_of(written), lost_mesh)
            return EditResult(write_edited_folder(self.out, content, advance), config, None)


def check_router(checkpoint: Checkpoint, config: Config) -> None:
    """Raises UserError unless the domains of a model are independent of one another."""
    if not checkpoint.coverage:
        raise UserError(f"{checkpoint.path} has no sparse layers, where a domain has experts: upcycle it first")
    if config.model.router != "rre":
        raise UserError(
            f"{checkpoint.path} routes by {config.model.router_setting}, which couples the domains, so none "
            "can come or go without the others: use a model of router rre"
        )


def check_known(checkpoint: Checkpoint, name: str) -> None:
    """Raises UserError, naming the domains there are, for one that the model does not have."""
    if name not in checkpoint.domains:
        raise UserError(f"{checkpoint.path} has no domain {name}: it has {', '.join(checkpoint.domains)}")


def check_free(checkpoint: Checkpoint, name: str) -> None:
    """Raises UserError for a name that a domain of the model has already, upper and lower case being the same."""
    taken = {domain.casefold(): domain for domain in checkpoint.domains}
    if name.casefold() in taken:
        raise UserError(f"{checkpoint.path} already has a domain {taken[name.casefold()]}: choose another name")


def sampler_state(state: Mapping[str, Any], domains: Mapping[str, str]) -> dict[str, Any]:
    """The trainer's state with the text cursors of `domains` only (new name -> old name); others begin anew."""
    sampler = dict(state.get("sampler") or {})
    # Cursors, and of a stream what is left over of each domain's text.
    for part in ("domains", "tails"):
        if part in sampler:
            sampler[part] = {new: sampler[part][old] for new, old in domains.items() if old in sampler[part]}
    return {**state, "sampler": sampler} if sampler else dict(state)
