"""Where a training step's time goes: MindSpore's CPU profiler over real steps of the product, summed by operator type.

    python -m benchmarks.profile_step [--variants dense sparse16] [--steps N]

Prints one Markdown table per variant and writes them to benchmarks/results/profile_step.md. The profiler times kernels
where they run: time between kernels and in the experts' NumPy update does not show, so the last line tells the clock's
time too.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.ours import stepper
from benchmarks.workload import VARIANTS, prepare
from parallel.ops.compiled_kernels import kernel_times, library

WARMUP = 32  # after 30 launches of a kernel MindSpore has chosen its number of threads
SHOWN = 12  # operator types in the table; the rest is summed


def profile(config: Path, steps: int) -> tuple[Counter, Counter, float]:
    """Milliseconds and calls a step by operator type or kernel, and the step's length by the clock in milliseconds."""
    from mindspore import profiler

    with stepper(config) as ours, tempfile.TemporaryDirectory() as folder:
        for _ in range(WARMUP):
            ours.step()
        ours.flush()
        watched = profiler.profile(
            activities=[profiler.ProfilerActivity.CPU],
            on_trace_ready=profiler.tensorboard_trace_handler(folder),
        )
        before = compiled_times()
        start = time.perf_counter()
        for _ in range(steps):
            ours.step()
        ours.flush()
        seconds = time.perf_counter() - start
        watched.step()
        watched.stop()
        spent, calls = Counter(), Counter()
        for path in Path(folder).rglob("cpu_op_type_info_*.csv"):
            with path.open(encoding="utf-8", newline="") as rows:
                for row in csv.DictReader(rows):
                    spent[row["op_type"]] += float(row["total_compute_time"]) / steps
                    calls[row["op_type"]] += int(row["type_occurrences"]) / steps
        # The profiler knows every compiled kernel as Custom; they count themselves by name.
        for name, (number, taken) in compiled_times().items():
            earlier = before.get(name, (0, 0.0))
            for counter, amount in ((calls, number - earlier[0]), (spent, 1000 * (taken - earlier[1]))):
                counter[f"{name} (compiled)"] += amount / steps
                counter["Custom"] -= amount / steps
        if compiled_times():
            spent["launching compiled kernels"] = spent.pop("Custom")
            calls["launching compiled kernels"] = calls.pop("Custom")
    return spent, calls, 1000 * seconds / steps


def compiled_times() -> dict[str, tuple[int, float]]:
    """Kernel name -> (calls, seconds) so far; empty where no compiled kernels are used."""
    path = library()
    return kernel_times(path) if path else {}


def table(spent: Counter, calls: Counter, clock: float) -> str:
    """The figures of `profile` as a Markdown table."""
    total = sum(spent.values())
    lines = ["| operator | calls a step | ms a step | share |", "| --- | --- | --- | --- |"]
    shown = spent.most_common(SHOWN)
    for name, ms in shown:
        lines.append(f"| {name} | {calls[name]:.0f} | {ms:.0f} | {ms / total:.0%} |")
    rest = total - sum(ms for _, ms in shown)
    lines.append(f"| {len(spent) - len(shown)} others | {sum(calls.values()) - sum(calls[n] for n, _ in shown):.0f} | "
                 f"{rest:.0f} | {rest / total:.0%} |")  # fmt: skip
    lines.append(f"| all kernels (the step took {clock:.0f} ms) | {sum(calls.values()):.0f} | {total:.0f} | 100% |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Operator times of a training step.")
    parser.add_argument("--steps", type=int, default=3, help="steps under the profiler")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["dense", "sparse16"])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for corpora and batches")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    given = parser.parse_args()
    parts = ["# Where a training step spends its time", "Written by `python -m benchmarks.profile_step`."]
    for name in given.variants:
        work = prepare(VARIANTS[name], given.work / name, 1)
        parts += [f"## {VARIANTS[name].title}", table(*profile(work.config, given.steps))]
        print("\n\n".join(parts[-2:]) + "\n", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "profile_step.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
