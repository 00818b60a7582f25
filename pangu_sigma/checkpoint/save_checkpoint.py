"""Checkpoint save by one process, atomic: at every moment the folder that carries a checkpoint's name is whole.

Files go into a hidden folder, each synced to disk; then the manifest; then the folder gets its name in one rename. A
process that dies on the way leaves a hidden folder, which nobody takes for a checkpoint and the next save removes.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.atomic_folder import working_folder
from pangu_sigma.checkpoint.checkpoint_contents import CheckpointContents
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.file_plan import find_unchanged, plan_tensor_files
from pangu_sigma.checkpoint.folder_locks import lock_working_folder
from pangu_sigma.checkpoint.folder_writer import FolderWriter, sync_folder
from pangu_sigma.checkpoint.retention import delete_checkpoint, list_checkpoints, prune_checkpoints, remove_stale
from pangu_sigma.checkpoint.tensor_file import byte_chunks, spec_of
from pangu_sigma.errors import CheckpointError


@dataclass(frozen=True)
class SaveResult:
    """Result of a save. `links_refused` counts unchanged files that had to be written because no link was possible."""

    path: Path
    bytes_written: int
    bytes_linked: int
    links_refused: int
    seconds: float
    deleted: tuple[Path, ...]
    messages: tuple[str, ...]


def save_checkpoint(
    run_dir: Path | str,
    contents: CheckpointContents,
    tensors: Mapping[str, np.ndarray],
    *,
    keep: int,
    max_shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> SaveResult:
    """Saves `run_dir/checkpoints/step-…`, then deletes all but the `keep` newest checkpoints.

    tensors: name → array, of the shapes the model has; written without a copy (non-contiguous: one at a time).
    progress(bytes_done, bytes_total) is called in this thread while files are written.

    Files whose content the newest checkpoint has already are hard-linked. A checkpoint of the same step is replaced.
    Raises CheckpointError when the disk is too small or fails (the last checkpoint stays whole, nothing is left
    behind), ValueError for arguments that make no whole checkpoint.
    """
    started = time.perf_counter()
    run_dir, step = Path(run_dir), contents.step
    if keep < 1 or max_shard_bytes < 1:
        raise ValueError(f"{keep=} and {max_shard_bytes=} must be at least 1")
    contents.check_names(tensors)
    everything = {**tensors, **contents.probe_arrays}
    specs = [spec_of(name, array) for name, array in everything.items()]
    cells = contents.cells(specs)
    planned = plan_tensor_files(specs, max_shard_bytes) + contents.small_files()

    root = run_dir / folder_layout.CHECKPOINTS
    disk_write = DiskWrite(f"step {step}", "saved", root, "choose another run.dir", " (the last checkpoint is whole)")
    with disk_write.explain_errors():
        root.mkdir(parents=True, exist_ok=True)
    messages = remove_stale(run_dir)
    previous, new_messages = open_previous(run_dir, step)
    messages += new_messages
    temporary = root / folder_layout.working_name("tmp", step, os.getpid())
    with ThreadPoolExecutor(2) as threads:
        if previous is not None:
            find_unchanged(planned, everything, previous, threads)
        needed = disk_write.check_space((file.size for file in planned if file.link is None), len(specs))
        with disk_write.explain_errors(needed), working_folder(temporary):
            total = sum(file.size for file in planned)
            writer = FolderWriter(temporary, lambda spec: byte_chunks(everything[spec.name]), threads, total, progress)
            for file in planned:
                writer.write(file)
            writer.finish(contents.manifest(cells, writer.files, writer.tensors))
            final = move_into_place(temporary, root / folder_layout.step_name(step))
    deleted, new_messages = prune_checkpoints(run_dir, keep, final)
    if writer.links_refused:
        messages.append(f"{writer.links_refused} unchanged files were written again: {root} refused to link them")
    return SaveResult(
        path=final,
        bytes_written=writer.bytes_written,
        bytes_linked=writer.bytes_linked,
        links_refused=writer.links_refused,
        seconds=time.perf_counter() - started,
        deleted=tuple(deleted),
        messages=tuple(messages + new_messages),
    )


def open_previous(run_dir: Path, step: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to link unchanged files from, and what is odd about the run's checkpoints."""
    checkpoints, _ = list_checkpoints(run_dir)
    messages = []
    if later := [path.name for saved_step, path in checkpoints if saved_step > step]:
        messages.append(
            f"{run_dir} also holds checkpoints of later steps ({', '.join(later)}), from which a resume would go on: "
            "delete them if this is the run to keep"
        )
    candidates = [path for saved_step, path in checkpoints if saved_step <= step] or [path for _, path in checkpoints]
    if not candidates:
        return None, messages
    try:
        return open_checkpoint(candidates[-1]), messages
    except CheckpointError as error:
        return None, [*messages, f"every file is written anew, since the last checkpoint cannot be linked to: {error}"]


def move_into_place(temporary: Path, final: Path) -> Path:
    """Gives the finished folder its name; an older version of the same step steps aside first and goes afterwards."""
    if os.path.lexists(final) and not (final / folder_layout.MANIFEST).exists():
        delete_checkpoint(final)
    if not os.path.lexists(final):
        os.rename(temporary, final)
        sync_folder(final.parent)
        return final
    _, step, _ = folder_layout.parse_folder(final)
    aside = final.with_name(folder_layout.working_name("replaced", step, os.getpid()))
    with lock_working_folder(final):
        os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(aside, final)
            raise
        sync_folder(final.parent)
        with suppress(OSError):  # the next save removes what stays, and says so
            shutil.rmtree(aside)
    return final
