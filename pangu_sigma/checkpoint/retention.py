"""Checkpoint retention: a run's checkpoints, deleting the old ones, and cleaning up after killed processes.

Beside finished checkpoints there are hidden folders: being written (`tmp`), being replaced (`replaced`), being deleted
(`trash`). Whoever works on one holds a lock on it (`atomic_folder`).
"""

import os
import shutil
from pathlib import Path

from pangu_sigma.checkpoint import folder_layout
from parallel.comm.atomic_folder import is_abandoned, lock_working_folder


def working_folders(run_dir: Path) -> list[tuple[str, int, int, Path]]:
    """(kind, step, pid, path) of every folder of a run that is being written, replaced or deleted, or was left so."""
    folders = []
    for path in _entries(run_dir):
        parsed = folder_layout.parse_folder(path)
        if parsed is not None and parsed[0] is not None:
            folders.append((*parsed, path))
    return folders


def list_checkpoints(run_dir: Path) -> tuple[list[tuple[int, Path]], list[Path]]:
    """([(step, folder)] of all folders with a manifest, oldest first; the step folders without one).

    A version that was being replaced when its process died counts, as long as the new one is not in place.
    """
    finished: dict[int, Path] = {}
    replaced: dict[int, Path] = {}
    unfinished = []
    for path in _entries(run_dir):
        parsed = folder_layout.parse_folder(path)
        if parsed is None or parsed[0] not in (None, "replaced"):
            continue
        kind, step, _ = parsed
        if not os.path.lexists(path / folder_layout.MANIFEST):
            unfinished.extend([path] if kind is None else [])
        elif kind is None:
            finished[step] = path
        else:
            replaced[step] = path
    return sorted({**replaced, **finished}.items()), unfinished


def remove_stale(run_dir: Path | str) -> list[str]:
    """Remove what killed processes left half written, half replaced or half deleted; returns a sentence for each.

    Call it when a training starts (a save does it too). Folders of living processes stay and are mentioned.
    """
    messages = []
    for kind, step, pid, path in working_folders(Path(run_dir)):
        if not is_abandoned(path, pid):
            messages.append(f"{path} stays: process {pid} is at work on it")
            continue
        final = path.with_name(folder_layout.step_name(step))
        try:
            if kind == "replaced" and not final.exists():
                os.rename(path, final)
                messages.append(f"{final} is back: the process that was replacing it ended before it was done")
            else:
                delete_folder(path)
                verb = {"tmp": "saving", "trash": "deleting", "replaced": "replacing"}[kind]
                messages.append(f"removed {path}, left by process {pid}, which ended while {verb} step {step}")
        except OSError as error:
            messages.append(f"{path}, left by process {pid}, could not be removed: {error.strerror}")
    return messages


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill half way leaves nothing that looks like one. Raises OSError."""
    _, step, _ = folder_layout.parse_folder(folder)
    trash = folder.with_name(folder_layout.working_name("trash", step, os.getpid()))
    with lock_working_folder(folder):
        os.rename(folder, trash)
        delete_folder(trash)


def prune_checkpoints(run_dir: Path, keep: int, newest: Path) -> list[str]:
    """Keep the `keep` checkpoints of highest step and always `newest`, delete the others; returns what went wrong."""
    checkpoints, _ = list_checkpoints(run_dir)
    others = [path for _, path in checkpoints if path != newest]
    messages = []
    for path in others[: max(0, len(others) - (keep - 1))]:
        try:
            delete_checkpoint(path)
        except OSError as error:
            messages.append(f"the old checkpoint {path} could not be deleted: {error.strerror}")
    return messages


def delete_folder(folder: Path) -> None:
    """Delete a folder so that whatever a kill leaves, also under a name given by hand, is no checkpoint: its manifest
    goes first. Raises OSError."""
    (folder / folder_layout.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _entries(run_dir: Path) -> list[Path]:
    root = run_dir / folder_layout.CHECKPOINTS
    return sorted(root.iterdir()) if root.is_dir() else []
