"""What every change of a model's domains has in common: the model that is changed, and where the result goes.

A run is changed in place: its last checkpoint is replaced by one of the same step that has the change, in one rename,
and `config.yaml` in the run's folder follows. With an output the run stays as it is, and the new one begins with its
metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import (
    Checkpoint,
    Fingerprints,
    StreamedCheckpoint,
    TensorSpec,
    folder_layout,
    remove_stale,
    resolve,
    write_model_folder,
)
from pangu_sigma.checkpoint.float_types import convert_float
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.checkpoint.model_folder import check_output, write_run_folder
from pangu_sigma.checkpoint.run_config_file import CONFIG_BEFORE, DOMAIN_CHANGES, config_digest, mend_config
from pangu_sigma.checkpoint.save_checkpoint import replace_checkpoint
from pangu_sigma.checkpoint.streamed_checkpoint import TensorBytes, plan_taken
from pangu_sigma.config import Config
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.config.domain_edits import checked
from pangu_sigma.config.load_config import with_run_folder
from pangu_sigma.errors import UserError, argument
from pangu_sigma.monitor.metrics_log import copy_metrics
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.signals import stop_signals_raise
from pangu_sigma.tensor_names import parse_name
from pangu_sigma.trained_model import run_of, stored_config
from pangu_sigma.training.continual.teacher_snapshot import TEACHER_KEY
from rre.router_specs import routers_that


@dataclass(frozen=True)
class EditResult:
    """A change that stands: the checkpoint, its configuration, and the run that it lies in, None where it stands alone.

    lost_mesh: whether the model's mesh does not hold the changed domains, so that its configuration names none.
    """

    checkpoint: Checkpoint
    config: Config
    run_dir: Path | None
    lost_mesh: bool = False

    def __repr__(self) -> str:
        return f"EditResult({str(Path(self))!r}, domains={self.domains})"

    def __fspath__(self) -> str:
        return str(self.run_dir or self.checkpoint.path)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that the model has now."""
        return self.checkpoint.domains

    @property
    def config_file(self) -> Path:
        """The configuration's file, by which training goes on with `resume`."""
        return Path(self) / folder_layout.CONFIG

    @property
    def change(self) -> str:
        """The change as the model's history tells it."""
        return self.checkpoint.state[DOMAIN_CHANGES][-1]["change"]

    @property
    def steps_ahead(self) -> int:
        """Steps that the plan has left."""
        return self.config.train.steps - self.checkpoint.step


