"""What a benchmark leaves behind: its figures as JSON, a page of them as Markdown, and what machine they are of."""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pangu_sigma.monitor.result_files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
_SPELLED = {"python": "Python", "mindspore": "MindSpore", "torch": "PyTorch", "transformers": "transformers"}


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option `--out` of every benchmark."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def machine(*packages: str, torch_python: str | None = None) -> dict[str, Any]:
    """Processor and versions, for the record; torch's from another interpreter, if given."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    record = {
        "cpu": model,
        "cores": sum(line.startswith("processor") for line in lines),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
    if torch_python is not None:
        command = [torch_python, "-c", "import torch; print(torch.__version__)"]
        record["torch"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {**record, "date": datetime.now(UTC).date().isoformat()}


def sentence(made_on: dict[str, Any]) -> str:
    """What `machine` found, as the end of a page says it."""
    versions = [f"{name} {made_on[key]}" for key, name in _SPELLED.items() if key in made_on]
    return f"{made_on['cores']} cores of {made_on['cpu']}, {', '.join(versions)}, {made_on['date']}."


def loss_complaints(name: str, first: float, last: float, vocabulary: int) -> list[str]:
    """What speaks against a system having trained: nothing if its loss begins near ln V and falls."""
    complaints = []
    if abs(first - math.log(vocabulary)) > 0.5:
        complaints.append(f"{name}: the first loss is {first:.2f}, far from ln {vocabulary}")
    if not last < first:
        complaints.append(f"{name}: the loss does not fall ({first:.2f} to {last:.2f})")
    return complaints


def write_results(folder: Path, name: str, record: dict[str, Any], page: str, complaints: Iterable[str] = ()) -> None:
    """Write `name`.json and `name`.md into `folder`, after warning of what speaks against the figures."""
    for complaint in complaints:
        print(f"Warning: {complaint}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", record)
    write_text(folder / f"{name}.md", page)
