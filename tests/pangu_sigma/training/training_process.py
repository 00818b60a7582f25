"""Real training processes: started, waited for, stopped, and what they leave compared byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[3]
# What is added to every key is added to all of a row's scores, and softmax does not see it: the gradient is rounding
# alone, of which Adam makes whole steps. Trainings that differ in rounding differ in it.
UNSEEN = "attention.key.bias"


def command(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run `pangu-sigma ARGUMENTS` in the folder `cwd`."""
    return subprocess.run(
        _words(arguments), capture_output=True, text=True, cwd=cwd, env=_environment(), timeout=600, **options
    )


def started(*arguments: object, cwd: Path, log: Path, **options) -> subprocess.Popen[str]:
    """Start `pangu-sigma ARGUMENTS` in the folder `cwd`; what it says goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as stream:
        return subprocess.Popen(
            _words(arguments), stdout=stream, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=_environment(),
            **options,
        )  # fmt: skip


def fed(*arguments: object, text: str, cwd: Path) -> subprocess.Popen[str]:
    """Start `pangu-sigma ARGUMENTS` in the folder `cwd`, `text` on its standard input, pipes for what it says."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        _words(arguments), stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=_environment()
    )
    process.stdin.write(text)
    process.stdin.close()
    return process


def trained_two_steps(small_yaml: Path, folder: Path, window: int) -> Path:
    """A run of two steps in `folder` whose sequences have `window` tokens: what it writes is nonsense, but its own."""
    size = [f"model.positions={window}", f"data.sequence_length={window}", "train.steps=2", "train.phases=[]"]
    rest = ["schedule.warmup_steps=1", "evaluate.every=0", "checkpoint.every=0"]
    done = command("train", small_yaml, f"run.dir={folder / 'run'}", *size, *rest, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 180.0) -> bool:
    """Whether `happened` became true before the process ended; looks as often as it can."""
    deadline = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None:
            return happened()
        assert time.monotonic() < deadline, "the process did not get there in time"
        time.sleep(0.0005)
    return True


def steps_logged(run: Path) -> int:
    """The last step that stands in the run's metrics; 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def unfinished_saves(run: Path) -> list[Path]:
    """Temporary folders of saves that stand without their manifest."""
    return [path for path in run.glob("checkpoints/.tmp-step-*") if not (path / "manifest.json").exists()]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def assert_equal_checkpoints(first: Path, second: Path) -> None:
    """Every tensor and the loop's state are equal byte for byte."""
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    for file in files:
        tensors, other = load_file(first / file), load_file(second / file)
        assert tensors.keys() == other.keys()
        differing = [name for name in tensors if tensors[name].tobytes() != other[name].tobytes()]
        assert not differing, f"{file}: {differing}"
    assert json.loads((first / "state.json").read_text()) == json.loads((second / "state.json").read_text())


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One sentence that holds all `parts`, exit code 2, no traceback."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("Error: ")
    for part in parts:
        assert part in lines[-1]


def _words(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "pangu_sigma", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
