"""Reference of every key of the schema: allowed values, default and meaning, for errors and `config --describe`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Section

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_PATTERN_TEXT = "of small letters, digits, '_' and '-', starting with a letter or digit, at most 64 long"


class KeyDescription(NamedTuple):
    """One key of the schema; `[]` in the path stands for an item of a list."""

    path: str
    allowed: str
    default: str
    description: str


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[KeyDescription]:
    """Every key that holds a value, in the schema's order."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner, is_list = _inner_section(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{path}[]." if is_list else f"{path}.")
        else:
            yield KeyDescription(path, allowed(field), _default(field), field.description or "")


def allowed(field: FieldInfo) -> str:
    """What a field accepts, in words: "a whole number of at least 1, or null"."""
    return _allowed(field.annotation, field.metadata)


def field_at(path: Sequence[str | int], root: type[Section] = Config) -> FieldInfo | None:
    """The field of `root` at a key path, or None where it leads to no field of its own (an item, a mapping's key)."""
    section: type[Section] | None = root
    field: FieldInfo | None = None
    for step in path:
        if isinstance(step, int):
            continue
        if section is None or step not in section.model_fields:
            return None
        field = section.model_fields[step]
        section, _ = _inner_section(field.annotation)
    return None if path and isinstance(path[-1], int) else field


def section_at(path: Sequence[str | int], root: type[Section] = Config) -> type[Section] | None:
    """The section of `root` that a key path leads to, or None."""
    section: type[Section] | None = root
    for step in path:
        if isinstance(step, int):
            continue
        if section is None or step not in section.model_fields:
            return None
        section, _ = _inner_section(section.model_fields[step].annotation)
    return section


def allowed_at(path: Sequence[str | int], root: type[Section] = Config) -> str:
    """What is allowed at a key path of `root`; also for items of lists and values of mappings."""
    field = field_at(path, root)
    if field is not None:
        return allowed(field)
    inside = path[-1] if path else None
    parent = field_at(path[:-1], root) if path else None
    if parent is None:
        return "a value of the schema"
    annotation = _without_null(parent.annotation)
    arguments = get_args(annotation)
    if isinstance(inside, int) and get_origin(annotation) is tuple:
        return _allowed(arguments[0], [])
    return _allowed(arguments[-1], []) if arguments else "a value of the schema"


def _without_null(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [argument for argument in get_args(annotation) if argument is not type(None)]
        return _without_null(rest[0])
    if hasattr(annotation, "__metadata__"):
        return _without_null(get_args(annotation)[0])
    return annotation


def _inner_section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section inside an annotation and whether it is an item of a list."""
    bare = _without_null(annotation)
    if get_origin(bare) is tuple:
        inner, _ = _inner_section(get_args(bare)[0])
        return inner, True
    return (bare, False) if isinstance(bare, type) and issubclass(bare, Section) else (None, False)


def _allowed(annotation: Any, metadata: Sequence[Any]) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        first, *_ = (argument for argument in get_args(annotation) if argument is not type(None))
        return f"{_allowed(first, metadata)}, or null"
    if hasattr(annotation, "__metadata__"):
        inner, *extra = get_args(annotation)
        return _allowed(inner, [*metadata, *extra])
    if get_origin(annotation) is Literal:
        choices = [json.dumps(choice).strip('"') for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if get_origin(annotation) is tuple:
        at_least = " of at least one item" if _bound(metadata, "min_length") else ""
        return f"a list{at_least}, each {_allowed(get_args(annotation)[0], [])}"
    if get_origin(annotation) is dict:
        return f"a mapping, each value {_allowed(get_args(annotation)[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a mapping with the keys {', '.join(annotation.model_fields)}"
    return _PLAIN.get(annotation, "a value") + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    low, above = _bound(metadata, "ge"), _bound(metadata, "gt")
    high, below = _bound(metadata, "le"), _bound(metadata, "lt")
    parts = []
    if low is not None:
        parts.append(f"of at least {low}")
    if above is not None:
        parts.append(f"greater than {above}")
    if high is not None:
        parts.append(f"at most {high}")
    if below is not None:
        parts.append(f"less than {below}")
    if _bound(metadata, "pattern") is not None:
        parts.append(_PATTERN_TEXT)
    elif _bound(metadata, "min_length") is not None:
        parts.append("that is not empty")
    return (" " + " and ".join(parts)) if parts else ""


def _bound(metadata: Sequence[Any], name: str) -> Any:
    for item in metadata:
        value = getattr(item, name, None)
        if value is not None:
            return value
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return json.dumps(list(value) if isinstance(value, tuple) else value).strip('"')
