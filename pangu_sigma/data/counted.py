"""Counted randomness: every draw is a hash of where it is used, so nothing has to be kept to repeat it.

NumPy promises no stable streams between its versions; integer hashing is the same everywhere and for ever. The mixer is
SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

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
