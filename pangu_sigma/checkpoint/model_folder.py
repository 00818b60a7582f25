"""Model folder: a checkpoint without optimizer state, which stands alone and is written as a stream.

Layout and manifest are a checkpoint's, so whatever opens a checkpoint opens a model folder. Tensors come one after the
other, each in chunks, so memory holds a chunk, whatever the model's size. Files go into a hidden folder beside the
output, each synced to disk; then the manifest; then the folder gets its name in one rename.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.atomic_folder import hidden_beside, remove_abandoned, working_folder
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.file_plan import (
    PlannedFile,
    check_tensor_names,
    plan_content,
    plan_tensor_files,
    plan_tokenizer,
    probe_tensors,
)
from pangu_sigma.checkpoint.folder_writer import FolderWriter, sync_folder
from pangu_sigma.checkpoint.manifest import CoverageCell, Fingerprints, Manifest, coverage_cells, manifest_bytes
from pangu_sigma.checkpoint.tensor_file import TensorSpec, byte_chunks, spec_of
from pangu_sigma.errors import CheckpointError

CARD = "README.md"
_DOCUMENT_BYTES = 1 << 20  # room for what `finish` adds

TensorBytes = np.ndarray | Iterable[bytes | memoryview]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Contents of a model folder.

    tensors: every tensor's name, type and shape; the `domains.{d}.` of a name says whose it is. read(spec) gives that
    tensor: an array of its type and shape, or its bytes in C order in chunks (bytes-like; a chunk may be overwritten
    when the next is asked for). It is called once for each, in the order in which the files hold them.
    coverage: sparse layer -> domain -> number of experts; empty for a dense model. probe: domain -> int32 [n, S + 1].
    origin: where the model came from, anything that JSON holds. documents: further files by name, such as the model
    card `README.md`. copies: tensor files of another checkpoint that go in unchanged, which `tensors` does not repeat.

    Raises ValueError for what makes no whole model.
    """

    tensors: Sequence[TensorSpec]
    read: Callable[[TensorSpec], TensorBytes]
    domains: Sequence[str]
    coverage: Mapping[str, Mapping[str, int]]
    config_text: str
    tokenizer_files: Mapping[str, bytes]
    fingerprints: Fingerprints
    step: int = 0
    probe: Mapping[str, np.ndarray] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)
    copies: Sequence[PlannedFile] = ()
    max_shard_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        folder_layout.check_domains(self.domains)
        check_tensor_names((spec.name for spec in self._all_specs), self.domains)
        names = [spec.name for spec in self._all_specs]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is given twice")
        if states := [name for name in names if folder_layout.is_optimizer(name)]:
            raise ValueError(f"a model folder holds no optimizer state: {states[0]!r}")

    @cached_property
    def _all_specs(self) -> list[TensorSpec]:
        copied = {name: entry for file in self.copies for name, entry in file.copied.items()}
        return [*self.tensors, *(TensorSpec(name, entry.dtype, entry.shape) for name, entry in copied.items())]

    @property
    def tensor_count(self) -> int:
        """Number of the model's tensors, copied ones included."""
        return len(self._all_specs)

    @cached_property
    def cells(self) -> tuple[CoverageCell, ...]:
        """The expert groups, as the manifest lists them."""
        return coverage_cells(self.coverage, self.domains, self._all_specs)

    @cached_property
    def probe_arrays(self) -> dict[str, np.ndarray]:
        """The probe by tensor name."""
        return probe_tensors(self.probe, self.domains)

    @cached_property
    def files(self) -> list[PlannedFile]:
        """Every file but the manifest, with its size, in the order in which they are written."""
        specs = [*self.tensors, *(spec_of(name, array) for name, array in self.probe_arrays.items())]
        state = json.dumps({"origin": self.origin}, allow_nan=False, ensure_ascii=False, indent=1).encode()
        planned = sorted([*plan_tensor_files(specs, self.max_shard_bytes), *self.copies], key=lambda file: file.path)
        planned += [
            plan_content(folder_layout.CONFIG, self.config_text.encode()),
            plan_content(folder_layout.STATE, state),
        ]
        planned += plan_tokenizer(self.tokenizer_files)
        planned += [plan_document(name, text) for name, text in self.documents.items()]
        return planned

    @property
    def bytes(self) -> int:
        """Bytes of all these files."""
        return sum(file.size for file in self.files)


