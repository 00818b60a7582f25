"""A run's `config.yaml`: kept equal to the configuration in its last checkpoint, also when its domains change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.monitor.result_files import write_text

# Key of the trainer state that lists what was done to the domains of a run: [{"step", "change"}].
DOMAIN_CHANGES = "domain_changes"
# Key of the trainer state right after a change: the hash of the run's config.yaml before it.
CONFIG_BEFORE = "config_before"


def config_digest(run_dir: Path) -> str:
    """The hash of the run's own `config.yaml`."""
    return hashlib.sha256((run_dir / folder_layout.CONFIG).read_bytes()).hexdigest()


def stale_config(run_dir: Path, checkpoint: Checkpoint) -> str | None:
    """The text of the run's `config.yaml` where it still is the one from before the last change of `checkpoint`.

    Whoever changed the domains was killed after the checkpoint had been replaced, and before this file was.
    """
    before, path = checkpoint.state.get(CONFIG_BEFORE), run_dir / folder_layout.CONFIG
    if before is None or not path.is_file() or config_digest(run_dir) != before:
        return None
    text = path.read_text(encoding="utf-8")
    return text if text != checkpoint.config_text else None


def mend_config(run_dir: Path, checkpoint: Checkpoint) -> str | None:
    """Finish a change of domains whose process was killed before its last write; what there is to say, None if none."""
    if stale_config(run_dir, checkpoint) is None:
        return None
    for unfinished in run_dir.glob(f".{folder_layout.CONFIG}.*"):
        unfinished.unlink()
    write_text(run_dir / folder_layout.CONFIG, checkpoint.config_text)
    change = checkpoint.state[DOMAIN_CHANGES][-1]["change"]
    return (
        f"{run_dir / folder_layout.CONFIG} is that of the checkpoint again: "
        f"the process of '{change}' ended before it was"
    )
