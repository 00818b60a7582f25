"""Four real domains learned one after another by eight systems, and by two that see all of them at once.

    python -m benchmarks.lifelong [--steps N] [--seeds N] [--jobs N] [--only SYSTEM …] [--render] [--small] [--quick]

Code, mathematics, drama and Chinese poetry, an equal number of tokens each; a token meets about 3 M parameters in every
system. Every run is `pangu-sigma lifelong` on a file of stages. Stop it whenever you like: the same command goes on
where it was, and `--render` writes the tables and the heat map of what is finished so far to benchmarks/results/.

--quick (about 20 minutes on 2 cores with nothing beside it): one seed, code and mathematics at once as the base, then
drama, then poetry, by six of the systems and without inferring domains; its tables are lifelong_quick.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lifelong_markdown import page, panels, results_name
from benchmarks.lifelong_systems import (
    DOMAINS,
    QUICK_SYSTEMS,
    System,
    missing_text,
    prepare_text,
    systems,
    write_stages,
)
from benchmarks.record import add_output, machine, write_results
from benchmarks.runs import Failed, Job, run_all
from pangu_sigma.lifelong.loss_heat_map import heat_map
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.signals import stop_signals_raise

# 30 runs of 4 stages in more than 3 hours on 2 cores.
STEPS, SEEDS, JOBS = 120, 3, 2
REPLAY, EWC, OUTPUT = 0.2, 100.0, 1.0


@dataclass(frozen=True, eq=False)
class Run:
    """One system with one seed; its measurement lies in `folder`, its file of stages and log beside it."""

    name: str
    system: System
    seed: int
    folder: Path

    @property
    def result(self) -> dict | None:
        """The finished measurement; None while it is not."""
        try:
            measurement = json.loads((self.folder / "lifelong.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return measurement if measurement["complete"] else None

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.folder.with_suffix(".log")


def job(run: Run, text: dict[str, Path], steps: int, small: bool, quick: bool = False) -> Job:
    """The process of one run."""

    def command() -> list[str]:
        stages = write_stages(run.system, run.folder, text, run.seed, steps, small, quick)
        return [sys.executable, "-m", "pangu_sigma", "lifelong", str(stages)]

    return Job(run.folder.name, command, run.log, lambda: run.result is not None, lambda: _tidy(run.folder))


def _tidy(folder: Path) -> None:
    """A finished measurement is its figures; the models of all runs would fill the disk."""
    for path in folder.glob("stages/*/checkpoints"):
        shutil.rmtree(path)


def collect(runs: list[Run]) -> dict[str, dict]:
    """System -> {"title", "joint", "seeds": {seed: finished measurement}}, of those that have a finished one."""
    by_system: dict[str, dict] = {}
    for run in runs:
        result = run.result
        if result is not None:
            entry = by_system.setdefault(
                run.name, {"title": run.system.title, "joint": run.system.joint, "seeds": {}}
            )
            # The plan names this machine's folders.
            entry["seeds"][str(run.seed)] = {key: value for key, value in result.items() if key != "plan"}
    return by_system


def render(runs: list[Run], given: argparse.Namespace) -> str:
    """Write tables, heat map and figures of what is finished; returns the page."""
    by_system = collect(runs)
    record = {
        "machine": machine("mindspore"),
        "steps": given.steps,
        "seeds": given.seeds,
        "jobs": given.jobs,
        "small": given.small,
        "quick": given.quick,
        "runs": len(runs),
        "finished": sum(len(entry["seeds"]) for entry in by_system.values()),
        "domains": list(DOMAINS),
        "systems": by_system,
    }
    written = page(record)
    name = results_name(record)
    write_results(given.out, name, record, written)
    if drawn := panels(record):
        write_text(given.out / f"{name}.svg", heat_map(drawn, columns=2))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Four domains learned one after another by eight systems.")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a stage")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=JOBS, help="runs at a time, each on processors of its own")
    parser.add_argument("--replay", type=float, default=REPLAY, help="share of old text under replay")
    parser.add_argument("--ewc", type=float, default=EWC, help="weight of EWC")
    parser.add_argument("--output", type=float, default=OUTPUT, help="weight of Lifelong-MoE's output regularisation")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="some systems only, by their short names")
    parser.add_argument("--render", action="store_true", help="train nothing, write what is finished")
    parser.add_argument("--small", action="store_true", help="a model that only shows that everything works")
    parser.add_argument("--quick", action="store_true", help="one seed, six systems, two domains after a base of two")
    parser.add_argument("--work", type=Path, default=Path("build/lifelong"), help="folder for the runs")
    add_output(parser)
    given = parser.parse_args()
    if min(given.steps, given.seeds, given.jobs) < 1:
        parser.error("--steps, --seeds and --jobs must be at least 1.")
    chosen = systems(given.replay, given.ewc, given.output)
    if given.quick:
        given.seeds, chosen = 1, {name: chosen[name] for name in QUICK_SYSTEMS}
    if unknown := sorted(set(given.only or ()) - set(chosen)):
        parser.error(f"there is no system {unknown[0]}: the systems are {', '.join(chosen)}.")
    if missing := missing_text():
        parser.exit(2, f"Error: {missing[0]} is not here: it is the text of one of the four domains.\n")
    kind = f"{'quick-' if given.quick else ''}{'small' if given.small else 'steps'}-{given.steps}"
    work = given.work.resolve() / kind
    # Seed by seed, so that every system has its first one early.
    runs = [
        Run(name, system, seed, work / f"{name}-{seed}")
        for seed in range(1, given.seeds + 1)
        for name, system in chosen.items()
        if not given.only or name in given.only
    ]
    if given.render:
        print(render(runs, given))
        return
    try:
        with stop_signals_raise():
            text = prepare_text(work / "text")
            run_all([job(run, text, given.steps, given.small, given.quick) for run in runs], given.jobs)
    except Failed as failure:
        render(runs, given)
        parser.exit(1, f"Error: {failure}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Interrupted; the same command goes on, --render shows what is finished.\n")
    print(render(runs, given))


if __name__ == "__main__":
    main()
