"""Decoding speed beside Hugging Face's GPT-2 of the same size, measured in one interleaved run.

    python -m benchmarks.decoding [--rounds N] [--tokens N] [--prompt N]

Every system is a process of its own with its model built; one computes at a time, in turns; ratios are taken inside a
round and their median is reported. A turn is a whole job: prompts in, sampled tokens (temperature 1) out, at batch 1
and 8. Both sides count 8 layers (ours: 7 and the query layer), so the dense model has GPT-2's size; the sparse one
holds 4 domains of 4 experts in its top 4 layers, and its 8 texts belong to all 4 domains.

Prints a Markdown table and writes it with the figures of every round to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.benchmark_server import Server, ServerFailed
from benchmarks.record import add_output, machine, sentence, write_results
from benchmarks.workload import FFN, HEADS, HIDDEN, LAYERS, LENGTH, VARIANTS, VOCABULARY, prepare
from pangu_sigma.monitor.progress import progress

HERE = Path(__file__).parent
BASELINE = "Hugging Face GPT-2"
OURS = {"dense": "ours, dense", "sparse16": "ours, 4 domains × 4 experts in 4 of 8 layers"}
BATCHES = (1, 8)
WARMUP_TURNS = 2


def commands(folder: Path) -> dict[str, list[str]]:
    """The command line of every system; writes the configurations of ours."""
    sizes = {
        "layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "ffn": FFN, "vocab": VOCABULARY, "positions": LENGTH,
    }  # fmt: skip
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    systems = {BASELINE: [sys.executable, str(HERE / "decoding_hf.py"), *options]}
    for variant, name in OURS.items():
        config = prepare(VARIANTS[variant], folder / variant, batches=1).config
        systems[name] = [sys.executable, "-m", "benchmarks.decoding_ours", str(config)]
    return systems


def measure(folder: Path, rounds: int, prompt: int, tokens: int) -> dict:
    """Tokens/s of every system, batch and round, and the systems' parameter counts."""
    launch = commands(folder)
    with ExitStack() as running:
        total = len(launch) * len(BATCHES) * (WARMUP_TURNS + rounds)
        job = running.enter_context(progress("decode", total, "turns"))
        servers = {name: running.enter_context(Server(name, command)) for name, command in launch.items()}
        speeds: dict[str, dict[str, list[float]]] = {str(b): {name: [] for name in servers} for b in BATCHES}
        order = list(servers)
        for turn in range(-WARMUP_TURNS, rounds):
            first = turn % len(order)
            for name in order[first:] + order[:first]:
                for batch in BATCHES:
                    answer = servers[name].ask(f"decode {batch} {prompt} {tokens} {turn + WARMUP_TURNS}")
                    if turn >= 0:
                        speeds[str(batch)][name].append(answer["tokens"] / answer["seconds"])
                    job.advance()
        parameters = {name: server.parameters for name, server in servers.items()}
    return {"parameters": parameters, "tokens_per_second": speeds}


def ratios(speeds: dict[str, list[float]], name: str) -> list[float]:
    """Our tokens/s over the baseline's, round by round."""
    return [a / b for a, b in zip(speeds[name], speeds[BASELINE], strict=True)]


def table(result: dict) -> str:
    """The result as a Markdown table."""
    lines = [
        "| system | parameters | batch | tokens/s | ratio (median of rounds) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, parameters in result["parameters"].items():
        for batch, speeds in result["tokens_per_second"].items():
            in_rounds = ratios(speeds, name)
            ratio = f"**{statistics.median(in_rounds):.2f}** ({min(in_rounds):.2f} to {max(in_rounds):.2f})"
            lines.append(
                f"| {name} | {parameters / 1e6:.1f} M | {batch} | {statistics.median(speeds[name]):.0f} | "
                f"{'1' if name == BASELINE else ratio} |"
            )
    return "\n".join(lines)


def page(record: dict) -> str:
    """The whole record for a reader."""
    return "\n".join(
        [
            "# Decoding speed beside Hugging Face's GPT-2",
            "",
            "Written by `make bench` (`python -m benchmarks.decoding`); every round is in `decoding.json`.",
            "",
            table(record["result"]),
            "",
            f"{LAYERS} layers, {HIDDEN} wide, {HEADS} heads, feed-forward {FFN}, vocabulary {VOCABULARY}, float32, "
            f"untrained weights. {record['rounds']} rounds in turns; a turn takes {record['prompt']} prompt tokens a "
            f"text and writes {record['tokens']}, sampled at temperature 1, and its time holds all of it. Ours goes "
            "through the engine of `pangu-sigma generate` and `serve`, with text as it comes; Hugging Face through "
            "`generate` with sdpa attention, two threads, inference mode and its default cache.",
            "",
            sentence(record["machine"]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed beside Hugging Face's GPT-2.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of a text")
    parser.add_argument("--tokens", type=int, default=96, help="tokens written per text")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for corpora and configurations")
    add_output(parser)
    given = parser.parse_args()
    if min(given.rounds, given.tokens, given.prompt) < 1 or given.prompt + given.tokens > LENGTH:
        parser.error(
            f"--rounds, --prompt and --tokens must be at least 1, prompt and tokens together at most {LENGTH}."
        )
    if subprocess.run([sys.executable, "-c", "import transformers, torch"], capture_output=True).returncode:
        parser.exit(2, "Error: there is no transformers to compare with: pip install '.[hf]'\n")
    try:
        result = measure(given.work, given.rounds, given.prompt, given.tokens)
    except ServerFailed as failure:
        parser.exit(1, f"Error: {failure}\n")
    record = {
        "machine": machine("mindspore", "torch", "transformers"),
        "rounds": given.rounds,
        "prompt": given.prompt,
        "tokens": given.tokens,
        "result": result,
    }
    print(table(result))
    write_results(given.out, "decoding", record, page(record))


if __name__ == "__main__":
    main()
