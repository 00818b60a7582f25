"""How names and values read in sentences: as they are written in YAML and JSON, and in the order that people expect."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value as it could be written in YAML or JSON (`null`, `true`), shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def bare(value: Any) -> str:
    """A value as in `shown`, but a text without quotation marks: in `model.activation = relu`."""
    return value if isinstance(value, str) else shown(value)


def natural_order(name: str) -> list[Any]:
    """Sorting key of names with numbers in them: shard 9 comes before shard 10."""
    parts = re.split(r"(\d+)", name)
    # By length first, as digits that are no number of Python's may be there, and very many of them.
    return [(len(part.lstrip("0")), part.lstrip("0")) if index % 2 else part for index, part in enumerate(parts)]


def listed(names: Collection[str], most: int = 12) -> str:
    """The names in natural order, shortened to `most` of them with how many there are more."""
    ordered = sorted(names, key=natural_order)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a slip of; None where it resembles none.

    A slip is a letter too many, too few, wrong or swapped with the next one, one in four letters at most and none in a
    name of two; or `name` has the words of the other and more (`batch_size` of `batch`), or some of them.
    """
    typed = name[:200].lower()
    near: list[tuple[int, int, str]] = []
    for order, other in enumerate(known):
        slips, length = _slips(typed, other.lower()), max(len(typed), len(other))
        if slips <= (max(1, length // 4) if length > 2 else 0) or _shares_words(typed, other.lower()):
            near.append((slips, order, other))
    return min(near)[2] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that an unknown one resembles, as a question; the first ten of all where it resembles none."""
    names = list(known)
    near = nearest(name, names)
    if near is not None:
        return f"did you mean '{near}'?"
    return f"choose one of {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"


def _shares_words(one: str, other: str) -> bool:
    words, others = (set(re.findall(r"[^\W_]+", text)) for text in (one, other))
    return bool(words and others) and (words <= others or others <= words)


def _slips(one: str, other: str) -> int:
    """Letters to insert, delete, replace or swap with the next until `one` is `other` (optimal string alignment)."""
    before, row = [0], list(range(len(other) + 1))
    for i, letter in enumerate(one):
        older, before, row = before, row, [i + 1]
        for j, wanted in enumerate(other):
            row.append(min(before[j] + (letter != wanted), before[j + 1] + 1, row[j] + 1))
            if i and j and letter == other[j - 1] and one[i - 1] == wanted:
                row[-1] = min(row[-1], older[j - 1] + 1)
    return row[-1]
