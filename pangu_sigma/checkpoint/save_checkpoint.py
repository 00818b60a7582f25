"""Checkpoint save by one process, atomic: at every moment the folder that carries a checkpoint's name is whole.

Files go into a hidden folder, each synced to disk; then the manifest; then the folder gets its name in one rename. A
process that dies on the way leaves a hidden folder, which nobody takes for a checkpoint and the next save removes.
"""

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_contents import CheckpointContents
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.file_plan import find_unchanged
from pangu_sigma.checkpoint.retention import delete_checkpoint, list_checkpoints, prune_checkpoints, remove_stale
from pangu_sigma.checkpoint.streamed_checkpoint import Progress, StreamedCheckpoint
from pangu_sigma.checkpoint.tensor_file import byte_chunks, spec_of
from pangu_sigma.checkpoint.verified_files import VerifiedFiles, inode_of, mend_older
from pangu_sigma.errors import CheckpointError, argument
from parallel.comm.atomic_folder import atomic_folder, lock_working_folder, rename_synced, sync_folder


@dataclass(frozen=True)
class SaveResult:
    """Result of a save. `links_refused` counts unchanged files that had to be written because no link was possible."""

    path: Path
    bytes_written: int
    bytes_linked: int
    links_refused: int
    messages: tuple[str, ...]


def save_checkpoint(
    run_dir: Path | str,
    contents: CheckpointContents,
    tensors: Mapping[str, np.ndarray],
    *,
    keep: int,
    max_shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
    verified: VerifiedFiles | None = None,
    read_everything: bool = False,
) -> SaveResult:
    """Saves `run_dir/checkpoints/step-…`, then deletes all but the `keep` newest checkpoints.

    tensors: name → array, of the shapes the model has; written without a copy (non-contiguous: one at a time).
    progress(bytes_done, bytes_total) is called in this thread while files are written.

    Files whose content the newest checkpoint has already are hard-linked, if they are sound (`verified_files` says when
    they are read; all of them without `verified`, which the saves of a run share, or with `read_everything`); a damaged
    one is written anew and named. A checkpoint of the same step is replaced.
    Raises CheckpointError when the disk is too small or fails (the last checkpoint stays whole, nothing is left
    behind), ValueError for arguments that make no whole checkpoint.
    """
    run_dir = Path(run_dir)
    if keep < 1 or max_shard_bytes < 1:
        raise ValueError(f"{keep=} and {max_shard_bytes=} must be at least 1")
    content = StreamedCheckpoint(
        **{item.name: getattr(contents, item.name) for item in fields(contents)},
        tensors=[spec_of(name, array) for name, array in tensors.items()],
        read=lambda spec: byte_chunks(tensors[spec.name]),
        max_shard_bytes=max_shard_bytes,
    )
    messages = remove_stale(run_dir)
    previous, new_messages = open_previous(run_dir, content.step)
    messages += new_messages
    if previous is not None:
        with ThreadPoolExecutor(2) as threads:
            find_unchanged(content.new_files, {**tensors, **content.probe_arrays}, previous, threads)
    verified = verified or VerifiedFiles()
    links = {file.path: file for file in content.new_files if file.link is not None}
    entries = {path: file.entry for path, file in links.items()}
    bad = verified.damaged({p: file.link for p, file in links.items()}, entries, everything=read_everything)
    damaged = {path: links[path].link for path in bad}
    inodes = {path: inode_of(file) for path, file in damaged.items()}
    for path in damaged:
        links[path].link = None
    final, disk_write = step_folder(run_dir, content.step)
    with disk_write.explain_errors(), atomic_folder(final, move_into_place) as folder:
        manifest, writer = content.write_into(folder, disk_write, progress)
    new_messages = prune_checkpoints(run_dir, keep, final)
    new_messages += mend_older(run_dir, final, damaged, inodes)
    verified.saved(final, writer.linked, manifest.files)
    if writer.links_refused:
        messages.append(
            f"{writer.links_refused} unchanged files were written again: {final.parent} refused to link them"
        )
    return SaveResult(
        path=final,
        bytes_written=writer.bytes_written,
        bytes_linked=writer.bytes_linked,
        links_refused=writer.links_refused,
        messages=tuple(messages + new_messages),
    )


def replace_checkpoint(run_dir: Path, content: StreamedCheckpoint, progress: Progress | None = None) -> Checkpoint:
    """Puts `content` in the place of the run's checkpoint of the same step; every moment one of the two stands whole.

    The caller holds the run's lock. Raises CheckpointError when the disk is too small or fails: the old one stays.
    """
    final = run_dir / folder_layout.CHECKPOINTS / folder_layout.step_name(content.step)
    disk_write = DiskWrite(
        f"the change of {run_dir}", "written", final.parent, f"use {argument('out')}", " (the checkpoint is as it was)"
    )
    remove_stale(run_dir)
    with disk_write.explain_errors(), atomic_folder(final, move_into_place) as folder:
        manifest, _ = content.write_into(folder, disk_write, progress)
    return Checkpoint(final, manifest)


def step_folder(run_dir: Path, step: int) -> tuple[Path, DiskWrite]:
    """The folder of a run's checkpoint, and how errors of saving it read."""
    final = run_dir / folder_layout.CHECKPOINTS / folder_layout.step_name(step)
    ending = " (the last checkpoint is whole)"
    return final, DiskWrite(f"step {step}", "saved", final.parent, "choose another run.dir", ending)


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


def move_into_place(folder: Path, final: Path) -> None:
    """Gives the finished folder its name; an older version of the same step steps aside first and goes afterwards."""
    if os.path.lexists(final) and not (final / folder_layout.MANIFEST).exists():
        delete_checkpoint(final)
    if not os.path.lexists(final):
        rename_synced(folder, final)
        return
    _, step, _ = folder_layout.parse_folder(final)
    aside = final.with_name(folder_layout.working_name("replaced", step, os.getpid()))
    with lock_working_folder(final):
        os.rename(final, aside)
        try:
            os.rename(folder, final)
        except BaseException:
            os.rename(aside, final)
            raise
        sync_folder(final.parent)
        with suppress(OSError):  # the next save removes what stays, and says so
            shutil.rmtree(aside)
