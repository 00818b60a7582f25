"""The smallest configuration, as a file and as a loader with changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pangu_sigma.config import Config, load_config

SMALLEST = """\
schema_version: 2
run: {dir: runs/small}
model: {preset: tiny, sparse: {layers: 0}}
domains:
  - {name: code, data: [code.jsonl]}
  - {name: docs, data: [docs.jsonl], experts: 2, weight: 3}
optimizer: {learning_rate: 1e-3}
train: {steps: 10, batch_size: 4}
"""


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


@pytest.fixture
def small(small_file: Path) -> Callable[..., Config]:
    """Loads the smallest configuration with the given overrides."""
    return lambda *overrides: load_config(small_file, overrides)
