"""Cutting domains out of a 40-domain checkpoint of several GB, beside `cp` of the same bytes.

    python -m benchmarks.extraction [--rounds N] [--domains N] [--ffn N] [--keep N [N …]]

Makes a checkpoint of random weights (streamed, no training), then in interleaved rounds, each into a new folder:

- `pangu-sigma extract --no-verify` in a process of its own. Time is from its start to its end, Python's own start
  included; bytes read and written are that process's `rchar` and `wchar` in /proc/self/io when it ends, less what a
  process reads that only imports the same modules; memory is its highest resident set (`VmHWM`).
- `cp` of the same files, and `cp` and `sync` of the same files: extraction syncs every file before the folder gets its
  name, so the second is the like for like.

Everything lies in one folder that is removed at the end. All files were read before the first round, so each round
reads from memory, as after a training. Prints a Markdown table and writes it with every round to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.record import add_output, machine, sentence, write_results
from pangu_sigma.checkpoint import (
    Checkpoint,
    Fingerprints,
    StreamedCheckpoint,
    TensorSpec,
    open_checkpoint,
    write_model_folder,
)
from pangu_sigma.config import Config, config_from_dict, tensor_shapes
from pangu_sigma.convert.converted_folder import new_specs
from pangu_sigma.monitor.progress import progress

HERE = Path(__file__).parent
VOCABULARY = 32000
HIDDEN, LAYERS, SPARSE, EXPERTS = 1024, 8, 4, 2
PIECE = 8 << 20

# The process under measurement: the real command, whose last act is to tell what it read, wrote and held.
MEASURED = """
import json, sys
from pathlib import Path
from pangu_sigma.cli import app
if len(sys.argv) > 2:
    app(sys.argv[2:], standalone_mode=False)
else:
    import extract.extraction_job
