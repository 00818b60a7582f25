"""Which files, tensors and bytes each domain of a checkpoint owns; nothing but the manifest is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.tensor_names import is_routing


@dataclass(frozen=True)
class DomainListing:
    """One domain of a checkpoint: experts per sparse layer, parameters and bytes that are its own, and its files."""

    name: str
    experts: dict[str, int]
    parameters: int
    bytes: int
    files: tuple[str, ...]


def list_domains(path: str | Path) -> list[DomainListing]:
    """The domains of a run or checkpoint folder, in the model's order, without optimizer state.

    Routing tables count as bytes, not as parameters. Raises UserError if `path` holds no whole checkpoint.
    """
    checkpoint = resolve(path)
    return [_listing(checkpoint, domain) for domain in checkpoint.domains]


def _listing(checkpoint: Checkpoint, domain: str) -> DomainListing:
    names = checkpoint.names(domains=[domain], shared=False, optimizer=False)
    entries = {name: checkpoint.manifest.tensors[name] for name in names}
    files = checkpoint.files(names)
    return DomainListing(
        name=domain,
        experts={layer: groups[domain] for layer, groups in checkpoint.coverage.items() if domain in groups},
        parameters=sum(math.prod(e.shape) for name, e in entries.items() if not is_routing(name)),
        bytes=sum(checkpoint.manifest.files[file].bytes for file in files),
        files=tuple(files),
    )
