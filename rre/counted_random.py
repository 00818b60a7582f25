"""Counter-based random numbers: every draw is a function of what it is for, so no generator state has to be restored.

A draw depends on (seed, purpose, step, sample, layer, …) alone; it survives a resume and does not change with the
number of processes that share a batch. Whatever decides which text is read or which mask is used comes from integer
hashing, which is the same everywhere and for ever (NumPy promises no stable streams between its versions); the mixer is
SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np


def mix64(values: np.ndarray) -> np.ndarray:
    """Scatter 64-bit integers: a bijection of uint64, any shape in, the same shape out."""
    x = np.atleast_1d(values).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key64(*parts: int | str) -> int:
    """One 64-bit key from a tuple of integers and names, e.g. ``key64(seed, "order", domain, epoch)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def bits64(key: int, counters: np.ndarray) -> np.ndarray:
    """Uniform uint64 for every counter [N]: the stream ``key`` at the positions ``counters``."""
    steps = np.asarray(counters, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix64(steps + np.uint64(key))


def uniform(key: int, counters: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) for every counter [N]."""
    return (bits64(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, size: int) -> np.ndarray:
    """A permutation of ``range(size)`` (int64 [size]) that depends on nothing but ``key`` and ``size``."""
    return np.argsort(bits64(key, np.arange(size)), kind="stable").astype(np.int64)


def sample_keys(seed: int, purpose: str, step: int, samples: np.ndarray) -> np.ndarray:
    """One int32 key per global sample number [B], for draws made inside the compiled graph."""
    return (bits64(key64(seed, purpose, step), samples) >> np.uint64(32)).astype(np.uint32).view(np.int32)


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """NumPy's generator for one purpose and any counters: for draws whose result is stored, such as initial weights."""
    return np.random.Generator(np.random.Philox(key=key64(seed, purpose, *counters)))


def normal(
    draws: np.random.Generator, shape: tuple[int, ...], std: float, cutoff: float | None = None
) -> np.ndarray:
    """Normal(0, std) float32 of `shape`; values beyond `cutoff` standard deviations are drawn again until none is."""
    values = draws.standard_normal(shape, np.float32)
    if cutoff is not None:
        flat = values.reshape(-1)
        beyond = np.flatnonzero(np.abs(flat) > cutoff)
        while beyond.size:
            flat[beyond] = draws.standard_normal(beyond.size, np.float32)
            beyond = beyond[np.abs(flat[beyond]) > cutoff]
    return values * np.float32(std)
