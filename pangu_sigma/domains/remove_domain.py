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
    sampler_state,
)
from pangu_sigma.errors import UserError


def remove_domain(path: Path, name: str, *, out: Path | None = None) -> EditResult:
    """Remove the domain `name`, its experts, tables and moments; no other tensor changes. Raises UserError."""
    with CheckpointEditor(path, out) as subject:
        source = subject.checkpoint
        check_known(source, name)
        if len(source.domains) == 1:
            raise UserError(f"{name} is the last domain of {source.path}, which would be no model without it: keep it")
        left = [domain for domain in source.domains if domain != name]
        domain_edits.remove_domain(subject.values, name, source.step)
        return subject.write(
            f"remove {name}",
            domains=left,
            keep=left,
            new=EditedTensors(),
            coverage={
                layer_name: {domain: groups[domain] for domain in left}
                for layer_name, groups in source.coverage.items()
            },
            corpora={domain: value for domain, value in source.fingerprints.corpora.items() if domain in left},
            probe=source.probe(left),
            state=sampler_state(source.state, {domain: domain for domain in left}),
        )


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
        renamed = {domain: new if domain == old else domain for domain in source.domains}
        tensors = EditedTensors()
        for tensor in source.names(domains=[old], shared=False):
            entry = source.manifest.tensors[tensor]
            target = f"domains.{new}.{tensor.removeprefix(f'domains.{old}.')}"
            tensors.add(target, entry.dtype, entry.shape, lambda tensor=tensor: source.byte_chunks(tensor))
        domain_edits.rename_domain(subject.values, old, new)
        return subject.write(
            f"rename {old} to {new}",
            domains=list(renamed.values()),
            keep=[domain for domain in source.domains if domain != old],
            new=tensors,
            coverage={
                layer_name: {renamed[domain]: count for domain, count in groups.items()}
                for layer_name, groups in source.coverage.items()
            },
            corpora={renamed.get(domain, domain): value for domain, value in source.fingerprints.corpora.items()},
            probe={renamed[domain]: sequences for domain, sequences in source.probe().items()},
            state=sampler_state(source.state, {name: was for was, name in renamed.items()}),
        )
