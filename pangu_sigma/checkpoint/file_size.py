"""File sizes as people write them."""

from __future__ import annotations

import re

from pangu_sigma.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of `500MB`, `4GiB`, `1000000`, the largest size of a file. Raises UserError."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(text).strip().upper())
    size = 0
    if parts is not None and not (parts[3] and not parts[2]):
        size = int(float(parts[1]) * (_BINARY if parts[3] else _UNITS)[parts[2]])
    if size < 1:
        raise UserError(f"max_shard_size {text} is no size: write it like 500MB, 4GiB or 1000000")
    return size
