"""A small sequence of stages over the small run's configuration, learned once by a real process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.pangu_sigma.conftest import EXPERTS, SMALL_RUN
from tests.pangu_sigma.training import training_process

# A domain, two at once, and the first one again.
STAGES = [
    {"domains": ["code"], "steps": 6},
    {"domains": ["law", "poems"], "steps": 4},
    {"domains": ["code"], "steps": 3},
]


@pytest.fixture(scope="session")
def base_yaml(corpora, tmp_path_factory) -> Path:
    """The configuration under the stages."""
    domains = [{"name": n, "data": [str(corpora / f"{n}.jsonl")], "experts": e} for n, e in EXPERTS.items()]
    values = {
        **SMALL_RUN,
        "domains": domains,
        "schedule": {"kind": "cosine", "warmup_steps": 1},
        "train": {"steps": 1, "batch_size": 4},
        "evaluate": {"batches": 4, "batch_size": 4},
    }
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def stages_yaml(base_yaml, tmp_path) -> Callable[..., Path]:
    """Writes a file of stages over the base, with run.dir `tmp_path/run`; keys given replace the plain ones."""

    def write(**changes) -> Path:
        return write_stages(tmp_path, base_yaml, **changes)

    return write


@pytest.fixture(scope="session")
def finished_stages(base_yaml, tmp_path_factory) -> Path:
    """The folder of a whole measurement, `run` beside its `stages.yaml`; treat it as read-only."""
    folder = tmp_path_factory.mktemp("lifelong")
    done = training_process.command("lifelong", write_stages(folder, base_yaml), cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout, encoding="utf-8")
    return folder / "run"


def write_stages(folder: Path, base_yaml: Path, **changes) -> Path:
    values = {
        "schema_version": 2,
        "base": str(base_yaml),
        "changes": [f"run.dir={folder / 'run'}"],
        "stages": STAGES,
        **changes,
    }
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return path
