"""Bytes and memory of upcycling PanGu-α 13B's layout into the 38B and the 1085B layout, at reduced width.

    python -m benchmarks.upcycle [--hidden 80]

Layers, heads, vocabulary, sparse layers, domains and experts are those of the real models; only the width is smaller
(13B: 5120). Every conversion runs in a process of its own, whose memory is measured from the moment before it starts.
Reads PanGu-α's published tokenizer beside this checkout (../shared/data).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.record import add_output, write_results

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "shared/data/pangu_alpha/vocab.model"
LAYERS, HEADS, POSITIONS, FULL_WIDTH, SPARSE_LAYERS, EXPERTS = 40, 40, 1024, 5120, 8, 16
LAYOUTS = {"38B": 1, "1085B": 40}  # domains of 16 experts


def configuration(folder: Path, hidden: int, domains: int, sparse: bool) -> dict:
    """The configuration of the dense model, or of a sparse one."""
    return {
        "schema_version": 2,
        "run": {"dir": str(folder)},
        "model": {
            "vocab_size": 40000, "layers": LAYERS, "hidden": hidden, "heads": HEADS, "ffn": 4 * hidden,
            "positions": POSITIONS, "sparse": {"layers": SPARSE_LAYERS if sparse else 0},
        },
        "domains": [
            {"name": f"domain{i}", "data": ["none.jsonl"], "experts": EXPERTS if sparse else 1} for i in range(domains)
        ],
        "data": {"sequence_length": POSITIONS, "tokenizer": {"kind": "pangu_alpha", "path": str(TOKENIZER)}},
        "optimizer": {"learning_rate": 2e-5},
        "train": {"steps": 1, "batch_size": 1},
    }  # fmt: skip


def write_dense(folder: Path, hidden: int) -> Path:
    """A dense model with random weights."""
    from pangu_sigma.checkpoint import Fingerprints, StreamedCheckpoint, TensorSpec, write_model_folder
    from pangu_sigma.config import config_from_dict, effective
    from pangu_sigma.config.parameter_counts import tensor_shapes
    from pangu_sigma.data.tokenizers.tokenizer_registry import tokenizer_class
    from rre.counted_random import generator

    config = effective(config_from_dict(configuration(folder, hidden, 1, sparse=False)))
    tokenizer = tokenizer_class("pangu_alpha")(TOKENIZER.read_bytes())
    write_model_folder(
        folder,
        StreamedCheckpoint(
            tensors=[TensorSpec(n, "float32", shape) for n, shape in tensor_shapes(config, 40000).items()],
            read=lambda spec: generator(1, spec.name).standard_normal(spec.shape, np.float32),
            domains=config.domain_names,
            coverage={},
            config_text=config.to_yaml(),
            tokenizer_files=tokenizer.files(),
            state={},
            fingerprints=Fingerprints(tokenizer=tokenizer.fingerprint, corpora={}),
        ),
    )
    return folder


def measure(dense: Path, config: Path, out: Path) -> dict[str, float]:
    """Upcycle in this process: seconds, bytes read and written, peak memory above what the process had before."""
    from pangu_sigma.checkpoint import open_checkpoint
    from pangu_sigma.convert.upcycle import upcycle
    from pangu_sigma.data.tokenizers.pangu_alpha_tokenizer import PanguAlphaTokenizer

    PanguAlphaTokenizer(TOKENIZER.read_bytes())  # jieba's dictionary and the vocabulary are no part of the conversion
    # numpy's generators and the writer's threads too are there before
    open_checkpoint(dense)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    resident, io = _status("VmRSS"), _io()
    started = time.perf_counter()
    upcycle(dense, config, out)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "memory": _status("VmHWM") - resident,
        "read": _io()["rchar"] - io["rchar"],
        "written": _io()["wchar"] - io["wchar"],
    }


def results(hidden: int, work: Path) -> Iterator[dict]:
    """One row for each layout: sizes, what was measured, and the same layout's size at full width."""
    from pangu_sigma.checkpoint import open_checkpoint
    from pangu_sigma.config import config_from_dict, effective
    from pangu_sigma.config.parameter_counts import parameter_counts

    dense = write_dense(work / "dense", hidden)
    entries = open_checkpoint(dense).manifest
    largest = max(4 * math.prod(entry.shape) for entry in entries.tensors.values())
    for name, domains in LAYOUTS.items():
        config, out = work / f"{name}.yaml", work / name
        values = configuration(work / "run", hidden, domains, sparse=True)
        config.write_text(effective(config_from_dict(values)).to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.upcycle", "--measure", str(dense), str(config), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        if done.returncode:
            raise SystemExit(done.stderr)
        full = config_from_dict(configuration(work / "run", FULL_WIDTH, domains, sparse=True))
        yield {
            "layout": name,
            "hidden": hidden,
            "dense_bytes": sum(file.bytes for file in entries.files.values()),
            "sparse_bytes": sum(file.bytes for file in open_checkpoint(out).manifest.files.values()),
            "tensors": len(open_checkpoint(out).manifest.tensors),
            "largest_dense_tensor": largest,
            "full_parameters": parameter_counts(full, 40000).total,
            **json.loads(done.stdout.splitlines()[-1]),
        }
        shutil.rmtree(out)


def table(rows: list[dict]) -> str:
    """Markdown: one line for each layout."""
    lines = [
        "| layout | dense model | sparse model | tensors | largest dense tensor | memory above the start | read "
        "| written | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['layout']} | {_mb(row['dense_bytes'])} | {_mb(row['sparse_bytes'])} | {row['tensors']:,} "
        f"| {_mb(row['largest_dense_tensor'])} | **{_mb(row['memory'])}** | {_mb(row['read'])} | {_mb(row['written'])} "
        f"| {row['seconds']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def page(rows: list[dict], machine: str) -> str:
    """The result for a reader."""
    full = ", ".join(f"{row['layout']} {row['full_parameters'] / 1e9:.2f} billion" for row in rows)
    return (
        "# Upcycling PanGu-α 13B's layout\n\n"
        "Written by `python -m benchmarks.upcycle`; numbers in `upcycle.json`.\n\n"
        f"{table(rows)}\n\n"
        f"{LAYERS} layers, {HEADS} heads, vocabulary 40,000, top {SPARSE_LAYERS} blocks sparse, {EXPERTS} experts a "
        f"domain and layer, 1 and {LAYOUTS['1085B']} domains, as the real models have; width {rows[0]['hidden']} "
        f"instead of {FULL_WIDTH} (parameters at full width: {full}). Memory is the peak resident set of the "
        "converting process above what it held before: one tensor of the dense model, and buffers of at most 8 MB for "
        "reading, writing and hashing. An expert group is written expert by expert, so its size does not count.\n\n"
        f"{machine}\n"
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc, which only Linux has")


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(number) for name, number in (line.split(": ") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and memory of upcycling, at reduced width.")
    parser.add_argument("--hidden", type=int, default=80, help="width; a multiple of 40")
    add_output(parser)
    parser.add_argument("--measure", nargs=3, type=Path, metavar=("DENSE", "CONFIG", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    if not TOKENIZER.is_file():
        parser.exit(2, f"Error: {TOKENIZER} is not there: it is PanGu-α's published tokenizer\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        rows = list(results(given.hidden, Path(work)))
    print(table(rows))
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} core{'s' if cores > 1 else ''}, Python {platform.python_version()}, {date.today()}."
    write_results(given.out, "upcycle", {"machine": machine, "results": rows}, page(rows, machine))


if __name__ == "__main__":
    main()
