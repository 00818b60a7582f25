"""Teacher snapshot: the frozen model of a regularised phase, kept with the run.

    run/previous/step-00000300/                     a model folder: the weights when the phase
                                                    began, or before the model grew
    run/previous/step-00000300.fisher.safetensors   the Fisher information of its shared parameters, for ewc

A checkpoint's state names both with their hashes, so that a resumed phase has the same teacher or is refused.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import (
    Checkpoint,
    CheckpointError,
    StreamedCheckpoint,
    folder_layout,
    open_checkpoint,
    write_model_folder,
)
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.retention import delete_folder
from pangu_sigma.checkpoint.safetensors_header import load_safetensors
from pangu_sigma.checkpoint.streamed_checkpoint import plan_taken
from pangu_sigma.checkpoint.tensor_file import byte_chunks, digest_of_file, spec_of, write_tensor_file
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.result_files import atomic_file
from parallel.comm.atomic_folder import rename_synced, sync_folder

FOLDER = "previous"
# Key of the trainer state that names the teacher of the phase under way.
TEACHER_KEY = "previous"


@dataclass(frozen=True)
class TeacherSnapshot:
    """Identity of a phase's teacher, as a checkpoint's state keeps it.

    phase: its index. step: optimizer steps done when it began. model: `hash_tensors` of the teacher. fisher: sha256 of
    the Fisher information's file, None without one.
    """

    phase: int
    step: int
    model: str
    fisher: str | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> TeacherSnapshot | None:
        """The snapshot that a checkpoint's state names, None if it names none."""
        fields = state.get(TEACHER_KEY)
        return cls(**fields) if fields else None


def hash_tensors(model: Checkpoint) -> str:
    """SHA-256 over the names and hashes of the tensors of `model`, wherever it lies and however it is configured."""
    running = hashlib.sha256()
    for name in model.names(optimizer=False):
        for piece in model.manifest.tensors[name].slices:
            running.update(f"{name} {piece.offset} {piece.sha256}\n".encode())
    return running.hexdigest()


def snapshot_path(run_dir: Path, step: int) -> Path:
    """Where the teacher of a phase that began at `step` lies."""
    return run_dir / FOLDER / folder_layout.step_name(step)


def fisher_path(run_dir: Path, step: int) -> Path:
    """Where its Fisher information lies."""
    return run_dir / FOLDER / f"{folder_layout.step_name(step)}.fisher.safetensors"


def working_folder(run_dir: Path, step: int) -> Path:
    """Where a teacher is saved before `publish_saved` moves it to `snapshot_path`."""
    return run_dir / FOLDER / f".{folder_layout.step_name(step)}"


def publish_saved(run_dir: Path, saved: Path) -> None:
    """Make what was `saved` in the working folder the snapshot of its step; what a killed process left is replaced."""
    step = folder_layout.parse_folder(saved)[1]
    rename_synced(saved, _free_path(run_dir, step))
    shutil.rmtree(working_folder(run_dir, step))


def link_snapshot(run_dir: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Make the model of `checkpoint` the snapshot of its step; its files are hard-linked. Raises CheckpointError."""
    groups = ["shared", *(f"domains/{name}" for name in checkpoint.domains)]
    content = StreamedCheckpoint(
        taken=plan_taken(checkpoint, groups),
        link=True,
        domains=list(checkpoint.domains),
        coverage=checkpoint.coverage,
        config_text=checkpoint.config_text,
        state={"origin": {"job": "previous model", "sha256": checkpoint.sha256}},
        tokenizer_files=checkpoint.tokenizer_files(),
        fingerprints=checkpoint.fingerprints,
        step=checkpoint.step,
        probe=checkpoint.probe(),
    )
    return write_model_folder(_free_path(run_dir, checkpoint.step), content)


def _free_path(run_dir: Path, step: int) -> Path:
    path = snapshot_path(run_dir, step)
    if path.exists():
        delete_folder(path)
    return path


def open_snapshot(run_dir: Path, snapshot: TeacherSnapshot) -> Checkpoint:
    """The teacher that `snapshot` names. Raises UserError where it is missing or another one."""
    path = snapshot_path(run_dir, snapshot.step)
    advice = f"restore {run_dir / FOLDER}, without which phase {snapshot.phase} cannot go on"
    try:
        model = open_checkpoint(path)
    except CheckpointError as error:
        raise UserError(f"the previous model {path} is missing or damaged ({error}); {advice}") from error
    if hash_tensors(model) != snapshot.model:
        raise UserError(f"the previous model {path} is not the one that the checkpoint names; {advice}")
    return model


def write_fisher(run_dir: Path, step: int, fisher: Mapping[str, np.ndarray]) -> str:
    """Write the Fisher information by parameter name; returns the file's sha256. Raises CheckpointError."""
    path = fisher_path(run_dir, step)
    disk_write = DiskWrite(f"the Fisher information of step {step}", "saved", run_dir, "choose another run.dir")
    with disk_write.explain_errors(), ThreadPoolExecutor(2) as threads:
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = [spec_of(name, array) for name, array in fisher.items()]
        with atomic_file(path) as temporary:
            done = write_tensor_file(
                temporary, specs, lambda spec: byte_chunks(fisher[spec.name]), {}, threads, lambda count: None
            )
        sync_folder(path.parent)
    return done.sha256


def read_fisher(run_dir: Path, snapshot: TeacherSnapshot) -> dict[str, np.ndarray]:
    """The Fisher information that `snapshot` names: float32 by parameter name.

    Raises UserError where it is missing or another one."""
    path = fisher_path(run_dir, snapshot.step)
    try:
        _, digest = digest_of_file(path)
    except CheckpointError as error:
        raise UserError(f"the Fisher information {path} cannot be read: restore it to resume") from error
    if digest != snapshot.fisher:
        raise UserError(f"the Fisher information {path} is not what the checkpoint names: restore it to resume")
    return load_safetensors(path)


def remove_unneeded(run_dir: Path, needed_steps: set[int]) -> None:
    """Delete the snapshots of all other steps than `needed_steps`, and what killed processes left unfinished."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return
    for path in folder.glob(".*step-*"):  # left by killed processes: nobody else writes here while the run is locked
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(folder.glob("step-*")):
        parsed = folder_layout.parse_folder(path.with_name(path.name.split(".")[0]))
        if parsed is None or parsed[1] in needed_steps:
            continue
        delete = delete_folder if path.is_dir() else Path.unlink
        delete(path)
