"""Streamed checkpoint: one whose tensors are asked for one after the other, beside whole files of other checkpoints.

Memory holds a chunk, whatever the model's size. Files that stay as they are come in by a hard link (an edit of a
checkpoint) or a copy (a folder that must stand alone), after or while their hashes are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_contents import CheckpointContents
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.file_plan import PlannedFile, plan_content, plan_tensor_files
from pangu_sigma.checkpoint.folder_writer import FolderWriter
from pangu_sigma.checkpoint.manifest import CoverageCell, Manifest
from pangu_sigma.checkpoint.tensor_file import TensorSpec, byte_chunks, spec_of

TensorBytes = np.ndarray | Iterable[bytes | memoryview]
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
# Gets the written model before it has its manifest; returns further documents, name -> text.
Finish = Callable[[Checkpoint], Mapping[str, str]]

DOCUMENT_BYTES = 1 << 20  # room for what `finish` adds


@dataclass(frozen=True, kw_only=True)
class StreamedCheckpoint(CheckpointContents):
    """Contents of a checkpoint or model folder with its tensors.

    tensors: every tensor's name, type and shape; the `domains.{d}.` of a name says whose it is. read(spec) gives that
    tensor: an array of its type and shape, or its bytes in C order in chunks (bytes-like; a chunk may be overwritten
    when the next is asked for). It is called once for each, in the order in which the files hold them.
    taken: tensor files of other checkpoints that go in unchanged (`plan_taken`), which `tensors` does not repeat; with
    `link` as hard links where the file system has them. documents: further files by name, such as the model card.

    Raises ValueError for what makes no whole model.
    """

    tensors: Sequence[TensorSpec] = ()
    read: Callable[[TensorSpec], TensorBytes] | None = None
    taken: Sequence[PlannedFile] = ()
    link: bool = False
    documents: Mapping[str, str] = field(default_factory=dict)
    max_shard_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is given twice")
        self.expert_groups  # noqa: B018 - raises

    @cached_property
    def expert_groups(self) -> tuple[CoverageCell, ...]:
        """The expert groups, as the manifest lists them."""
        return self.expert_groups_of(self.specs)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """Every tensor but the probe, those of taken files included."""
        taken = {name: entry for file in self.taken for name, entry in file.copied.items()}
        return [*self.tensors, *(TensorSpec(name, entry.dtype, entry.shape) for name, entry in taken.items())]

    @cached_property
    def new_files(self) -> list[PlannedFile]:
        """The files that are written, in their order, with their sizes; the manifest is not among them."""
        specs = [*self.tensors, *(spec_of(name, array) for name, array in self.probe_arrays.items())]
        documents = [plan_document(name, text) for name, text in self.documents.items()]
        return [*plan_tensor_files(specs, self.max_shard_bytes), *self.small_files(), *documents]

    @property
    def files(self) -> list[PlannedFile]:
        """Every file but the manifest."""
        return [*self.taken, *self.new_files]

    @property
    def bytes(self) -> int:
        """Bytes of all these files."""
        return sum(file.size for file in self.files)

    def check_space(self, disk_write: DiskWrite, documents: int = 0) -> None:
        """Raises CheckpointError unless everything that is no link has room on the disk, and `documents` more bytes."""
        written = self.new_files if self.link else self.files
        disk_write.check_space([documents, *(file.size for file in written if file.link is None)], len(self.specs))

    def write_into(
        self,
        folder: Path,
        disk_write: DiskWrite,
        progress: Progress | None = None,
        finish: Finish | None = None,
    ) -> tuple[Manifest, FolderWriter]:
        """Write all files into `folder`, each synced to disk, the manifest last; `progress` is called in this thread.

        Raises CheckpointError for a disk that is too small (before anything is written) and for a taken file that is
        damaged, OSError, and ValueError for tensors that are not what they should be.
        """
        self.check_space(disk_write, 0 if finish is None else DOCUMENT_BYTES)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as threads:
            writer = FolderWriter(folder, self._chunks, threads, self.bytes, progress)
            if self.link:
                writer.adopt(self.taken)
            else:
                writer.copy(self.taken)
            for file in self.new_files:
                writer.write(file)
            manifest = self.manifest(self.expert_groups, writer.files, writer.tensors)
            if finish is not None:
                for name, text in finish(Checkpoint(folder, manifest)).items():
                    writer.write(plan_document(name, text))
                manifest = manifest.model_copy(update={"files": dict(writer.files)})
            writer.finish(manifest)
        return manifest, writer

    def _chunks(self, spec: TensorSpec) -> Iterator[bytes | memoryview]:
        given = self.probe_arrays.get(spec.name)
        if given is None:
            given = self.read(spec)
        if not isinstance(given, np.ndarray):
            yield from given
            return
        if spec_of(spec.name, given) != spec:
            raise ValueError(f"tensor {spec.name!r} came as {given.dtype} {list(given.shape)}, not as {spec}")
        yield from byte_chunks(given)


def plan_taken(checkpoint: Checkpoint, groups: Collection[str]) -> list[PlannedFile]:
    """The tensor files of `checkpoint` that belong to `groups` (`folder_layout.group_of`), for another folder."""
    return [
        PlannedFile(
            path, entry.bytes, entry=entry, copy=checkpoint.path / path, copied=checkpoint.tensors_by_file.get(path, {})
        )
        for path, entry in checkpoint.manifest.files.items()
        if folder_layout.group_of_file(path) in groups
    ]


def plan_document(name: str, text: str) -> PlannedFile:
    """A text that lies in the folder beside the tensors; ValueError for a name that is taken or no plain file name."""
    taken = {folder_layout.CONFIG, folder_layout.STATE, folder_layout.MANIFEST, folder_layout.TOKENIZER}
    if "/" in name or not folder_layout.is_safe_path(name) or name in taken or name.endswith(folder_layout.ENDING):
        raise ValueError(f"a document of a model folder cannot be named {name!r}")
    return plan_content(name, text.encode())
