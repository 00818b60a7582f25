"""Checkpoint edit: another checkpoint's files and a few new ones; no byte of a domain that stays is touched.

Files that stay are hard-linked (copied where the file system has no links) after their hashes were checked; what is new
is streamed. All of it goes into a hidden folder that gets its name in one rename, as a save does.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.atomic_folder import hidden_beside, remove_abandoned, working_folder
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.file_plan import (
    PlannedFile,
    check_tensor_names,
    plan_content,
    plan_tensor_files,
    plan_tokenizer,
    probe_tensors,
)
from pangu_sigma.checkpoint.folder_writer import FolderWriter, sync_folder, write_synced
from pangu_sigma.checkpoint.manifest import Fingerprints, Manifest, coverage_cells, manifest_bytes
from pangu_sigma.checkpoint.model_folder import TensorBytes, check_output
from pangu_sigma.checkpoint.retention import remove_stale
from pangu_sigma.checkpoint.save_checkpoint import move_into_place
from pangu_sigma.checkpoint.tensor_file import TensorSpec, byte_chunks, spec_of


@dataclass(frozen=True, kw_only=True)
class EditedCheckpoint:
    """Contents of a checkpoint that is made from another one.

    kept: whole tensor files that stay (see `kept_files`). tensors and read: the new tensors, each an array or its bytes
    in chunks when it is asked for. coverage: sparse layer -> domain -> number of experts. probe: domain -> int32 [n, S
    + 1]. state: anything JSON holds. Raises ValueError for what makes no whole checkpoint.
    """

    kept: Sequence[PlannedFile]
    tensors: Sequence[TensorSpec]
    read: Callable[[TensorSpec], TensorBytes]
    domains: Sequence[str]
    coverage: Mapping[str, Mapping[str, int]]
    config_text: str
    state: Mapping[str, Any]
    tokenizer_files: Mapping[str, bytes]
    fingerprints: Fingerprints
    step: int
    probe: Mapping[str, np.ndarray] = field(default_factory=dict)
    max_shard_bytes: int = 4 << 30

    def specs(self) -> list[TensorSpec]:
        """Every tensor but the probe."""
        kept = {name: entry for file in self.kept for name, entry in file.copied.items()}
        return [*self.tensors, *(TensorSpec(name, entry.dtype, entry.shape) for name, entry in kept.items())]

    def new_files(self) -> list[PlannedFile]:
        """The files that are written, with their sizes."""
        given = [spec_of(name, array) for name, array in probe_tensors(self.probe, self.domains).items()]
        state = json.dumps(self.state, allow_nan=False, ensure_ascii=False).encode()
        planned = plan_tensor_files([*self.tensors, *given], self.max_shard_bytes)
        planned += [
            plan_content(folder_layout.CONFIG, self.config_text.encode()),
            plan_content(folder_layout.STATE, state),
        ]
        return planned + plan_tokenizer(self.tokenizer_files)


def kept_files(checkpoint: Checkpoint, groups: Collection[str]) -> list[PlannedFile]:
    """The tensor files of `checkpoint` that belong to `groups` (`folder_layout.group_of`), for another folder."""
    tensors: dict[str, dict] = {}
    for name, entry in checkpoint.manifest.tensors.items():
        for piece in entry.slices:
            tensors.setdefault(piece.file, {})[name] = entry
    return [
        PlannedFile(path, entry.bytes, entry=entry, copy=checkpoint.path / path, copied=tensors.get(path, {}))
        for path, entry in checkpoint.manifest.files.items()
        if folder_layout.group_of_file(path) in groups
    ]


def replace_checkpoint(
    run_dir: Path, content: EditedCheckpoint, progress: Callable[[int, int], None] | None = None
) -> Checkpoint:
    """Puts `content` in the place of the run's checkpoint of the same step; every moment one of the two stands whole.

    The caller holds the run's lock. Raises CheckpointError when the disk is too small or fails: the old one stays.
    """
    root = run_dir / folder_layout.CHECKPOINTS
    disk_write = DiskWrite(f"the change of {run_dir}", "written", root, "use --out", " (the checkpoint is as it was)")
    remove_stale(run_dir)
    temporary = root / folder_layout.working_name("tmp", content.step, os.getpid())

    def publish() -> Path:
        return move_into_place(temporary, root / folder_layout.step_name(content.step))

    return open_checkpoint(_write(temporary, temporary, content, disk_write, publish, progress))


def write_edited_run(
    out: Path | str, content: EditedCheckpoint, progress: Callable[[int, int], None] | None = None
) -> Checkpoint:
    """Writes the new run folder `out` with one checkpoint and its `config.yaml`; `out` is not there or empty."""
    final, temporary, disk_write = _new_folder(out)
    inside = Path(folder_layout.CHECKPOINTS) / folder_layout.step_name(content.step)

    def publish() -> Path:
        write_synced(temporary / folder_layout.CONFIG, content.config_text.encode())
        for folder in ((temporary / inside).parent, temporary):
            sync_folder(folder)
        return _rename(temporary, final) / inside

    return open_checkpoint(_write(temporary, temporary / inside, content, disk_write, publish, progress))


def write_edited_folder(
    out: Path | str, content: EditedCheckpoint, progress: Callable[[int, int], None] | None = None
) -> Checkpoint:
    """Writes the folder `out` that is itself the checkpoint (a model folder); `out` is not there or empty."""
    final, temporary, disk_write = _new_folder(out)
    return open_checkpoint(
        _write(temporary, temporary, content, disk_write, lambda: _rename(temporary, final), progress)
    )


def _new_folder(out: Path | str) -> tuple[Path, Path, DiskWrite]:
    final = check_output(out)
    disk_write = DiskWrite(str(final), "written", final.parent, "choose another folder")
    with disk_write.explain_errors():
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(final)
    return final, hidden_beside(final), disk_write


def _rename(temporary: Path, final: Path) -> Path:
    os.rename(temporary, final)
    sync_folder(final.parent)
    return final


def _write(
    temporary: Path,
    folder: Path,
    content: EditedCheckpoint,
    disk_write: DiskWrite,
    publish: Callable[[], Path],
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Fill `folder` (`temporary` or inside it), then `publish` renames it; a failure leaves nothing."""
    folder_layout.check_domains(content.domains)
    specs = content.specs()
    check_tensor_names((spec.name for spec in specs), content.domains)
    cells = coverage_cells(content.coverage, content.domains, specs)
    new = content.new_files()
    given = probe_tensors(content.probe, content.domains)
    needed = disk_write.check_space((file.size for file in new), len(specs))
    total = sum(file.size for file in (*new, *content.kept))

    def read(spec: TensorSpec):
        values = given[spec.name] if spec.name in given else content.read(spec)
        if not isinstance(values, np.ndarray):
            return values
        if spec_of(spec.name, values) != spec:
            raise ValueError(f"tensor {spec.name!r} came as {values.dtype} {list(values.shape)}, not as {spec}")
        return byte_chunks(values)

    with ThreadPoolExecutor(2) as threads, disk_write.explain_errors(needed), working_folder(temporary):
        folder.mkdir(parents=True, exist_ok=True)
        writer = FolderWriter(folder, read, threads, total, progress)
        writer.adopt(content.kept)
        for file in new:
            writer.write(file)
        manifest = Manifest(
            format_version=folder_layout.FORMAT_VERSION,
            step=content.step,
            domains=tuple(content.domains),
            fingerprints=content.fingerprints,
            coverage=cells,
            files=writer.files,
            tensors=dict(sorted(writer.tensors.items())),
        )
        writer.finish(manifest_bytes(manifest))
        return publish()
