"""One training of 20 steps by MindFormers' own Trainer, and the same by ours, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pangu_sigma.integrations.mindformers.mindformers_settings import read_yaml, settings_of
from tests.pangu_sigma.conftest import EXPERTS
from tests.pangu_sigma.training import training_process

STEPS = 20
SHIPPED = training_process.ROOT / "configs" / "mindformers" / "pretrain_pangu_sigma_small.yaml"


@dataclass(frozen=True)
class BothTrained:
    """Output folder of MindFormers' training, its losses; folder of ours, and its losses."""

    file: Path
    formers: Path
    formers_losses: list[float]
    ours: Path
    our_losses: list[float]


@pytest.fixture(scope="session")
def tiny_yaml(corpora, tmp_path_factory) -> Path:
    """The shipped YAML with a tiny model, one domain a step, and one domain that never comes."""
    folder = tmp_path_factory.mktemp("mindformers")
    values = read_yaml(SHIPPED)
    sections = values["model"]["model_config"]["pangu_sigma"]
    sections["model"] = {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "positions": 16, "sparse": {"layers": 1}}
    sections["domains"] = [
        {"name": name, "data": [str(corpora / f"{name}.jsonl")], "experts": experts, "weight": float(name != "poems")}
        for name, experts in EXPERTS.items()
    ]
    sections["data"] = {
        "sequence_length": 16, "max_domains_per_batch": 1, "tokenizer": {"kind": "train", "vocab_size": 384},
        "cache": str(folder / "cache"),
    }  # fmt: skip
    values["train_dataset"]["data_loader"]["steps"] = STEPS
    values["runner_config"]["batch_size"] = 4
    values["lr_schedule"] |= {"learning_rate": 3e-3, "warmup_steps": 4}
    values["output_dir"] = str(folder / "output")
    values["callbacks"].append({"type": "LossRecorder", "path": str(folder / "losses.jsonl")})
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run_formers(file: Path, cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train with MindFormers as `file` says, in a process of its own that knows the callback LossRecorder."""
    words = [sys.executable, "-m", "tests.pangu_sigma.integrations.mindformers.loss_recorder", str(file), *overrides]
    path = os.pathsep.join([str(training_process.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        words, capture_output=True, text=True, cwd=cwd, timeout=600, env=os.environ | {"PYTHONPATH": path}
    )


@pytest.fixture(scope="session")
def formers() -> None:
    """Skips where MindFormers is not installed."""
    if find_spec("mindformers") is None:
        pytest.skip("MindFormers is not installed: pip install 'pangu-sigma[mindformers]'")


@pytest.fixture(scope="session")
def both_trained(formers, tiny_yaml, tmp_path_factory) -> BothTrained:
    """The same 20 steps by both trainers."""
    folder = tmp_path_factory.mktemp("both")
    done = run_formers(tiny_yaml, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    left = sorted(path.name for path in folder.iterdir())
    assert left == [], f"the training left {left} in the current folder"
    values = settings_of(read_yaml(tiny_yaml), str(tiny_yaml)).to_dict()
    values["run"] |= {"dir": str(folder / "ours"), "log_every": 1}
    config = folder / "ours.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = training_process.command("train", config, cwd=folder)
    assert done.returncode == 0, done.stderr
    records = json_lines(folder / "ours" / "metrics.jsonl")
    return BothTrained(
        file=tiny_yaml,
        formers=Path(read_yaml(tiny_yaml)["output_dir"]),
        formers_losses=json_lines(tiny_yaml.parent / "losses.jsonl"),
        ours=folder / "ours",
        our_losses=[r["loss"] for r in records if "gradient_norm" in r],
    )


def json_lines(path: Path) -> list:
    """The values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
