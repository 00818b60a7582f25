"""Checks that compute do it in processes of their own: whatever they break, the doctor goes on and says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.comm.launch import free_port

MSRUN = "from mindspore.parallel.cluster.run import main; main()"
_SHOWN = 300  # characters of a process's last words


@dataclass(frozen=True)
class ProcessResult:
    """How processes ended: their `results`, or why there are none."""

    results: list[dict[str, Any]]
    trouble: str = ""


def step(device: str, kernels: str, folder: Path, seconds: float) -> ProcessResult:
    """Two steps of the trainer on a device."""
    folder.mkdir()
    out = folder / "step.json"
    words = [sys.executable, "-m", "pangu_sigma.doctor.step_work", device, kernels, str(out)]
    trouble = _ran(words, folder, seconds)
    return ProcessResult([], trouble) if trouble else ProcessResult([json.loads(out.read_text(encoding="utf-8"))])


def exchange(device: str, count: int, folder: Path, seconds: float) -> ProcessResult:
    """Rows there and back between `count` processes on devices of one kind."""
    folder.mkdir()
    logs = folder / "logs"
    words = [
        sys.executable, "-c", MSRUN, f"--worker_num={count}", f"--local_worker_num={count}", "--join=True",
        "--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--log_dir={logs}",
        f"--cluster_time_out={int(seconds)}", "python", "-m", "pangu_sigma.doctor.exchange_work", device, str(folder),
    ]  # fmt: skip
    trouble = _ran(words, folder, seconds)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank_*.json"))]
    if len(results) == count:
        return ProcessResult(results)
    last_lines = [
        _last_words(log.read_text(encoding="utf-8", errors="replace")) for log in sorted(logs.glob("worker_*.log"))
    ]
    silent = f"{count - len(results)} of {count} did not answer"
    return ProcessResult(results, next(filter(None, last_lines), "") or trouble or silent)


def _ran(words: Sequence[str], folder: Path, seconds: float) -> str:
    """Run a command in `folder` with what it starts; returns what went wrong, empty if nothing."""
    process = subprocess.Popen(
        words, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"no answer within {seconds:.0f} s"
        raise
    return "" if process.returncode == 0 else _last_words(output) or f"ended with code {process.returncode}"


def _environment() -> Mapping[str, str]:
    # This Python and this code in the child, wherever the current folder is; no rank of an outer launcher.
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK_ID", "RANK_SIZE") and not k.startswith("MS_")}
    path = [str(Path(sys.executable).parent), *filter(None, [kept.get("PATH")])]
    code = [str(Path(__file__).parents[2]), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(code), "GLOG_v": "4"}


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [""])[-1][:_SHOWN]
