"""One measured model of the expert-store benchmark, in a process of its own.

    python -m benchmarks.expert_store_work '{"store": "host", "domains": 160, …}'      # prints one JSON line

The steps are the product's own: batches planned ahead in the reading thread (which prefetches from the disk), the
compiled gradient graph, norm and clipping, AdamW over shared parameters and activated experts. Token ids are random and
the domains of a step follow `Rotation`; losses mean nothing here, every tensor and every byte moved is real.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.config.load_config import effective
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.data.prefetcher import Prefetcher
from pangu_sigma.training.schedule import scheduled_step

EOD = 2


@dataclass(frozen=True)
class Work:
    """What to build and how long to step. Every step has `domains_per_step` domains, never those of the step before."""

    store: str
    domains: int
    experts_per_domain: int
    sparse_layers: int
    batch: int
    domains_per_step: int
    steps: int
    warmup: int
    router: str = "rre"
    update_all: bool = False  # as an MoE does whose experts are all parameters: dense AdamW over every expert
    layers: int = 4
    hidden: int = 256
    ffn: int = 1024
    heads: int = 4
    length: int = 128
    vocabulary: int = 8192
    resident_gib: float = 1.0
    folder: str = "build/expert_store/run"

    @property
    def experts(self) -> int:
        """Stored experts of a sparse layer."""
        return self.domains * self.experts_per_domain

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 2 * self.hidden * self.ffn + self.hidden + self.ffn

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def activated(self) -> int:
        """Experts that a step's domains own, over all sparse layers."""
        return self.domains_per_step * self.experts_per_domain * self.sparse_layers

    def config(self) -> Config:
        """The product's configuration."""
        return effective(config_from_dict({
            "schema_version": 2,
            "run": {"dir": self.folder, "tensorboard": False},
            "model": {
                "vocab_size": self.vocabulary, "layers": self.layers, "hidden": self.hidden, "heads": self.heads,
                "ffn": self.ffn, "positions": self.length,
                "sparse": {"layers": self.sparse_layers, "router": self.router},
            },
            "domains": [
                {"name": f"d{i:04d}", "data": ["drawn"], "experts": self.experts_per_domain}
                for i in range(self.domains)
            ],
            "data": {
                "sequence_length": self.length, "max_domains_per_batch": self.domains_per_step,
                "tokenizer": {"kind": "sentencepiece", "path": "none"},
            },
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"kind": "constant"},
            "train": {"steps": 1_000_000, "batch_size": self.batch},
            "experts": {"store": self.store, "resident_gib": self.resident_gib},
        }))  # fmt: skip


