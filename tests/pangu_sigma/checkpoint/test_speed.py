"""A save costs about what hashing and writing its bytes costs, and next to nothing for what did not change."""

import hashlib
import os
import time
from statistics import median

import numpy as np
import pytest

from pangu_sigma.checkpoint.verified_files import VerifiedFiles

MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> dict[str, np.ndarray]:
    """200 MB in 25 tensors."""
    draw = np.random.default_rng(0)
    return {f"blocks.{i}.feed_forward.up.weight": draw.random(2 * MIB, dtype=np.float32) for i in range(25)}


def hash_and_write(path, tensors) -> float:
    """Seconds to hash every byte, then write it and sync it."""
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for array in tensors.values():
            hashlib.sha256(array.data).digest()
            file.write(array.data)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def test_a_save_costs_about_what_hashing_and_writing_costs(tmp_path, save, model):
    plain, saved = [], []
    for attempt in range(3):
        plain.append(hash_and_write(tmp_path / f"plain-{attempt}", model))
        started = time.perf_counter()
        save(tmp_path / str(attempt), 1, model, groups={})
        saved.append(time.perf_counter() - started)
    # the best of three each: other programs may use the disk and the cores meanwhile
    assert median(saved) < 1.6 * median(plain) + 0.2, f"saved in {saved} s, hashed and written in {plain} s"


def test_an_unchanged_model_costs_its_hash(tmp_path, save, model):
    run = {"groups": {}, "verified": VerifiedFiles()}
    save(tmp_path, 1, model, **run)
    hashed, saved = [], []
    for step in (2, 3, 4):
        started = time.perf_counter()
        for array in model.values():
            hashlib.sha256(array.data).digest()
        hashed.append(time.perf_counter() - started)
        started = time.perf_counter()
        result = save(tmp_path, step, model, **run)
        saved.append(time.perf_counter() - started)
        assert result.bytes_linked > 200 * MIB and result.bytes_written < 1000
    assert median(saved) < 1.2 * median(hashed) + 0.2, f"saved in {saved} s, hashed in {hashed} s"
