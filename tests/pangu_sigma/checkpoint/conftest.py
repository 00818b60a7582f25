"""A small model's tensors, and saving them with everything else a checkpoint holds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, SaveResult, save_checkpoint
from pangu_sigma.checkpoint.manifest import sign

LAYERS = ("blocks.2", "query_layer")
GROUPS = {"code": 4, "law": 2}
HOW = ("keep", "max_shard_bytes", "progress", "verified", "read_everything")
EXPERT = {"up.weight": (8, 16), "up.bias": (16,), "down.weight": (16, 8), "down.bias": (8,)}


def make_tensors(seed: int = 0, groups: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Shared tensors, two domains' experts and tables, and optimizer state, filled by `seed`."""
    draw = np.random.default_rng(seed)
    tensors = {
        "embedding.word": draw.random((50, 8), dtype=np.float32),
        "blocks.0.norm1.gamma": draw.random(8, dtype=np.float32),
        "optimizer.m.embedding.word": draw.random((50, 8), dtype=np.float32),
        "optimizer.v.embedding.word": draw.random((50, 8), dtype=np.float32),
    }
    for domain, experts in (GROUPS if groups is None else groups).items():
        for layer in LAYERS:
            for name, shape in EXPERT.items():
                tensor = f"{layer}.experts.{name}"
                tensors[f"domains.{domain}.{tensor}"] = draw.random((experts, *shape), dtype=np.float32)
                for moment in "mv":
                    array = draw.random((experts, *shape), dtype=np.float32)
                    tensors[f"domains.{domain}.optimizer.{moment}.{tensor}"] = array
            tensors[f"domains.{domain}.{layer}.routing"] = draw.integers(0, experts, 50, dtype=np.int32)
            tensors[f"domains.{domain}.optimizer.steps.{layer}"] = draw.integers(0, 99, experts, dtype=np.int64)
    return tensors


def save_small(run: Path, step: int, tensors: dict[str, np.ndarray], **changes) -> SaveResult:
    """Saves `tensors` with two domains, or with what `changes` says instead."""
    groups = changes.pop("groups", GROUPS)
    how = {"keep": 3} | {name: changes.pop(name) for name in HOW if name in changes}
    contents = {
        "step": step,
        "domains": list(groups),
        "coverage": {layer: dict(groups) for layer in LAYERS},
        "config_text": "schema_version: 2\n",
        "tokenizer_files": {"tokenizer.model": b"\x00\x01pieces"},
        "probe": {domain: np.arange(18, dtype=np.int32).reshape(2, 9) for domain in groups},
        "state": {"step": step, "cursors": {"code": [3, 2**90]}, "loss_scale": {"value": 65536.0, "clean": 3}},
        "fingerprints": Fingerprints(tokenizer="t1", corpora={domain: f"{domain}-1" for domain in groups}),
    }
    return save_checkpoint(run, CheckpointContents(**{**contents, **changes}), tensors, **how)


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Edits a manifest as someone would who also computes its hash anew."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_bytes(sign(json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n"))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return make_tensors()


@pytest.fixture
def make():
    return make_tensors


@pytest.fixture
def save():
    return save_small


@pytest.fixture
def edit_manifest():
    return change_manifest


@pytest.fixture
def folder(tmp_path, tensors) -> Path:
    """A saved checkpoint's folder."""
    return save_small(tmp_path, 7, tensors).path
