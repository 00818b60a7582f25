"""A small trained model with a window for examples, and files of examples."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("GLOG_v", "4")

import pytest
import yaml

from tests.pangu_sigma.conftest import WORDS
from tests.pangu_sigma.training.training_process import trained_two_steps

LENGTH = 48
BASE = {
    "schema_version": 2,
    "run": {"dir": "run", "log_every": 1, "tensorboard": False},
    "optimizer": {"learning_rate": 3e-3},
    "train": {"steps": 4, "batch_size": 4, "gradient_accumulation_steps": 2},
    "evaluate": {"every": 2, "batch_size": 4},
    "checkpoint": {"every": 2},
}


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def answers(domain: str, count: int) -> list[dict]:
    draw = random.Random(1)
    words = WORDS[domain].split()
    prompts = [" ".join(draw.choices(words, k=draw.randrange(1, 5))) for _ in range(count)]
    return [{"prompt": prompt, "answer": f"{prompt} {prompt}"} for prompt in prompts]


def pairs(domain: str, count: int) -> list[dict]:
    return [
        {"prompt": a["prompt"], "chosen": a["answer"], "rejected": b["prompt"]}
        for a, b in zip(answers(domain, count), reversed(answers(domain, count)), strict=True)
    ]


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    from pangu_sigma import runtime

    runtime.prepare("CPU")


@pytest.fixture(scope="session")
def taught(small_yaml, tmp_path_factory) -> Path:
    """A run of two steps over three domains, with dropout and resampled routing."""
    return trained_two_steps(small_yaml, tmp_path_factory.mktemp("taught"), LENGTH)


@pytest.fixture(scope="session")
def example_files(tmp_path_factory) -> Path:
    """A folder with law.jsonl and code.jsonl of answers, and pairs.jsonl of law."""
    folder = tmp_path_factory.mktemp("examples")
    for domain in ("law", "code"):
        write_jsonl(folder / f"{domain}.jsonl", answers(domain, 40))
    write_jsonl(folder / "pairs.jsonl", pairs("law", 40))
    return folder


@pytest.fixture
def adaptation_file(tmp_path, example_files) -> Callable[..., Path]:
    """(objective, changes of adapt …) -> a YAML file over the examples."""

    def write(objective: str, **changes) -> Path:
        files = {"law": "pairs"} if objective == "dpo" else {"law": "law", "code": "code"}
        examples = [{"name": name, "data": [str(example_files / f"{file}.jsonl")]} for name, file in files.items()]
        path = tmp_path / f"{objective}.yaml"
        path.write_text(
            yaml.safe_dump({**BASE, "adapt": {"heldout_fraction": 0.1, "examples": examples, **changes}}),
            encoding="utf-8",
        )
        return path

    return write
