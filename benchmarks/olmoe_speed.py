"""Training throughput of OLMoEs beside Hugging Face's OlmoeForCausalLM and plain PyTorch, in one interleaved run.

    python -m benchmarks.olmoe_speed [--rounds N] [--steps N] [--variants fine coarse]

Four systems of the same sizes: ours, Hugging Face's model, and a plain PyTorch one with its experts as a loop over
those that were hit and as sorted batched products (`torch_olmoe.py`). Each is a process of its own with its model
built; one computes at a time, in turns, so that whatever else the machine does meets all alike; ratios are taken inside
a round and their median is reported. The batches of real text are equal for all, initial weights each system's own.
The objective of all is the mean loss plus Hugging Face's pooled load-balancing loss.

Rounds are kept in --work as they are measured: started again after an interruption, it goes on with the round that was
not finished (and warms up anew). Prints a Markdown table and writes it to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.benchmark_server import Server, ServerFailed
from benchmarks.record import add_output, loss_complaints, machine, sentence, write_results
from benchmarks.workload import sampler
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.config.load_config import effective
from pangu_sigma.data.builtin_corpora import build
from pangu_sigma.data.corpus import prepare_corpus
from pangu_sigma.monitor.progress import progress

HERE = Path(__file__).parent
VOCABULARY, LENGTH, BATCH, LAYERS, HIDDEN, HEADS = 8192, 512, 4, 4, 256, 8
# The first step compiles; MindSpore then tries thread counts for every kernel over its first 30 launches.
WARMUP = {"ours": 32, "other": 2}
OURS = "pangu-sigma"
FORMS = {"Hugging Face": "hf", "PyTorch loop": "loop", "PyTorch sorted bmm": "bmm"}


@dataclass(frozen=True)
class Variant:
    """One division of the experts; a token computes with top_k * ffn inner values in both."""

    name: str
    experts: int
    top_k: int
    ffn: int

    @property
    def title(self) -> str:
        return f"{self.experts} experts of {self.ffn}, top {self.top_k}"

    @property
    def sizes(self) -> dict[str, int]:
        """What the PyTorch side is built from."""
        return {
            "vocab_size": VOCABULARY, "hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "positions": LENGTH,
            **{key: value for key, value in asdict(self).items() if key != "name"},
        }  # fmt: skip


VARIANTS = {v.name: v for v in (Variant("fine", 64, 8, 128), Variant("coarse", 16, 1, 1024))}


def configuration(variant: Variant, folder: Path, corpora: dict[str, Path]) -> Config:
    """The product's configuration of a variant, with its run folder and token cache inside `folder`."""
    values = {
        "schema_version": 2,
        "run": {"dir": str(folder), "log_every": 1_000_000, "tensorboard": False},
        "model": {
            "vocab_size": VOCABULARY,
            "layers": LAYERS,
            "hidden": HIDDEN,
            "heads": HEADS,
            "ffn": variant.ffn,
            "positions": LENGTH,
            "activation": "silu",
            "norm": "rmsnorm",
            "position": "rope",
            "feed_forward": "swiglu",
            "biases": False,
            "head": "untied",
            "query_layer": "none",
            "attention": {"qk_norm": True},
            "init_scale_residual": False,
            "sparse": {
                "pattern": "every", "router": "olmoe", "top_k": variant.top_k,
                "balance": "pooled", "z_loss_weight": 0.0,
            },
        },
        "domains": [{"name": "mixed", "data": [str(p) for p in corpora.values()], "experts": variant.experts}],
        "data": {"tokenizer": {"vocab_size": VOCABULARY}, "sequence_length": LENGTH, "deduplicate": "none"},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"kind": "constant"},
        "train": {"steps": 1_000_000, "batch_size": BATCH},
    }  # fmt: skip
    return effective(config_from_dict(values))


