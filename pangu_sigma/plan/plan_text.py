"""A plan as text."""

from __future__ import annotations

from typing import Any

from pangu_sigma.monitor.text_tables import text_table
from pangu_sigma.plan.hardware import GIB

NOTE = "By arithmetic from the stated assumptions; no NPU has run this yet."


def text(plan: dict[str, Any]) -> str:
    """The plan for a terminal: parameters, memory against limits, bytes and time of a step, what to change."""
    mesh, counts = plan["mesh"], plan["parameters"]
    groups = f", {mesh['placement_groups']} placement groups" if mesh["placement"] == "domain" else ""
    activated = max(counts["activated_per_token"].values())
    parts = [
        f"{plan['devices']} devices: data {mesh['data']} x expert {mesh['expert']} x tensor {mesh['tensor']} x "
        f"pipeline {mesh['pipeline']}, {mesh['placement']} placement{groups}\n"
        f"{counts['total'] / 1e9:,.2f} B parameters, {counts['shared'] / 1e9:,.2f} B shared, "
        f"{activated / 1e9:,.2f} B met by a token",
        _memory(plan),
        _step(plan),
        _placements(plan),
    ]
    step, paper = plan["step"], plan["paper"]
    rate = step["tokens_per_second"]
    parts.append(
        f"estimate {step['total_seconds']:.2f} s a step, {rate:,.0f} tokens/s, {rate / plan['devices']:,.1f} a device "
        f"(the paper on {paper['devices']} devices: {paper['tokens_per_second']:,} tokens/s, "
        f"{paper['tokens_per_second'] / paper['devices']:,.1f} a device)"
    )
    parts.append("assumed: " + ", ".join(f"{k} {v:g}" for k, v in plan["assumptions"].items()) + f"\n{NOTE}")
    if "compiled" in plan:
        parts.append(_compiled(plan["compiled"]))
    verdict = "It fits." if plan["fits"] else "It does not fit."
    parts.append("\n".join([verdict, *(f"Change: {line}." for line in plan["advice"])]))
    return "\n\n".join(part for part in parts if part)


def _memory(plan: dict[str, Any]) -> str:
    rows = [["device", name, f"{size / GIB:,.2f}", ""] for name, size in plan["device"]["bytes"].items()]
    for location in ("device", "host"):
        memory = plan[location]
        if memory["total"]:
            verdict = "fits" if memory["fits"] else "does not fit"
            rows.append([location, "total", f"{memory['total'] / GIB:,.2f}", f"{verdict} {memory['limit'] / GIB:,.0f}"])
    return text_table(["GiB of one", "", "needed", "limit"], rows, left=2)


def _step(plan: dict[str, Any]) -> str:
    step = plan["step"]
    rows = []
    for name, seconds in step["seconds"].items():
        sent = step["bytes_per_device"].get(name)
        work = f"{step['flop'] / plan['devices'] / 1e12:,.1f} TFLOP" if name == "products" else ""
        work = f"{sent / GIB:,.2f} GiB" if sent is not None else work
        if seconds:
            rows.append([name, work, f"{seconds:.3f}"])
    return text_table(["step, a device", "work", "seconds"], rows)


def _placements(plan: dict[str, Any]) -> str:
    if plan["dispatch"] is None:
        return ""
    rows = [
        [
            name,
            str(figures["exchange_ranks"]),
            f"{figures['all-to-all'] / GIB:,.2f}",
            f"{figures['all-reduce'] / GIB:,.2f}",
        ]
        for name, figures in plan["placements"].items()
    ]
    return text_table(["placement", "ranks in an exchange", "all-to-all GiB", "all-reduce GiB"], rows)


def _compiled(figures: dict[str, Any]) -> str:
    """What MindSpore's pass made of the graph, or of every pipeline stage's."""
    stages = figures.get("stages", [figures])
    tables = []
    for of_stage in stages:
        what = f"stage {of_stage['stage']}, rank {of_stage['rank']}: the graph of a whole step"
        if len(stages) == 1:
            what = "rank 0's graph of one micro-batch"
        tables.append(f"{what}:\n{_collectives(of_stage)}\n{_parts(of_stage)}")
    both = "; rows and their gradients go from stage to stage, micro-batch by micro-batch" if len(stages) > 1 else ""
    return (
        f"compiled by MindSpore's semi-auto-parallel pass for {figures['devices']} devices in "
        f"{figures['seconds']:.1f} s, {figures['peak_bytes'] / GIB:.1f} GiB; "
        + "\n\n".join(tables)
        + "; every sparse layer has its exchanges, "
        f"inside its placement group{both}"
    )


def _parts(figures: dict[str, Any]) -> str:
    cut = sum(p["shard"] != p["shape"] for p in figures["parameters"].values())
    return (
        f"{len(figures['parameters'])} parameters as in the manifest, {cut} of them cut; "
        f"{len(figures['experts'])} expert tensors come in cut as planned"
    )


def _collectives(figures: dict[str, Any]) -> str:
    rows = []
    for row in figures["collectives"]:
        ranks = row["ranks"]
        rank_list = ", ".join(map(str, ranks[:4])) + (f", … {ranks[-1]}" if len(ranks) > 4 else "")
        way = "backward" if row["backward"] else "forward"
        rows.append([row["kind"], way, str(row["count"]), str(len(ranks)), f"{row['bytes'] / 2**20:,.2f}", rank_list])
    return text_table(
        ["collective", "", "times", "ranks", "MiB each", f"of rank {figures['rank']}: ranks"], rows, left=2
    )
