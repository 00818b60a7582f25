"""The finished run's domains changed, and models that are told apart byte for byte."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def medicine(tmp_path_factory) -> Path:
    """Text of a domain that the run does not have."""
    path = tmp_path_factory.mktemp("medicine") / "medicine.jsonl"
    words = ["patient", "doctor", "heart", "blood", "nurse", "pain", "dose", "drug", "cure", "fever", "lung"]
    draw = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(80):
            file.write(json.dumps({"text": " ".join(draw.choice(words) for _ in range(draw.randrange(20, 60)))}) + "\n")
    return path


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder by its relative path with the sha256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensor_digests(checkpoint) -> dict[str, str]:
    """Every tensor but the probe with the sha256 of its bytes, moments and step counts included."""
    return {name: checkpoint.manifest.tensors[name].slices[0].sha256 for name in checkpoint.names()}
