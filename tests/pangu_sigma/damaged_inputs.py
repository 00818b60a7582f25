"""Damaged and hostile variants of a real file's bytes: cut, flipped, spliced, and JSON with a value that is no such."""

from __future__ import annotations

import json
import random
from typing import Any

# What stands in the place of a value of JSON.
_VALUES = (
    None, True, "", "x", "\ud800", "\x00", "../../x", -1, 0, 1.5, 2**31, 2**63, 2**64, 10**30, -(2**63), 1e300,
    float("nan"), float("inf"), [], {}, [[]], {"": {}}, [1, "a"], [-1, 2**62], "9" * 400, "a" * 5000, [0] * 40,
    ["a", None],
)  # fmt: skip
# What is put into bytes anywhere.
_PIECES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b'"', b"}", b"]", b"[" * 200, b'{"a":' * 200, b"\n", b": ", b"- ",
    b"&a [*a]", b"!!bool x", b"!!timestamp x", b"!!python/object:os.system x", b"<<: *b\n", b"*a", b"1e999", b"NaN",
    b"9" * 500, b"\t", b"? [a]\n: b\n", b"%TAG ! x\n", b"--- \n", b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x7f",
    b"\x0a\xff\xff\xff\x0f",
)  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One variant of `content`; of a JSON object every other one is well-formed, with values that do not belong."""
    if content[:1] == b"{" and draw.random() < 0.5:
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if value is not None:
            for _ in range(draw.randint(1, 2)):
                value = _with_another_value(value, draw)
            return json.dumps(value).encode()
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + draw.choice((1, 2, 8, 100, len(data)))]
        elif kind == 3:
            data[at:at] = draw.choice(_PIECES)
        elif kind == 4:
            begin = draw.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + draw.choice((1, 10, 200))]
        else:
            end = at + draw.choice((1, 4, 20))
            data[at:end] = draw.choice(_PIECES)
    return bytes(data)


def _with_another_value(value: Any, draw: random.Random) -> Any:
    """`value` with one value somewhere in it replaced, left out or added."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.1:
        return draw.choice(_VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    changed = value.copy()
    kind = draw.random()
    if kind < 0.1:
        del changed[key]
    elif kind < 0.15 and isinstance(value, dict):
        changed[draw.choice(("", "x", "__metadata__", "\ud800"))] = draw.choice(_VALUES)
    else:
        changed[key] = _with_another_value(value[key], draw)
    return changed
