"""Speed of two commits side by side: training and decoding, in turns, by their command lines and servers."""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.commit_checkout import LOGS, Checkout, CommandFailed, common_overrides
from pangu_sigma.monitor.progress import progress

# The first step compiles; MindSpore then tries thread counts for every kernel over its first 30 launches.
WARMUP, STEPS = 32, 16
LEAST_RATIO = 0.97
BATCHES = {1: 6, 8: 3}  # texts at a time -> requests a round
# MindSpore picks thread counts for its kernels as a process begins and keeps them: one server's luck moves its speed by
# a tenth, so new ones begin after so many rounds.
SERVER_ROUNDS = 3
NEW_TOKENS = 100  # of each text: with the prompt they fit into the quickstart's window
COMPILING_SECONDS = 600.0
_SPEED_RUN, _CACHE = "speed-run", "speed-data"


@dataclass(frozen=True)
class Speed:
    """Tokens per second of OLD and NEW in every round."""

    name: str
    old: tuple[float, ...]
    new: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the rounds of NEW / OLD."""
        return statistics.median(new / old for old, new in zip(self.old, self.new, strict=True))

    @property
    def passed(self) -> bool:
        """Whether NEW is slower by no more than is allowed."""
        return self.ratio >= LEAST_RATIO


def speeds_table(speeds: Sequence[Speed]) -> str:
    """Median tokens per second of both and the median of the ratios, as a Markdown table."""
    lines = [
        "| tokens/s | OLD | NEW | NEW / OLD | lowest to highest | result |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for speed in speeds:
        ratios = [new / old for old, new in zip(speed.old, speed.new, strict=True)]
        lines.append(
            f"| {speed.name} | {statistics.median(speed.old):,.0f} | {statistics.median(speed.new):,.0f} | "
            f"{speed.ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | {'pass' if speed.passed else 'SLOWER'} |"
        )
    return "\n".join(lines)


def measure_speeds(checkouts: Sequence[Checkout], run: str, domain: str, rounds: int) -> list[Speed]:
    """Measure two checkouts, which take turns; `run` is a trained run in the folder of each. Raises CommandFailed."""
    return [_measure_training(checkouts, rounds), *_measure_decoding(checkouts, run, domain, rounds)]


def _measure_training(checkouts: Sequence[Checkout], rounds: int) -> Speed:
    overrides = {
        "run.dir": _SPEED_RUN,
        "run.log_every": "1",
        "run.tensorboard": "false",
        "train.steps": str(WARMUP + STEPS),
        "evaluate.every": "0",
        "checkpoint.every": "0",
        "data.cache": _CACHE,
    }
    words = ["train", "configs/quickstart.yaml", *common_overrides(overrides, checkouts)]
    speeds: list[list[float]] = [[], []]
    with progress("speed of training", 2 * rounds, unit="runs") as job:
        for index in _turns(rounds):
            folder = checkouts[index].folder
            shutil.rmtree(folder / _SPEED_RUN, ignore_errors=True)
            checkouts[index].run("speed", words)
            lines = (folder / _SPEED_RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rates = [row["tokens_per_second"] for row in map(json.loads, lines) if "tokens_per_second" in row]
            speeds[index].append(statistics.median(rates[-STEPS:]))
            job.advance()
    return Speed("training", *map(tuple, speeds))


def _measure_decoding(checkouts: Sequence[Checkout], run: str, domain: str, rounds: int) -> list[Speed]:
    """Tokens per second through HTTP, compilation excluded; both servers stand, one of them works."""
    speeds: dict[int, list[list[float]]] = {batch: [[], []] for batch in BATCHES}
    with progress("speed of decoding", 2 * rounds, unit="turns") as job:
        for first in range(0, rounds, SERVER_ROUNDS):
            with ExitStack() as running:
                addresses = [running.enter_context(_server(checkout, run)) for checkout in checkouts]
                for address in addresses:
                    for batch in BATCHES:
                        _decode(address, domain, batch, 1)
                for index in _turns(min(SERVER_ROUNDS, rounds - first)):
                    for batch, requests in BATCHES.items():
                        speeds[batch][index].append(_decode(addresses[index], domain, batch, requests))
                    job.advance()
    return [
        Speed(f"decoding, {batch} {'texts' if batch > 1 else 'text'} at a time", *map(tuple, pair))
        for batch, pair in speeds.items()
    ]


def _turns(rounds: int) -> Iterator[int]:
    """0 and 1 in every round; the other one begins each time, so that none always runs on what its neighbour left."""
    for number in range(rounds):
        yield number % 2
        yield 1 - number % 2


@contextmanager
def _server(checkout: Checkout, run: str) -> Iterator[str]:
    """`pangu-sigma serve` for the length of a `with` block; gives its address when everything is compiled."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    log = checkout.folder / LOGS / "serve.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            checkout.command(["serve", run, "--port", str(port)]),
            cwd=checkout.folder, env=checkout.environment(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + COMPILING_SECONDS
        while not _answers(f"{address}/models"):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-10:]
                raise CommandFailed(f"{checkout.title}: the server does not come up:\n" + "\n".join(last))
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _decode(address: str, domain: str, batch: int, requests: int) -> float:
    """Median tokens per second of some requests, one after the other, each for `batch` texts."""
    rates = []
    for seed in range(requests):
        body = {
            "model": domain, "prompt": [f"def f{row}(" for row in range(batch)], "max_tokens": NEW_TOKENS,
            "temperature": 1.0, "seed": seed,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{address}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=COMPILING_SECONDS) as response:
            tokens = json.load(response)["usage"]["completion_tokens"]
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)
