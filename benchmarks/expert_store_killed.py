"""Training runs with tables on disk, killed and resumed beside the uninterrupted one, under a cap on memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from benchmarks.expert_store_work import Work

CAP = 3.0 * 2**30  # bytes of heap and anonymous memory
KILL_AFTER, SAVE_EVERY = 7, 5  # steps


def write_run(work: Work, folder: Path) -> Path:
    """A configuration file and 40 small corpora for `pangu-sigma train`."""
    folder.mkdir(parents=True)
    values = work.config().to_dict()
    values["run"] |= {"dir": str(folder / "run"), "log_every": 1}
    values["data"] |= {"tokenizer": {"kind": "train", "vocab_size": 320}, "cache": str(folder / "cache"),
                       "deduplicate": "none"}  # fmt: skip
    values["model"]["vocab_size"] = None
    values["train"] |= {"steps": work.steps}
    values["schedule"] |= {"decay_steps": None}
    values["checkpoint"] |= {"keep": 1}
    for number, domain in enumerate(values["domains"]):
        path = folder / f"{domain['name']}.jsonl"
        line = " ".join(f"{word} of {number * 31 % 97} " for word in ("river", "table", "window", "paper", "stone"))
        path.write_text("".join(json.dumps({"text": f"{line * 8}{i}"}) + "\n" for i in range(400)), encoding="utf-8")
        domain["data"] = [str(path)]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Watched:
    """A training process under RLIMIT_DATA (heap and anonymous memory), its memory sampled while it runs."""

    def __init__(self, path: Path, run: Path, *words: str) -> None:
        self.run, self.most = run, {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        command = [sys.executable, "-m", "pangu_sigma", "train", str(path), f"run.dir={run}", *words]
        self.log = run.with_name(run.name + ".log")
        with open(self.log, "a", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env={**os.environ, "GLOG_v": "4"},
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (int(CAP), int(CAP))),
            )  # fmt: skip

    def wait(self, kill_after: int | None = None) -> float:
        """Wait for the end, or kill -9 once so many steps are logged; the seconds that it took."""
        started = time.perf_counter()
        while self.process.poll() is None:
            self._sample()
            if kill_after is not None and self._steps() >= kill_after:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
                return time.perf_counter() - started
            time.sleep(0.05)
        if self.process.returncode or kill_after is not None:
            raise RuntimeError(self.log.read_text(encoding="utf-8")[-2000:])
        return time.perf_counter() - started

    def _sample(self) -> None:
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return
        for line in lines:
            name, _, value = line.partition(":")
            if name in self.most:
                self.most[name] = max(self.most[name], int(value.split()[0]) * 1024)

    def _steps(self) -> int:
        try:
            lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def killed(work: Work, folder: Path) -> dict:
    """Train uninterrupted, and killed and resumed; compare the hashes of every tensor of the last checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    path = write_run(work, folder)
    try:
        uninterrupted = Watched(path, folder / "whole")
        seconds = {"uninterrupted": uninterrupted.wait()}
        expected = hashes(folder / "whole", work.steps)
        whole_size = checkpoint_bytes(folder / "whole", work.steps)
        shutil.rmtree(folder / "whole")  # its hashes are what counts, and the disk has other things to hold
        first = Watched(path, folder / "run", f"checkpoint.every={SAVE_EVERY}")
        seconds["until killed"] = first.wait(KILL_AFTER)
        table_bytes = sum(512 * p.stat().st_blocks for p in (folder / "run" / "experts").glob("*.table"))
        second = Watched(path, folder / "run", f"checkpoint.every={SAVE_EVERY}", "--resume")
        seconds["resumed"] = second.wait()
        resumed = hashes(folder / "run", work.steps)
        saves = [
            record for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            if (record := json.loads(line))["kind"] == "checkpoint"
        ]  # fmt: skip
        return {
            "work": asdict(work),
            "tensors": len(expected),
            "differing": sorted(name for name in expected if resumed.get(name) != expected[name]),
            "table_bytes": table_bytes,
            "checkpoint_bytes": whole_size,
            "saves": [{k: r[k] for k in ("step", "bytes_written", "bytes_linked", "seconds")} for r in saves],
            "seconds": seconds,
            "cap_bytes": int(CAP),
            "most": {name: max(w.most[name] for w in (uninterrupted, first, second)) for name in uninterrupted.most},
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def manifest(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text(encoding="utf-8"))


def hashes(run: Path, step: int) -> dict[str, str]:
    """Tensor name -> sha256 of its bytes, of a checkpoint's manifest."""
    entries = manifest(run, step)
    return {name: entry["slices"][0]["sha256"] for name, entry in entries["tensors"].items()}


def checkpoint_bytes(run: Path, step: int) -> int:
    return sum(entry["bytes"] for entry in manifest(run, step)["files"].values())