def commands(variant: Variant, folder: Path, batches: int) -> dict[str, list[str]]:
    """Write the variant's files into `folder`; the command line of every system."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(variant, folder, build(folder.parent / "corpora"))
    drawn = sampler(config, prepare_corpus(config))
    np.save(folder / "tokens.npy", np.stack([drawn.next_batch(BATCH).tokens for _ in range(batches)]))
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "sizes.json").write_text(json.dumps(variant.sizes), encoding="utf-8")
    torch = [sys.executable, str(HERE / "torch_olmoe.py"), "--sizes", str(folder / "sizes.json")]
    torch += ["--tokens", str(folder / "tokens.npy")]
    systems = {OURS: [sys.executable, "-m", "benchmarks.ours", str(folder / "config.yaml")]}
    return systems | {name: [*torch, "--form", form] for name, form in FORMS.items()}


def measure(variant: Variant, folder: Path, rounds: int, steps: int) -> list[dict]:
    """All rounds of a variant, those of an earlier start included: system -> seconds and losses of its steps."""
    kept = folder / f"rounds_of_{steps}_steps.jsonl"
    done = read_rounds(kept)
    if len(done) >= rounds:
        return done[:rounds]
    launch = commands(variant, folder, WARMUP["ours"] + rounds * steps)
    # Without the half line of a killed process, behind which nothing could be read.
    kept.write_text("".join(json.dumps(results) + "\n" for results in done), encoding="utf-8")
    with ExitStack() as running:
        turns = len(launch) * (1 + rounds - len(done))
        job = running.enter_context(progress(f"{variant.name}: measure", turns, "turns"))
        servers = {name: running.enter_context(Server(name, command)) for name, command in launch.items()}
        first = {}
        for name, server in servers.items():
            first[name] = server.steps(WARMUP["ours" if name == OURS else "other"])["losses"][0]
            job.advance()
        order = list(servers)
        for number in range(len(done), rounds):
            # Another system begins each round, so that none always runs on what the same neighbour left behind.
            turn = number % len(order)
            results = {}
            for name in order[turn:] + order[:turn]:
                results[name] = servers[name].steps(steps) | {
                    "first_loss": first[name], "parameters": servers[name].parameters,
                }  # fmt: skip
                job.advance()
            with open(kept, "a", encoding="utf-8") as file:
                file.write(json.dumps(results) + "\n")
            done.append(results)
    return done


def read_rounds(path: Path) -> list[dict]:
    """Rounds that were finished; a line that a killed process left half is none."""
    finished_rounds: list[dict] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                finished_rounds.append(json.loads(line))
            except ValueError:
                break
    return finished_rounds


def summary(variant: Variant, rounds: list[dict]) -> dict:
    """Medians of tokens/s, and the median over rounds of our ratio to Hugging Face's and to the faster plain form."""
    speeds = {
        name: [len(r[name]["seconds"]) * BATCH * LENGTH / sum(r[name]["seconds"]) for r in rounds] for name in rounds[0]
    }
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    plain = max((n for n in speeds if n.startswith("PyTorch")), key=medians.get)
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds[OURS], speeds[name], strict=True))
        for name in speeds
        if name != OURS
    }
    last = rounds[-1]
    return {
        "variant": variant.name,
        "title": variant.title,
        "tokens_per_second": speeds,
        "medians": medians,
        "ratios": ratios,
        "plain": plain,
        "parameters": {name: last[name]["parameters"] for name in last},
        "losses": {name: (last[name]["first_loss"], last[name]["losses"][-1]) for name in last},
    }


def complaints(result: dict) -> list[str]:
    """What speaks against the systems computing the same thing: nothing if sizes agree and losses begin near ln V and
    fall."""
    sentences = []
    if len(set(result["parameters"].values())) != 1:
        sentences.append(f"the systems have different numbers of parameters: {result['parameters']}")
    for name, (first, last) in result["losses"].items():
        sentences += loss_complaints(name, first, last, VOCABULARY)
    return sentences


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = ["| experts | system | tokens/s | ours is × |", "| --- | --- | --- | --- |"]
    for result in results:
        for name, speed in result["medians"].items():
            ratio = f"**{result['ratios'][name]:.2f}**" if name in result["ratios"] else ""
            lines.append(f"| {result['title']} | {name} | {speed:.0f} | {ratio} |")
    return "\n".join(lines)


def page(record: dict) -> str:
    """The whole record for a reader."""
    losses = [
        f"- {r['title']}, {name}: {first:.2f} at the first step, {last:.2f} at the last"
        for r in record["results"]
        for name, (first, last) in r["losses"].items()
    ]
    lines = [
        "# Training speed of OLMoEs beside PyTorch",
        "",
        "Written by `python -m benchmarks.olmoe_speed`; every round is in `olmoe_speed.json`.",
        "",
        table(record["results"]),
        "",
        f"{LAYERS} layers, {HIDDEN} wide, {HEADS} heads, batch {BATCH} × {LENGTH}, vocabulary {VOCABULARY}, float32. "
        f"{record['rounds']} rounds of {record['steps']} steps, systems in turns; ratios are medians over rounds. A "
        "step holds everything: reading, routing, gradients, clipping, AdamW.",
        "",
        sentence(record["machine"]),
        "",
        f"Losses (ln {VOCABULARY} = {math.log(VOCABULARY):.2f}; initial weights differ):",
        "",
        *losses,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training throughput of OLMoEs beside PyTorch.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a system's turn")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("build/bench/olmoe"), help="folder for text, batches, rounds")
    add_output(parser)
    given = parser.parse_args()
    if min(given.rounds, given.steps) < 1:
        parser.error("--rounds and --steps must be at least 1.")
    results = []
    try:
        for name in given.variants:
            rounds = measure(VARIANTS[name], given.work / name, given.rounds, given.steps)
            results.append(summary(VARIANTS[name], rounds))
    except ServerFailed as failure:
        parser.exit(1, f"Error: {failure}\n")
    machine_record = machine("mindspore", "torch")
    record = {"machine": machine_record, "rounds": given.rounds, "steps": given.steps, "results": results}
    print(table(results))
    against = [complaint for result in results for complaint in complaints(result)]
    write_results(given.out, "olmoe_speed", record, page(record), against)


if __name__ == "__main__":
    main()
