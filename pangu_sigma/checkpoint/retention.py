"""Folders that are no checkpoints: being written, being replaced, being deleted, and what a killed process left.

Whoever works on such a folder holds a lock on it, which the system drops when the process ends, however it ends.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pangu_sigma.checkpoint import folder_layout

# between making a folder and locking it, its owner is told from a dead process of the same number by the folder's age
_GRACE_SECONDS = 60.0


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks the existing `folder` (it may be renamed meanwhile): no other process takes it for abandoned."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # a file system without locks refuses: the process number in the folder's name is what remains
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def working_folders(run_dir: Path) -> list[tuple[str, int, int, Path]]:
    """(kind, step, pid, path) of every folder of a run that is being written, replaced or deleted, or was left so."""
    found = []
    for path in _entries(run_dir):
        parsed = folder_layout.parse_folder(path)
        if parsed is not None and parsed[0] is not None:
            found.append((*parsed, path))
    return found


def list_checkpoints(run_dir: Path) -> tuple[list[tuple[int, Path]], list[Path]]:
    """([(step, folder)] of all folders with a manifest, oldest first; the step folders without one).

    A version that was being replaced when its process died counts, as long as the new one is not in place.
    """
    whole: dict[int, Path] = {}
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
            whole[step] = path
        else:
            replaced[step] = path
    return sorted({**replaced, **whole}.items()), unfinished


def remove_stale(run_dir: Path | str) -> list[str]:
    """Removes what killed processes left half written, half replaced or half deleted; returns a sentence for each.

    Call it when a training starts (a save does it too). Folders of living processes stay and are mentioned.
    """
    messages = []
    for kind, step, pid, path in working_folders(Path(run_dir)):
        if not abandoned(path, pid):
            messages.append(f"{path} stays: process {pid} is at work on it")
            continue
        final = path.with_name(folder_layout.step_name(step))
        try:
            if kind == "replaced" and not final.exists():
                os.rename(path, final)
                messages.append(f"{final} is back: the process that was replacing it ended before it was done")
            else:
                _delete(path)
                verb = {"tmp": "saving", "trash": "deleting", "replaced": "replacing"}[kind]
                messages.append(f"removed {path}, left by process {pid}, which ended while {verb} step {step}")
        except OSError as error:
            messages.append(f"{path}, left by process {pid}, could not be removed: {error.strerror}")
    return messages


def discard(folder: Path) -> None:
    """Deletes a checkpoint so that a kill half way leaves nothing that looks like one. Raises OSError."""
    _, step, _ = folder_layout.parse_folder(folder)
    trash = folder.with_name(folder_layout.working_name("trash", step, os.getpid()))
    with held(folder):
        os.rename(folder, trash)
        _delete(trash)


def prune(run_dir: Path, keep: int, newest: Path) -> tuple[list[Path], list[str]]:
    """Keeps the `keep` checkpoints of highest step and always `newest`; returns (deleted folders, what went wrong)."""
    checkpoints, _ = list_checkpoints(run_dir)
    others = [path for _, path in checkpoints if path != newest]
    deleted, messages = [], []
    for path in others[: max(0, len(others) - (keep - 1))]:
        try:
            discard(path)
            deleted.append(path)
        except OSError as error:
            messages.append(f"the old checkpoint {path} could not be deleted: {error.strerror}")
    return deleted, messages


def _delete(folder: Path) -> None:
    # the manifest goes first: whatever a kill leaves then, also under a name given by hand, is no checkpoint
    (folder / folder_layout.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _entries(run_dir: Path) -> list[Path]:
    root = run_dir / folder_layout.CHECKPOINTS
    return sorted(root.iterdir()) if root.is_dir() else []


def abandoned(folder: Path, pid: int) -> bool:
    """Whether nobody works on `folder` any more, which process `pid` made and held."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        locks = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            locks = False
        if pid == os.getpid() or not _exists(pid):
            return True
        return locks and time.time() - os.fstat(handle).st_mtime > _GRACE_SECONDS
    finally:
        os.close(handle)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
