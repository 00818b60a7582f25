"""File plan of a checkpoint: its files with their sizes, and which of them the previous checkpoint has already."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from pangu_sigma.checkpoint.tensor_file import TensorSpec, digest_of, in_file_order, make_header
from pangu_sigma.tensor_names import PROBE, parse_name, probe_name


@dataclass
class PlannedFile:
    """A file of the plan: a tensor file (`specs`), one of given `content`, or a `copy` of another folder's tensor file.

    `known` holds those tensors' hashes that are known before writing; `link` is an equal file to link instead. A copy
    has its `entry` in that folder's manifest and the entries of the tensors that lie in it, `copied`.
    """

    path: str
    size: int
    specs: tuple[TensorSpec, ...] = ()
    content: bytes | None = None
    known: dict[str, str] = field(default_factory=dict)
    link: Path | None = None
    entry: FileEntry | None = None
    copy: Path | None = None
    copied: dict[str, TensorEntry] = field(default_factory=dict)


def plan_tensor_files(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[PlannedFile]:
    """Distributes tensors to files by the rule of `folder_layout`; a group comes where its first tensor's name does."""
    groups: dict[str, list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: spec.name):
        groups.setdefault(folder_layout.group_of(spec.name), []).append(spec)
    planned = []
    for group, members in groups.items():
        by_name = {spec.name: spec for spec in members}
        shards = folder_layout.cut_into_shards(((spec.name, spec.nbytes) for spec in members), max_shard_bytes)
        for path, names in zip(folder_layout.shard_paths(group, len(shards)), shards, strict=True):
            order = tuple(in_file_order(by_name[name] for name in names))
            size = len(make_header(order)) + sum(spec.nbytes for spec in order)
            planned.append(PlannedFile(path, size, specs=order))
    return planned


def plan_content(path: str, content: bytes) -> PlannedFile:
    """A file with the given content."""
    return PlannedFile(path, len(content), content=content)


def plan_tokenizer(files: Mapping[str, bytes]) -> list[PlannedFile]:
    """The tokenizer's files, name -> content; ValueError for a name that is no plain file name."""
    planned = []
    for name, content in sorted(files.items()):
        path = f"{folder_layout.TOKENIZER}/{name}"
        if "/" in name or not folder_layout.is_safe_path(path):
            raise ValueError(f"the tokenizer file name {name!r} is no plain file name")
        planned.append(plan_content(path, content))
    return planned


def check_tensor_names(names: Iterable[str], domains: Sequence[str]) -> None:
    """Raises ValueError for a tensor of a domain that is not listed, and for a reserved name."""
    for name in names:
        domain = parse_name(name).domain
        if domain is not None and domain not in domains:
            raise ValueError(f"tensor {name!r} belongs to {domain!r}, which is not among the domains {list(domains)}")
        if parse_name(name).module == PROBE or name == "__metadata__":
            raise ValueError(f"the tensor name {name!r} is reserved")


def probe_tensors(probe: Mapping[str, np.ndarray], domains: Sequence[str]) -> dict[str, np.ndarray]:
    """The probe, domain -> int32 [sequences, S + 1], by tensor name; ValueError if it is something else."""
    for domain, sequences in probe.items():
        if domain not in domains or sequences.dtype != np.int32 or sequences.ndim != 2:
            raise ValueError(f"the probe of {domain!r} must be int32 [sequences, S + 1] of one of the domains")
    return {probe_name(domain): sequences for domain, sequences in probe.items()}


def find_unchanged(
    planned: Sequence[PlannedFile], tensors: Mapping[str, np.ndarray], previous: Checkpoint, threads: Executor
) -> None:
    """Marks the files that `previous` holds with the same bytes.

    A file's tensors are hashed in `threads` until one differs; the hashes are kept for the writing.
    """
    for file in planned:
        entry = previous.manifest.files.get(file.path)
        if entry is None or entry.bytes != file.size:
            continue
        if file.content is not None:
            same = hashlib.sha256(file.content).hexdigest() == entry.sha256
        else:
            same = _same_tensors(file, tensors, previous.manifest, threads)
        if same:
            file.link, file.entry = previous.path / file.path, entry


def _same_tensors(file: PlannedFile, tensors: Mapping[str, np.ndarray], previous: Manifest, threads: Executor) -> bool:
    before = {}
    for spec in file.specs:
        entry = previous.tensors.get(spec.name)
        if entry is None or (entry.dtype, entry.shape) != (spec.dtype, spec.shape) or len(entry.slices) != 1:
            return False
        if entry.slices[0].file != file.path:
            return False
        before[spec.name] = entry.slices[0].sha256
    changed = Event()

    def compare(spec: TensorSpec) -> None:
        if changed.is_set():
            return
        digest = digest_of(tensors[spec.name])
        file.known[spec.name] = digest
        if digest != before[spec.name]:
            changed.set()

    # small tensors first: when a file has changed, they tell so at the least cost
    list(threads.map(compare, sorted(file.specs, key=lambda spec: spec.nbytes)))
    return not changed.is_set()
