"""Training throughput beside the same architecture in PyTorch eager, measured in one interleaved run.

    python -m benchmarks.training_speed [--rounds N] [--steps N] [--variants dense sparse4 sparse16]

Every system is a server of its own process with its model built; one computes at a time, in turns, so that whatever
else the machine does meets all of them alike; ratios are taken inside a round and their median is reported. Batches of
real text and routing tables (drawn `uniform`) are equal for all. Initial weights are each system's own, so the losses
only show that all learn the same thing: they begin near ln V and fall. Attention restarts at an end-of-document token
on our side only, which costs us a mask. The sparse PyTorch model is measured in both its forms (a loop over hit
experts, batched products over sorted rows); the faster one is the baseline.

Prints a Markdown table and writes it with the figures of every round to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.benchmark_server import Server, ServerFailed
from benchmarks.record import add_output, loss_complaints, machine, sentence, write_results
from benchmarks.workload import (
    BATCH,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    VARIANTS,
    VOCABULARY,
    Variant,
    Workload,
    prepare,
)
from pangu_sigma.monitor.progress import progress

HERE = Path(__file__).parent
# The first step compiles; MindSpore then tries thread counts for every kernel over its first 30 launches.
WARMUP = 32
OURS = "pangu-sigma"


def commands(work: Workload, torch_python: str) -> dict[str, list[str]]:
    """The command line of every system that computes this variant."""
    variant = work.variant
    torch = [torch_python, str(HERE / "torch_pangu.py"), "--serve", "--tokens", str(work.tokens)]
    torch += ["--vocab", str(VOCABULARY)]
    systems = {OURS: [sys.executable, "-m", "benchmarks.ours", str(work.config)]}
    if not variant.sparse_layers:
        return systems | {"PyTorch": [*torch, "--variant", "dense"]}
    torch += ["--variant", "sparse", "--sparse-layers", str(variant.sparse_layers), "--routing", str(work.routing)]
    torch += ["--experts", str(variant.experts)]
    return systems | {f"PyTorch {form}": [*torch, "--form", form] for form in ("loop", "bmm")}


def measure(variant: Variant, folder: Path, torch_python: str, warmup: int, rounds: int, steps: int) -> dict:
    """Measure one variant; the result holds tokens/s per round and the losses of every system."""
    work = prepare(variant, folder / variant.name, warmup + rounds * steps)
    with ExitStack() as running:
        launch = commands(work, torch_python)
        total = len(launch) * (1 + rounds)
        job = running.enter_context(progress(f"{variant.name}: measure", total, "turns"))
        servers = {name: running.enter_context(Server(name, command)) for name, command in launch.items()}
        losses: dict[str, list[float]] = {}
        speeds: dict[str, list[float]] = {name: [] for name in servers}
        for name, server in servers.items():
            losses[name] = server.steps(warmup)["losses"]
            job.advance()
        order = list(servers)
        for number in range(rounds):
            # Another system begins each round, so that none always runs on what the same neighbour left behind.
            first = number % len(order)
            for name in order[first:] + order[:first]:
                answer = servers[name].steps(steps)
                speeds[name].append(steps * BATCH * LENGTH / sum(answer["seconds"]))
                losses[name] += answer["losses"]
                job.advance()
        parameters = {name: server.parameters for name, server in servers.items()}
    return {
        "variant": variant.name,
        "title": variant.title,
        "parameters": parameters,
        "tokens_per_second": speeds,
        "losses": losses,
        **summary(speeds),
    }


def summary(speeds: dict[str, list[float]]) -> dict:
    """Medians, the baseline (the fastest PyTorch form) and the median ratio to each form, from tokens/s per round."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    others = [name for name in speeds if name != OURS]
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)) for name in others
    }
    baseline = max(others, key=medians.get)
    return {"medians": medians, "ratios": ratios, "baseline": baseline, "ratio": ratios[baseline]}


def complaints(result: dict) -> list[str]:
    """What speaks against the two systems computing the same thing: nothing if all losses begin near ln V and fall."""
    runs = result["losses"].items()
    return [c for name, losses in runs for c in loss_complaints(name, losses[0], losses[-1], VOCABULARY)]


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| variant | ours, tokens/s | PyTorch, tokens/s | ratio (median of rounds) |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        medians, baseline = result["medians"], result["baseline"]
        torch = ", ".join(
            f"{name.removeprefix('PyTorch').strip() or 'eager'} {medians[name]:.0f}" for name in result["ratios"]
        )
        spread = [a / b for a, b in zip(*(result["tokens_per_second"][n] for n in (OURS, baseline)), strict=True)]
        lines.append(
            f"| {result['title']} | {medians[OURS]:.0f} | {torch} | "
            f"**{result['ratio']:.2f}** ({min(spread):.2f} to {max(spread):.2f}) |"
        )
    return "\n".join(lines)


def page(record: dict) -> str:
    """The whole record for a reader: table, how it was measured, losses."""
    results = record["results"]
    losses = [
        f"- {r['variant']}, {name}: {steps[0]:.2f} at the first step, {steps[-1]:.2f} after {len(steps)}"
        for r in results
        for name, steps in r["losses"].items()
    ]
    return "\n".join(
        [
            "# Training speed beside PyTorch eager",
            "",
            "Written by `make bench` (`python -m benchmarks.training_speed`); every round is in `training_speed.json`.",
            "",
            table(results),
            "",
            f"{LAYERS} layers, {HIDDEN} wide, {HEADS} heads, feed-forward {FFN}, batch {BATCH} × {LENGTH}, vocabulary "
            f"{VOCABULARY}, float32. {record['rounds']} rounds of {record['steps']} steps, systems in turns; the range "
            "is over the rounds. A step holds everything: reading, routing, gradients, clipping, AdamW.",
            "",
            sentence(record["machine"]),
            "",
            f"Losses (ln {VOCABULARY} = {math.log(VOCABULARY):.2f}; weights and masks at document ends differ):",
            "",
            *losses,
            "",
            "Where a step of ours spends its time: [profile_step.md](profile_step.md).",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Training throughput beside PyTorch eager.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a system's turn")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="untimed steps of every system")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for corpora and batches")
    add_output(parser)
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PYTHON", help="interpreter that has torch, if not this one"
    )
    given = parser.parse_args()
    if min(given.rounds, given.steps, given.warmup) < 1:
        parser.error("--rounds, --steps and --warmup must be at least 1.")
    if subprocess.run([given.torch_python, "-c", "import torch"], capture_output=True).returncode:
        parser.exit(2, f"Error: {given.torch_python} has no torch to compare with: pip install '.[torch]'\n")
    results = []
    try:
        for name in given.variants:
            results.append(
                measure(VARIANTS[name], given.work, given.torch_python, given.warmup, given.rounds, given.steps)
            )
    except ServerFailed as failure:
        parser.exit(1, f"Error: {failure}\n")
    machine_record = machine("mindspore", torch_python=given.torch_python)
    record = {"machine": machine_record, "rounds": given.rounds, "steps": given.steps, "results": results}
    print(table(results))
    against = [complaint for result in results for complaint in complaints(result)]
    write_results(given.out, "training_speed", record, page(record), against)


if __name__ == "__main__":
    main()