def plan_document(name: str, text: str) -> PlannedFile:
    """A text that lies in the folder beside the tensors; ValueError for a name that is taken or no plain file name."""
    taken = {folder_layout.CONFIG, folder_layout.STATE, folder_layout.MANIFEST, folder_layout.TOKENIZER}
    if "/" in name or not folder_layout.is_safe_path(name) or name in taken or name.endswith(folder_layout.ENDING):
        raise ValueError(f"a document of a model folder cannot be named {name!r}")
    return plan_content(name, text.encode())


def check_output(out: Path | str) -> Path:
    """The absolute path of a folder that can be written to, links followed; CheckpointError if it is there and full."""
    path = Path(os.path.realpath(os.path.expanduser(out)))
    if path.parent.name == folder_layout.CHECKPOINTS:
        raise CheckpointError(f"{out} lies among a run's checkpoints: choose another folder for the model")
    if path.is_dir():
        if next(path.iterdir(), None) is not None:
            raise CheckpointError(f"{out} exists and is not empty: choose another folder or empty it")
    elif path.exists():
        raise CheckpointError(f"{out} is a file: choose a folder for the model")
    return path


def check_space(out: Path | str, model: ModelFolder) -> int:
    """The bytes that the folder needs on the disk of `out`; CheckpointError when they are not free."""
    path = check_output(out)
    where = next(parent for parent in path.parents if parent.is_dir())
    return _disk_write(path, where).check_space(
        [*(file.size for file in model.files), _DOCUMENT_BYTES], model.tensor_count
    )


def write_model_folder(
    out: Path | str,
    model: ModelFolder,
    *,
    finish: Callable[[Checkpoint], Mapping[str, str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Writes the folder `out` and opens it. `progress(bytes_done, bytes_total)` is called in this thread.

    `finish` gets the written model before it has its manifest and name (for a verification), and returns further
    documents, name -> text; what it raises ends the writing. Whatever ends it, Ctrl-C too, leaves nothing behind;
    what a killed process left goes with the next writing of the same folder.

    Raises CheckpointError when `out` is there and not empty, when the disk is too small (before anything is written)
    or fails, and for a copied file that is damaged; ValueError for tensors that are not what `model` says.
    """
    final = check_output(out)
    disk_write = _disk_write(final, final.parent)
    with disk_write.explain_errors():
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(final)
    needed = check_space(final, model)
    temporary = hidden_beside(final)
    with ThreadPoolExecutor(2) as threads, disk_write.explain_errors(needed), working_folder(temporary):
        writer = FolderWriter(temporary, lambda spec: _chunks_of(model, spec), threads, model.bytes, progress)
        writer.copy(model.copies)
        for file in model.files:
            if file.copy is None:
                writer.write(file)
        if finish is not None:
            written = Checkpoint(temporary, _manifest(model, writer))
            for name, text in finish(written).items():
                writer.write(plan_document(name, text))
        manifest = _manifest(model, writer)
        writer.finish(manifest_bytes(manifest))
        os.rename(temporary, final)
        sync_folder(final.parent)
    return Checkpoint(final, manifest)


def _manifest(model: ModelFolder, writer: FolderWriter) -> Manifest:
    return Manifest(
        format_version=folder_layout.FORMAT_VERSION,
        step=model.step,
        domains=tuple(model.domains),
        fingerprints=model.fingerprints,
        coverage=model.cells,
        files=writer.files,
        tensors=dict(sorted(writer.tensors.items())),
    )


def _chunks_of(model: ModelFolder, spec: TensorSpec) -> Iterator[bytes | memoryview]:
    given = model.probe_arrays.get(spec.name)
    if given is None:
        given = model.read(spec)
    if not isinstance(given, np.ndarray):
        yield from given
        return
    if spec_of(spec.name, given) != spec:
        raise ValueError(f"tensor {spec.name!r} came as {given.dtype} {list(given.shape)}, not as {spec}")
    yield from byte_chunks(given)


def _disk_write(final: Path, where: Path) -> DiskWrite:
    return DiskWrite(str(final), "written", where, "choose another folder")
