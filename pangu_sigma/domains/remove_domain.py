"""Removing and renaming domains: the others' files stay as they are."""

from __future__ import annotations

from pathlib import Path

from pangu_sigma.config import domain_edits
from pangu_sigma.domains.checkpoint_editor import (
    CheckpointEditor,
    EditedTensors,
    EditResult,
    check_free,
    check_known,
)
from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import of_domain


def remove_domain(path: Path, name: str, *, out: Path | None = None) -> EditResult:
    """Remove the domain `name`, its experts, tables and moments; no other tensor changes. Raises UserError."""
    with CheckpointEditor(path, out) as subject:
        source = subject.checkpoint
        check_known(source, name)
        if len(source.domains) == 1:
            raise UserError(f"{name} is the last domain of {source.path}, which would be no model without it: keep it")
        left = [domain for domain in source.domains if domain != name]
        domain_edits.remove_domain(subject.values, name, source.step)
        return subject.write(f"remove {name}", domains={domain: domain for domain in left})


def rename_domain(path: Path, old: str, new: str, *, out: Path | None = None) -> EditResult:
    """Give the domain `old` the name `new`: its tensors' bytes stay, their names and its files' change.

    Its text goes on in an order of its own, since a domain's order is drawn by its name. Raises UserError.
    """
    with CheckpointEditor(path, out, any_router=True) as subject:
        source = subject.checkpoint
        check_known(source, old)
        if old != new:
            check_free(source, new)
        else:
            raise UserError(f"domain {old} has this name already: choose another one")
        tensors = EditedTensors()
        for tensor in source.names(domains=[old], shared=False):
            tensors.copy(source, tensor, of_domain(tensor, new))
        domain_edits.rename_domain(subject.values, old, new)
        domains = {new if domain == old else domain: domain for domain in source.domains}
        return subject.write(f"rename {old} to {new}", tensors, domains=domains)