class Rotation:
    """Stands where the mixture sampler stands: random tokens, domains in a new random order every round of all."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.step = 0
        self.left: list[int] = []
        self.last: list[int] = []

    def next_batch(self, size: int, rows: slice | None = None) -> Batch:
        work, per = self.work, self.work.domains_per_step
        if len(self.left) < per:
            drawn = np.random.default_rng([7, self.step]).permutation(work.domains).tolist()
            self.left = [d for d in drawn if d not in self.last] + self.last
        self.last, self.left = self.left[:per], self.left[per:]
        drawn_domains = np.array(self.last)
        draw = np.random.default_rng([8, self.step])
        tokens = draw.integers(3, work.vocabulary, (size, work.length + 1), dtype=np.int32)
        domain = drawn_domains[np.arange(size) % drawn_domains.size].astype(np.int32)
        batch = Batch(tokens, domain, self.step * size + np.arange(size), self.step)
        self.step += 1
        return batch

    def state(self) -> dict:
        return {"step": self.step}


def every_expert_store(model):
    """The model's store in memory, extended by the dense update of an MoE whose experts are all ordinary parameters."""
    from rre.adamw import AdamWHyperparameters, has_weight_decay, update_in_place

    class EveryExpertStore(type(model.store)):
        """After `rest` every expert had one update of AdamW: by its gradient, or by zero where no token came.

        Untouched neighbours have equal step counts and are updated in one pass over their common memory.
        """

        CHUNK = 1 << 22  # bytes of one task

        def __init__(self, store) -> None:
            self.adopted = {kind: {} for kind in ("weight", "m", "v")}
            for kind, layer_name, name, table in store.tables():
                self.adopted[kind].setdefault(layer_name, {})[name] = table
            super().__init__(store.shapes, store.experts, store._kernels)
            self.zeros = np.zeros(1 << 22, np.float32)
            self.touched: dict[str, set[int]] = {layer_name: set() for layer_name in self.shapes}

        def _make_tables(self):
            return self.adopted

        def apply(self, layer_name, expert, *arguments, **named) -> None:
            self.touched[layer_name].add(expert)
            super().apply(layer_name, expert, *arguments, **named)

        def rest(self, hyper: AdamWHyperparameters) -> None:
            for layer_name, touched in self.touched.items():
                bounds = [-1, *sorted(touched), self.experts[layer_name]]
                for before, after in zip(bounds, bounds[1:], strict=False):
                    for name, shape in self.shapes[layer_name].items():
                        rows = max(1, self.CHUNK // (4 * int(np.prod(shape))))
                        for start in range(before + 1, after, rows):
                            self._decay(layer_name, name, start, min(start + rows, after), hyper)
                untouched = np.ones(self.experts[layer_name], bool)
                untouched[list(touched)] = False
                self.steps[layer_name][untouched] += 1
                touched.clear()

        def _decay(self, layer_name: str, name: str, start: int, end: int, hyper: AdamWHyperparameters) -> None:
            w, m, v = (self.table(layer_name, name, kind)[start:end].reshape(-1) for kind in ("weight", "m", "v"))
            step = int(self.steps[layer_name][start]) + 1
            gradient = self.zeros[: w.size]
            task = self._workers.submit(
                _timed, update_in_place, w, m, v, gradient, hyper, step, 1.0, has_weight_decay("." + name),
                self._kernels,
            )
            self._running.append((task, None))

    return EveryExpertStore(model.store)


def _timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def status(field: str) -> int:
    """A size in bytes of /proc/self/status, for example VmHWM, the most memory that was ever resident."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def cached_bytes(folder: Path) -> int | None:
    """Bytes of the expert tables in the system's cache; None without `fincore` or files."""
    files = sorted(folder.glob("*.table"))
    if not files or shutil.which("fincore") is None:
        return None
    listing = subprocess.run(["fincore", "--bytes", "--json", *map(str, files)], capture_output=True, text=True).stdout
    return sum(int(entry["res"]) for entry in json.loads(listing)["fincore"])


def write_every_byte(store) -> None:
    """Make moments real memory or disk blocks, as they are once every expert has trained: no page is a zero page."""
    for kind, layer_name, name, table in store.tables():
        if kind == "weight":
            continue
        for expert in range(table.shape[0]):
            store.write(
                kind, layer_name, name, slice(expert, expert + 1), np.full((1, *table.shape[1:]), 1e-12, np.float32)
            )


def measure(work: Work) -> dict:
    """Build, warm up, step; times in seconds, traffic in bytes a step."""
    config = work.config()
    runtime.prepare("CPU", Path(work.folder) / "mindspore")
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.training.flops import flops_per_token
    from pangu_sigma.training.trainer import Trainer
    from rre.adamw import AdamWHyperparameters

    started = time.perf_counter()
    model = build_model(config, work.vocabulary, EOD)
    write_every_byte(model.store)
    if work.update_all:
        model = replace(model, store=every_expert_store(model))
    trainer = Trainer(model)
    store, tables = model.store, Path(work.folder) / "experts"
    optimizer = config.optimizer
    hyper = AdamWHyperparameters(
        optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.expert_epsilon, optimizer.weight_decay
    )
    built = time.perf_counter() - started
    files = [path.stat() for path in tables.glob("*.table")]
    seconds, touched, cached = [], [], []
    counts = {layer_name: steps.copy() for layer_name, steps in store.steps.items()}
    with Prefetcher(Rotation(work), work.batch, config.data.prefetch, transform=trainer.plan) as reader:
        for step in range(work.warmup + work.steps):
            if step == work.warmup:
                store.flush()
                trainer.take_record()
                counts = {layer_name: steps.copy() for layer_name, steps in store.steps.items()}
            start = time.perf_counter()
            planned = next(reader)
            result = trainer.step(scheduled_step(config, step), planned)
            if not result.finite:
                raise RuntimeError(f"step {step}: the loss is {result.loss}")
            if work.update_all:
                store.rest(hyper)
            if step in (0, work.warmup - 1, work.warmup + work.steps - 1):
                store.flush()
            if step == 0:
                compiled = time.perf_counter() - start
            if step >= work.warmup:
                seconds.append(time.perf_counter() - start)
            if tables.exists() and step % 10 == 9:
                cached.append(cached_bytes(tables))
        moved = trainer.take_record()["store"]
        touched = sum(int((store.steps[layer_name] > counts[layer_name]).sum()) for layer_name in store.steps)
    measured = {
        "work": asdict(work),
        "experts_per_layer": work.experts,
        "expert_parameters": work.experts * work.sparse_layers * work.expert_parameters,
        "parameters_per_token": flops_per_token(config, work.vocabulary) / 6,
        "tokens_per_step": work.tokens,
        "build_seconds": built,
        "first_step_seconds": compiled,
        "median_seconds": statistics.median(seconds),
        "mean_seconds": statistics.fmean(seconds),
        "seconds": [round(s, 5) for s in seconds],
        "experts_touched_in_all_steps": touched,
        "traffic_per_step": moved,
        "peak_resident_bytes": status("VmHWM"),
        "resident_anonymous_bytes": status("RssAnon"),
        "resident_file_bytes": status("RssFile"),
        "file_bytes": sum(s.st_size for s in files),
        "file_blocks_bytes": sum(512 * s.st_blocks for s in files),
        "cached_file_bytes_most": max((c for c in cached if c is not None), default=None),
        "most_mapped_bytes": getattr(store, "mapped_bytes", None),
    }
    store.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="One measured model of the expert-store benchmark.")
    parser.add_argument("work", help="the fields of Work as JSON")
    print(json.dumps(measure(Work(**json.loads(parser.parse_args().work)))), flush=True)


if __name__ == "__main__":
    main()
