"""Randomness that is counted, not kept: every draw is a function of what it is for, so nothing has to be restored.

A draw depends on (seed, purpose, step, sample, layer) alone; it survives a resume and does not change with the number
of processes that share a batch.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return NumPy's Philox generator for one purpose and up to four counters (step, sample, layer, …).

    Equal arguments give equal streams on every machine; any other argument gives an independent one.
    """
    words = hashlib.sha256(repr((seed, purpose, counters)).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(words, dtype="<u8")))


def sample_keys(seed: int, purpose: str, step: int, samples: np.ndarray) -> np.ndarray:
    """Return one int32 key [B] per global sample number, for draws made inside the compiled graph."""
    return np.array(
        [generator(seed, purpose, step, int(n)).integers(-(2**31), 2**31, dtype=np.int64) for n in samples],
        dtype=np.int64,
    ).astype(np.int32)
