"""How long MindSpore's own pass takes to cut the shipped cluster configurations, and what it makes of them.

    python -m benchmarks.plan_compile [--only NAME] [--out benchmarks/results]

Every configuration is compiled for all its devices on this machine, which has none; those of several placement groups
once more under global placement. Writes plan_compile.json and plan_compile.md. No NPU has run these graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
from pathlib import Path
from typing import Any

from benchmarks.record import add_output, write_results
from pangu_sigma.config import load_config
from pangu_sigma.plan.cluster_plan import changed
from pangu_sigma.plan.compile_plan import compile_plan

ROOT = Path(__file__).parents[1]
CONFIGS = (
    "eight_devices_dense", "eight_devices_global", "eight_devices_domain", "eight_devices_pipeline", "pangu_alpha_13b",
    "pangu_sigma_38b", "pangu_sigma_1085b",
)  # fmt: skip
GIB = 2**30


def variants(name: str) -> dict[str, Any]:
    """The configuration by placement: its own, and global where it is domain."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    by_placement = {config.parallel.placement: config}
    if config.parallel.placement == "domain":
        limit = config.data.max_domains_per_batch
        everywhere = None if limit is None else limit * config.parallel.placement_groups
        by_placement["global"] = changed(
            config,
            {"parallel.placement": "global", "parallel.placement_groups": 1, "data.max_domains_per_batch": everywhere},
        )
    return by_placement


def measure(name: str) -> list[dict[str, Any]]:
    """A row for each placement of a configuration."""
    rows = []
    for placement, config in variants(name).items():
        before = processor_seconds()
        compiled = compile_plan(config)
        exchanges = [c for c in compiled["collectives"] if c["kind"] == "AlltoAll"]
        rows.append(
            {
                "configuration": name,
                "placement": placement if config.model.sparse_prefixes else "",
                "devices": compiled["devices"],
                "layers": config.model.layers,
                "compile_seconds": compiled["seconds"],
                "total_seconds": compiled["total_seconds"],
                "processor_seconds": processor_seconds() - before,
                "peak_bytes": compiled["peak_bytes"],
                "collectives": sum(c["count"] for c in compiled["collectives"]),
                "exchanges": sum(c["count"] for c in exchanges),
                "exchange_ranks": max((len(c["ranks"]) for c in exchanges), default=0),
                "bytes": compiled["bytes"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def processor_seconds() -> float:
    """User and system time of this process and of those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def table(rows: list[dict[str, Any]], machine: str) -> str:
    """The rows as Markdown."""
    lines = [
        "# Compiling cluster configurations without a cluster",
        "",
        f"`python -m benchmarks.plan_compile`, {machine}. Rank 0's graph of one micro-batch, forward and backward,",
        "from MindSpore's semi-auto-parallel pass; bytes are what a rank puts into the collectives of one micro-batch.",
        "With pipeline stages it is the first stage's graph of a whole step, and seconds are those of all stages.",
        "*compile s* and *in all s* are by the clock, on a machine that may have other work; *processor s* is the time",
        "that the compile and the check used of a processor. No NPU has run it.",
        "",
        "| configuration | devices | placement | compile s | in all s | processor s | GiB | collectives | AllToAll "
        "| its ranks | AllToAll GiB | AllReduce GiB | gather and scatter GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        size = row["bytes"]
        rest = sum(size.get(kind, 0) for kind in ("AllGather", "ReduceScatter"))
        cells = [
            row["configuration"], row["devices"], row["placement"], f"{row['compile_seconds']:.0f}",
            f"{row['total_seconds']:.0f}", f"{row['processor_seconds']:.0f}", f"{row['peak_bytes'] / GIB:.1f}",
            row["collectives"], row["exchanges"], row["exchange_ranks"] or "",
            *(f"{size.get(kind, 0) / GIB:.2f}" for kind in ("AlltoAll", "AllReduce")), f"{rest / GIB:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write; configurations that were not asked for keep their earlier rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CONFIGS, action="append")
    add_output(parser)
    arguments = parser.parse_args()
    kept = arguments.out / "plan_compile.json"
    known = json.loads(kept.read_text(encoding="utf-8"))["rows"] if kept.is_file() else []
    by_name = {name: [row for row in known if row["configuration"] == name] for name in CONFIGS}
    for name in arguments.only or CONFIGS:
        by_name[name] = measure(name)
    rows = [row for name in CONFIGS for row in by_name[name]]
    processors = len(os.sched_getaffinity(0))
    machine = f"{processors} processor{'s' if processors > 1 else ''} ({platform.machine()})"
    write_results(arguments.out, "plan_compile", {"machine": machine, "rows": rows}, table(rows, machine))


if __name__ == "__main__":
    main()
