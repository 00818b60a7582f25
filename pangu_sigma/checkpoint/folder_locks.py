"""Lock on a run's folder: one job in it at a time, and nothing of a job that was refused.

A flock lock, which the system drops when the process that holds it ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.errors import UserError, disk_advice
from pangu_sigma.monitor.metrics_log import FILE_NAME as METRICS
from parallel.comm.atomic_folder import make_parents, remove_empty
from parallel.comm.plain_files import open_for_writing

LOCK = ".lock"
STAGES = "stages"  # of a lifelong measurement: a run each
# What a job makes in a run's folder before the run has begun.
_PREPARED = ("data", "mindspore")
# Tokenised text of this size took long to make, and the next job finds it: it is not thrown away with a refused one.
_KEPT_BYTES = 64 << 20

# Files by which a folder that is no run holds a model: exported here, or by others.
_WEIGHTS = frozenset({".safetensors", ".onnx", ".mindir", ".ckpt", ".gguf", ".pt", ".pth"})


def refuse_model_folder(folder: Path) -> None:
    """Raises UserError where a run would be written into a folder that holds a model, or below one."""
    real = folder.expanduser().resolve()
    is_run = (real / folder_layout.CHECKPOINTS).is_dir()
    weights = [] if is_run or not real.is_dir() else sorted(f for f in real.iterdir() if f.suffix.lower() in _WEIGHTS)
    files = (folder_layout.MANIFEST, folder_layout.CONFIG)
    models = [path for path in (real, *real.parents) if all((path / name).is_file() for name in files)]
    for path in (*models, *weights):
        raise UserError(
            f"a run cannot be written to {folder}, where a model lies ({path}): set run.dir to a new folder"
        )


@contextmanager
def lock_run_folder(
    folder: Path,
    taken: str = "another process is training in",
    run_dir: Path | None = None,
    prepared: Sequence[str] | None = _PREPARED,
) -> Iterator[None]:
    """Lock a run's folder, made if needed, against a second job.

    A job that ends by an error before its run has begun leaves nothing: what it `prepared` in the folder goes, and the
    folder and its parents where they are its own. Tokenised text of more than 64 MiB stays for the next one.
    prepared: names; None for all that is new, unless the error names a file of it (a log). run_dir: whose run it is,
    where `folder` lies in it.

    Raises UserError if the folder holds a model, cannot be written or is locked already; its sentence then begins with
    `taken`.
    """
    refuse_model_folder(folder)
    with _parents_removed_if_empty(folder):
        handle = _lock(folder, taken)
        try:
            with ExitStack() as stack:
                if run_dir is not None and run_dir != folder:
                    stack.enter_context(_new_of_workers_removed(run_dir))
                stack.enter_context(_new_removed(folder, prepared, run_dir or folder))
                yield
        finally:
            os.close(handle)


@contextmanager
def removed_if_refused(folder: Path, prepared: Sequence[str]) -> Iterator[None]:
    """What `lock_run_folder` does beside locking, for a job that prepares a folder in which no run begins."""
    with _parents_removed_if_empty(folder), _new_removed(folder, prepared, folder):
        yield


@contextmanager
def _new_removed(folder: Path, prepared: Sequence[str] | None, run_dir: Path) -> Iterator[None]:
    before = set(os.listdir(folder)) - {LOCK}
    try:
        yield
    except BaseException as error:
        names_log = prepared is None and f"{folder}{os.sep}" in str(error)
        if not _has_begun(run_dir) and not names_log:
            _remove(folder, {LOCK, *(os.listdir(folder) if prepared is None else prepared)} - before)
        raise


@contextmanager
def _new_of_workers_removed(run_dir: Path) -> Iterator[None]:
    """Remove what processes that have ended made in their run's folder, unless another job has the run by now."""
    before = set(os.listdir(run_dir))
    try:
        yield
    except BaseException:
        with suppress(UserError):
            handle = _lock(run_dir, "")
            if not _has_begun(run_dir):
                _remove(run_dir, {LOCK, *_PREPARED} - before)
            os.close(handle)
        raise


@contextmanager
def _parents_removed_if_empty(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; where the block ends by an error, those it made go again if nothing is in them."""
    try:
        made = make_parents(folder / LOCK)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def _lock(folder: Path, taken: str) -> int:
    path = folder / LOCK
    while True:
        try:
            handle = open_for_writing(path)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A refused job removes its lock's file: who opened that just before has a lock that nobody else sees.
            with suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except OSError as error:
            os.close(handle)
            raise UserError(f"{taken} {folder}: wait for it or set another run.dir") from error
        os.close(handle)


def _cannot_write(folder: Path, error: OSError) -> UserError:
    place = f"{error.filename}: " if error.filename and Path(error.filename) != folder else ""
    advice = disk_advice(error.errno, "choose another folder")
    return UserError(f"run.dir {folder} cannot be written ({place}{error.strerror}): {advice}")


def _has_begun(run_dir: Path) -> bool:
    begun = (folder_layout.CONFIG, folder_layout.CHECKPOINTS, METRICS, STAGES)
    return any((run_dir / name).exists() for name in begun)


def _remove(folder: Path, names: Collection[str]) -> None:
    """Remove what a refused job made, unless it is worth keeping; the lock's file too."""
    if sum(path.lstat().st_size for name in names for path in (folder / name).rglob("*.bin")) > _KEPT_BYTES:
        return
    for path in (folder / name for name in names):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
