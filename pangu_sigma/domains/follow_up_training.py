"""Training ahead for the domains that a model has: a run goes on with another plan than it had left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pangu_sigma.config.domain_edits import replace_phases
from pangu_sigma.domains.checkpoint_editor import CheckpointEditor, EditResult


def plan_training(
    path: Path,
    phases: Sequence[Mapping[str, Any]],
    what: str,
    *,
    max_domains_per_batch: int | None = None,
    out: Path | None = None,
) -> EditResult:
    """Give the run `path`, or with `out` a new run that shares its files, another plan; no tensor changes.

    phases: the run's whole `train.phases`, those that are done as they were. max_domains_per_batch: the run's
    `data.max_domains_per_batch` from now on. `what` tells the change. Works with any router. Raises UserError;
    nothing is changed then.
    """
    with CheckpointEditor(path, out, any_router=True) as subject:
        replace_phases(subject.values, phases, max_domains_per_batch)
        return subject.write(what)
