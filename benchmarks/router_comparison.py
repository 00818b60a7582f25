"""RRE beside the field's routers: the same four domains, tokens, active parameters and seeds.

    python -m benchmarks.router_comparison [--steps N] [--seeds N] [--jobs N] [--only SYSTEM …] [--render]

Every run is `pangu-sigma train`. Stop it whenever you like: the same command goes on where it was, and `--render`
writes the table of what is finished so far to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lifelong_systems import missing_text, prepare_text
from benchmarks.record import add_output, machine, sentence, write_results
from benchmarks.router_systems import DOMAINS, INNER, SHARED, SYSTEMS
from benchmarks.runs import Failed, Job, run_all
from pangu_sigma.config import load_config
from pangu_sigma.config.parameter_counts import parameter_counts
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.monitor.printable_text import compact
from pangu_sigma.signals import stop_signals_raise

HERE = Path(__file__).parent
CONFIG = HERE / "four_domains.yaml"
# 18 runs of 0.4 M tokens in about 40 minutes on 2 cores, two runs at a time.
STEPS, SEEDS, JOBS = 200, 3, 2
# Tokens per second come from runs of their own, one at a time: MindSpore chooses its threads over the first launches.
SPEED_STEPS, SPEED_AFTER = 60, 40
LAST = 5  # records at the end of a run over which load and drops are taken


def overrides(name: str, seed: int, steps: int, folder: Path, text: dict[str, Path]) -> list[str]:
    """The changes to four_domains.yaml that make one run."""
    system = SYSTEMS[name]
    domains = [{"name": n, "data": [str(path.resolve())], "experts": system.experts} for n, path in text.items()]
    return [
        f"run.dir={folder}", f"run.seed={seed}", f"data.cache={folder.parent / 'cache'}", f"domains={domains}", *SHARED,
        *system.changes(), f"train.steps={steps}", f"schedule.warmup_steps={max(1, steps // 10)}",
        f"evaluate.every={steps}", f"checkpoint.every={max(1, steps // 4)}",
    ]  # fmt: skip


def job(name: str, seed: int, steps: int, work: Path, text: dict[str, Path]) -> Job:
    """The run of one system with one seed."""
    folder = work / f"{name}-{seed}"

    def command() -> list[str]:
        begun = ["--resume"] if any(folder.glob("checkpoints/*/manifest.json")) else []
        changes = overrides(name, seed, steps, folder, text)
        return [sys.executable, "-m", "pangu_sigma", "train", str(CONFIG), *changes, *begun]

    return Job(folder.name, command, folder.with_suffix(".log"), lambda: losses(folder, steps) is not None)


def speed_job(name: str, work: Path, text: dict[str, Path]) -> Job:
    """A short run of one system on all processors, for its tokens per second."""
    folder = work / f"{name}-speed"
    changes = [*overrides(name, 1, SPEED_STEPS, folder, text), "run.log_every=1", "evaluate.every=0",
               f"checkpoint.every={SPEED_STEPS}"]  # fmt: skip

    def command() -> list[str]:
        # One that was interrupted is measured anew.
        shutil.rmtree(folder, ignore_errors=True)
        return [sys.executable, "-m", "pangu_sigma", "train", str(CONFIG), *changes]

    return Job(folder.name, command, folder.with_suffix(".log"), (folder / "summary.json").exists)


def speed(folder: Path) -> float | None:
    """Tokens per second of the finished short run in `folder`: the median of its last steps."""
    if not (folder / "summary.json").exists():
        return None
    train = [r for r in read_metrics(folder) if r["kind"] == "train" and r["step"] > SPEED_AFTER]
    return statistics.median(r["tokens_per_second"] for r in train)


def losses(folder: Path, steps: int) -> dict[str, float] | None:
    """Held-out loss by domain after the last step; None while the run is not finished."""
    if not (folder / "summary.json").exists():
        return None
    records = [r for r in read_metrics(folder) if r["kind"] == "evaluate" and r["step"] == steps]
    return records[-1]["losses"] if records else None


def figures(folder: Path, steps: int) -> dict:
    """What the table shows of one finished run."""
    train = [r for r in read_metrics(folder) if r["kind"] == "train"]
    last = train[-LAST:]
    busiest, dropped = [], []
    for record in last:
        for by_domain in record.get("expert_load", {}).values():
            rows = [n for group in by_domain.values() for n in group]
            # A domain's text can only come to its own group: each group is weighed against its own mean.
            groups = by_domain.values() if "rre" in folder.name else [rows]
            busiest += [max(g) * len(g) / sum(g) for g in groups if sum(g)]
        dropped += [share for by_domain in record.get("dropped_share", {}).values() for share in by_domain.values()]
    return {
        "losses": losses(folder, steps),
        "imbalance": statistics.mean(busiest) if busiest else None,
        "dropped": statistics.mean(dropped) if dropped else None,
    }


def collect(work: Path, names: Sequence[str], seeds: int, steps: int) -> dict[str, dict[str, dict]]:
    """System -> seed -> figures, of what is finished."""
    by_system: dict[str, dict[str, dict]] = {}
    for name in names:
        for seed in range(1, seeds + 1):
            folder = work / f"{name}-{seed}"
            if folder.is_dir() and losses(folder, steps) is not None:
                by_system.setdefault(name, {})[str(seed)] = figures(folder, steps)
    return by_system


def routers_alone(names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of one layer's routing of 2,048 tokens, measured in a process of its own."""
    routers = [name for name in names if SYSTEMS[name].router]
    if not routers:
        return {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.router_time", *routers], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(record: dict) -> str:
    """A row per system as Markdown."""
    header = ["system", "parameters", "a token meets", *DOMAINS, "mean", "tokens/s", "busiest × mean", "dropped",
              "router, µs/token"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    for name, by_seed in record["systems"].items():
        runs = list(by_seed.values())
        means = [statistics.mean(run["losses"].values()) for run in runs]
        row = [SYSTEMS[name].title, *(compact(n) for n in record["parameters"][name])]
        row += [spread([run["losses"][domain] for run in runs]) for domain in DOMAINS]
        fast = record["tokens_per_second"].get(name)
        row += [f"**{spread(means)}**", "–" if fast is None else f"{fast:,.0f}"]
        for key, digits in (("imbalance", 2), ("dropped", 3)):
            values = [run[key] for run in runs if run[key] is not None]
            row.append(f"{statistics.mean(values):.{digits}f}" if values and SYSTEMS[name].router else "–")
        alone = record["router_ms"].get(name)
        row.append("–" if alone is None else f"{1000 * alone / 2048:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def page(record: dict) -> str:
    """The whole record as Markdown."""
    tokens = record["steps"] * 16 * 128
    return "\n".join(
        [
            "# Routers beside each other",
            "",
            f"Written by `python -m benchmarks.router_comparison`; every figure is in `router_comparison.json`. "
            f"{record['finished']} of {record['runs']} runs are finished.",
            "",
            table(record) if record["systems"] else "Nothing is finished yet.",
            "",
            f"Held-out loss in nats per token, mean and standard deviation over the seeds; 4 layers 192 wide, every "
            f"layer sparse (no query layer), inner width met by a token {INNER} in each, vocabulary 4,096, batch 16 × "
            f"128, {record['steps']} steps = {compact(tokens)} tokens of four domains in equal shares. Experts are "
            f"{INNER}/k wide, so all sparse systems store the same number of parameters. Gates choose among all "
            "experts of a layer and are not told the domain; RRE is. Tables are balanced by frequency. Busiest × mean: "
            f"rows of the busiest expert over the mean (RRE: of its group) in training; dropped: share of choices. "
            f"Tokens/s: training on all processors, nothing beside it, median of {SPEED_STEPS - SPEED_AFTER} steps.",
            "",
            "Router: routing of 2,048 tokens in one layer alone, by the clock; a gate's forward and backward pass in "
            "the step, a table's look-up and plan in the reading thread, beside it.",
            "",
            sentence(record["machine"]),
            "",
        ]
    )


def render(given: argparse.Namespace, work: Path, names: Sequence[str]) -> str:
    """Write the table and the figures of what is finished; returns the page."""
    systems = collect(work, names, given.seeds, given.steps)
    counts = {}
    for name in systems:
        # The folders are not read: only sizes count.
        config = load_config(CONFIG, overrides(name, 1, given.steps, work / name, dict.fromkeys(DOMAINS, CONFIG)))
        parameters = parameter_counts(config, 4096)
        counts[name] = (parameters.total, max(parameters.activated_per_token.values()))
    record = {
        "machine": machine("mindspore"),
        "steps": given.steps,
        "runs": len(names) * given.seeds,
        "finished": sum(len(by_seed) for by_seed in systems.values()),
        "systems": systems,
        "parameters": counts,
        "router_ms": routers_alone(list(systems)),
        "tokens_per_second": {
            name: measured for name in systems if (measured := speed(work / f"{name}-speed")) is not None
        },
    }
    written = page(record)
    write_results(given.out, "router_comparison", record, written)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="RRE beside the field's routers on the same work.")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=JOBS, help="runs at a time, each on processors of its own")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM", default=list(SYSTEMS))
    parser.add_argument("--render", action="store_true", help="train nothing, write what is finished")
    parser.add_argument("--work", type=Path, default=Path("build/routers"), help="folder for the runs")
    add_output(parser)
    given = parser.parse_args()
    if min(given.steps, given.seeds, given.jobs) < 1:
        parser.error("--steps, --seeds and --jobs must be at least 1.")
    if missing := missing_text():
        parser.exit(2, f"Error: {missing[0]} is not here: it is the text of one of the four domains.\n")
    work = given.work.resolve() / f"steps-{given.steps}"
    if not given.render:
        text = prepare_text(work / "text")
        # Seed by seed, so that every system has its first one early.
        jobs = [job(name, seed, given.steps, work, text) for seed in range(1, given.seeds + 1) for name in given.only]
        try:
            with stop_signals_raise():
                run_all(jobs, given.jobs)
                run_all([speed_job(name, work, text) for name in given.only], 1)
        except Failed as failure:
            parser.exit(1, f"Error: {failure}\n")
        except KeyboardInterrupt:
            parser.exit(130, "Interrupted; the same command goes on, --render shows what is finished.\n")
    print(render(given, work, given.only))


if __name__ == "__main__":
    main()
