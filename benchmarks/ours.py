"""The product's side of the speed comparison: real optimizer steps, asked for line by line.

    python -m benchmarks.ours CONFIG.yaml        # `step N` per line on stdin, one JSON line back

A step is all that `pangu-sigma train` does in one: the next batch from the reading thread (tokens, routing and dispatch
planned ahead), the compiled gradient graph, norm and clipping, AdamW over shared parameters and activated experts, and
the figures of the metrics. Between requests nothing computes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from benchmarks.workload import sampler
from pangu_sigma import runtime
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.data.corpus import prepare_corpus
from pangu_sigma.data.prefetcher import Prefetcher
from pangu_sigma.training.schedule import scheduled_step


class Stepper:
    """One run's model, trainer and reader; `step` does an optimizer step on the next batch."""

    def __init__(self, config: Config, reader: Prefetcher, trainer) -> None:
        self.config = config
        self.reader = reader
        self.trainer = trainer
        self.done = 0
        self.parameters = sum(p.size for p in trainer.model.net.trainable_params())
        self.parameters += sum(table.size for kind, _, _, table in trainer.model.store.tables() if kind == "weight")

    def step(self) -> float:
        """Do one optimizer step; return its loss in nats per token, before the update."""
        result = self.trainer.step(scheduled_step(self.config, self.done), next(self.reader))
        self.done += 1
        return result.loss

    def flush(self) -> None:
        """Wait for updates that are still under way."""
        self.trainer.model.store.flush()
        self.trainer.model.net.trainable_params()[-1].asnumpy()


@contextmanager
def stepper(path: Path) -> Iterator[Stepper]:
    """A `Stepper` for the configuration file `path`, as `pangu_sigma.training.job` builds one."""
    config = config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path))
    runtime.prepare(config.run.device, Path(config.run.dir) / "mindspore")
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.training.trainer import Trainer

    corpus = prepare_corpus(config)
    trainer = Trainer(build_model(config, config.model.vocab_size, corpus.tokenizer.eod_id))
    with Prefetcher(
        sampler(config, corpus), config.train.batch_size, config.data.prefetch, transform=trainer.plan
    ) as reader:
        yield Stepper(config, reader, trainer)


def timed(stepper: Stepper, count: int) -> tuple[list[float], list[float]]:
    """Do `count` steps; return seconds and losses. The last step's time holds every update that was still under way."""
    seconds, losses = [], []
    for number in range(count):
        start = time.perf_counter()
        losses.append(stepper.step())
        if number == count - 1:
            stepper.flush()
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimizer steps of the product, timed.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    with stepper(parser.parse_args().config) as ours:
        print(json.dumps({"ready": True, "parameters": ours.parameters}), flush=True)
        for line in sys.stdin:
            words = line.split()
            if len(words) == 2 and words[0] == "step" and words[1].isdigit():
                seconds, losses = timed(ours, int(words[1]))
                print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)
            else:
                print(json.dumps({"error": f"unknown request {line.strip()!r}; send `step N`"}), flush=True)


if __name__ == "__main__":
    main()
