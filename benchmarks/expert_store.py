"""What storing many experts costs a training step: expert stores beside each other and beside a learned-gate MoE.

    python -m benchmarks.expert_store [--part stored throughput disk killed] [--again] [--work FOLDER]

Four parts, each made of cases that run in a process of their own; a case that stands in the results is not run again
(`--again` runs it). The figures go to benchmarks/results/expert_store.json, the tables to expert_store.md.

- stored: step time over the number of stored experts, the activated number fixed, another set every step.
- throughput: tokens per second beside the same model with a learned top-1 gate, whose experts are all resident and all
  updated every step: by the same kernels on all threads, and as a plain PyTorch program.
- disk: tables of more than 24 GB in files, every byte written beforehand, 50 steps within the resident bound.
- killed: a real run with 4 GB of tables, killed and resumed, beside the uninterrupted run, under a cap on memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.expert_store_killed import KILL_AFTER, SAVE_EVERY, killed
from benchmarks.expert_store_work import Work
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import write_json, write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "expert_store.json"
GIB = 2**30

# 8 activated experts in one sparse layer whatever is stored.
STORED = Work("host", 4, 4, 1, batch=4, domains_per_step=2, steps=60, warmup=36)
STORED_EXPERTS = (16, 64, 256, 640, 1024)
FEW_STEPS_FROM = 640  # experts of a device store, whose steps then take seconds
# 640 experts in each of 2 sparse layers, 40 domains: 672 M expert parameters, 84 times what a token meets besides
# attention, as in the paper (1,075 B and 12.8 B).
MOE = Work("host", 40, 16, 2, batch=4, domains_per_step=2, steps=6, warmup=3, layers=7, length=128)
MOE_TOKENS = (256, 1024, 4096, 16384)
GATE_TOKENS = (256, 1024, 4096)  # with a learned gate, whose graph of 5,120 weights takes minutes
TORCH = "torch"  # the router of the cases that benchmarks/torch_pangu.py runs
# 1,024 records of 25.2 MB.
DISK = Work(
    "disk", 256, 2, 2, batch=4, domains_per_step=2, steps=50, warmup=0, hidden=512, ffn=2048, heads=8, resident_gib=1.0
)
PAPER_TOKENS, PAPER_EXPERT_PARAMETERS = 524_288, 640 * 8 * 210e6
KILLED = Work("disk", 40, 4, 1, batch=4, domains_per_step=2, steps=10, warmup=0, hidden=512, ffn=2048, heads=8,
              resident_gib=0.5)  # fmt: skip


def cases() -> dict[str, dict[str, Work]]:
    """part -> name of a case -> what it measures; `killed` is no single process."""
    stored = {f"host {n}": replace(STORED, domains=n // 4) for n in STORED_EXPERTS}
    for n in STORED_EXPERTS:
        steps, warmup = (10, 4) if n >= FEW_STEPS_FROM else (STORED.steps, STORED.warmup)
        stored[f"device {n}"] = replace(STORED, store="device", domains=n // 4, steps=steps, warmup=warmup)
    throughput = {}
    for tokens in MOE_TOKENS:
        steps, warmup = (3, 2) if tokens > 8192 else (6, 3)
        one = replace(MOE, batch=tokens // MOE.length, steps=steps, warmup=warmup)
        throughput[f"stored {tokens}"] = one
        throughput[f"all updated {tokens}"] = replace(one, update_all=True)
    for tokens in GATE_TOKENS:
        throughput[f"gate {tokens}"] = replace(
            MOE, batch=tokens // MOE.length, store="device", router="switch", update_all=True, steps=3, warmup=1
        )
        throughput[f"torch {tokens}"] = replace(throughput[f"gate {tokens}"], router=TORCH)
    return {"stored": stored, "throughput": throughput, "disk": {"24 GB": DISK}, "killed": {"4 GB": KILLED}}


def run_case(work: Work, folder: Path, seconds: float) -> dict:
    """Measure in a process of its own; a case that takes longer than `seconds` is reported as such."""
    work = replace(work, folder=str(folder / "run"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch = work.router == TORCH
    command = torch_command(work) if torch else [
        sys.executable, "-m", "benchmarks.expert_store_work", json.dumps(asdict(work))
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env={**os.environ, "GLOG_v": "4"}
        )
    except subprocess.TimeoutExpired:
        return {"work": asdict(work), "impracticable": f"no result after {seconds:.0f} s, compilation included"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        return {"work": asdict(work), "impracticable": (done.stderr.strip().splitlines() or ["ended"])[-1]}
    result = json.loads(done.stdout.splitlines()[-1])
    if torch:
        return {"work": asdict(work), "median_seconds": statistics.median(result["seconds_per_step"]), **result}
    return result


def torch_command(work: Work) -> list[str]:
    """The same sizes as a PyTorch program: a learned top-1 gate, every expert resident and updated in every step."""
    sizes = {
        "layers": work.layers, "sparse-layers": work.sparse_layers, "hidden": work.hidden, "heads": work.heads,
        "ffn": work.ffn, "vocab": work.vocabulary, "batch": work.batch, "sequence": work.length,
        "experts": work.experts, "steps": work.steps, "warmup": work.warmup, "threads": os.cpu_count(),
    }  # fmt: skip
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(HERE / "torch_pangu.py"), "--variant", "sparse", "--gate", *words]


def page(results: dict) -> str:
    """All tables as Markdown."""
    lines = [
        "# Expert stores",
        "",
        "Written by `python -m benchmarks.expert_store`; every step's time is in `expert_store.json`. Steps are the "
        "product's own; token ids are random, domains rotate so that no step has one of the step before. "
        f"{results.get('machine', '')}",
    ]
    for part, shown in (("stored", stored_table), ("throughput", throughput_table), ("disk", disk_table),
                        ("killed", killed_table)):  # fmt: skip
        if results.get(part):
            lines += ["", *shown(results[part])]
    if any(results.get(part) for part in ("stored", "throughput", "disk")):
        lines += ["", *arithmetic_table(results)]
    return "\n".join(lines) + "\n"


def stored_table(results: dict) -> list[str]:
    one = STORED
    lines = [
        "## Step time over the number of stored experts",
        "",
        f"{one.layers} layers {one.hidden} wide, {one.sparse_layers} of them sparse, {one.tokens} tokens a step, "
        f"{one.activated} experts activated and updated a step, another set every step; {one.expert_parameters:,} "
        "parameters an expert. Median of "
        f"{one.steps} steps after {one.warmup}; first step = compilation of the graph.",
        "",
        "| stored experts | host, ms | against 16 | first step, s | device, ms | first step, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = results.get("host 16", {}).get("median_seconds")
    for n in STORED_EXPERTS:
        host, device = results.get(f"host {n}"), results.get(f"device {n}")
        if host is None:
            continue
        row = [str(n)]
        if "median_seconds" in host:
            ratio = f"{host['median_seconds'] / base:.2f}" if base else ""
            row += [f"{1e3 * host['median_seconds']:.1f}", ratio, f"{host['first_step_seconds']:.0f}"]
        else:
            row += [host["impracticable"], "", ""]
        if device is None:
            row += ["not run", ""]
        elif "median_seconds" in device:
            row += [f"{1e3 * device['median_seconds']:.1f}", f"{device['first_step_seconds']:.0f}"]
        else:
            row += [device["impracticable"], ""]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def throughput_table(results: dict) -> list[str]:
    one = MOE
    parameters = one.experts * one.sparse_layers * one.expert_parameters
    met = next((f["parameters_per_token"] for f in results.values() if "parameters_per_token" in f), float("nan"))
    lines = [
        "## Throughput beside an MoE that updates every expert",
        "",
        f"{one.layers} layers {one.hidden} wide, {one.sparse_layers} of them sparse with {one.experts} experts in "
        f"{one.domains} domains: {parameters / 1e6:,.0f} M expert parameters, {met / 1e6:.1f} M met by a token "
        f"(attention included), {parameters / met:.0f} times fewer (the paper: 1,075 B and 12.8 B, 84 times). Three "
        "systems with the same kernels for dispatch, experts and AdamW, on all threads, "
        f"{one.domains_per_step} domains a step, and one that shares nothing with them:",
        "",
        "- *store*: experts routed at random, host store; a step fetches and updates what it activates.",
        "- *all updated*: the same graph and the same activated experts, but AdamW over all experts every step (zero "
        "gradients where no token came). A gate only adds to that: more experts hit, and all of them in the graph. So "
        "its ratio is what updating alone costs, a lower bound.",
        "- *learned gate*: `router: switch` over all experts, all of them inputs of the graph, all updated every step: "
        "the paper's comparison as this code computes it. The gate spreads a batch over far more experts, and the "
        "graph of 5,120 weights and gradients has costs of its own in MindSpore.",
        "- *PyTorch*: the learned gate's model as a plain eager program (`benchmarks/torch_pangu.py --gate`): experts "
        "in a loop over those that were hit, one fused AdamW over all.",
        "",
        "| tokens a step | store, tokens/s | all updated, tokens/s | ratio, at least | learned gate, tokens/s | "
        "ratio | PyTorch, tokens/s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens in MOE_TOKENS:
        stored = results.get(f"stored {tokens}", {})
        if "median_seconds" not in stored:
            continue
        row = [f"{tokens:,}", f"{tokens / stored['median_seconds']:.0f}"]
        for name in ("all updated", "gate", "torch"):
            other = results.get(f"{name} {tokens}")
            if other is None:
                row += ["not run", ""]
            elif "median_seconds" not in other:
                row += [other["impracticable"], ""]
            else:
                ratio = other["median_seconds"] / stored["median_seconds"]
                length = other["work"]["length"]
                noted = "" if length == stored["work"]["length"] else f" (sequences of {length})"
                row += [f"{tokens / other['median_seconds']:.0f}{noted}", f"**{ratio:.1f}**"]
        lines.append("| " + " | ".join(row) + " |")
    share = PAPER_TOKENS * parameters / PAPER_EXPERT_PARAMETERS
    return [
        *lines,
        "",
        "Which end is the paper's: 524,288 tokens a step over 640 × 8 experts of 210 M parameters are 4.9e-7 tokens "
        f"per stored expert parameter, which makes {share:.0f} tokens a step here: the small end. (By FLOPs per "
        "updated parameter a model of the same proportions has the paper's share at the paper's 524,288 tokens. But "
        "the paper's cluster computes at 5.4e15 FLOP/s, and its ratio of 6.3 at 7.5 s a step leaves 39.8 s for 1,075 G "
        "parameters: 2.0e5 FLOP in the time of one update, where this machine has some hundreds. Equal shares of time "
        "are at the small end too.)",
    ]


def disk_table(results: dict) -> list[str]:
    lines = ["## Tables beyond memory"]
    for name, one in results.items():
        work = Work(**one["work"])
        if "median_seconds" not in one:
            return [*lines, "", f"{name}: {one['impracticable']}"]
        moved = one["traffic_per_step"]
        lines += [
            "",
            f"{one['expert_parameters'] / 1e9:.2f} G expert parameters, {one['file_bytes'] / 1e9:.1f} GB of tables "
            f"({one['file_blocks_bytes'] / 1e9:.1f} GB of disk blocks: not sparse, every byte written beforehand), "
            f"`experts.resident_gib = {work.resident_gib}`. The trainer is driven directly, because a run ends with a "
            f"checkpoint, which would need as much disk again. {work.steps} steps, "
            f"{one['experts_touched_in_all_steps']} different experts updated in all: "
            f"{one['median_seconds']:.2f} s a step (median), {moved['bytes_read'] / 1e6:.0f} MB read and "
            f"{moved['bytes_written'] / 1e6:.0f} MB written a step, "
            f"{100 * moved['prefetch_hit_rate']:.0f} % of the experts were there when asked for. Peak resident memory "
            f"{one['peak_resident_bytes'] / GIB:.2f} GiB, of the tables in the system's cache at most "
            f"{(one['cached_file_bytes_most'] or 0) / GIB:.2f} GiB.",
        ]
    return lines


def killed_table(results: dict) -> list[str]:
    lines = ["## Killed and resumed"]
    for one in results.values():
        work, most = Work(**one["work"]), one["most"]
        verdict = "equal byte for byte" if not one["differing"] else f"{len(one['differing'])} DIFFER"
        saves = "; ".join(
            f"step {s['step']}: {s['bytes_written'] / 1e9:.2f} GB written, {s['bytes_linked'] / 1e9:.2f} GB linked, "
            f"{s['seconds']:.0f} s" for s in one["saves"]
        )  # fmt: skip
        lines += [
            "",
            f"`pangu-sigma train` with {one['table_bytes'] / 1e9:.2f} GB of tables, `experts.resident_gib = "
            f"{work.resident_gib}`, heap and anonymous memory capped at {one['cap_bytes'] / GIB} GiB (RLIMIT_DATA), "
            f"file pages watched: at most {most['RssAnon'] / GIB:.2f} GiB anonymous, {most['RssFile'] / GIB:.2f} GiB "
            f"of mapped files (libraries included), {most['VmHWM'] / GIB:.2f} GiB in all. Killed with SIGKILL after "
            f"step {KILL_AFTER}, resumed from step {SAVE_EVERY}, {work.steps} steps: all {one['tensors']} tensors of "
            f"the last checkpoint {verdict} to the uninterrupted run's. Saves ({saves}): domains that did not "
            "train since the last one are linked.",
        ]
    return lines


def arithmetic_table(results: dict) -> list[str]:
    """Measured traffic and memory beside what sizes alone predict."""
    lines = [
        "## Traffic and memory beside the arithmetic",
        "",
        "P parameters an expert, A activated a step: 4 P A bytes go to the step, 4 P A gradients come back; the disk "
        "store reads 12 P and writes 12 P for each expert that is not resident; memory holds 12 P for every expert of "
        "a host store, the bound for a disk store, and besides the process itself (libraries, graph, shared "
        "parameters).",
        "",
        "| case | to the step, MB: predicted, measured | back, MB | disk read + written, MB: at most, measured | "
        "expert memory, GiB | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part in ("stored", "throughput", "disk"):
        for name, one in results.get(part, {}).items():
            if "traffic_per_step" not in one or name.startswith("device"):
                continue
            work, moved = Work(**one["work"]), one["traffic_per_step"]
            active = work.experts * work.sparse_layers if work.store == "device" else work.activated
            weights = 4 * work.expert_parameters
            disk = work.store == "disk"
            resident_bytes = min(one["expert_parameters"] * 12, work.resident_gib * GIB if disk else float("inf"))
            disk_bytes = 6 * weights * active if disk else 0
            lines.append(
                f"| {part}: {name} | {weights * active / 1e6:.0f}, {moved['bytes_to_step'] / 1e6:.0f} | "
                f"{moved['bytes_from_step'] / 1e6:.0f} | {disk_bytes / 1e6:.0f}, "
                f"{(moved['bytes_read'] + moved['bytes_written']) / 1e6:.0f} | {resident_bytes / GIB:.2f} | "
                f"{one['peak_resident_bytes'] / GIB:.2f} |"
            )
    return lines


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB of memory."


def main() -> None:
    parts = cases()
    parser = argparse.ArgumentParser(description="Expert stores beside each other and beside a learned-gate MoE.")
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--only", nargs="+", metavar="CASE", help="only these cases of the parts")
    parser.add_argument("--again", action="store_true", help="measure what stands in the results already, too")
    parser.add_argument("--work", type=Path, default=Path("build/expert_store"), help="folder for tables and runs")
    parser.add_argument("--seconds", type=float, default=400.0, help="time limit of a case")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["machine"] = machine()
    todo = [
        (part, name, work)
        for part in given.part
        for name, work in parts[part].items()
        if (given.again or name not in results.get(part, {})) and (not given.only or name in given.only)
    ]
    folder = (given.work / str(os.getpid())).absolute()
    with progress("measure", len(todo), "cases") as job:
        for part, name, work in todo:
            result = killed(work, folder) if part == "killed" else run_case(work, folder, given.seconds)
            result["work"]["folder"] = ""
            results.setdefault(part, {})[name] = result
            RESULTS.parent.mkdir(exist_ok=True)
            write_json(RESULTS, results)
            job.advance()
    text = page(results)
    write_text(RESULTS.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
