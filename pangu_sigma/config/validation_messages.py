"""Error messages of a configuration: one sentence a problem, with the key, what was written and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from pangu_sigma.config.key_descriptions import allowed_at, field_at, keys, meaning, section_at
from pangu_sigma.config.schema import Config
from pangu_sigma.config.schema_versions import SCHEMA_VERSION, changed_name
from pangu_sigma.config.section import TOO_LARGE, Section
from pangu_sigma.wording import nearest, shown


class Problem(NamedTuple):
    """One thing that is wrong: the key path it belongs to and a sentence without its source."""

    key: str
    sentence: str


def problems_of(error: ValidationError, root: type[Section] = Config) -> list[Problem]:
    """All problems of a failed validation of `root`, in the schema's order, but unknown keys first:
    what is missing may only be misspelt."""
    items = error.errors(include_url=False)
    paths = [tuple(item["loc"]) for item in items]
    result: list[tuple[bool, Problem]] = []
    for item, path in zip(items, paths, strict=True):
        # A list with a wrong item is also reported as too short: only the innermost path is the user's mistake.
        if any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            continue
        # The sizes that a preset would have filled in are missing only because its name is wrong.
        if item["type"] == "missing" and (*path[:-1], "preset") in paths:
            continue
        result.append((item["type"] != "extra_forbidden", _problem(item, path, root)))
    return [problem for _, problem in sorted(result, key=lambda found: found[0])]


def _problem(item: Any, path: tuple[str | int, ...], root: type[Section]) -> Problem:
    key = dotted(path)
    if item["type"] == "missing":
        field = field_at(path, root)
        meant = f" ({meaning(field)})" if field is not None else ""
        return Problem(key, f"{key} is missing: set it to {allowed_at(path, root)}{meant}")
    if item["type"] == "extra_forbidden":
        return Problem(key, unknown_key(path, root))
    allowed = item["msg"] if item["type"] == TOO_LARGE else allowed_at(path, root)
    sentence = f"{key} = {shown(item['input'])} is not allowed: it must be {allowed}"
    if item["type"] == "literal_error":
        near = nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        sentence += f"; did you mean '{near}'?" if near else ""
    return Problem(key, sentence)


def unknown_key(path: Sequence[str | int], root: type[Section] = Config) -> str:
    """A sentence for a key that the schema does not have; names the nearest one that it has."""
    *parents, wrong = path
    new_name = changed_name(dotted(path)) if root is Config else None
    if new_name is not None:
        return f"{dotted(path)} is not a known key: it is {new_name} since schema_version {SCHEMA_VERSION}"
    section = section_at(parents, root)
    known = list(section.model_fields) if section is not None else []
    prefix = dotted(parents) + "." if parents else ""
    slip = nearest(str(wrong), known)
    near = [prefix + name for name in ([slip] if slip else known) if slip or _initials(name) == wrong]
    near += [key.path for key in keys(root) if key.path.rsplit(".", 1)[-1] == wrong]
    sentence = f"{dotted(path)} is not a known key: "
    if near:
        return f"{sentence}the nearest known key is {near[0]}"
    return f"{sentence}{dotted(parents)} has {', '.join(known)}" if known else f"{sentence}leave it out"


def _initials(name: str) -> str:
    """`lr` of `learning_rate`: the short form that many other systems use as the key."""
    return "".join(word[0] for word in name.split("_"))


def dotted(path: Sequence[str | int]) -> str:
    """A key path as it is written in overrides: `domains.0.experts`."""
    return ".".join(str(step) for step in path) or "the configuration"
