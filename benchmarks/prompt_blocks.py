"""Time to the first token, and how long others wait for it, by the block in which the server reads prompts.

    python -m benchmarks.prompt_blocks [--rounds N] [--quick]

One process, one model, a decoder for each block size; they take turns, and the medians of the rounds are reported. A
turn is the way of a prompt through the engine of `pangu-sigma serve`, first alone (time to its first token), then while
another text is written: the longest time between two tokens of that text, which is how long a turn keeps others
waiting. Every graph has run before the first round.

The model holds 4 domains of 4 experts in its top 4 of 8 layers, with untrained weights. Prints a Markdown table and
writes it with the figures of every round to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.record import add_output, machine, sentence, write_results
from benchmarks.workload import FFN, HEADS, HIDDEN, LAYERS, SPARSE_LAYERS, VARIANTS, VOCABULARY, configuration
from pangu_sigma import runtime
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.data.builtin_corpora import build
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.generation import Request, Sampling
from pangu_sigma.generation.engine import Engine
from pangu_sigma.model.model import Model
from pangu_sigma.monitor.progress import progress

PROMPTS = (100, 300, 600, 1024)
WHOLE = "whole"
BLOCKS = (WHOLE, 256, 128, 64)
WINDOW = 1152  # the longest prompt, and room for a text that is written beside it
QUICK = {"layers": 3, "hidden": 64, "heads": 2, "ffn": 128, "sparse": {"layers": 1}}


@dataclass
class Times:
    """Seconds of every round: until the first token of a prompt alone, and the longest gap of a text beside it."""

    first_token: list[float]
    longest_gap: list[float]


def settings(folder: Path, quick: bool) -> Config:
    """The configuration of the model that is measured."""
    values = configuration(VARIANTS["sparse16"], folder, build(folder.parent / "corpora")).to_dict()
    values["model"] |= {"positions": WINDOW} | (QUICK if quick else {})
    values["data"]["sequence_length"] = WINDOW
    return config_from_dict(values, source="the benchmark")


def engines(model: Model, tokenizer: Tokenizer) -> dict[str, Engine]:
    """An engine for each way of reading prompts."""
    from pangu_sigma.generation.kv_cache_decoder import KvCacheDecoder  # loads MindSpore, which is set up by now

    return {
        str(block): Engine(
            model, tokenizer, decoder=KvCacheDecoder(model, slots=2, block=WINDOW if block == WHOLE else block)
        )
        for block in BLOCKS
    }


def requests(engine: Engine, ids: np.ndarray, beside: bool) -> list[Request]:
    """A short text that is written all the time (only with `beside`), and the prompt, whose first token is wanted."""
    domain = engine.domains[0]
    prompt = Request(tuple(map(int, ids)), domain, Sampling(2, temperature=0.0))
    return [Request(tuple(map(int, ids[:8])), domain, Sampling(WINDOW, temperature=0.0)), prompt][not beside :]


def time_alone(engine: Engine, ids: np.ndarray) -> float:
    """Seconds from a prompt's arrival to its first token."""
    start = time.perf_counter()
    engine.add(requests(engine, ids, beside=False)[0])
    while not engine.step():
        pass
    seconds = time.perf_counter() - start
    while not engine.idle:
        engine.step()
    return seconds


def time_beside(engine: Engine, ids: np.ndarray) -> float:
    """The longest time in seconds between two tokens of a text while the prompt is read."""
    written, prompt = requests(engine, ids, beside=True)
    other = engine.add(written)
    for _ in range(4):
        engine.step()
    asked = engine.add(prompt)
    gaps, answered, last = [], False, time.perf_counter()
    while not answered:
        events = engine.step()
        now = time.perf_counter()
        if any(event.request_id == other and event.finish for event in events):
            other = engine.add(written)
        gaps.append(now - last)
        last = now
        answered = any(event.request_id == asked for event in events)
    engine.cancel(other)
    while not engine.idle:
        engine.step()
    return max(gaps)


def measure(config: Config, rounds: int) -> dict[str, dict[str, Times]]:
    """Times by block size and prompt length."""
    runtime.prepare(config.run.device, Path(config.run.dir) / "mindspore")
    from pangu_sigma.data.corpus import prepare_corpus
    from pangu_sigma.model.build_model import build_model

    tokenizer = prepare_corpus(config).tokenizer
    model = build_model(config, VOCABULARY, tokenizer.eod_id)
    by_block = engines(model, tokenizer)
    times = {block: {str(length): Times([], []) for length in PROMPTS} for block in by_block}
    order = list(by_block)
    with progress("prompts", (1 + rounds) * len(order) * len(PROMPTS), "turns") as job:
        for turn in range(-1, rounds):  # the first compiles
            first = turn % len(order)
            for block in order[first:] + order[:first]:
                for length in PROMPTS:
                    ids = np.random.default_rng([turn + 1, length]).integers(3, VOCABULARY, length)
                    alone, gap = time_alone(by_block[block], ids), time_beside(by_block[block], ids)
                    if turn >= 0:
                        times[block][str(length)].first_token.append(alone)
                        times[block][str(length)].longest_gap.append(gap)
                    job.advance()
    return times


def table(times: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """The result as a Markdown table: milliseconds, medians of the rounds."""
    lines = [
        "| a prompt is read | " + " | ".join(f"{length:,} tokens" for length in PROMPTS) + " |",
        "| --- |" + " --- |" * len(PROMPTS),
    ]
    for block, by_length in times.items():
        cells = [
            ", ".join(f"{1000 * statistics.median(rounds):,.0f} ms" for rounds in seconds.values())
            for seconds in by_length.values()
        ]
        lines.append(f"| {'whole' if block == WHOLE else f'in blocks of {block}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(record: dict) -> str:
    """The whole record for a reader."""
    sizes = record["sizes"]
    return "\n".join(
        [
            "# Blocks in which prompts are read",
            "",
            "Written by `python -m benchmarks.prompt_blocks`; every round is in `prompt_blocks.json`. Time to the "
            "first token of a prompt alone, then the longest time between two tokens of a text that is written "
            "meanwhile:",
            "",
            table(record["times"]),
            "",
            f"{sizes['layers']} layers (the top {sizes['sparse_layers']} sparse, 4 domains of 4 experts), "
            f"{sizes['hidden']} wide, {sizes['heads']} heads, feed-forward {sizes['ffn']}, vocabulary {VOCABULARY}, "
            f"window {WINDOW}, float32, untrained weights. {record['rounds']} rounds in turns of all block sizes in "
            "one process; medians.",
            "",
            sentence(record["machine"]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token by the block in which prompts are read.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model: for a try, not for figures to quote")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for corpora and tokenizer")
    add_output(parser)
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1.")
    folder = (given.work / ("prompt_blocks_quick" if given.quick else "prompt_blocks")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    times = measure(settings(folder, given.quick), given.rounds)
    sizes = {"layers": LAYERS, "sparse_layers": SPARSE_LAYERS, "hidden": HIDDEN, "heads": HEADS, "ffn": FFN}
    if given.quick:
        sizes = {**QUICK, "sparse_layers": QUICK["sparse"]["layers"]}
        del sizes["sparse"]
    record = {
        "machine": machine("mindspore"),
        "rounds": given.rounds,
        "sizes": sizes,
        "times": {block: {n: asdict(one) for n, one in lengths.items()} for block, lengths in times.items()},
    }
    print(table(record["times"]))
    write_results(given.out, "prompt_blocks", record, page(record))


if __name__ == "__main__":
    main()
