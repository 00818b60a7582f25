"""Saves that are killed, or whose disk fails, at one file operation after the other; and bits flipped in their files.

    python -m tests.pangu_sigma.checkpoint.attacked_saves SCRATCH KIND EVERY

KIND: kill, an error number, or flip. EVERY: takes each so-manieth operation; for flip, so many flips a file. After each
the last complete checkpoint must be whole, and so must be the next save. Prints counts as JSON, or fails.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import CheckpointError, find_latest, open_checkpoint
from pangu_sigma.checkpoint.retention import list_checkpoints
from pangu_sigma.checkpoint.verified_files import VerifiedFiles
from tests import file_faults
from tests.pangu_sigma.checkpoint.conftest import make_tensors, save_small

REFUSED = 3


def tensors_of(step: int) -> dict[str, np.ndarray]:
    """A model that trains the domain code alone."""
    tensors = make_tensors()
    return {name: array + step if ".code." in name and array.dtype == np.float32 else array
            for name, array in tensors.items()}  # fmt: skip


def save(run: Path, step: int, verified: VerifiedFiles | None = None) -> tuple[str, ...]:
    return save_small(run, step, tensors_of(step), keep=2, verified=verified).messages


def assert_whole(run: Path, steps: set[int]) -> int:
    """The last complete checkpoint is of one of `steps`, whole, and holds what was saved."""
    checkpoint, _ = find_latest(run)
    assert checkpoint.step in steps, checkpoint.step
    checkpoint.verify()
    expected = tensors_of(checkpoint.step)
    for name, array in checkpoint.load().items():
        assert array.tobytes() == expected[name].tobytes(), name
    return checkpoint.step


def assert_next_save_is_whole(run: Path) -> None:
    save(run, 4)
    assert_whole(run, {4})
    for _, path in list_checkpoints(run)[0]:
        open_checkpoint(path).verify()
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(names) == 2 and names[1] == "step-00000004" and not names[0].startswith("."), names


def attacked(source: Path, run: Path, number: int, every: int) -> dict[str, int]:
    """Kill a save, or let it fail, at each operation (one in `every`)."""
    counts = {"operations": 0, "old": 0, "new": 0}
    operation = 0
    while True:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)

        def work(operation: int = operation) -> None:
            file_faults.arm(run, operation, number)
            messages = save(run, 3)
            # What is told is no failure of the save: an old checkpoint that could not be deleted.
            if file_faults.operations() <= operation and not messages:
                raise EOFError

        ended = file_faults.in_child(work, {CheckpointError: REFUSED, EOFError: 4})
        if ended == 4:
            return counts
        assert (ended == file_faults.KILLED) == (number == file_faults.KILL)
        step = assert_whole(run, {3} if ended == 0 else {2, 3})
        counts["operations"] += 1
        counts["new" if step == 3 else "old"] += 1
        assert_next_save_is_whole(run)
        operation += every


def flipped(source: Path, run: Path, flips: int) -> dict[str, int]:
    """Flip single bits in every file of the last checkpoint, while the run goes on and before it is opened again."""
    draw = random.Random(0)
    counts = {"files": 0, "flips": 0, "written anew": 0, "refused": 0}
    files = [path.relative_to(source) for path in sorted(source.glob("checkpoints/*2/**/*")) if path.is_file()]
    for file in files:
        counts["files"] += 1
        bits = 8 * (source / file).stat().st_size
        for bit in draw.sample(range(bits), min(flips, bits)):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(source, run)
            shutil.rmtree(run / "checkpoints/step-00000002")
            verified = VerifiedFiles()
            save(run, 2, verified)
            content = bytearray((run / file).read_bytes())
            content[bit // 8] ^= 1 << bit % 8
            with open(run / file, "r+b") as stream:  # the same file, as a disk would change it
                stream.write(content)
            try:
                VerifiedFiles().read_all(find_latest(run)[0])
            except CheckpointError as error:
                assert str(run / file) in str(error), error
                counts["refused"] += 1
            messages = save(run, 3, verified)
            assert_whole(run, {3})
            counts["written anew"] += any(str(run / file) in message for message in messages)
            counts["flips"] += 1
    return counts


def main(scratch: Path, kind: str, every: int) -> None:
    source = scratch / "source"
    for step in (1, 2):
        file_faults.in_child(lambda step=step: save(source, step))
    if kind == "flip":
        print(json.dumps(flipped(source, scratch / "run", every)))
    else:
        print(json.dumps(attacked(source, scratch / "run", file_faults.KILL if kind == "kill" else int(kind), every)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
