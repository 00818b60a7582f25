"""Reader of untrusted JSON, the only one: whatever a file, a line or a header holds, it returns or says what is wrong.

Bytes, depth and number of values are bounded before anything is built of them, so that no text takes more time or
memory than its size allows. Python's own reader accepts what JSON does not have or what other code stumbles over later:
a key written twice (the last one wins silently), NaN and Infinity, numbers beyond 64 bits, half a surrogate pair.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu_sigma.regular_file import read_at_most


class UnreadableText(ValueError):
    """A text that is no JSON or YAML, or none that is read here; `problem` completes
    "it is …", `line` (from 1) says where, if known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem if line is None else f"line {line}: {problem}")
        self.problem, self.line = problem, line

    def at(self, source: object) -> str:
        """How a sentence about it begins: the source with the line, and the problem."""
        return f"{source}{'' if self.line is None else f', line {self.line}'}: {self.problem}"


@dataclass(frozen=True)
class JsonLimits:
    """Most bytes, values (members of objects and lists, nested ones too) and levels of nesting of a text, and bits of a
    whole number."""

    bytes: int
    values: int
    depth: int = 64
    bits: int = 64


SMALL = JsonLimits(16 << 20, 1_000_000)  # configurations, results, lines
LARGE = JsonLimits(128 << 20, 8_000_000)  # headers, manifests, vocabularies: 10 values a tensor, 2 a piece
STATE = JsonLimits(128 << 20, 8_000_000, bits=128)  # of a run: generators of random numbers count in 128 bits
_TEXT = re.compile(r'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)  # one that is not closed too: nothing is looked at twice
_NO_BRACKET = re.compile(r"[^\[\]{}]++")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DIGITS = 20  # of a number, in a sentence


def decoded(data: bytes, most: int) -> str:
    """UTF-8 text without its byte order mark. Raises UnreadableText, also for more than `most` bytes."""
    if len(data) > most:
        raise UnreadableText(f"larger than {most} bytes, which no such file needs")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableText(f"not UTF-8 text (at byte {error.start})", line) from None


def parse_json(text: bytes | str, limits: JsonLimits = SMALL, lenient: bool = False) -> Any:
    """The value of a JSON text: objects, lists, texts, numbers, true, false and None. Raises UnreadableText.

    lenient: a line of somebody's corpus, of which we need a few fields: NaN and Infinity, which many programs write,
    half surrogate pairs and numbers of any size (as floats) may stand in it.
    """
    if isinstance(text, bytes):
        text = decoded(text, limits.bytes)
    elif len(text) > limits.bytes:
        raise UnreadableText(f"larger than {limits.bytes} characters, which no such text needs")
    text = text.removeprefix("\ufeff")
    _check_size(text, limits)
    try:
        value = _decoder(limits.bits, lenient).decode(text)
    except json.JSONDecodeError as error:
        line = error.lineno if "\n" in text.strip() else None
        raise UnreadableText(f"not valid JSON ({error.msg} at column {error.colno})", line) from None
    if not lenient and _SURROGATE.search(text):
        _refuse_half_pairs(value)
    return value


def parse_object(text: bytes | str, limits: JsonLimits = SMALL, lenient: bool = False) -> dict[str, Any]:
    """`parse_json` of a text that must hold an object. Raises UnreadableText."""
    value = parse_json(text, limits, lenient)
    if not isinstance(value, dict):
        raise UnreadableText("no JSON object")
    return value


def read_object(path: Path, limits: JsonLimits = SMALL) -> dict[str, Any]:
    """The object that a JSON file holds. Raises UnreadableText, and OSError as the file system does."""
    return parse_object(read_at_most(path, limits.bytes), limits)


def _check_size(text: str, limits: JsonLimits) -> None:
    """Raises UnreadableText for a text with too many values or levels; what stands inside strings does not count."""

    def count(structure: str) -> tuple[int, int]:
        opened = structure.count("[") + structure.count("{")
        return opened, 1 + opened + structure.count(",")

    opened, values = count(text)  # at most so many: enough to know for nearly all texts
    if opened <= limits.depth and values <= limits.values:
        return
    structure = _TEXT.sub("", text)
    opened, values = count(structure)
    if values > limits.values:
        raise UnreadableText(f"larger than {limits.values:,} values, which no such text needs")
    depth = 0
    for bracket in _NO_BRACKET.sub("", structure) if opened > limits.depth else "":
        depth += 1 if bracket in "[{" else -1
        if depth > limits.depth:
            raise UnreadableText(f"nested more than {limits.depth} levels deep, which no such text needs")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise UnreadableText(f"not valid JSON (the key {_shown(twice)} is written twice)")
    return mapping


def _decoder(bits: int, lenient: bool) -> json.JSONDecoder:
    longest = len(str(1 << bits))

    def whole(digits: str) -> int:
        if len(digits) <= longest and -(1 << bits - 1) <= (value := int(digits)) < 1 << bits:
            return value
        raise UnreadableText(f"not valid JSON here (the number {digits[:_DIGITS]}… is beyond {bits} bits)")

    def any_whole(digits: str) -> int | float:
        return int(digits) if len(digits) <= longest else float(digits)

    if lenient:
        return json.JSONDecoder(object_pairs_hook=_object, parse_int=any_whole)
    return json.JSONDecoder(object_pairs_hook=_object, parse_int=whole, parse_float=_float, parse_constant=_no_number)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise UnreadableText(f"not valid JSON here (the number {digits[:_DIGITS]} is too large)")
    return value


def _no_number(name: str) -> float:
    raise UnreadableText(f"not valid JSON ({name} is none of its numbers)")


def _refuse_half_pairs(value: Any) -> None:
    for text in _texts(value):
        if has_half_pair(text):
            raise UnreadableText(f"not valid JSON (the text {_shown(text)} holds half a surrogate pair)")


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def has_half_pair(text: str) -> bool:
    r"""Python strings may hold surrogate code points (JSON's ``\ud800``); UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _shown(text: str) -> str:
    return ascii(text[:60])