@dataclass
class EditedTensors:
    """Tensors that a change makes: name -> (spec, how to get it)."""

    sources: dict[str, tuple[TensorSpec, Callable[[], TensorBytes]]] = field(default_factory=dict)

    def add(self, name: str, dtype: str, shape: Sequence[int], read: Callable[[], TensorBytes]) -> None:
        """One more tensor; `read` is called once, when it is written."""
        self.sources[name] = (TensorSpec(name, dtype, tuple(shape)), read)

    def add_converted(self, name: str, dtype: str, shape: Sequence[int], make: Callable[[], np.ndarray]) -> None:
        """One more tensor that `make` gives as float32, stored as `dtype`."""
        self.add(name, dtype, shape, lambda: convert_float(name, make(), dtype))

    def copy(self, source: Checkpoint, name: str, target: str | None = None) -> None:
        """The tensor `name` of a checkpoint as it is, under the name `target` (None: its own)."""
        entry = source.manifest.tensors[name]
        self.add(target or name, entry.dtype, entry.shape, partial(source.byte_chunks, name))

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

    def __enter__(self) -> CheckpointEditor:
        with ExitStack() as stack:
            stack.enter_context(stop_signals_raise())
            self._prepare(stack)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _prepare(self, stack: ExitStack) -> None:
        checkpoint = resolve(self.path)
        if self.out is None:
            run_dir = run_of(checkpoint)
            if run_dir is None:
                raise UserError(
                    f"{self.path} is no run, whose checkpoint could be replaced: name a new folder as {argument('out')}"
                )
            if not (run_dir / folder_layout.CONFIG).is_file() or Path(self.path).resolve() != run_dir.resolve():
                raise UserError(
                    f"{self.path} is one checkpoint: name its run {run_dir}, or a new folder as {argument('out')}"
                )
            stack.enter_context(lock_run_folder(run_dir))
            remove_stale(run_dir)  # what a killed process was replacing comes back under its name
            checkpoint = resolve(self.path)  # nobody trains here any more, so this stays the last one
            mend_config(run_dir, checkpoint)
        else:
            self.out = check_output(self.out)
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
        if self.out is None:
            return self.config.to_dict()
        # The text that was tokenised for the old run serves the new one; a model has none in its folder.
        values = with_run_folder(self.config, self.out)
        if self.run_dir is not None:
            values["data"]["cache"] = self.config.data.cache
        return values

    @property
    def has_moments(self) -> bool:
        """Whether the model carries its optimizer's state."""
        return any(parse_name(name).is_optimizer for name in self.checkpoint.manifest.tensors)

    def write(
        self,
        change: str,
        new: EditedTensors | None = None,
        *,
        domains: Mapping[str, str] | None = None,
        experts: Mapping[str, Mapping[str, int]] | None = None,
        corpora: Mapping[str, str] | None = None,
        probe: Mapping[str, np.ndarray] | None = None,
        extra_state: Mapping[str, Any] | None = None,
    ) -> EditResult:
        """Write the changed model; `change` goes into its history. `self.values` is its configuration.

        new: tensors that are made; a domain of which there is one, or the shared parameters, must all be there, every
        other one's files stay. domains: name after the change -> before it, of the domains that stay (None: all, as
        they are). experts: domain -> sparse layer -> experts, of a domain that is new or has another number now.
        corpora and probe: of the new ones.
        """
        source, new = self.checkpoint, new or EditedTensors()
        config = checked(self.values, f"the configuration of {source.path} after the change")
        lost_mesh = config.parallel.mesh.size < self.config.parallel.mesh.size
        domains = {name: name for name in source.domains} if domains is None else domains
        experts = experts or {}
        names = list(dict.fromkeys([*domains, *experts]))
        state = sampler_state(source.state, domains)
        # A phase under way that stays near a previous model takes the model of this moment for it.
        state.pop(TEACHER_KEY, None)
        state |= extra_state or {}
        replaced = self.run_dir if self.out is None else None
        if replaced is not None:
            state[CONFIG_BEFORE] = config_digest(replaced)
        state[DOMAIN_CHANGES] = [*state.pop(DOMAIN_CHANGES, []), {"step": source.step, "change": change}]
        text = stored_text(config, config.run.dir, is_model=self.run_dir is None)
        known = source.fingerprints.corpora
        kept = {name: known[was] for name, was in domains.items() if was in known}
        old_probe = source.probe()
        content = StreamedCheckpoint(
            taken=plan_taken(source, self._kept_groups(new, domains)),
            link=True,
            tensors=new.specs,
            read=new.read,
            domains=names,
            coverage={
                layer_name: {n: experts[n][layer_name] if n in experts else groups[domains[n]] for n in names}
                for layer_name, groups in source.coverage.items()
            },
            config_text=text,
            state=state,
            tokenizer_files=source.tokenizer_files(),
            fingerprints=Fingerprints(
                tokenizer=source.fingerprints.tokenizer,
                corpora={**kept, **(corpora or {})},
            ),
            step=source.step,
            probe={**{name: old_probe[was] for name, was in domains.items() if was in old_probe}, **(probe or {})},
        )
        with progress(change, content.bytes, unit="B") as job:

            def advance(done: int, _: int) -> None:
                job.set(done)

            if replaced is not None:
                written = replace_checkpoint(replaced, content, advance)
                write_text(replaced / folder_layout.CONFIG, text)
                return EditResult(written, config, replaced, lost_mesh)
            assert self.out is not None
            if self.run_dir is not None:
                add = partial(copy_metrics, self.run_dir, step=source.step)
                written = write_run_folder(self.out, content, advance, add)
                return EditResult(written, config, run_of(written), lost_mesh)
            return EditResult(write_model_folder(self.out, content, progress=advance, moments=True), config, None)

    def _kept_groups(self, new: EditedTensors, domains: Mapping[str, str]) -> list[str]:
        """The file groups of whatever keeps its name and has no new tensor, optimizer state included."""
        rewritten = {parse_name(name).domain for name in new.sources}
        kept = [] if None in rewritten else ["shared"]
        kept += [f"domains/{name}" for name, was in domains.items() if name == was and name not in rewritten]
        return kept + [f"optimizer/{group}" for group in kept]


def check_router(checkpoint: Checkpoint, config: Config) -> None:
    """Raises UserError unless the domains of a model are independent of one another."""
    if not checkpoint.coverage:
        raise UserError(f"{checkpoint.path} has no sparse layers, where a domain has experts: upcycle it first")
    if not config.model.router_spec.separates_domains:
        raise UserError(
            f"{checkpoint.path} routes by {config.model.router_setting}, which couples the domains, so none "
            f"can come or go without the others: use a model of router {routers_that(lambda s: s.separates_domains)}"
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
