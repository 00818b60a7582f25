"""A small training run of three domains, made once by a real process and used by many tests."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.pangu_sigma.training import training_process

WORDS = {
    "code": "def return if else for in range print self class import value list dict none true yield",
    "law": "the court shall party contract agreement hereby section clause judge appeal claim damages",
    "poems": "rose moon night love soft wind silver dream sea star shadow song light winter",
}
STEPS = 12
# Everything that is random or counted is on: dropout, resampled routing, accumulation, phases, a limit on domains.
SMALL_RUN = {
    "schema_version": 2,
    "run": {"dir": "run", "log_every": 1},
    "model": {
        "layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "positions": 16,
        "dropout": 0.1, "attention": {"dropout": 0.1},
        "sparse": {"layers": 1, "resample": True},
    },
    "data": {"sequence_length": 16, "max_domains_per_batch": 2, "tokenizer": {"kind": "train", "vocab_size": 384}},
    "optimizer": {"learning_rate": 3e-3},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "train": {
        "steps": STEPS, "batch_size": 4, "gradient_accumulation_steps": 2,
        "phases": [{"steps": 4, "weights": {"code": 1.0}}, {}],
    },
    "evaluate": {"every": 6, "batches": 8, "batch_size": 4},
    "checkpoint": {"every": 2, "keep": 20},
}  # fmt: skip
EXPERTS = {"code": 2, "law": 1, "poems": 2}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> Path:
    """A folder with one small .jsonl file per domain."""
    folder = tmp_path_factory.mktemp("corpora")
    draw = random.Random(0)
    for domain, words in WORDS.items():
        with open(folder / f"{domain}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(80):
                text = " ".join(draw.choice(words.split()) for _ in range(draw.randrange(20, 60)))
                file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_yaml(corpora, tmp_path_factory) -> Path:
    """The small run's configuration; its tokenised text is shared by all runs that do not say otherwise."""
    folder = tmp_path_factory.mktemp("configuration")
    domains = [{"name": n, "data": [str(corpora / f"{n}.jsonl")], "experts": e} for n, e in EXPERTS.items()]
    values = {**SMALL_RUN, "domains": domains, "data": {**SMALL_RUN["data"], "cache": str(folder / "cache")}}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(small_yaml, tmp_path_factory) -> Path:
    """The run, trained in one go; treat it as read-only. Its process ran in the folder `cwd` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "cwd").mkdir()
    own = [f"run.dir={folder / 'run'}", "data.cache=null"]
    done = training_process.command("train", small_yaml, *own, cwd=folder / "cwd")
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stderr, encoding="utf-8")
    return folder / "run"


@pytest.fixture
def copied_run(finished_run, tmp_path) -> Callable[[int], Path]:
    """step -> a copy of the run as it was when that step had been saved."""

    def copy(step: int) -> Path:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        for path in (run / "checkpoints").iterdir():
            if path > training_process.checkpoint(run, step):
                shutil.rmtree(path)
        return run

    return copy
