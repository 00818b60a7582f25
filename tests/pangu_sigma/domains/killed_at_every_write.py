"""Changes a run's domains in child processes that are killed with SIGKILL at one file operation after the other.

    python -m tests.pangu_sigma.domains.killed_at_every_write RUN SCRATCH CHANGE TEXT EVERY

It runs `under_faults`. For one in EVERY operations on the run that the change makes, a child changes a copy of RUN
and dies there; what is left must be the old family or the new one, and changing it again, or going on from it, must
give the new one. Prints {"operations": n, "old": n, "new": n} or fails. Only this process forks, which runs no other
threads.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from pangu_sigma.checkpoint import Checkpoint, find_latest, folder_layout
from pangu_sigma.checkpoint.run_config_file import mend_config
from pangu_sigma.config.domain_edits import FollowUpTraining
from pangu_sigma.domains.add_domain import NewDomain, add_domain, add_model
from pangu_sigma.domains.expand_gates import expand_domain
from pangu_sigma.domains.merge_models import merge_models
from pangu_sigma.domains.remove_domain import remove_domain, rename_domain
from pangu_sigma.domains.resize_domain import resize_domain
from pangu_sigma.trained_model import stored_config
from tests.file_faults import KILLED, arm, in_child

_HIDDEN = (".tmp", ".trash", ".replaced", ".out", ".step", ".config")


def changes(text: str) -> dict[str, Callable[[Path], object]]:
    """Every change by name, of the run in a folder."""
    new = NewDomain("medicine", (text,), 2, "mean")
    held = FollowUpTraining("medicine", 2, "regularised", regularise={"output": 1.0})
    return {
        "add": lambda run: add_domain(run, new),
        "add-out": lambda run: add_domain(run, new, out=run / "out"),
        "add-model": lambda run: add_model(run, run.parent / "sibling", "law", name="statutes"),
        "remove": lambda run: remove_domain(run, "law"),
        "rename": lambda run: rename_domain(run, "law", "statutes"),
        "resize": lambda run: resize_domain(run, "law", 3),
        "merge": lambda run: merge_models([run, run], run / "out"),
        "expand": lambda run: expand_domain(run, new, held),
    }


def family(checkpoint: Checkpoint) -> dict[str, str]:
    """Every tensor's hash, after the files were read again."""
    checkpoint.verify()
    return {name: checkpoint.manifest.tensors[name].slices[0].sha256 for name in checkpoint.names()}


def result(run: Path, change: str) -> Checkpoint | None:
    """What the change makes, where it stands."""
    if change == "merge":
        out = run / "out"
        return find_complete(out) if out.exists() else None
    where = run / "out" if change.endswith("-out") else run
    return find_latest(where)[0] if where.exists() else None


def find_complete(folder: Path) -> Checkpoint:
    from pangu_sigma.checkpoint import open_checkpoint

    return open_checkpoint(folder)


def main(source: Path, scratch: Path, change: str, text: str, every: int) -> None:
    do = changes(text)[change]
    uninterrupted = scratch / "whole"
    shutil.copytree(source, uninterrupted)
    in_child(lambda: do(uninterrupted))
    after = family(result(uninterrupted, change))
    before = None if change in ("merge", "add-out") else family(result(source, change))
    counts = {"operations": 0, "old": 0, "new": 0}
    run, operation = scratch / "killed", 0

    def attack() -> None:
        arm(run, operation)
        do(run)

    while True:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)
        if in_child(attack) != KILLED:
            break
        checkpoint = result(run, change)
        now = None if checkpoint is None else family(checkpoint)
        assert now in (before, after), f"operation {operation}: neither the old nor the new family"
        # The model that is left loads, and its files and configuration say the same.
        is_new = now == after and now != before
        counts["new" if is_new else "old"] += 1
        if is_new and before is not None:
            mend_config(run, checkpoint)
            assert (run / folder_layout.CONFIG).read_text(encoding="utf-8") == checkpoint.config_text
            assert stored_config(checkpoint).domain_names == checkpoint.domains
        elif not is_new:
            in_child(lambda: do(run))
            assert family(result(run, change)) == after
            left = [path for path in run.rglob(".*") if path.name.startswith(_HIDDEN)]
            assert not left, left
        counts["operations"] += 1
        operation += every
    assert family(result(run, change)) == after
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
