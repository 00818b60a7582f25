"""Model folder: a checkpoint without optimizer state, which stands alone; and a run's folder with one checkpoint.

Layout and manifest are a checkpoint's, so whatever opens a checkpoint opens a model folder. Whatever ends the writing,
Ctrl-C too, leaves nothing behind; what a killed process left goes with the next writing of the same folder.
"""

import os
from collections.abc import Callable
from pathlib import Path

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.disk_space import DiskWrite
from pangu_sigma.checkpoint.folder_writer import write_synced
from pangu_sigma.checkpoint.streamed_checkpoint import Finish, Progress, StreamedCheckpoint
from pangu_sigma.errors import CheckpointError
from pangu_sigma.tensor_names import parse_name
from parallel.comm.atomic_folder import atomic_folder, sync_folder

CARD = "README.md"


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


def output_write(path: Path) -> DiskWrite:
    """How errors of writing the output folder `path` read; the parent need not be there yet."""
    parent = next(parent for parent in path.parents if parent.is_dir())
    return DiskWrite(str(path), "written", parent, "choose another folder")


def write_model_folder(
    out: Path | str, content: StreamedCheckpoint, *, finish: Finish | None = None, progress: Progress | None = None,
    moments: bool = False,
) -> Checkpoint:  # fmt: skip
    """Writes the folder `out`; `finish` may verify the written model before it has its name: what it raises ends it.

    moments: the optimizer's state may come along, as where a whole checkpoint is edited.
    Raises CheckpointError when `out` is there and not empty, when the disk is too small (before anything is written)
    or fails, and for a taken file that is damaged; ValueError for tensors that are not what `content` says, and for
    moments otherwise.
    """
    if not moments and (states := [spec.name for spec in content.specs if parse_name(spec.name).is_optimizer]):
        raise ValueError(f"a model folder holds no optimizer state: {states[0]!r}")
    final = check_output(out)
    disk_write = output_write(final)
    with disk_write.explain_errors(), atomic_folder(final) as folder:
        manifest, _ = content.write_into(folder, disk_write, progress, finish)
    return Checkpoint(final, manifest)


def write_run_folder(
    out: Path | str,
    content: StreamedCheckpoint,
    progress: Progress | None = None,
    add: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Writes the new run folder `out` with one checkpoint and its `config.yaml`; `add` puts more into the folder before
    it has its name. Raises as `write_model_folder`, and what `add` raises."""
    final = check_output(out)
    disk_write = output_write(final)
    inside = Path(folder_layout.CHECKPOINTS) / folder_layout.step_name(content.step)
    with disk_write.explain_errors(), atomic_folder(final) as folder:
        manifest, _ = content.write_into(folder / inside, disk_write, progress)
        write_synced(folder / folder_layout.CONFIG, content.config_text.encode())
        if add is not None:
            add(folder)
        sync_folder(folder / folder_layout.CHECKPOINTS)
        sync_folder(folder)
    return Checkpoint(final / inside, manifest)
