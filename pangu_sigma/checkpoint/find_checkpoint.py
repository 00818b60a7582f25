"""Finding a checkpoint: from the folder that a user names (a run's or a checkpoint's) to the opened checkpoint."""

from pathlib import Path

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.retention import list_checkpoints, working_folders
from pangu_sigma.errors import CheckpointError


def find_latest(run_dir: Path | str) -> tuple[Checkpoint | None, list[str]]:
    """The last complete checkpoint of a run (None when there is none yet), and a sentence for each folder passed over.

    Unfinished folders (no manifest) are passed over. A finished one that is damaged is not: it raises CheckpointError
    by name, since to go on from an older one without being told would lose work silently. Changes nothing on disk.
    """
    run_dir = Path(run_dir)
    checkpoints, unfinished = list_checkpoints(run_dir)
    messages = [
        f"passed over {path}: process {pid} was {'saving' if kind == 'tmp' else 'deleting'} step {step}"
        for kind, step, pid, path in working_folders(run_dir)
        if kind != "replaced"
    ]
    messages += [f"passed over {path}: it has no {folder_layout.MANIFEST}" for path in unfinished]
    if not checkpoints:
        return None, messages
    step, path = checkpoints[-1]
    if path.name != folder_layout.step_name(step):
        messages.append(f"{path} is used: the process that was replacing it ended before it was done")
    return open_checkpoint(path, messages), messages


def resolve(path: Path | str) -> Checkpoint:
    """Opens the checkpoint a user names: a run folder (its last complete one) or a folder with a manifest.

    `Checkpoint.messages` says what was passed over. Raises CheckpointError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a run folder or a checkpoint folder")
    if path.is_dir() and not (path / folder_layout.MANIFEST).exists() and (path / folder_layout.CHECKPOINTS).is_dir():
        checkpoint, messages = find_latest(path)
        if checkpoint is None:
            reasons = "".join(f"; {message}" for message in messages)
            raise CheckpointError(f"the run {path} has no checkpoint yet: train it first{reasons}")
        return checkpoint
    if path.is_dir() and not (path / folder_layout.MANIFEST).exists() and folder_layout.parse_folder(path) is None:
        raise CheckpointError(
            f"{path} is neither a run (no {folder_layout.CHECKPOINTS}/ in it) nor a checkpoint "
            f"(no {folder_layout.MANIFEST} in it): name one of them"
        )
    return open_checkpoint(path)