io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
Path(sys.argv[1]).write_text(json.dumps({"read": int(io["rchar"]), "written": int(io["wchar"]), "memory": peak}))
"""


def benchmark_config(domains: int, ffn: int) -> Config:
    """A model whose experts are nearly all of it, as in the paper."""
    return config_from_dict(
        {
            "schema_version": 2,
            "run": {"dir": "/nowhere/run"},
            "model": {
                "layers": LAYERS, "hidden": HIDDEN, "heads": 16, "ffn": ffn, "positions": 1024,
                "vocab_size": VOCABULARY, "sparse": {"layers": SPARSE},
            },
            "domains": [
                {"name": f"domain-{i:02d}", "data": [f"/nowhere/{i}.jsonl"], "experts": EXPERTS} for i in range(domains)
            ],
            "data": {"cache": "/nowhere/run/data", "sequence_length": 1024},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 1, "batch_size": 1},
        }
    )  # fmt: skip


def make_checkpoint(folder: Path, config: Config) -> Checkpoint:
    """Random weights in the checkpoint's format; memory holds one piece."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2 * PIECE // 4, np.float32)

    def read(spec: TensorSpec) -> Iterator[memoryview] | np.ndarray:
        if spec.dtype == "int32":
            return rng.integers(0, EXPERTS, spec.shape, dtype=np.int32)
        return pieces(spec.nbytes)

    def pieces(size: int) -> Iterator[memoryview]:
        for start in range(0, size, PIECE):
            # another cut of the noise each time: no two tensors are equal
            begin = int(rng.integers(0, noise.size - PIECE // 4))
            yield noise[begin : begin + min(PIECE, size - start) // 4].data.cast("B")

    model = StreamedCheckpoint(
        tensors=new_specs(tensor_shapes(config, VOCABULARY)),
        read=read,
        domains=list(config.domain_names),
        coverage=config.coverage,
        config_text=config.to_yaml(),
        tokenizer_files={"tokenizer.model": rng.bytes(600_000)},
        state={},
        fingerprints=Fingerprints(tokenizer="random", corpora={}),
        probe={name: rng.integers(0, VOCABULARY, (2, 1025), dtype=np.int32) for name in config.domain_names},
    )
    with progress(f"make {len(config.domains)} domains", model.bytes, unit="B") as job:
        return write_model_folder(folder, model, progress=lambda done, total: job.set(done))


def measured_process(folder: Path, *words: object) -> dict[str, float]:
    """Seconds, bytes read and written, and peak memory of one `pangu-sigma` process (without words: its imports)."""
    report = folder / "report.json"
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", MEASURED, str(report), *map(str, words)], check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd=HERE.parent,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **json.loads(report.read_text())}


def copy(sources: list[Path], target: Path, sync: bool) -> float:
    """Seconds of `cp` of the files into a new folder, and of `sync` of the copies."""
    target.mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *map(str, sources), str(target)], check=True)
    if sync:
        subprocess.run(["sync", *(str(path) for path in target.iterdir())], check=True)
    return time.perf_counter() - started


def measure(parent: Checkpoint, keep: int, folder: Path, rounds: int) -> dict:
    """All rounds for the first `keep` domains."""
    domains = list(parent.domains[:keep])
    sources = [parent.path / file for file in parent.files(parent.names(domains=domains))]
    out = folder / "out"
    words = ["extract", parent.path, "--out", out, "--no-verify", *(w for d in domains for w in ("--domain", d))]
    record: dict = {"domains": keep, "bytes": sum(path.stat().st_size for path in sources), "rounds": []}

    def extraction() -> dict:
        results = measured_process(folder, *words)
        results["output"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return results

    turns = {
        "extract": extraction,
        "cp": lambda: {"seconds": copy(sources, out, sync=False)},
        "cp and sync": lambda: {"seconds": copy(sources, out, sync=True)},
    }
    names = list(turns)
    with progress(f"cut {keep}", rounds * len(turns), unit="turns") as job:
        for number in range(rounds):
            results = {}
            first = number % len(names)
            for name in names[first:] + names[:first]:
                results[name] = turns[name]()
                shutil.rmtree(out)
                # what is still to be written of this turn must not slow the next one
                subprocess.run(["sync", "-f", str(folder)], check=True)
                job.advance()
            record["rounds"].append(results)
    return record


def summary(record: dict, imports: dict[str, float]) -> dict:
    """Medians and ratios over the rounds."""
    rounds = record["rounds"]
    seconds = {name: statistics.median(by_program[name]["seconds"] for by_program in rounds) for name in rounds[0]}
    ratios = {
        name: statistics.median(by_program["extract"]["seconds"] / by_program[name]["seconds"] for by_program in rounds)
        for name in seconds
        if name != "extract"
    }
    cut = [by_program["extract"] for by_program in rounds]
    written = statistics.median(one["output"] for one in cut)
    read = statistics.median(one["read"] - imports["read"] for one in cut)
    return {
        "seconds": seconds,
        "ratios": ratios,
        "bytes_read": read,
        "bytes_written": written,
        "read_per_written": read / written,
        "memory": max(one["memory"] for one in cut),
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| domains cut out | written | read / written | peak memory | extract | cp and sync | cp "
        "| extract / (cp and sync) | extract / cp |",
        "| --- " * 9 + "|",
    ]
    for result in results:
        seconds, ratios = result["seconds"], result["ratios"]
        lines.append(
            f"| {result['domains']} | {result['bytes_written'] / 1e9:.2f} GB | {result['read_per_written']:.3f} | "
            f"{result['memory'] / 1e6:.0f} MB | {seconds['extract']:.2f} s | {seconds['cp and sync']:.2f} s | "
            f"{seconds['cp']:.2f} s | **{ratios['cp and sync']:.2f}** | {ratios['cp']:.2f} |"
        )
    return "\n".join(lines)


def page(record: dict) -> str:
    """The whole record for a reader."""
    return "\n".join(
        [
            "# Cutting domains out of a large checkpoint",
            "",
            "Written by `python -m benchmarks.extraction`; every round is in `extraction.json`.",
            "",
            table(record["results"]),
            "",
            f"A checkpoint of {record['domains']} domains, {record['bytes'] / 1e9:.1f} GB of random float32 weights "
            f"({record['parameters'] / 1e9:.2f} G parameters): {LAYERS} layers, {HIDDEN} wide, feed-forward "
            f"{record['ffn']}, {EXPERTS} experts a domain in each of {SPARSE} sparse layers. Medians of "
            f"{record['rounds']} rounds, the three in turns; a ratio is the median of the rounds' ratios.",
            "",
            "`extract` is the whole command with `--no-verify`, Python's start included: every byte is read once, its "
            "sha256 compared with the manifest, written and synced to disk. Bytes read are the process's own count "
            f"(`rchar` of /proc/self/io) less the {record['imports']['read'] / 1e6:.1f} MB that importing the program "
            f"reads; importing alone takes {record['imports']['seconds']:.2f} s and "
            f"{record['imports']['memory'] / 1e6:.0f} MB of memory. Source files are in the page cache.",
            "",
            sentence(record["machine"]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Cutting domains out of a large checkpoint, beside cp.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--domains", type=int, default=40, help="domains of the checkpoint")
    parser.add_argument("--ffn", type=int, default=3072, help="inner width of an expert")
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 16], help="how many domains to cut out")
    parser.add_argument("--work", type=Path, default=Path("build/bench-extraction"), help="folder, removed at the end")
    add_output(parser)
    given = parser.parse_args()
    if min(given.rounds, given.domains, *given.keep) < 1 or max(given.keep) > given.domains:
        parser.error("--rounds and --keep must be at least 1, and --keep at most --domains.")
    if given.work.exists():
        parser.error(f"{given.work} exists: remove it or choose another --work.")
    config = benchmark_config(given.domains, given.ffn)
    try:
        given.work.mkdir(parents=True)
        folder = given.work.resolve()
        parent = make_checkpoint(folder / "checkpoint", config)
        parent = open_checkpoint(parent.path)
        parent.verify()  # also brings every file into the page cache
        imports = measured_process(folder)
        results = []
        for keep in given.keep:
            record = measure(parent, keep, folder, given.rounds)
            results.append({**record, **summary(record, imports)})
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    from pangu_sigma.config import parameter_counts

    record = {
        "machine": machine(),
        "rounds": given.rounds,
        "domains": given.domains,
        "ffn": given.ffn,
        "bytes": sum(file.bytes for file in parent.manifest.files.values()),
        "parameters": parameter_counts(config, VOCABULARY).total,
        "imports": imports,
        "results": results,
    }
    print(table(results))
    write_results(given.out, "extraction", record, page(record))


if __name__ == "__main__":
    main()
